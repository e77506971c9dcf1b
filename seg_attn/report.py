"""What a run says at its end: the per-class table for people, JSON and CSV for programs."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABSENT = "–"


def per_class_table(report: Mapping[str, Any]) -> str:
    """Lay out IoU per class and their mean, in percent, as lines of text; a class that occurs nowhere shows a dash."""
    rows = [(name, _percent(iou)) for name, iou in report["per_class"].items()]
    width = max(len(name) for name, _ in [*rows, ("mean IoU", "")])
    rule = f"{'-' * width}  {'-' * 7}"
    body = [f"{name:<{width}}  {iou:>7}" for name, iou in rows]
    foot = [f"{'mean IoU':<{width}}  {_percent(report['miou']):>7}"]
    return "\n".join([f"{'class':<{width}}  {'IoU (%)':>7}", rule, *body, rule, *foot])


def _percent(value: float | None) -> str:
    return ABSENT if value is None or value != value else f"{100 * value:.2f}"


def write_metrics(report: Mapping[str, Any], folder: Path, stage: str) -> tuple[Path, Path]:
    """Write `<stage>_metrics.json` and `.csv` into a folder: fractions in full precision, an absent class as null."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / f"{stage}_metrics.json", folder / f"{stage}_metrics.csv"
    as_json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "iou"])
        rows.writerows([name, "" if iou is None else repr(iou)] for name, iou in report["per_class"].items())
        rows.writerow(["mean", repr(report["miou"])])
    return as_json, as_csv
