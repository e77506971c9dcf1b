"""Small data sets written to disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg_attn.data.images import voc_palette, write_mask


def picture(height, width, seed):
    """A smooth photograph, different for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def labels(height, width, seed, classes=21):
    """Stripes of a few classes with ignored seams."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, classes, 5)[(np.arange(width) * 5 // width)]
    mask[:: max(1, width // 7)] = 255
    return np.repeat(mask[None], height, axis=0).astype(np.uint8)


@pytest.fixture(scope="session")
def make_devkit():
    """Write a VOCdevkit: {split: [(name, height, width), ...]}; returns the root."""

    def make(root: Path, splits, year=2012, classes=21, aug=()):
        folder = root / "VOCdevkit" / f"VOC{year}"
        for sub in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        for split, images in splits.items():
            for number, (name, height, width) in enumerate(images):
                seed = sum(name.encode()) + number
                Image.fromarray(picture(height, width, seed)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
                kind = "SegmentationClassAug" if name in aug else "SegmentationClass"
                if split != "test":
                    write_mask(folder / kind / f"{name}.png", labels(height, width, seed, classes), voc_palette())
            names = "".join(f"{name}\n" for name, _, _ in images)
            (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
        return root

    return make


@pytest.fixture(scope="session")
def voc_root(make_devkit, tmp_path_factory):
    """Seven training and five validation images of three sizes."""
    sizes = [(40, 56), (48, 40), (40, 56), (30, 64), (40, 56), (48, 40), (40, 56)]
    train = [(f"2007_{number:06d}", *size) for number, size in enumerate(sizes)]
    val = [(f"2008_{number:06d}", *size) for number, size in enumerate(sizes[:5])]
    test = [("2009_000001", 33, 44)]
    return make_devkit(tmp_path_factory.mktemp("voc"), {"train": train, "val": val, "test": test})
