"""`summary.csv`: per image the share of each class and the mean confidence, right even after a stop in between.

While a run goes on, each image's row is appended to a journal before its mask gets its name: whoever finds the mask
finds the row. The table is made of the rows of the table before, if there is one, and of the journals.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from seg_attn.data.images import write_bytes
from seg_attn.errors import InputError
from seg_attn.prediction.outputs import Seen

SUMMARY = "summary.csv"
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
        handle = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def finish(self) -> Path:
        """Write the table of all rows, sorted by file, and remove the journals."""
        journals = sorted(self.folder.glob(".summary.*.journal"))
        rows = self._table()
        for journal in journals:
            for line in journal.read_text(encoding="utf-8").splitlines():
                row = _parsed(line)
                if row is not None and len(row) == len(self.columns):
                    rows[str(row[0])] = [str(value) for value in row]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(rows[name] for name in sorted(rows))
        write_bytes(self.folder / SUMMARY, buffer.getvalue().encode())
        for journal in journals:
            journal.unlink(missing_ok=True)
        return self.folder / SUMMARY

    def check(self) -> None:
        """Refuse to go on with the table of another model.

        Raises:
            InputError: If the folder's table has other columns.
        """
        self._table()

    def _table(self) -> dict[str, list[str]]:
        path = self.folder / SUMMARY
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
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
