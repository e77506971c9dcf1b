"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows on stderr how far work of a known size is.

    Args:
        label: What is done, such as "converting masks".
        total: Size of the work.
        is_bytes: Whether the size is in bytes.

    Examples:
        >>> with Progress("counting", 3) as progress:
        ...     progress.advance(3)
    """

    def __init__(self, label: str, total: float, *, is_bytes: bool = False) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._unit = 1e6 if is_bytes else 1
        self._suffix = " MB" if is_bytes else ""
        self._last = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            size = DownloadColumn() if is_bytes else MofNCompleteColumn()
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), size, TimeRemainingColumn(), transient=True)
            self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, amount: int = 1) -> None:
        """Say that so much more is done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            done, total = (f"{value / self._unit:,.0f}" for value in (self.done, self.total))
            print(f"{self.label}: {done} of {total}{self._suffix}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
