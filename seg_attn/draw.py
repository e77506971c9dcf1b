"""Pictures of masks: class colours, class colours laid over the photograph, contours, legends."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

UInt8Array = NDArray[np.uint8]

# Height of a legend's letters and squares, of its lines, and the space around them, in pixels.
_LETTER, _LINE, _GAP = 12, 18, 6


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
    image: UInt8Array,
    mask: NDArray[np.integer[Any]],
    palette: Sequence[Sequence[int]],
    opacity: float = 0.5,
    above: NDArray[np.integer[Any]] | None = None,
) -> UInt8Array:
    """Lay class colours over a photograph; class 0, the background, stays as photographed, and regions are outlined.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: Class indices (H, W).
        palette: One colour (red, green, blue) per class.
        opacity: Share of the colour, 0 to 1.
        above: Class indices (W,) of the row above, where image and mask continue another.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    colors = colorize(mask, palette)
    share = np.where(mask == 0, 0.0, opacity)[..., None]
    drawn: UInt8Array = np.round(image * (1 - share) + colors * share).astype(np.uint8)
    drawn[_edges(mask, above)] = 255
    return drawn


def contour(
    image: UInt8Array,
    mask: NDArray[np.integer[Any]],
    palette: Sequence[Sequence[int]],
    above: NDArray[np.integer[Any]] | None = None,
) -> UInt8Array:
    """Draw the borders between classes over a photograph, each pixel in the colour of its own class.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: Class indices (H, W).
        palette: One colour (red, green, blue) per class.
        above: Class indices (W,) of the row above, where image and mask continue another.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    edges = _edges(mask, above)
    drawn = image.copy()
    drawn[edges] = colorize(mask[edges], palette)
    return drawn


def legend(names: Sequence[str], colors: Sequence[Sequence[int]], width: int) -> UInt8Array:
    """Draw a legend: a square of each colour and its name, in as many lines as the width asks for.

    Args:
        names: What stands beside each square.
        colors: One colour (red, green, blue) per name.
        width: Width of the picture; a name that is wider is cut.

    Returns:
        uint8 (height, width, 3), RGB, on white; its height follows from the names.
    """
    font = ImageFont.load_default(size=_LETTER)
    left, line, places = _GAP, 0, []
    for name in names:
        needed = _LETTER + _GAP + math.ceil(font.getlength(name)) + 2 * _GAP
        if left > _GAP and left + needed > width:
            left, line = _GAP, line + 1
        places.append((left, _GAP + line * _LINE))
        left += needed
    picture = Image.new("RGB", (width, 2 * _GAP + (line + 1) * _LINE), "white")
    pen = ImageDraw.Draw(picture)
    for name, color, (x, y) in zip(names, colors, places, strict=True):
        pen.rectangle((x, y, x + _LETTER - 1, y + _LETTER - 1), fill=tuple(color), outline="black")
        pen.text((x + _LETTER + _GAP, y - 2), name, fill="black", font=font)
    return np.asarray(picture, dtype=np.uint8)


def _edges(mask: NDArray[np.integer[Any]], above: NDArray[np.integer[Any]] | None) -> NDArray[np.bool_]:
    """Where a pixel's class is not that of its left or upper neighbour."""
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    if above is not None:
        edges[0] |= mask[0] != above
    return edges
