"""Images and masks: one decoding, one encoding, one normalisation, used by training, evaluation and prediction alike.

Photographs are decoded to RGB and turned as their EXIF orientation says; masks are read as palette *indices*, never as
colours. JPEG goes through OpenCV, the fastest maintained decoder among our dependencies (torchvision's is deprecated);
everything else, and every JPEG with a peculiarity, goes through Pillow. Both use libjpeg-turbo and give equal pixels.
"""

import io
import os
import secrets
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from seg_attn.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

UInt8Array = NDArray[np.uint8]
ImageSource = str | os.PathLike[str] | Image.Image | UInt8Array

VOID = 255
"""The label that means "no class": outside of the image, object borders, ignored values."""

_ORIENTATION = 0x0112
# OpenCV before 4.11 decodes to BGR only.
_DECODES_RGB = hasattr(cv2, "IMREAD_COLOR_RGB")
_DECODE = cv2.IMREAD_COLOR_RGB if _DECODES_RGB else cv2.IMREAD_COLOR
_JPEG_END = b"\xff\xd9"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_EXIF = (b"eXIf", b"Raw profile type")
# Pillow scales grey PNGs of fewer than 8 bits up to 0..255; a label is the value that was stored.
_GREY_SCALE = {"L;2": 85, "L;4": 17}


def read_image(source: ImageSource) -> UInt8Array:
    """Decode a photograph.

    The EXIF orientation is applied. Grey becomes RGB, CMYK and palettes are converted, an alpha channel is dropped, the
    first frame of an animation is taken, and 16 bits are cut to their upper 8.

    Args:
        source: A path, a PIL image or an array that `read_image` returns as it is: uint8, (H, W, 3), RGB.

    Returns:
        uint8 array (H, W, 3), RGB.

    Raises:
        InputError: The file is missing, broken, truncated or no image, or its values have no known range.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            msg = f"an image array must be uint8 of shape (H, W, 3), got {source.dtype} {source.shape}"
            raise InputError(f"{msg}; convert it to 8-bit RGB")
        return source
    if isinstance(source, Image.Image):
        return _rgb_array(source, getattr(source, "filename", "") or "image")
    path = Path(source)
    data = _read_bytes(path)
    try:
        if data.startswith(_PNG_SIGNATURE):
            _png_pixels(data)
        size = _plain_jpeg_size(data)
        if size is not None:
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE | cv2.IMREAD_IGNORE_ORIENTATION)
            if decoded is not None and decoded.shape[:2] == size:
                return np.asarray(decoded if _DECODES_RGB else decoded[..., ::-1], dtype=np.uint8, order="C")
        with Image.open(io.BytesIO(data)) as image:
            return _rgb_array(image, path)
    except InputError:
        raise
    except Exception as error:  # a broken file can raise anything from a decoder (struct.error, SyntaxError, ...)
        raise _unreadable(path, error, "image") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read (height, width) of an image as `read_image` would return it, without decoding it.

    Raises:
        InputError: The file is missing or not an image.
    """
    path = Path(path)
    data = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # A PNG's EXIF may follow its pixels, so that Pillow decodes them to find out.
            if image.format == "PNG" and not any(name in data for name in _PNG_EXIF):
                return height, width
            if isinstance(image, TiffImageFile):  # whose size newer Pillows report as turned already
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except Exception as error:
        raise _unreadable(path, error, "image") from error


def read_mask(path: str | os.PathLike[str]) -> UInt8Array:
    """Read a label mask: palette indices or grey values, never colours.

    Args:
        path: A palette or grey image of 1 to 8 bits; more bits are accepted where the values fit into 8.

    Returns:
        uint8 array (H, W) of the stored indices.

    Raises:
        InputError: The file is missing or broken, holds colours, fractions or labels above 255, or is a JPEG, whose
            compression changes labels.
    """
    stored = read_stored_mask(path)
    if stored.ndim == 3:
        raise InputError(
            f"{path}: the mask holds colours, not class indices; save palette indices or give a colour table"
        )
    return stored


def read_stored_mask(path: str | os.PathLike[str]) -> UInt8Array:
    """Read a mask as it is stored: indices as `read_mask` does, or the colours of a true-colour image.

    Returns:
        uint8 array (H, W) of indices, or (H, W, 3) of colours, RGB.

    Raises:
        InputError: As `read_mask`, colours excepted.
    """
    path = Path(path)
    data = _read_bytes(path)
    try:
        plain = _plain_png(data)
        if plain is not None:
            return plain
        with Image.open(io.BytesIO(data)) as image:
            return _stored_array(image, path)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(path, error, "mask") from error


def write_mask(
    path: str | os.PathLike[str], mask: NDArray[np.integer], palette: Sequence[Sequence[int]] | UInt8Array
) -> None:
    """Write a mask as a PNG of palette indices, whole or not at all.

    Args:
        path: Where to write; its folder must exist. An existing file is replaced in one step.
        mask: (H, W), integers in [0, 255].
        palette: Up to 256 RGB triples; the entries that it leaves out are those of VOC's palette.

    Raises:
        ValueError: `mask` is not a 2-d array of integers in [0, 255], or `palette` is not (n <= 256, 3) in [0, 255].
    """
    path = Path(path)
    labels = np.asarray(mask)
    if labels.ndim != 2 or 0 in labels.shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"mask must be an integer array (H, W), got {labels.dtype} {labels.shape}")
    if labels.dtype != np.uint8 and (labels.min() < 0 or labels.max() > 255):
        raise ValueError(f"mask must lie in [0, 255], got [{labels.min()}, {labels.max()}]")
    colors = np.asarray(palette, dtype=np.int64).reshape(-1, 3)
    if len(colors) > 256 or (colors.size and (colors.min() < 0 or colors.max() > 255)):
        raise ValueError(f"palette must be at most 256 RGB triples in [0, 255], got {len(colors)} entries")
    # All 256 entries: a shorter palette makes the PNG writer use fewer bits per pixel, which cuts the label 255.
    full = np.concatenate([colors, voc_palette()[len(colors) :]]).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(labels.astype(np.uint8)))
    image.putpalette(full.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary file beside it, then moved into its place."""
    # The random part keeps two processes that write the same file out of each other's way.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def voc_palette(n: int = 256) -> UInt8Array:
    """Pascal VOC's palette: the bits of an index, three at a time, from the top bit of red, green and blue downwards.

    Source: `VOClabelcolormap.m` of the VOC 2012 development kit.

    Args:
        n: Number of entries, 0 to 256.

    Returns:
        uint8 array (n, 3), RGB.

    Raises:
        ValueError: `n` is not in [0, 256].

    Examples:
        >>> voc_palette(3).tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
        >>> voc_palette()[255].tolist()
        [224, 224, 192]
    """
    if not 0 <= n <= 256:
        raise ValueError(f"n must lie in [0, 256], got {n}")
    index = np.arange(n)
    palette = np.zeros((n, 3), dtype=np.int64)
    for triple in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * triple + channel)) & 1) << (7 - triple)
    return palette.astype(np.uint8)


def normalize(image: UInt8Array, mean: Sequence[float], std: Sequence[float]) -> "Tensor":
    """(image / 255 - mean) / std, the only normalisation of the package: equal bytes in give equal floats everywhere.

    Args:
        image: uint8 (H, W, 3), RGB.
        mean: Three channel means of images scaled to [0, 1].
        std: Three deviations, positive.

    Returns:
        float32 tensor (3, H, W), channels-last in memory: `tensor[None]` is a channels-last batch.

    Raises:
        ValueError: `mean` or `std` are not three numbers, or a deviation is not positive.
    """
    import torch  # in here: the sample data and `data check` use this module and have no need of torch

    table = _normalization_table(tuple(mean), tuple(std))
    return torch.from_numpy(cv2.LUT(np.ascontiguousarray(image), table)).permute(2, 0, 1)


@lru_cache(maxsize=16)
def _normalization_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each byte: float32 (1, 256, 3), rounded once from float64."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must hold three numbers each, got {list(mean)} and {list(std)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}")
    values = np.arange(256, dtype=np.float64)[:, None] / 255
    table: NDArray[np.float32] = ((values - np.array(mean)) / np.array(std)).astype(np.float32)
    return table[None]


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path or the list that names it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable image file") from error
    if not data:
        raise InputError(f"{path}: the file is empty; copy or download it again")
    return data


def _unreadable(path: Path, error: Exception, kind: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file; check the path or the list that names it")
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image format that Pillow knows"
    elif isinstance(error, Image.DecompressionBombError):
        reason = "more pixels than PIL.Image.MAX_IMAGE_PIXELS allows"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: not a readable {kind} ({reason}); export it again or leave it out")


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and "exif" not in image.info:  # parsing what is not there costs as much as opening
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    # Asked first, because `exif_transpose` copies an image that is upright already.
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that OpenCV decodes as Pillow would; None for any other file.

    Grey or three components of 8 bits, no EXIF orientation, one picture, and an end that was not cut off. Reading the
    segments' heads here takes a small part of the time that Pillow, which parses their tables too, takes for it.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(_JPEG_END):
        return None
    position = 2
    while position + 12 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 10]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            fits = 0 < height * width <= (Image.MAX_IMAGE_PIXELS or height * width)
            return (height, width) if fits and body[0] == 8 and body[5] in (1, 3) else None
        if marker == 0xE1 and body.startswith(b"Exif") and _exif_turns(data):
            return None
        if marker == 0xE2 and body.startswith(b"MPF"):
            return None
        position += 2 + length
    return None


def _exif_turns(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return _orientation(image) != 1


def _png_pixels(data: bytes) -> bytes:
    """The compressed pixels of a PNG, every chunk's checksum verified: Pillow does not look at those of the pixels.

    Raises:
        ValueError: A checksum is wrong or the file is cut short.
    """
    position, stream = 8, []
    while data[position + 4 : position + 8] != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise ValueError("the PNG is cut short")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError("the PNG is damaged: a checksum is wrong")
        if data[position + 4 : position + 8] == b"IDAT":
            stream.append(data[position + 8 : end - 4])
        position = end
    return b"".join(stream)


def _plain_png(data: bytes) -> UInt8Array | None:
    """Decode the kind of PNG that VOC's masks are, twice as fast as Pillow; None for any other kind.

    8 bits per pixel, palette or grey, no interlacing, no EXIF, and no line filtered: then the pixels lie as they are,
    one filter byte before each line, in the zlib stream (PNG specification, sections 7.2, 9 and 10).

    Raises:
        ValueError: The file is damaged.
        zlib.error: Likewise.
    """
    if data[:8] != _PNG_SIGNATURE:
        return None
    stream = _png_pixels(data)
    if data[24:29] not in (b"\x08\x03\0\0\0", b"\x08\0\0\0\0") or any(name in data for name in _PNG_EXIF):
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or width * height):
        return None
    size = height * (width + 1)
    unpacker = zlib.decompressobj()
    first = unpacker.decompress(stream, 1)
    if first != b"\0":  # a filtered first line: seen at once, before the work is done for nothing
        return None
    pixels = first + unpacker.decompress(unpacker.unconsumed_tail, size - 1)
    if len(pixels) != size:
        raise ValueError("the PNG holds fewer pixels than it says")
    lines = np.frombuffer(pixels, dtype=np.uint8).reshape(height, width + 1)
    return None if lines[:, 0].any() else lines[:, 1:].copy()


def _rgb_array(image: Image.Image, name: str | Path) -> UInt8Array:
    image = _upright(image)
    if image.mode.startswith("I"):  # "I;16", "I;16B", or "I", which is how older Pillows open 16-bit files
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name}: 32-bit values of unknown range; convert the image to 8 or 16 bits")
        return np.repeat((values.astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise InputError(f"{name}: floating-point values of unknown range; convert the image to 8 or 16 bits")
    image.info.pop("transparency", None)  # alpha is dropped anyway; with it Pillow warns about the conversion
    return np.array(image.convert("RGB"))


def _stored_array(image: Image.Image, path: Path) -> UInt8Array:
    if image.format in ("JPEG", "MPO"):
        raise InputError(f"{path}: a JPEG has changed the labels it was given; save masks as PNG")
    scale = 1
    if image.format == "PNG" and image.mode == "L" and isinstance(image, ImageFile.ImageFile) and image.tile:
        scale = _GREY_SCALE.get(str(image.tile[0][3]), 1)
    image = _upright(image)
    if image.mode in ("P", "L", "1"):
        values = np.array(image, dtype=np.uint8)
        return values if scale == 1 else values // np.uint8(scale)
    if image.mode in ("PA", "LA"):
        return np.ascontiguousarray(np.array(image)[..., 0])
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or (values != np.trunc(values)).any():
            raise InputError(f"{path}: the mask holds fractions; save class indices as an 8-bit PNG")
        if values.min() < 0 or values.max() > 255:
            low, high = int(values.min()), int(values.max())
            raise InputError(f"{path}: the mask holds values from {low} to {high}; save class indices in 0..255")
        return values.astype(np.uint8)
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))
