"""A PNG written row by row, so that an image need never be whole in memory, and seen by nobody until it is.

PNG specification (Third Edition), sections 5, 10 and 11: signature, IHDR, PLTE, IDAT chunks that hold one zlib stream,
IEND. Each row starts with its filter type: 0 (none) for palette indices, 2 (up) for photographs.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from seg_attn.data.images import UInt8Array, voc_palette
from seg_attn.prediction.files import whole_file

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEX, _GREY, _RGB = 3, 0, 2
_UP = 2


class PngStrips:
    """Writes rows as they come into an open file; see `open_png`."""

    def __init__(self, file: BinaryIO, width: int, palette: Sequence[Sequence[int]] | None, bits: int) -> None:
        self.width = width
        self.height = 0
        self._file = file
        self._bits = bits
        self._kind = _INDEX if palette is not None else (_GREY if bits == 16 else _RGB)
        self._packer = zlib.compressobj(6 if palette is not None else 3)
        self._above: UInt8Array | None = None
        self._file.write(_SIGNATURE)
        self._chunk(b"IHDR", self._header())
        if palette is not None:
            colors = np.asarray(palette, dtype=np.uint8).reshape(-1, 3)
            self._chunk(b"PLTE", np.concatenate([colors, voc_palette()[len(colors) :]]).tobytes())

    def write(self, rows: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
        """Add rows below those written: uint8 (rows, W) indices, uint8 (rows, W, 3), or uint16 (rows, W)."""
        height = len(rows)
        values = np.ascontiguousarray(rows.astype(">u2") if self._bits == 16 else rows)
        lines = values.reshape(height, -1).view(np.uint8)
        filtered = np.zeros((height, lines.shape[1] + 1), dtype=np.uint8)
        if self._kind == _INDEX:
            filtered[:, 1:] = lines
        else:
            filtered[:, 0] = _UP
            filtered[1:, 1:] = lines[1:] - lines[:-1]  # modulo 256, as the filter is
            filtered[0, 1:] = lines[0] if self._above is None else lines[0] - self._above
            self._above = lines[-1].copy()
        self.height += height
        self._data(self._packer.compress(filtered.data))

    def finish(self) -> None:
        """End the file, and write into its head how many rows there are."""
        self._data(self._packer.flush())
        self._chunk(b"IEND", b"")
        self._file.seek(len(_SIGNATURE))
        self._chunk(b"IHDR", self._header())

    def _header(self) -> bytes:
        return struct.pack(">IIBBBBB", self.width, self.height, self._bits, self._kind, 0, 0, 0)

    def _data(self, packed: bytes) -> None:
        if packed:
            self._chunk(b"IDAT", packed)

    def _chunk(self, name: bytes, content: bytes) -> None:
        self._file.write(struct.pack(">I", len(content)) + name + content)
        self._file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(name))))


@contextmanager
def open_png(
    path: Path, width: int, palette: Sequence[Sequence[int]] | None = None, *, bits: int = 8
) -> Iterator[PngStrips]:
    """Open a PNG to write rows into; it takes its name when the block ends without an error.

    Args:
        path: Where the file will be; its folder must exist.
        width: Pixels of a row.
        palette: RGB triples: the rows are uint8 (rows, W) indices. Without one, rows are uint8 (rows, W, 3), RGB, or
            uint16 (rows, W), grey, as `bits` says.
        bits: 8, or 16 for grey.

    Examples:
        >>> with open_png(Path("out.png"), 6, palette=[[0, 0, 0], [255, 0, 0]]) as png:  # doctest: +SKIP
        ...     png.write(np.zeros((2, 6), dtype=np.uint8))
    """
    with whole_file(path) as file:
        png = PngStrips(file, width, palette, bits)
        yield png
        png.finish()
