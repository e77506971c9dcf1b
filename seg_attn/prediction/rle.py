"""Masks as COCO's run lengths: the compressed strings that pycocotools reads and writes.

A binary mask is read column by column; its runs, beginning with that of zeros, are written as differences from the run
two before (from the fourth on), five bits to a character (`maskApi.c` of cocoapi, `rleToString`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seg_attn.data.images import UInt8Array


def run_lengths(binary: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of a binary mask (H, W), read column by column, beginning with zeros.

    Examples:
        >>> run_lengths(np.array([[True, False], [True, True]]))
        [0, 2, 1, 1]
    """
    line = binary.ravel(order="F")
    changes = np.flatnonzero(line[1:] != line[:-1]) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], changes, [line.size]])).tolist()
    return [0, *lengths] if line[0] else lengths


def compress(lengths: Sequence[int]) -> str:
    """Write run lengths as COCO's string.

    Examples:
        >>> compress([6, 1, 40, 4])
        '61X13'
    """
    text = []
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            text.append(chr((bits | 0x20 if more else bits) + 48))
    return "".join(text)


def coco_segments(mask: UInt8Array, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Describe each class that occurs in a mask (H, W) as COCO does a region.

    Returns:
        Per class `category_id` (its index), `category_name`, `segmentation` (`size` [H, W] and `counts`), `area`, and
        `bbox` [x, y, width, height].
    """
    segments = []
    for index in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist():
        binary = mask == index
        rows, columns = np.flatnonzero(binary.any(axis=1)), np.flatnonzero(binary.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        segments.append(
            {
                "category_id": index,
                "category_name": class_names[index],
                "segmentation": {"size": list(mask.shape), "counts": compress(run_lengths(binary))},
                "area": int(binary.sum()),
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
            }
        )
    return segments
