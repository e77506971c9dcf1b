"""Output folders: files that appear whole or not at all, what is left of those never finished, and locks."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from errno import EISDIR
from pathlib import Path
from typing import BinaryIO

from seg_attn.errors import InputError

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""This machine in the names of unfinished files: several machines may write into one folder."""

_LEFTOVER = re.compile(r"\.(?P<host>[0-9a-f]{8})\.(?P<process>\d{1,9})-[0-9a-f]+\.part")
_DAY = 24 * 60 * 60
# Names of the files that this process is writing.
_unfinished: set[str] = set()


def check_writable(folder: Path) -> None:
    """Try an output folder, or the one that it will be made in, before hours go into what is to be written there.

    Raises:
        InputError: If nothing can be written there.
    """
    existing = folder
    try:
        for existing in (folder, *folder.parents):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(existing)
                break
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(
            f"--output {folder}: nothing can be written into {existing} ({error.strerror}); name another folder"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and reading that takes its name when the block ends without an error.

    Until then it is `.HOST.PROCESS-RANDOM.part` beside it: short, so that any name that a file may have will do.

    Args:
        path: Where the file will be; its folder must exist. An existing file is replaced in one step.

    Raises:
        OSError: If it cannot be written, or could not take its name; that is found out before the block.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    temporary = path.with_name(f".{HOST}.{os.getpid()}-{secrets.token_hex(4)}.part")
    _unfinished.add(temporary.name)
    try:
        with temporary.open("x+b") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary.name)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Let one process at a time, and one thread, into the block: the one that holds a lock on a file.

    The file is gone after the block. One that a killed process left behind is not locked any more.

    Args:
        path: The file; its folder must exist.
    """
    held = False
    while not held:
        with path.open("ab") as file:
            lock(file)
            held = not _is_removed(file)  # by the one whose end we waited for
            if held:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()


def lock(file: BinaryIO) -> None:
    """Wait for a lock on a file opened for writing; it ends when the file is closed, or with the process."""
    _has_lock(file, wait=True)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on a file; False if it is not there, or its file system has no locks."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return not _has_lock(file, wait=False)
    return False


def _has_lock(file: BinaryIO, wait: bool) -> bool:
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system, or a file system, without locks: as if nobody else were there
        pass
    return True


def _is_removed(file: BinaryIO) -> bool:
    try:
        return os.fstat(file.fileno()).st_nlink == 0
    except OSError:  # removed on another machine
        return True


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove the unfinished files of processes that are no more; those of other machines when they are a day old."""
    for folder in folders:
        for path in folder.glob(".*.part"):
            found = _LEFTOVER.fullmatch(path.name)
            if found and path.name not in _unfinished and _is_abandoned(path, found["host"], int(found["process"])):
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if host != HOST:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _DAY
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return process == os.getpid()  # our own are known: this one is of an earlier process with our number
