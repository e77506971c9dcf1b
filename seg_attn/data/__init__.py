"""Data: decoding, augmentation, data sets and data modules. Names load on first use, so importing costs nothing."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# albumentations asks the network for its newest version when it is imported, unless told not to before.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from seg_attn.data.datamodules import (
        MaskFolderDataModule,
        SampleDataModule,
        SegmentationDataModule,
        VOCDataModule,
    )
    from seg_attn.data.images import image_size, normalize, read_image, read_mask, voc_palette, write_mask
    from seg_attn.data.voc import VOC_CLASSES

_HOME = {
    "MaskFolderDataModule": "datamodules",
    "SampleDataModule": "datamodules",
    "SegmentationDataModule": "datamodules",
    "VOCDataModule": "datamodules",
    "image_size": "images",
    "normalize": "images",
    "read_image": "images",
    "read_mask": "images",
    "voc_palette": "images",
    "write_mask": "images",
    "VOC_CLASSES": "voc",
}

__all__ = [
    "VOC_CLASSES",
    "MaskFolderDataModule",
    "SampleDataModule",
    "SegmentationDataModule",
    "VOCDataModule",
    "image_size",
    "normalize",
    "read_image",
    "read_mask",
    "voc_palette",
    "write_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
