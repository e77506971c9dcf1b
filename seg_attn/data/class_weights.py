"""Class frequencies of a data set, counted once and kept, and the loss weights that follow from them.

`effective_number`: Cui et al. 2019, arXiv 1901.05555, eq. 2: E_n = (1 - β^n) / (1 - β), weight ∝ 1 / E_n. Differs from
the paper in what n counts: the images that hold a class, since with pixels β^n vanishes and all weights would be equal.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seg_attn.data.images import VOID, UInt8Array, write_bytes

SCHEMES = ("inverse_frequency", "effective_number")
"""Names of the ways to weigh classes."""


@dataclass(frozen=True)
class ClassCounts:
    """How often each class occurs.

    Attributes:
        pixels: Pixels per class.
        images: Images that hold the class.
        ignored: Pixels without a class.
    """

    pixels: list[int]
    images: list[int]
    ignored: int


def count_classes(masks: Iterable[UInt8Array], num_classes: int) -> ClassCounts:
    """Count over masks (H, W) of class indices and 255."""
    pixels = np.zeros(256, dtype=np.int64)
    images = np.zeros(256, dtype=np.int64)
    for mask in masks:
        here = histogram(mask)
        pixels += here
        images += here > 0
    return ClassCounts(pixels[:num_classes].tolist(), images[:num_classes].tolist(), int(pixels[VOID]))


def cached_counts(
    paths: Sequence[Path], read: Callable[[Path], UInt8Array], num_classes: int, *, settings: str = ""
) -> ClassCounts:
    """Count the classes of mask files, or return what was counted before for the same files.

    The result is kept in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`) under a key made of the files'
    paths, sizes and times and of `settings`; where that folder cannot be written, nothing is kept.

    Args:
        paths: Mask files.
        read: Reads one as class indices and 255.
        num_classes: Number of classes.
        settings: Whatever else decides what `read` returns.

    Raises:
        InputError: A mask is missing, broken or mislabelled.
    """
    key = hashlib.sha256(f"{num_classes}\n{settings}\n".encode())
    for path in paths:
        if path.is_file():  # a missing one is reported by `read`
            state = path.stat()
            key.update(f"{path.resolve()}\t{state.st_size}\t{state.st_mtime_ns}\n".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seg_attn"
    kept = folder / f"class_counts-{key.hexdigest()[:32]}.json"
    try:
        return ClassCounts(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        counts = count_classes((read(path) for path in paths), num_classes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, json.dumps(counts.__dict__).encode())
    except OSError:
        pass  # a convenience, not a result
    return counts


def class_weights(counts: ClassCounts, scheme: str, beta: float = 0.999) -> list[float]:
    """One loss weight per class, with mean 1 over the classes that occur; a class that does not occur gets 1.

    Args:
        counts: From `count_classes`.
        scheme: "inverse_frequency" (∝ 1 / pixels) or "effective_number".
        beta: β of the effective number, in [0, 1); at 0 all weights are 1, towards 1 they become 1 / images.

    Raises:
        ValueError: An unknown scheme, or `beta` out of range.

    Examples:
        >>> class_weights(ClassCounts([300, 100, 0], [3, 1, 0], 0), "inverse_frequency")
        [0.5, 1.5, 1.0]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    number = np.array(counts.pixels if scheme == "inverse_frequency" else counts.images, dtype=np.float64)
    occurs = number > 0
    if scheme == "effective_number":
        number = (1 - beta**number) / (1 - beta)
    weights = np.ones(len(number))
    if occurs.any():
        weights[occurs] = 1 / number[occurs]
        weights[occurs] /= weights[occurs].mean()
    return [float(weight) for weight in weights]


def histogram(mask: UInt8Array) -> NDArray[np.int64]:
    """Pixels per value of a uint8 mask: int64 (256,)."""
    return np.bincount(mask.ravel(), minlength=256)
