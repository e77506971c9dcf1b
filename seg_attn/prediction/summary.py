"""`summary.csv`: per image the share of each class and the mean confidence, right even after a stop in between.

While a run goes on, each image's row is appended to a journal before its mask gets its name: whoever finds the mask
finds the row. Every process has a journal of its own, which it holds a lock on: several runs may share a folder. The
table is made of the rows of the table before, if there is one, and of the journals that nobody holds any more.
"""

import contextlib
import csv
import io
import json
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from seg_attn.errors import InputError
from seg_attn.prediction.files import is_locked, lock, only_one, whole_file
from seg_attn.prediction.outputs import Seen

SUMMARY = "summary.csv"
# A file's name may be any bytes; those that are not UTF-8 are written as they are.
_TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
_FIXED = ["file", "height", "width", "mean_confidence"]


class Summary:
    """Collects rows and writes the table.

    As a context it moves into the table, before the block, the rows that stopped runs left, so that they are older than
    all that are added, and those added after it; if the block ends with an error, they stay in the journal.

    Args:
        folder: The output folder.
        class_names: The columns of shares.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = folder
        self.columns = [*_FIXED, *class_names]
        self._path = folder / f".summary.{secrets.token_hex(8)}.journal"
        self._journal: BinaryIO | None = None
        self._adding = threading.Lock()

    def add(self, name: str, seen: Seen) -> None:
        """Note an image's row: from here on it survives the process."""
        pixels = seen.height * seen.width
        shares = [count / pixels for count in seen.counts]
        with self._adding:
            if self._journal is None:
                self._journal = self._started()
            self._journal.write(_line([name, seen.height, seen.width, seen.confidence, *shares]))
            self._journal.flush()

    def close(self) -> None:
        """Add no more: leave the rows to whoever writes the table next."""
        if self._journal is not None:
            with contextlib.suppress(OSError):  # of a row whose `add` has said so
                self._journal.close()
            self._journal = None

    def finish(self) -> None:
        """Write the table of all rows but those that live processes still collect, sorted by file.

        Raises:
            InputError: If another process has written a table of other columns by now.
        """
        self.close()
        with self._only_one():
            journals = [path for path in self._journals() if path == self._path or not is_locked(path)]
            rows = self._table()
            for path in journals:
                rows |= self._rows(path)
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(rows[name] for name in sorted(rows))
            with whole_file(self.folder / SUMMARY) as file:
                file.write(buffer.getvalue().encode(**_TEXT))
            for path in journals:
                path.unlink(missing_ok=True)

    def check(self) -> None:
        """Refuse to go on with the table, or the rows, of another model.

        Raises:
            InputError: If the folder's table or a journal has other columns.
        """
        for path in self._journals():  # before the table: rows move into it
            self._rows(path)
        self._table()

    def __enter__(self) -> Self:
        if self._journals():
            self.finish()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def _only_one(self) -> contextlib.AbstractContextManager[None]:
        return only_one(self.folder / ".summary.lock")

    def _started(self) -> BinaryIO:
        with self._only_one():  # nobody finds the journal without its lock
            journal = self._path.open("xb")
            lock(journal)
        journal.write(_line(self.columns))
        return journal

    def _journals(self) -> list[Path]:
        """All journals, our own, whose rows win, last."""
        return sorted(self.folder.glob(".summary.*.journal"), key=lambda path: (path == self._path, path))

    def _rows(self, journal: Path) -> dict[str, list[str]]:
        try:
            lines = journal.read_text(**_TEXT).splitlines()
        except FileNotFoundError:  # moved into the table
            return {}
        header, *rows = [row for row in map(_parsed, lines) if row is not None] or [self.columns]
        self._check_columns(journal, header)
        return {str(row[0]): [str(value) for value in row] for row in rows if len(row) == len(self.columns)}

    def _table(self) -> dict[str, list[str]]:
        path = self.folder / SUMMARY
        if not path.is_file():
            return {}
        with path.open(newline="", **_TEXT) as file:
            header, *rows = list(csv.reader(file)) or [[]]
        self._check_columns(path, header)
        return {row[0]: row for row in rows if len(row) == len(self.columns)}

    def _check_columns(self, path: Path, columns: Sequence[object]) -> None:
        if columns != self.columns:
            raise InputError(f"{path} is of other classes: name another --output folder, or remove it")


def _line(values: Sequence[object]) -> bytes:
    return (json.dumps(values) + "\n").encode()


def _parsed(line: str) -> list[Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the end of what a killed process wrote
        return None
    return row if isinstance(row, list) else None
