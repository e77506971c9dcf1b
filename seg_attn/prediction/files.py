"""Files that appear under their name whole or not at all, and what is left of those that were never finished."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from errno import EISDIR
from pathlib import Path
from typing import BinaryIO

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""This machine in the names of unfinished files: several machines may write into one folder."""

_LEFTOVER = re.compile(r"\.(?P<host>[0-9a-f]{8})\.(?P<process>\d{1,9})-[0-9a-f]+\.part")
_DAY = 24 * 60 * 60
# Names of the files that this process is writing.
_unfinished: set[str] = set()


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
