"""A comparison for people at a terminal and for programs: tables, verdicts, `compare.json` and `compare.csv`."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
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
        write_bytes(folder / name, text.encode())
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
    """Print the tables and what they show; as wide as the terminal, or as they need where there is none."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PLAIN_WIDTH, no_color=True, highlight=False)
    records = comparison.records()
    console.print(_main_table(records))
    console.print(_class_table(records, comparison.class_names))
    for line in comparison.verdicts():
        console.print(Text(line))
    for line in seed_lines(records):
        console.print(Text(line))


def _main_table(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{records[0]['images']:,} images", title_justify="left")
    table.add_column("setting")
    for head in ("mIoU", "difference", "95 % interval", "boundary", "img/s", "ms", "MiB", "GFLOPs", "M param."):
        table.add_column(head, justify="right", no_wrap=True)
    for record in records:
        low, high = record["ci95"]
        base = record["baseline"]
        table.add_row(
            Text(str(record["name"])),
            percent(record["miou"]),
            "baseline" if base else signed(record["difference"]),
            "" if base else f"{signed(low)} to {signed(high)}",
            percent(record["boundary_miou"]),
            figure(record["images_per_s"], 1),
            figure(record["latency_ms"], 1),
            figure(record["peak_memory_bytes"], 0, 2**20),
            figure(record["gflops"], 2),
            figure(record["parameters"], 2, 1e6),
        )
    return table


def _class_table(records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="IoU per class (%)", title_justify="left")
    table.add_column("class")
    for record in records:
        table.add_column(Text(str(record["name"])), justify="right")
    for name in class_names:
        table.add_row(Text(name), *(percent(record["per_class"][name]) for record in records))
    return table
