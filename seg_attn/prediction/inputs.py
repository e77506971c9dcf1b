"""What there is to predict: files, folders, patterns, lists and videos, each with the name that its mask will have."""

import functools
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import cv2
from PIL import Image

from seg_attn.errors import InputError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
MAX_PIXELS = 178_956_970
"""The most pixels that an image may have by default: where Pillow refuses to decode."""

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """One image to predict.

    Attributes:
        path: The file.
        name: Where its outputs lie below the output folder, without a suffix.
        frame: Index of the frame where the file is a video.
    """

    path: Path
    name: Path
    frame: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.frame is None else f"{self.path}, frame {self.frame}"


def find_images(inputs: Sequence[str | PathLike[str]]) -> list[Path]:
    """List the images that files, folders and glob patterns name, each once, in order.

    Raises:
        InputError: If an input names nothing, or a folder holds no image.
    """
    return list(dict.fromkeys(source.path for source in find_sources(inputs)))


def find_sources(
    inputs: Sequence[str | PathLike[str]],
    *,
    recursive: bool = False,
    videos: bool = False,
    lists: Sequence[str | PathLike[str]] = (),
    outside: Path | None = None,
) -> list[Source]:
    """List what files, folders, patterns and lists name, each once, in order.

    A file keeps its own name. What a recursive folder, a pattern with folders in it or a list with relative paths
    names keeps its folders too. A video becomes a folder of frames.

    Args:
        inputs: Files, folders, glob patterns, or lists as `@FILE`.
        recursive: Look into the folders of folders.
        videos: Take videos too, frame by frame.
        lists: Text files that name one file per line.
        outside: A folder that recursive folders leave out: that of the outputs, should it lie in one of them.

    Raises:
        InputError: If an input names nothing, a folder holds no image, or a list or video cannot be read.
    """
    found: dict[tuple[Path, Path], None] = {}
    for given in inputs:
        text = os.fspath(given)
        if text.startswith("@") and not os.path.exists(text):
            named = _listed(Path(text[1:]))
        else:
            named = _named(text, recursive, videos, outside)
        found |= dict.fromkeys(named)
    for path in lists:
        found |= dict.fromkeys(_listed(Path(path)))
    sources: list[Source] = []
    seen: set[Path] = set()
    for path, name in found:
        if path in seen:
            continue
        seen.add(path)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            if not videos:
                raise InputError(f"{path} is a video: add --video to predict its frames")
            sources += [Source(path, name / f"{index:06d}", index) for index in range(count_frames(path))]
        else:
            sources.append(Source(path, name))
    return sources


def count_frames(path: Path) -> int:
    """Count the frames of a video by reading it: what its header says is an estimate.

    Raises:
        InputError: If it cannot be opened or holds no frame.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    video = cv2.VideoCapture(str(path))
    count = 0
    try:
        while video.grab():
            count += 1
    finally:
        video.release()
    if not count:
        raise InputError(f"{path}: no frame can be read; convert the video, for example to .mp4")
    return count


def size_of(source: Source) -> tuple[int, int] | None:
    """Height and width of an image or frame as its file's header says, without decoding; None where it says none."""
    return pixels_of(source.path) if source.frame is None else _frame_size(source.path)


@functools.lru_cache(maxsize=1)
def _frame_size(path: Path) -> tuple[int, int] | None:
    video = cv2.VideoCapture(str(path))
    try:
        size = int(video.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(video.get(cv2.CAP_PROP_FRAME_WIDTH))
    finally:
        video.release()
    return size if all(size) else None


def pixels_of(path: Path) -> tuple[int, int] | None:
    """Height and width as a file's header says, without decoding; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # whatever is wrong with it is said when it is read
        return None


def _named(text: str, recursive: bool, videos: bool, outside: Path | None) -> list[tuple[Path, Path]]:
    path = Path(text)
    if path.is_dir():
        walk = path.rglob("*") if recursive else path.iterdir()
        files = sorted(file for file in walk if _is_image_name(file.relative_to(path), videos) and not file.is_dir())
        if outside is not None and recursive and outside.resolve() != path.resolve():
            files = [file for file in files if not file.resolve().is_relative_to(outside.resolve())]
        if not files:
            hint = "" if recursive or not any(part.is_dir() for part in path.iterdir()) else " itself: try --recursive"
            raise InputError(f"no image in folder {path}{hint}")
        return [(file, file.relative_to(path).with_suffix("")) for file in files]
    if path.exists():
        return [(path, Path(path.stem))]
    files = sorted(Path(name) for name in glob.glob(text, recursive=True) if os.path.isfile(name))
    if not files:
        raise InputError(f"no such file, folder or pattern: {text}")
    base = _fixed_folder(path)
    return [(file, file.relative_to(base).with_suffix("")) for file in files]


def _listed(path: Path) -> list[tuple[Path, Path]]:
    """The files that a list names: one per line, relative to the working folder or to the list's own."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no such list of files: {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a list of files ({error}); write one path per line") from error
    if b"\0" in content:
        raise InputError(f"{path} is no text and so no list of files; write one path per line")
    lines = [line.strip() for line in os.fsdecode(content).split("\n")]  # a file's name may be any bytes
    files = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        given = Path(line)
        if given.name in ("", ".."):
            raise InputError(f"{path}: {line!r} names no file; write the path of one per line")
        file = given if given.exists() or not (path.parent / given).exists() else path.parent / given
        keeps_folders = not given.is_absolute() and ".." not in given.parts
        files.append((file, given.with_suffix("") if keeps_folders else Path(given.stem)))
    if not files:
        raise InputError(f"{path} names no file; write one path per line")
    return files


def _fixed_folder(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = pattern.parts[:-1]
    fixed = next((index for index, part in enumerate(parts) if _MAGIC & set(part)), len(parts))
    return Path(*parts[:fixed])


def _is_image_name(path: Path, videos: bool) -> bool:
    if any(part.startswith(".") for part in path.parts):
        return False
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:  # Pillow knows some of these suffixes too
        return videos
    return suffix in Image.registered_extensions()
