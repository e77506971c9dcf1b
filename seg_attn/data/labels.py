"""From the values stored in a mask file to class indices, checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_attn.data.images import VOID, UInt8Array, read_mask, read_stored_mask
from seg_attn.errors import InputError


class LabelReader:
    """Reads a mask as class indices in [0, num_classes) and 255 for what is ignored, and refuses everything else.

    Args:
        num_classes: Number of classes, 1 to 254.
        ignore: Stored values that mean "no class", besides 255, which always does.
        label_map: Stored value to class index, or to 255; a value that it leaves out stands for itself.
        colors: One RGB triple per class: masks that hold colours are read by it. None refuses such masks.
        ignore_colors: RGB triples that mean "no class".

    Raises:
        ValueError: `num_classes` is out of range, a value lies outside of [0, 255], one is both mapped and ignored, or
            colours are not one per class and all different.
    """

    def __init__(
        self,
        num_classes: int,
        ignore: Sequence[int] = (VOID,),
        label_map: Mapping[int, int] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        ignore_colors: Sequence[Sequence[int]] = (),
    ) -> None:
        if not 1 <= num_classes <= 254:
            raise ValueError(f"num_classes must lie in [1, 254], got {num_classes}")
        mapping = dict(label_map or {})
        for name, values in (("ignore_index", ignore), ("label_map", [*mapping, *mapping.values()])):
            if any(not 0 <= value <= 255 for value in values):
                raise ValueError(f"{name} must hold values in [0, 255], got {sorted(values)}")
        if both := sorted(set(mapping) & set(ignore)):
            raise ValueError(f"label_map and ignore_index must not share values, got {both} in both")
        if bad := sorted({value for value in mapping.values() if value >= num_classes and value != VOID}):
            raise ValueError(f"label_map must map to classes in [0, {num_classes - 1}] or to {VOID}, got {bad}")
        self.num_classes = num_classes
        self.ignore = tuple(sorted({*ignore, VOID} - set(mapping)))
        # One table answers both questions: class + 1, 0 for ignored, num_classes + 1 for what is no class.
        table = np.minimum(np.arange(256), num_classes) + 1
        table[list(self.ignore)] = 0
        for stored, label in mapping.items():
            table[stored] = 0 if label == VOID else label + 1
        self._table = table.astype(np.uint8)
        self._plain = self.ignore == (VOID,) and not mapping
        self._colors: tuple[NDArray[np.int64], UInt8Array] | None = None
        if colors is not None:
            if len(colors) != num_classes:
                raise ValueError(
                    f"colors must hold one RGB triple per class, got {len(colors)} for {num_classes} classes"
                )
            codes = _color_codes(np.array([*colors, *ignore_colors]))
            if len(set(codes.tolist())) != len(codes):
                raise ValueError("colors and ignore_colors must all differ")
            order = np.argsort(codes)
            labels = np.array([*range(num_classes), *[VOID] * len(ignore_colors)])
            self._colors = codes[order], labels[order].astype(np.uint8)

    @property
    def settings(self) -> str:
        """All that decides what a file is read as, in one line."""
        colors = [] if self._colors is None else [self._colors[0].tolist(), self._colors[1].tolist()]
        return f"{self.num_classes} {self._table.tolist()} {colors}"

    def __call__(self, path: Path) -> UInt8Array:
        """Read `path` as uint8 (H, W) of class indices and 255.

        Raises:
            InputError: The file is not a mask, or holds labels that are no class.
        """
        if self._colors is None:
            return self.convert(read_mask(path), path)
        stored = read_stored_mask(path)
        # A palette image is read by its indices even where colours are known.
        return self.convert(stored, path) if stored.ndim == 2 else self._from_colors(stored, path, *self._colors)

    def convert(self, stored: UInt8Array, path: Path) -> UInt8Array:
        """Turn stored values (H, W) uint8 into class indices; `path` is for the message."""
        # 255 wraps to 0 by itself where values stand for themselves.
        shifted = stored + np.uint8(1) if self._plain else cv2.LUT(stored, self._table)
        if shifted.max() > self.num_classes:
            bad = np.unique(stored[shifted > self.num_classes]).tolist()
            listed = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            ignored = ", ".join(map(str, self.ignore))
            raise InputError(
                f"{path}: labels {listed} are neither one of the {self.num_classes} classes "
                f"(0..{self.num_classes - 1}) nor ignored ({ignored}); mend the mask, name more classes, "
                "or map or ignore these values"
            )
        return stored if self._plain else np.asarray(shifted - np.uint8(1), dtype=np.uint8)  # 0 wraps to 255

    def _from_colors(self, image: UInt8Array, path: Path, known: NDArray[np.int64], labels: UInt8Array) -> UInt8Array:
        codes = _color_codes(image)
        position = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        if (strange := known[position] != codes).any():
            y, x = np.argwhere(strange)[0].tolist()
            raise InputError(
                f"{path}: the colour {image[y, x].tolist()} (at row {y}, column {x}) is in neither colors nor "
                "ignore_colors; add it, or save the mask without antialiasing and lossy compression"
            )
        return labels[position]


def _color_codes(colors: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number per RGB triple: (..., 3) to (...)."""
    if colors.shape[-1] != 3 or colors.min() < 0 or colors.max() > 255:
        raise ValueError("colors must be RGB triples in [0, 255]")
    return np.asarray(colors.astype(np.int64) @ np.array([65536, 256, 1]))
