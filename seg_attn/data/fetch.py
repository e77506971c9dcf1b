"""Fetching archives whole and unpacking them safely: mirrors, resuming, checksums, no path outside of the target."""

import errno
import gzip
import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from seg_attn.data.images import write_bytes
from seg_attn.data.progress import Progress
from seg_attn.errors import InputError

_BLOCK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 2  # per mirror; what has arrived is kept from one to the next


@dataclass(frozen=True)
class Archive:
    """A file that is published in several places.

    Attributes:
        name: Its file name.
        urls: Where it is, best first.
        size: Bytes.
        sha256: Checksum, or None.
        md5: Checksum, or None.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    sha256: str | None = None
    md5: str | None = None

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file at `path`; None where size and every known checksum agree."""
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size:,} bytes and should have {self.size:,}"
        for name, expected in (("sha256", self.sha256), ("md5", self.md5)):
            if expected is not None:
                with path.open("rb") as file:
                    actual = hashlib.file_digest(file, name).hexdigest()
                # One is proof enough; the stronger comes first.
                return None if actual == expected.lower() else f"its {name} is {actual} and should be {expected}"
        return None


def fetch(archive: Archive, folder: Path) -> Path:
    """Download an archive, or finish a download that was interrupted; a whole and right file is left as it is.

    Bytes arrive in `<name>.part`. A mirror that fails is left for the next, which goes on where it stopped. The last
    file whose checksum was wrong is kept as `<name>.wrong`.

    Args:
        archive: What to fetch.
        folder: Where to; must exist.

    Returns:
        The path of the verified file.

    Raises:
        InputError: No mirror gave the right file, or the disk is full.
    """
    target, part = folder / archive.name, folder / f"{archive.name}.part"
    if target.is_file():
        if archive.fault(target) is None:
            return target
        _put_aside(target, archive.name)
    faults, aside = [], None
    for url in archive.urls:
        for _ in range(_ATTEMPTS):
            try:
                _download(url, part, archive)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise disk_full(folder) from error
                faults.append(f"{url}: {_reason(error)}")
                continue
            fault = archive.fault(part)
            if fault is None:
                os.replace(part, target)
                return target
            # Perhaps only its beginning, from another mirror, is wrong: so once more from the start.
            aside = _put_aside(part, archive.name)
            faults.append(f"{url}: {fault}")
    kept = f"; the last wrong file is kept as {aside}" if aside else ""
    raise InputError(
        f"{archive.name}: none of {len(archive.urls)} mirrors gave it ({'; '.join(dict.fromkeys(faults))}){kept}; "
        f"try again later, or get the file elsewhere and give it with --from"
    )


def disk_full(folder: Path) -> InputError:
    """The error for a disk without space."""
    return InputError(f"{folder}: the disk is full; free some space and run again, the work goes on where it stopped")


def members(path: Path, wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    """Read files of a tar archive in order, refusing whatever could lead out of a folder.

    Args:
        path: A tar archive, compressed or not.
        wanted: Says of a relative path and a size whether the file is to be read.

    Yields:
        (relative path with forward slashes, content) of the files that are wanted.

    Raises:
        InputError: The archive is damaged or cut short, or holds links, devices, absolute paths or `..`.
    """
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
                    raise InputError(f"{path}: refused, its member {member.name!r} leads out of the folder")
                if member.isdir():
                    continue
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise InputError(f"{path}: refused, its member {member.name!r} is a link or a device")
                if wanted(str(name), member.size):
                    data = content.read()
                    if len(data) != member.size:
                        raise EOFError(f"in {name}")
                    yield str(name), data
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the archive is damaged or cut short ({error}); fetch it again") from error


def unpack(path: Path, target: Path, *, below: str) -> None:
    """Unpack what lies below a folder of a tar archive; files that are there with the right size are left as they are.

    Every file appears whole or not at all, so an interrupted run is gone on with by calling this again.

    Args:
        path: The archive.
        target: Receives the content of `below`.
        below: Folder inside the archive, such as "VOCdevkit/VOC2012"; whatever lies above it is ignored.

    Raises:
        InputError: See `members`; or nothing lies below that folder, or the disk is full.
    """
    found = False

    def is_missing(name: str, size: int) -> bool:
        nonlocal found
        progress.advance(size)
        inside = _below(name, below)
        found = found or inside is not None
        if inside is None:
            return False
        place = target / inside
        return not (place.is_file() and place.stat().st_size == size)

    with Progress(f"unpacking {path.name}", path.stat().st_size, is_bytes=True) as progress:
        for name, data in members(path, is_missing):
            place = target / str(_below(name, below))
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(place, data)
            except OSError as error:
                raise disk_full(target) if error.errno == errno.ENOSPC else error from error
    if not found:
        raise InputError(f"{path}: holds no folder {below}; this is another archive")


def _below(name: str, folder: str) -> str | None:
    _, separator, inside = f"/{name}".partition(f"/{folder}/")
    return inside if separator else None


def _download(url: str, part: Path, archive: Archive) -> None:
    """Append what is missing of `part`; OSError, HTTPException or ValueError where the server does not give it."""
    have = part.stat().st_size if part.is_file() else 0
    if have > archive.size:
        part.unlink()
        have = 0
    if have == archive.size:
        return
    headers = {"User-Agent": "seg_attn", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if have and not (response.status == 206 and _range_start(response.headers.get("Content-Range", "")) == have):
            have = 0  # the server sends the whole file
        offered = response.headers.get("Content-Length")
        if offered is not None and have + int(offered) != archive.size:
            raise ValueError(f"offers {have + int(offered):,} bytes instead of {archive.size:,}")
        with part.open("ab" if have else "wb") as file, Progress(archive.name, archive.size, is_bytes=True) as progress:
            progress.advance(have)
            while block := response.read(_BLOCK):
                have += len(block)
                if have > archive.size:
                    raise ValueError(f"sends more than {archive.size:,} bytes")
                file.write(block)
                progress.advance(len(block))
    if have < archive.size:
        raise ConnectionError(f"broke off after {have:,} of {archive.size:,} bytes")


def _range_start(content_range: str) -> int | None:
    unit, _, rest = content_range.partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _put_aside(path: Path, name: str) -> Path:
    aside = path.with_name(f"{name}.wrong")
    os.replace(path, aside)
    return aside


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    return " ".join(str(error).split()) or type(error).__name__
