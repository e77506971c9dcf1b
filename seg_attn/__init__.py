"""DeepLabv3 semantic segmentation: live output stride, attention-fused skips, plug-in attention blocks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg_attn.data import MaskFolderDataModule, SampleDataModule, VOCDataModule
    from seg_attn.models.deeplabv3 import DeepLabV3
    from seg_attn.models.importing import import_weights
    from seg_attn.predict import Predictor
    from seg_attn.task import SegmentationTask

_HOME = {
    "DeepLabV3": "seg_attn.models.deeplabv3",
    "MaskFolderDataModule": "seg_attn.data",
    "Predictor": "seg_attn.predict",
    "SampleDataModule": "seg_attn.data",
    "SegmentationTask": "seg_attn.task",
    "VOCDataModule": "seg_attn.data",
    "import_weights": "seg_attn.models.importing",
}

__all__ = [
    "DeepLabV3",
    "MaskFolderDataModule",
    "Predictor",
    "SampleDataModule",
    "SegmentationTask",
    "VOCDataModule",
    "import_weights",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import seg_attn` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
