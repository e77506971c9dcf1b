"""The page of a comparison: one HTML file that asks nothing of a network, to read, sort, leaf through and print.

Text that comes from users (names of classes, rows and files) reaches the page in two ways only: escaped into HTML, and
as JSON whose `<`, `>` and `&` are escaped, which the page's script writes as text.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seg_attn.compare import Comparison, printable, seed_lines, unpack
from seg_attn.data.images import VOID, UInt8Array
from seg_attn.report import figure, percent, signed

LONGEST_SIDE = 640
# Of the disagreement map: all rows right, all wrong, only some right, no label.
_MAP_COLOURS = ((236, 236, 232), (120, 120, 128), (214, 84, 30), (255, 255, 255))

# Column: key of a record, heading, explanation, digits, unit.
_FIGURES = (
    ("boundary_miou", "boundary mIoU", "IoU of the pixels within 2 % of the diagonal from contours, in %", 2, 0.01),
    ("images_per_s", "images/s", "normalising, network and classes; without decoding", 1, 1.0),
    ("latency_ms", "latency, ms", "median of one batch", 1, 1.0),
    ("peak_memory_bytes", "memory, MiB", "peak", 0, 2.0**20),
    ("gflops", "GFLOPs", "two per multiply-add, of the image of median area", 2, 1.0),
    ("parameters", "parameters, M", "without an auxiliary head", 2, 1e6),
)


def page(comparison: Comparison, records: Sequence[Mapping[str, Any]], title: str, images: int) -> str:
    """Write the page.

    Args:
        comparison: What to show.
        records: Its rows as plain values.
        title: Heading.
        images: How many images to show: those on which the rows disagree most.

    Returns:
        HTML.
    """
    classes = [
        {"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour)}
        for name, colour in zip(comparison.class_names, comparison.palette, strict=True)
    ]
    content = {
        "classes": classes,
        "baseline": comparison.baseline,
        "rows": [
            {**{key: value for key, value in record.items() if key != "confusion"}, "label": _label(record)}
            for record in records
        ],
        "images": _browsed(comparison, images),
    }
    parts = {
        "TITLE": escape(title),
        "SUBTITLE": escape(_subtitle(comparison, records)),
        "VERDICTS": "\n".join(_verdict(comparison, index) for index in _others(comparison)) or _alone(records[0]),
        "TABLE_HEAD": _head(),
        "TABLE_BODY": "\n".join(_row(index, record) for index, record in enumerate(records)),
        "CLASS_HEAD": _class_head(records),
        "CLASS_BODY": "\n".join(_class_row(entry, records) for entry in classes),
        "NOTES": "\n".join(f"<li>{escape(note)}</li>" for note in _notes(comparison, records)),
        "DATA": _as_json(content),
    }
    html = files("seg_attn").joinpath("comparison_page.html").read_text(encoding="utf-8")
    head, *rest = html.split("{{")
    # One pass, so that nothing inside of what is put in is taken for a place to put something.
    return head + "".join(parts[name] + text for name, text in (part.split("}}", 1) for part in rest))


def _as_json(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# --- text and tables -------------------------------------------------------------------------------------------------


def _others(comparison: Comparison) -> list[int]:
    return [index for index in range(len(comparison.rows)) if index != comparison.baseline]


def _subtitle(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> str:
    number = len(records)
    rows = "one setting" if number == 1 else f"{number} settings"
    return (
        f"{rows} on {_count(comparison.images, 'image')} with {_count(len(comparison.class_names), 'class', 'classes')}"
        f" · baseline: {_label(records[comparison.baseline])}"
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _label(record: Mapping[str, Any]) -> str:
    """A row's name where nothing around it says what the number in it is."""
    name = str(record["name"])
    return f"stride {name}" if name.split(",")[0] == str(record["output_stride"]) else name


def _verdict(comparison: Comparison, index: int) -> str:
    kind = comparison.differences[index].kind
    mark = {"better": "▲", "worse": "▼", "none": "="}[kind]
    text = comparison.verdict(index)
    text = text[:1].upper() + text[1:]
    return f'<li class="{kind}"><span class="mark" aria-hidden="true">{mark}</span><span>{escape(text)}</span></li>'


def _alone(record: Mapping[str, Any]) -> str:
    return f'<li class="none"><span>{escape(str(record["name"]))}: mIoU {percent(record["miou"])} %</span></li>'


def _head() -> str:
    cells = [("setting", "", "text"), ("mIoU, %", "mean over the classes that occur", "number")]
    cells += [("difference", "in points, to the baseline row", "number"), ("95 % interval", "over images", "none")]
    cells += [(heading, explanation, "number") for _, heading, explanation, _, _ in _FIGURES]
    return "".join(
        f'<th scope="col"{_hint(explanation)}>{escape(heading)}</th>'
        if kind == "none"
        else f'<th scope="col" aria-sort="none"{_hint(explanation)}><button type="button" data-kind="{kind}">'
        f'{escape(heading)}<span class="arrow" aria-hidden="true"></span></button></th>'
        for heading, explanation, kind in cells
    )


def _hint(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""


def _row(index: int, record: Mapping[str, Any]) -> str:
    low, high = record["ci95"]
    base = record["baseline"]
    source = record["checkpoint"] or record["predictions"] or ""
    cells = [
        f'<th scope="row" data-value="{index}" title="{escape(source)}">{escape(_label(record))}</th>',
        _cell(record["miou"], percent(record["miou"])),
        _cell(record["difference"], "baseline" if base else signed(record["difference"])),
        f"<td>{'' if base else f'{signed(low)} to {signed(high)}'}</td>",
    ]
    cells += [_cell(record[key], figure(record[key], digits, unit)) for key, _, _, digits, unit in _FIGURES]
    kind = ' class="base"' if base else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _cell(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else repr(value)}">{escape(text)}</td>'


def _class_head(records: Sequence[Mapping[str, Any]]) -> str:
    cells = [("class", "text"), *((_label(record), "number") for record in records)]
    return "".join(
        f'<th scope="col" aria-sort="none"><button type="button" data-kind="{kind}">{escape(name)}'
        '<span class="arrow" aria-hidden="true"></span></button></th>'
        for name, kind in cells
    )


def _class_row(entry: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    name = entry["name"]
    head = (
        f'<th scope="row" data-value="{escape(name)}"><span class="swatch" style="--c:{entry["colour"]}"></span>'
        f"{escape(name)}</th>"
    )
    return f"<tr>{head}{''.join(_cell(r['per_class'][name], percent(r['per_class'][name])) for r in records)}</tr>"


def _notes(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        "mIoU is Pascal VOC's: one confusion matrix over all images, pixels labelled 255 left out, mean over the "
        "classes that occur in label or prediction.",
        f"Intervals are 95 % percentile intervals of a paired bootstrap over images (seed {comparison.seed}): they "
        "answer whether other images of the same kind would say the same. Each holds for itself: of twenty rows that "
        "do not differ, one is expected to be called different.",
        "Another training run is another source of doubt, which an interval over images does not cover: compare "
        "several seeds for that.",
    ]
    sizes = [record["gflops_size"] for record in records if record["gflops_size"]]
    if sizes:
        notes.append(f"GFLOPs are those of one image of {sizes[0][0]} × {sizes[0][1]}, two per multiply-add.")
    devices = sorted({record["device"] for record in records if record["device"]})
    if devices:
        on_cpu = "peak memory is that of a process of its own, Python and libraries included"
        on_gpu = "peak memory is what PyTorch took on the device"
        notes.append(
            f"Time and memory were measured on {', '.join(devices)}; {on_cpu if 'cpu' in devices else on_gpu}."
        )
    return notes + [f"{line[:1].upper()}{line[1:]}." for line in seed_lines(records)]


# --- pictures --------------------------------------------------------------------------------------------------------


def _browsed(comparison: Comparison, images: int) -> list[dict[str, Any]]:
    shares = comparison.disagreement()
    order = sorted(range(len(shares)), key=lambda index: -shares[index])[:images]
    return [_browse(comparison, index, shares[index]) for index in order]


def _browse(comparison: Comparison, index: int, share: float) -> dict[str, Any]:
    photograph, target = comparison.dataset.load(index)
    assert target is not None
    masks = [unpack(row.masks[index], target.shape) for row in comparison.rows]
    labelled = target != VOID
    right = [(mask == target) & labelled for mask in masks]
    return {
        "name": printable(comparison.dataset.pairs[index].image.name),
        "share": share,
        "size": [target.shape[1], target.shape[0]],
        "photograph": _photograph(photograph),
        "label": _indexed(target, comparison.palette),
        "predictions": [_indexed(mask, comparison.palette) for mask in masks],
        "accuracy": [float(hits.sum() / labelled.sum()) if labelled.any() else None for hits in right],
        "map": _indexed(_agreement(np.stack(masks), np.stack(right), labelled), _MAP_COLOURS),
    }


def _agreement(masks: UInt8Array, right: NDArray[np.bool_], labelled: NDArray[np.bool_]) -> UInt8Array:
    """0 all right, 1 all wrong and alike, 2 the rows differ, 3 no label; uint8 (H, W) from masks (R, H, W)."""
    alike = (masks == masks[0]).all(axis=0)
    classes = np.where(alike, np.where(right[0], 0, 1), 2)
    return np.where(labelled, classes, 3).astype(np.uint8)


def _photograph(image: UInt8Array) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _indexed(mask: UInt8Array, palette: Sequence[Sequence[int]]) -> str:
    picture = Image.fromarray(mask)
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    picture.putpalette(table.tobytes())
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
