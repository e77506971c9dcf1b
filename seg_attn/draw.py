"""Pictures of masks: class colours, and class colours laid over the photograph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]


def colorize(mask: NDArray[np.integer[Any]], palette: Sequence[Sequence[int]], ignore_index: int = 255) -> UInt8Array:
    """Colour class indices.

    Args:
        mask: Integers in 0..255, (H, W).
        palette: One colour (red, green, blue) per class.
        ignore_index: Label that is drawn white.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    table[ignore_index] = 255
    colors: UInt8Array = table[mask]
    return colors


def overlay(
    image: UInt8Array, mask: NDArray[np.integer[Any]], palette: Sequence[Sequence[int]], opacity: float = 0.5
) -> UInt8Array:
    """Lay class colours over a photograph; class 0, the background, stays as photographed, and regions are outlined.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: Class indices (H, W).
        palette: One colour (red, green, blue) per class.
        opacity: Share of the colour, 0 to 1.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    colors = colorize(mask, palette)
    share = np.where(mask == 0, 0.0, opacity)[..., None]
    drawn: UInt8Array = np.round(image * (1 - share) + colors * share).astype(np.uint8)
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    drawn[edges] = 255
    return drawn
