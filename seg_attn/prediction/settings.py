"""How a network is asked for its opinion on an image: scales, flips, tiles, precision."""

import math
from dataclasses import dataclass

PRECISIONS = ("float32", "bfloat16")
# Lightning's names for the same.
SYNONYMS = {
    "32": "float32",
    "32-true": "float32",
    "bf16": "bfloat16",
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
}
SMALLEST_TILE = 32


@dataclass(frozen=True)
class Settings:
    """How one image is predicted.

    Attributes:
        scales: Factors that the image is resized by; class probabilities are averaged over them.
        flip: Average over the image and its mirror image too.
        tile: Side of the square tiles that a larger image is cut into; None predicts it whole.
        overlap: Pixels that neighbouring tiles share at least; None is a quarter of a tile.
        precision: "float32" or "bfloat16".

    Raises:
        ValueError: For a value out of its range.

    Examples:
        >>> Settings(scales=(0.5, 1.0), flip=True).is_plain, Settings(tile=512).overlap_pixels
        (False, 128)
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tile: int | None = None
    overlap: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        object.__setattr__(self, "precision", SYNONYMS.get(self.precision, self.precision))
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be one or more positive numbers such as 0.5 1 1.5, got {list(self.scales)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, got {self.precision!r}")
        if self.tile is None:
            if self.overlap is not None:
                raise ValueError(f"overlap {self.overlap} needs tiles to overlap: give tile too")
            return
        if self.tile < SMALLEST_TILE:
            raise ValueError(f"tile must be at least {SMALLEST_TILE} pixels, got {self.tile}")
        if not 0 <= self.overlap_pixels < self.tile:
            raise ValueError(f"overlap must be at least 0 and below the tile's {self.tile} pixels, got {self.overlap}")

    @property
    def is_plain(self) -> bool:
        """Whether the network sees the image once, as it is."""
        return self.scales == (1.0,) and not self.flip

    @property
    def overlap_pixels(self) -> int:
        """Pixels that neighbouring tiles share at least."""
        if self.tile is None:
            return 0
        return self.tile // 4 if self.overlap is None else self.overlap

    def is_tiled(self, height: int, width: int) -> bool:
        """Whether an image of this size is cut into tiles: one that fits into a tile is not."""
        return self.tile is not None and max(height, width) > self.tile

    def number_of_tiles(self, height: int, width: int) -> int:
        """How often the network is asked for an image of this size (once for all scales and flips)."""
        if self.tile is None:
            return 1
        sides = (tile_starts(length, self.tile, self.overlap_pixels) for length in (height, width))
        return math.prod(map(len, sides))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along a side: all of them inside, evenly spread, sharing at least `overlap` pixels.

    Examples:
        >>> tile_starts(100, 40, 10), tile_starts(40, 40, 10), tile_starts(30, 40, 10)
        ([0, 30, 60], [0], [0])
    """
    if length <= tile:
        return [0]
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [round(index * (length - tile) / gaps) for index in range(gaps + 1)]
