"""A comparison for people at a terminal and for programs: tables, verdicts, `compare.json` and `compare.csv`."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seg_attn.compare import Comparison, seed_lines
from seg_attn.comparison_page import page
from seg_attn.data.images import write_bytes
from seg_attn.report import figure, percent, signed

_PLAIN_WIDTH = 200


def write_comparison(comparison: Comparison, folder: Path, title: str, images: int) -> list[Path]:
    """Write `compare.json`, `compare.csv` and `compare.html` into a folder, each whole or not at all.

    Args:
        comparison: What to write.
        folder: Made where it is missing.
        title: Heading of the page.
        images: How many images the page shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = comparison.records()
    texts = {
        "compare.json": json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "compare.csv": as_csv(records),
        "compare.html": page(comparison, records, title, images),
    }
    for name, text in texts.items():
        # A file's name may hold bytes that are no UTF-8; in JSON their escapes read back as they were.
        write_bytes(folder / name, text.encode(errors="backslashreplace"))
    return [folder / name for name in texts]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out as CSV, one line each: nested values become columns, unknown ones stay empty."""
    flat = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name in ("confusion", "per_class_ci95"):
            continue
        if name.endswith("ci95"):
            flat[f"{name}_low"], flat[f"{name}_high"] = (_cell(end) for end in value)
        elif isinstance(value, Mapping):
            flat |= {f"{name}/{key}": _cell(item) for key, item in value.items()}
        elif isinstance(value, list):
            flat[name] = " ".join(map(str, value))
        elif name != "seeds":
            flat[name] = _cell(value)
    return flat


def _cell(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the tables and what they show; as wide as the terminal, or as they need where there is none.

    Where a terminal is too narrow for the first table, its last columns are left out; the second is cut into several.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PLAIN_WIDTH, no_color=True, highlight=False)
    records = comparison.records()
    columns = len(_COLUMNS)
    while columns > _ESSENTIAL and not _fits(_main_table(records, columns), console):
        columns -= 1
    console.print(_main_table(records, columns))
    if left_out := [head for head, _ in _COLUMNS[columns:]]:
        console.print(Text(f"no room for {', '.join(left_out)}: compare.csv has them\n"))
    start = 0
    while start < len(records):
        end = len(records)
        while end > start + 1 and not _fits(_class_table(records[start:end], comparison.class_names), console):
            end -= 1
        console.print(_class_table(records[start:end], comparison.class_names))
        start = end
    for line in comparison.verdicts():
        console.print(Text(line))
    for line in seed_lines(records):
        console.print(Text(line))


def _fits(table: Table, console: Console) -> bool:
    """Whether a console is wide enough for a table whose names are wrapped and whose figures are not."""
    return console.measure(table, options=console.options.update(width=10_000)).minimum <= console.width


def _difference(record: Mapping[str, Any]) -> str:
    return "baseline" if record["baseline"] else signed(record["difference"])


def _interval(record: Mapping[str, Any]) -> str:
    return "" if record["baseline"] else " to ".join(map(signed, record["ci95"]))


# Heading and text, the most important first.
_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("mIoU", lambda record: percent(record["miou"])),
    ("difference", _difference),
    ("95 % interval", _interval),
    ("ms", lambda record: figure(record["latency_ms"], 1)),
    ("GFLOPs", lambda record: figure(record["gflops"], 2)),
    ("MiB", lambda record: figure(record["peak_memory_bytes"], 0, 2**20)),
    ("boundary", lambda record: percent(record["boundary_miou"])),
    ("img/s", lambda record: figure(record["images_per_s"], 1)),
    ("M param.", lambda record: figure(record["parameters"], 2, 1e6)),
)
_ESSENTIAL = 3
_NAME_WIDTH, _HEAD_WIDTH = 24, 12


def _main_table(records: Sequence[Mapping[str, Any]], columns: int) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{records[0]['images']:,} images", title_justify="left")
    longest = max(len(str(record["name"])) for record in records)
    table.add_column("setting", min_width=min(longest, _NAME_WIDTH), overflow="fold")
    cells = [[text(record) for record in records] for _, text in _COLUMNS[:columns]]
    for (head, _), texts in zip(_COLUMNS, cells, strict=False):
        table.add_column(head, justify="right", width=max(map(len, (head, *texts))))
    for record, *texts in zip(records, *cells, strict=True):
        table.add_row(Text(str(record["name"])), *texts)
    return table


def _class_table(records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="IoU per class (%)", title_justify="left")
    table.add_column("class", width=min(max(map(len, class_names)), _NAME_WIDTH), overflow="fold")
    for record in records:
        words = str(record["name"]).split()
        longest = min(max(map(len, words)), _NAME_WIDTH)
        width = max(len("100.00"), longest, min(len(" ".join(words)), _HEAD_WIDTH))
        table.add_column(Text(" ".join(words)), justify="right", width=width, overflow="fold")
    for name in class_names:
        table.add_row(Text(name), *(percent(record["per_class"][name]) for record in records))
    return table
