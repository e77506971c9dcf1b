"""`summary.csv`: per image the share of each class and the mean confidence, right even after a stop in between.

While a run goes on, each image's row is appended to a journal before its mask gets its name: whoever finds the mask
finds the row. The table is made of the rows of the table before, if there is one, and of the journals.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seg_attn.errors import InputError
from seg_attn.prediction.files import whole_file
from seg_attn.prediction.outputs import Seen

SUMMARY = "summary.csv"
# A file's name may be any bytes; those that are not UTF-8 are written as they are.
_TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
_FIXED = ["file", "height", "width", "mean_confidence"]


class Summary:
    """Collects rows and writes the table.

    Args:
        folder: The output folder.
        class_names: The columns of shares.
        process: Number of this process among several that write into one folder.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], process: int = 0) -> None:
        self.folder = folder
        self.columns = [*_FIXED, *class_names]
        self._journal = folder / f".summary.{process}.journal"

    def add(self, name: str, seen: Seen) -> None:
        """Note an image's row: from here on it survives the process."""
        pixels = seen.height * seen.width
        shares = [count / pixels for count in seen.counts]
        row = [name, seen.height, seen.width, seen.confidence, *shares]
        line = "\n" + json.dumps(row) + "\n"  # a line that a killed process left unfinished ends here
        with self._journal.open("ab", buffering=1 << 20) as journal:  # in one piece: several threads add rows
            journal.write(line.encode())

    def recover(self) -> None:
        """Move the rows that stopped runs left into the table, so that they are older than all that are added."""
        if self._journals():
            self.finish()

    def finish(self) -> None:
        """Write the table of all rows, sorted by file, and remove the journals."""
        journals = self._journals()
        rows = self._table()
        for journal in journals:
            for line in journal.read_text(**_TEXT).splitlines():
                row = _parsed(line)
                if row is not None and len(row) == len(self.columns):
                    rows[str(row[0])] = [str(value) for value in row]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(rows[name] for name in sorted(rows))
        with whole_file(self.folder / SUMMARY) as file:
            file.write(buffer.getvalue().encode(**_TEXT))
        for journal in journals:
            journal.unlink(missing_ok=True)

    def check(self) -> None:
        """Refuse to go on with the table of another model.

        Raises:
            InputError: If the folder's table has other columns.
        """
        self._table()

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob(".summary.*.journal"))

    def _table(self) -> dict[str, list[str]]:
        path = self.folder / SUMMARY
        if not path.is_file():
            return {}
        with path.open(newline="", **_TEXT) as file:
            lines = list(csv.reader(file))
        if not lines or lines[0] != self.columns:
            raise InputError(f"{path} is of other classes: name another --output folder, or remove it")
        return {line[0]: line for line in lines[1:] if len(line) == len(self.columns)}


def _parsed(line: str) -> list[object] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, list) else None
