"""From arrays of pixels to classes: whole or by tiles, at one scale or several, mirrored or not.

Several scales: the normalised image is resized bilinearly to round(scale * size), the logits are resized back
bilinearly, and their softmax is averaged (the evaluation of DeepLabv3, arXiv 1706.05587, section 4.1). Tiles: each
tile's probabilities are weighted by a ramp over what it shares with its neighbours; the weights of all tiles over a
pixel sum to one. Only what is unfinished is kept, so that memory grows with the width of an image by the overlap alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from seg_attn.data.images import UInt8Array, normalize
from seg_attn.models.classes import best_classes
from seg_attn.prediction.settings import Settings, tile_starts

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Strip:
    """Finished rows of one image.

    Attributes:
        top: Index of the first row.
        classes: uint8 (rows, W).
        confidence: Probability of that class, float32 (rows, W).
        probabilities: float32 (C, rows, W), or None where they were not asked for.
    """

    top: int
    classes: UInt8Array
    confidence: Float32Array
    probabilities: Float32Array | None = None


class Inference:
    """A network, what its images are normalised with, and the settings it is asked with.

    Args:
        network: Maps float (N, 3, H, W) to logits (N, C, H, W); in eval mode and on `device`.
        mean: Mean per channel, for values in 0..1.
        std: Standard deviation per channel, likewise.
        settings: Scales, flips, tiles.
        device: Where the network runs.
        dtype: What the network computes in.

    It keeps no state between calls: several threads may use one.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network
        self.mean = list(mean)
        self.std = list(std)
        self.settings = settings
        self.device = device
        self.dtype = dtype

    @torch.inference_mode()
    def whole(self, images: Sequence[UInt8Array], probabilities: bool = False) -> list[Strip]:
        """Predict images of one size in one batch, never by tiles.

        Args:
            images: uint8 (H, W, 3) each, all of one size.
            probabilities: Return them too.

        Returns:
            A strip per image: all of its rows.
        """
        scores = self._scores(images)
        classes, confidence = best_classes(scores, logits=self.settings.is_plain)
        chances: list[Float32Array | None] = [None] * len(images)
        if probabilities:
            chances = list((scores.softmax(dim=1) if self.settings.is_plain else scores).float().cpu().numpy())
        pairs = zip(classes.cpu().numpy(), confidence.cpu().numpy(), chances, strict=True)
        return [Strip(0, *pair) for pair in pairs]

    def strips(
        self,
        image: UInt8Array,
        probabilities: bool = False,
        batch_size: int = 1,
        advance: Callable[[int], object] | None = None,
    ) -> Iterator[Strip]:
        """Predict one image, by tiles where the settings say so, and yield its rows from top to bottom.

        Args:
            image: uint8 (H, W, 3).
            probabilities: Return them too.
            batch_size: Tiles per batch.
            advance: Told the number of tiles done, each time some are.

        Yields:
            Strips that follow each other and together cover the image.
        """
        height, width = image.shape[:2]
        if self.settings.is_tiled(height, width):
            yield from self._tiled(image, probabilities, batch_size, advance)
            return
        yield self.whole([image], probabilities)[0]
        if advance is not None:
            advance(1)

    def _scores(self, images: Sequence[UInt8Array]) -> Tensor:
        """Logits of the plain setting, else averaged probabilities: float32 (N, C, H, W), on the device."""
        normalized = [normalize(image, self.mean, self.std)[None] for image in images]
        batch = (normalized[0] if len(normalized) == 1 else torch.cat(normalized)).to(self.device)
        if self.settings.is_plain:
            return self._logits(batch)
        size = batch.shape[-2:]
        total: Tensor | None = None
        for scale in self.settings.scales:
            seen = self._probabilities(self._scaled(batch, scale), size)
            if self.settings.flip:  # mirrored before it is resized, and the pair summed first: a mirrored image then
                # gives the mirrored sum, to the bit
                seen = seen + self._probabilities(self._scaled(batch.flip(-1), scale), size).flip(-1)
            total = seen if total is None else total + seen
        assert total is not None
        return total / (len(self.settings.scales) * (2 if self.settings.flip else 1))

    @staticmethod
    def _scaled(batch: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return batch
        target = [max(1, round(scale * side)) for side in batch.shape[-2:]]
        return F.interpolate(batch, size=target, mode="bilinear", align_corners=False)

    def _logits(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.network(batch.to(self.dtype))
        return logits.float()

    def _probabilities(self, batch: Tensor, size: torch.Size) -> Tensor:
        logits = self._logits(batch)
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)
        return logits.softmax(dim=1)

    @torch.no_grad()  # a tensor made in inference mode would take no sums outside of it
    def _tile_probabilities(self, tiles: Sequence[UInt8Array]) -> Tensor:
        scores = self._scores(tiles)
        return (scores.softmax(dim=1) if self.settings.is_plain else scores).cpu()

    def _tiled(
        self, image: UInt8Array, probabilities: bool, batch_size: int, advance: Callable[[int], object] | None
    ) -> Iterator[Strip]:
        height, width = image.shape[:2]
        assert self.settings.tile is not None
        rows = TileAxis(height, self.settings.tile, self.settings.overlap_pixels)
        columns = TileAxis(width, self.settings.tile, self.settings.overlap_pixels)
        shared = max(rows.size - rows.finished(row) for row in range(len(rows.starts)))
        carry: Tensor | None = None  # (C, shared, W): weighted sums of the rows that the next row of tiles adds to
        carried = 0
        for row, (top, row_weights) in enumerate(zip(rows.starts, rows.weights, strict=True)):
            finished = rows.finished(row)
            kept = rows.size - finished
            classes = np.empty((finished, width), dtype=np.uint8)
            confidence = np.empty((finished, width), dtype=np.float32)
            chances: Float32Array | None = None
            beside: Tensor | None = None  # (C, tile rows, shared columns): likewise for the next tile to the right
            tiles = self._tiles(image, top, rows.size, columns, batch_size, advance)
            for column, left in enumerate(columns.starts):
                tile = next(tiles)
                done = columns.finished(column)
                inside = slice(left, left + done)
                tile *= row_weights[:, None] * columns.weights[column]
                if beside is not None:
                    tile[:, :, : beside.shape[2]] += beside
                beside = tile[:, :, done:].clone()
                if carry is None:
                    carry = torch.empty((len(tile), shared, width))
                tile[:, :carried, :done] += carry[:, :carried, inside]
                carry[:, :kept, inside] = tile[:, finished:, :done]
                ready = tile[:, :finished, :done]
                best, chance = best_classes(ready[None])
                classes[:, inside] = best[0].numpy()
                confidence[:, inside] = chance[0].numpy()
                if probabilities:
                    if chances is None:
                        chances = np.empty((len(tile), finished, width), dtype=np.float32)
                    chances[:, :, inside] = ready.numpy()
                del tile, ready  # or they would be held while the network sees the next one
            carried = kept
            yield Strip(top, classes, confidence, chances)

    def _tiles(
        self,
        image: UInt8Array,
        top: int,
        rows: int,
        columns: "TileAxis",
        batch_size: int,
        advance: Callable[[int], object] | None,
    ) -> Iterator[Tensor]:
        """Probabilities (C, rows, columns) of a row of tiles, from left to right."""
        for first in range(0, len(columns.starts), batch_size):
            lefts = columns.starts[first : first + batch_size]
            tiles = [np.ascontiguousarray(image[top : top + rows, left : left + columns.size]) for left in lefts]
            seen = self._tile_probabilities(tiles)
            if advance is not None:
                advance(len(lefts))
            yield from seen
            del seen


class TileAxis:
    """Where tiles lie along one side of an image, and what they weigh.

    Args:
        length: The side.
        tile: Side of a tile; a shorter image has one tile of its own length.
        overlap: Pixels that neighbours share at least.

    Attributes:
        starts: First pixel of each tile.
        size: Pixels of a tile.
        weights: float32 (size,) per tile; over each pixel of the side they sum to one.
    """

    def __init__(self, length: int, tile: int, overlap: int) -> None:
        self.length = length
        self.size = min(tile, length)
        self.starts = tile_starts(length, tile, overlap)
        ramps = [self._ramp(index) for index in range(len(self.starts))]
        total = np.zeros(length)
        for start, ramp in zip(self.starts, ramps, strict=True):
            total[start : start + self.size] += ramp
        self.weights = [
            torch.from_numpy((ramp / total[start : start + self.size]).astype(np.float32))
            for start, ramp in zip(self.starts, ramps, strict=True)
        ]

    def finished(self, index: int) -> int:
        """Number of pixels of a tile that no later tile covers."""
        following = self.starts[index + 1] if index + 1 < len(self.starts) else self.length
        return following - self.starts[index]

    def _ramp(self, index: int) -> NDArray[np.float64]:
        ramp = np.ones(self.size)
        for is_inner, neighbour, direction in (
            (index > 0, index - 1, 1),
            (index + 1 < len(self.starts), index + 1, -1),
        ):
            if is_inner:
                shared = self.size - abs(self.starts[index] - self.starts[neighbour])
                rise = np.minimum((np.arange(self.size) + 1) / (shared + 1), 1)
                ramp = np.minimum(ramp, rise[::direction])
        return ramp
