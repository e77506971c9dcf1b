"""How fast training samples are made: this package against torchvision's v2 transforms and albumentations' own.

All three do the same work on the same files, one thread each, in turns in one process: decode JPEG and mask PNG, scale
by a factor uniform in [0.5, 2], pad, crop, flip, jitter brightness, contrast, saturation and hue, normalise to tensors.
Each takes the fastest way that its library brings and that gives the same statistics of scale, position and labels.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from seg_attn.data.dataset import SegmentationDataset
from seg_attn.data.images import VOID, voc_palette, write_mask
from seg_attn.data.labels import LabelReader
from seg_attn.data.mask_folder import folder_listing
from seg_attn.data.transforms import train_transform
from seg_attn.data.voc import Pair
from seg_attn.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
SCALE = (0.5, 2.0)
JITTER = (0.2, 0.2, 0.2, 0.05)

Maker = Callable[[int], Any]


class RandomScale(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's resize by one random factor for image and mask; v2 has none that scales the image itself."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw a factor."""
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = float(torch.empty(()).uniform_(*SCALE))
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize, antialiased where it shrinks, nearest for the mask."""
        return self._call_kernel(v2.functional.resize, inpt, size=params["size"], antialias=True)


def ours(pairs: Sequence[Pair], crop: int) -> Maker:
    """Samples of `SegmentationDataset`, as a data module makes them."""
    transform = train_transform((crop, crop), mean=MEAN, scale=SCALE, color_jitter=JITTER)
    return SegmentationDataset(pairs, LabelReader(254), mean=MEAN, std=STD, transform=transform).__getitem__


def plain_albumentations(pairs: Sequence[Pair], crop: int) -> Maker:
    """The chain that albumentations' documentation suggests, with labels exact, on images that OpenCV reads."""
    transform = A.Compose(
        [
            A.RandomScale((SCALE[0] - 1, SCALE[1] - 1), mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1),
            A.PadIfNeeded(crop, crop, position="random", border_mode=cv2.BORDER_CONSTANT, fill=FILL, fill_mask=VOID),
            A.RandomCrop(crop, crop),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(*((1 - value, 1 + value) for value in JITTER[:3]), hue=(-JITTER[3], JITTER[3]), p=1),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )

    def make(index: int) -> Any:
        image = cv2.imread(str(pairs[index].image), cv2.IMREAD_COLOR_RGB)
        with Image.open(str(pairs[index].mask)) as file:
            mask = np.asarray(file)
        sample = transform(image=image, mask=mask)
        return {"image": sample["image"], "mask": sample["mask"].long()}

    return make


def torchvision_v2(pairs: Sequence[Pair], crop: int) -> Maker:
    """Transforms of torchvision on the tensors that its own JPEG decoder gives."""
    fill = {tv_tensors.Image: FILL, tv_tensors.Mask: VOID}
    transform = v2.Compose(
        [
            RandomScale(),
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(0.5),
            v2.ColorJitter(*JITTER),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    decode = _torchvision_decoder()

    def make(index: int) -> Any:
        image = tv_tensors.Image(decode(pairs[index].image))
        with Image.open(str(pairs[index].mask)) as file:
            mask = tv_tensors.Mask(torch.from_numpy(np.array(file)))
        image, mask = transform(image, mask)
        return {"image": image, "mask": mask.long()}

    return make


CHAINS: dict[str, Callable[[Sequence[Pair], int], Maker]] = {
    "seg_attn": ours,
    "albumentations": plain_albumentations,
    "torchvision v2": torchvision_v2,
}


def measure(pairs: Sequence[Pair], crop: int = 513, rounds: int = 7) -> list[dict[str, Any]]:
    """Time the chains in turns, one pass over all pairs per turn, on one thread.

    Args:
        pairs: Images and masks.
        crop: Side of the crop.
        rounds: Timed turns per chain, after one that is not timed.

    Returns:
        A row per chain: `chain`, `images_per_s` (median over the rounds), `ratio` (ours to it: median of the ratios of
        the rounds), `ratio_range` (smallest and largest).
    """
    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        makers = {name: build(pairs, crop) for name, build in CHAINS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for turn in range(rounds + 1):
            for name, make in makers.items():
                began = time.process_time()  # of this process: other work on the machine does not count
                for index in range(len(pairs)):
                    make(index)
                if turn:
                    seconds[name].append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv_threads)
    rows = []
    for name, times in seconds.items():
        ratios = [theirs / own for theirs, own in zip(times, seconds["seg_attn"], strict=True)]
        rows.append(
            {
                "chain": name,
                "images_per_s": len(pairs) / statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def write_scenes(folder: Path, count: int = 32, size: tuple[int, int] = (375, 500)) -> list[Pair]:
    """Write JPEGs and masks as large and as detailed as VOC's (500 x 375, about 90 kB), for want of real ones."""
    rng = np.random.default_rng(0)
    height, width = size
    pairs = []
    for number in range(count):
        coarse = rng.uniform(0, 255, (12, 16, 3)).astype(np.float32)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        image += cv2.resize(rng.normal(0, 22, (height // 2, width // 2, 3)).astype(np.float32), (width, height))
        labels = cv2.resize(
            rng.integers(0, 21, (5, 6), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
        )
        labels[:: height // 9] = VOID
        pair = Pair(folder / f"{number}.jpg", folder / f"{number}.png")
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(pair.image, quality=92)
        write_mask(folder / f"{number}.png", labels, voc_palette())
        pairs.append(pair)
    return pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark data`."""
    parser.add_argument(
        "--root", type=Path, help="folder of JPEGs and index masks (as train + trainannot); default: drawn"
    )
    parser.add_argument("--crop_size", type=int, default=513, help="side of the crop (default: 513)")
    parser.add_argument("--images", type=int, default=32, help="number of images (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns per chain (default: 7)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        InputError: There are no images.
    """
    if min(args.crop_size, args.images, args.rounds) < 1:
        raise InputError("--crop_size, --images and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        if args.root is None:
            pairs = write_scenes(Path(scratch), args.images)
        else:
            pairs = folder_listing(args.root, "train").checked()[: args.images]
        rows = measure(pairs, args.crop_size, args.rounds)
    if args.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return 0
    print(f"{len(pairs)} images, crop {args.crop_size}, one thread, median of {args.rounds} rounds in turns")
    print(f"{'chain':<16}{'images/s':>10}{'time, ours = 1':>18}")
    for row in rows:
        low, high = row["ratio_range"]
        print(f"{row['chain']:<16}{row['images_per_s']:>10.0f}{row['ratio']:>10.2f} ({low:.2f}..{high:.2f})")
    return 0


def _torchvision_decoder() -> Callable[[Path], torch.Tensor]:
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
    except ImportError:

        def from_pillow(path: Path) -> torch.Tensor:
            with Image.open(path) as file:
                image: torch.Tensor = v2.functional.pil_to_tensor(file.convert("RGB"))
                return image

        return from_pillow

    def from_torchvision(path: Path) -> torch.Tensor:
        image: torch.Tensor = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        return image

    warnings.filterwarnings(
        "ignore", message="The image decoding and encoding capabilities", category=DeprecationWarning
    )
    return from_torchvision
