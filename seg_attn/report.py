"""What a run says at its end: the per-class table for people, JSON and CSV for programs."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABSENT = "–"


def per_class_table(report: Mapping[str, Any]) -> str:
    """Lay out IoU per class and their mean, in percent, as lines of text; a class that occurs nowhere shows a dash."""
    rows = [(name, percent(iou)) for name, iou in report["per_class"].items()]
    width = max(len(name) for name, _ in [*rows, ("mean IoU", "")])
    rule = f"{'-' * width}  {'-' * 7}"
    body = [f"{name:<{width}}  {iou:>7}" for name, iou in rows]
    foot = [f"{'mean IoU':<{width}}  {percent(report['miou']):>7}"]
    return "\n".join([f"{'class':<{width}}  {'IoU (%)':>7}", rule, *body, rule, *foot])


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where there is none.

    Examples:
        >>> percent(0.12345), percent(None)
        ('12.35', '–')
    """
    return ABSENT if value is None or value != value else f"{100 * value:.2f}"


def signed(value: float | None) -> str:
    """A difference of fractions in points, with its sign; a dash where there is none.

    Examples:
        >>> signed(-0.0084), signed(0.0031)
        ('−0.84', '+0.31')
    """
    return ABSENT if value is None or value != value else f"{100 * value:+.2f}".replace("-", "−")


def figure(value: float | None, digits: int, unit: float = 1) -> str:
    """A figure in a unit, with separators; a dash where there is none.

    Examples:
        >>> figure(12_345_678, 2, 1e6), figure(4096.4, 0)
        ('12.35', '4,096')
    """
    return ABSENT if value is None or value != value else f"{value / unit:,.{digits}f}"


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
