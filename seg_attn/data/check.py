"""`seg-attn data check`: read a whole data set once and say what is wrong with which file.

Pairs that are missing, files that cannot be read, sizes that differ, labels that are no class, colours without a class,
images that occur in two splits (by content); and the numbers one wants to know: sizes and class frequencies.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_attn.data.class_weights import histogram
from seg_attn.data.images import VOID, UInt8Array, read_image
from seg_attn.data.progress import Progress
from seg_attn.data.voc import CLASS_NAMES_FILE, Pair, read_list
from seg_attn.errors import InputError

if TYPE_CHECKING:
    from seg_attn.data.datamodules import SegmentationDataModule

_CHUNK = 64  # pairs per task of a worker
_SHOWN = 20  # problems in the table for people; JSON has all


@dataclass
class Facts:
    """What one pair is found to be.

    Attributes:
        problems: One line each.
        size: (height, width) of the image; None where it cannot be read.
        pixels: Pixels per label value 0 to 255, 255 being what is ignored; None where there is no valid mask.
        digest: Of the decoded pixels of the image.
    """

    problems: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: NDArray[np.int64] | None = None
    digest: bytes | None = None


@dataclass
class SplitReport:
    """What one split is found to be.

    Attributes:
        pairs: Number of pairs.
        pixels: Pixels per class.
        images: Images that hold the class.
        ignored: Pixels without a class.
        sizes: How many images have which (height, width).
    """

    pairs: int
    pixels: list[int]
    images: list[int]
    ignored: int
    sizes: dict[tuple[int, int], int]


@dataclass
class Report:
    """What a data set is found to be.

    Attributes:
        class_names: One name per class.
        splits: By name.
        problems: What is wrong, one line each, the file first.
        notes: What is odd and does no harm.
    """

    class_names: list[str]
    splits: dict[str, SplitReport]
    problems: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it; sizes are written "width x height"."""
        splits = {}
        for name, split in self.splits.items():
            splits[name] = {
                "pairs": split.pairs,
                "pixels": dict(zip(self.class_names, split.pixels, strict=True)),
                "images": dict(zip(self.class_names, split.images, strict=True)),
                "ignored": split.ignored,
                "sizes": {f"{width}x{height}": number for (height, width), number in split.sizes.items()},
            }
        return {"ok": not self.problems, "problems": self.problems, "notes": self.notes, "splits": splits}


def examine(pair: Pair, read_labels: Callable[[Path], UInt8Array]) -> Facts:
    """Read an image and its mask to the end; whatever is wrong goes into the result."""
    facts = Facts()
    try:
        image = read_image(pair.image)
        facts.size = image.shape[:2]
        facts.digest = hashlib.sha256(np.ascontiguousarray(image).data).digest() + repr(image.shape).encode()
    except InputError as error:
        facts.problems.append(str(error))
    if pair.mask is None:
        return facts
    try:
        mask = read_labels(pair.mask)
    except InputError as error:
        facts.problems.append(str(error))
        return facts
    if facts.size is not None and mask.shape != facts.size:
        facts.problems.append(
            f"{pair.mask}: the mask is {mask.shape[1]}x{mask.shape[0]}, its image {pair.image} is "
            f"{facts.size[1]}x{facts.size[0]} (width x height); export one of them at the other's size"
        )
    facts.pixels = histogram(mask)
    return facts


def check(
    class_names: Sequence[str],
    splits: dict[str, Sequence[Pair]],
    read_labels: Callable[[Path], UInt8Array],
    workers: int | None = None,
) -> Report:
    """Examine every pair of every split.

    Args:
        class_names: One name per class.
        splits: Pairs by name of the split.
        read_labels: Reads a mask as class indices and 255.
        workers: Processes; None takes one per core, 1 none besides this one.
    """
    flat = [(split, pair) for split, pairs in splits.items() for pair in pairs]
    report = Report(list(class_names), {}, [], [])
    pixels = {split: np.zeros(256, dtype=np.int64) for split in splits}
    images = {split: np.zeros(256, dtype=np.int64) for split in splits}
    sizes: dict[str, Counter[tuple[int, int]]] = {split: Counter() for split in splits}
    seen: dict[bytes, tuple[str, Path]] = {}
    with Progress("checking", len(flat)) as progress:
        for (split, pair), facts in zip(flat, _examine_all([p for _, p in flat], read_labels, workers), strict=True):
            progress.advance()
            report.problems += facts.problems
            if facts.size is not None:
                sizes[split][facts.size] += 1
            if facts.pixels is not None:
                pixels[split] += facts.pixels
                images[split] += facts.pixels > 0
            if facts.digest is None:
                continue
            other_split, other = seen.setdefault(facts.digest, (split, pair.image))
            if other_split != split:
                report.problems.append(
                    f"{pair.image}: the same picture as {other}, which is in {other_split!r}, this in {split!r}; "
                    "take it out of one of them"
                )
            elif other != pair.image:
                report.notes.append(f"{pair.image}: the same picture as {other}, both in {split!r}")
    count = len(class_names)
    for split, pairs in splits.items():
        report.splits[split] = SplitReport(
            len(pairs),
            pixels[split][:count].tolist(),
            images[split][:count].tolist(),
            int(pixels[split][VOID]),
            dict(sizes[split].most_common()),
        )
    for index, name in enumerate(class_names):
        if any(pair.mask is not None for _, pair in flat) and not any(pixels[split][index] for split in splits):
            report.notes.append(f"class {name!r} ({index}) occurs in no mask")
    return report


def check_module(data: "SegmentationDataModule", splits: Sequence[str] = (), workers: int | None = None) -> Report:
    """Examine the splits of a data module.

    Args:
        data: Any of the data modules.
        splits: Which; none means those it trains, validates and tests on.
        workers: See `check`.
    """
    names = list(dict.fromkeys(splits or (data.train_split, data.val_split, data.test_split)))
    found: dict[str, Sequence[Pair]] = {}
    problems, notes = [], []
    for name in names:
        try:
            listing = data.listing(name)
        except InputError as error:
            problems.append(str(error))
            continue
        found[name] = listing.pairs
        problems += listing.problems
        notes += listing.notes
    report = check(data.class_names, found, data.label_reader, workers)
    report.problems[:0] = dict.fromkeys(problems)
    report.notes[:0] = dict.fromkeys(notes)
    return report


def check_sample(pairs: Sequence[Pair], read_labels: Callable[[Path], UInt8Array], count: int = 8) -> None:
    """Examine a few pairs from all over a split, before a long run starts.

    Raises:
        InputError: Something is wrong with one of them.
    """
    step = max(1, len(pairs) // count)
    for pair in pairs[::step][:count]:
        for problem in examine(pair, read_labels).problems:
            raise InputError(problem)


def table(report: Report) -> str:
    """The report for people."""
    lines = []
    for name, split in report.splits.items():
        common = ", ".join(f"{w}x{h} ({number:,})" for (h, w), number in list(split.sizes.items())[:3])
        more = f" and {len(split.sizes) - 3:,} other sizes" if len(split.sizes) > 3 else ""
        lines.append(f"{name}: {split.pairs:,} images, {common or 'none readable'}{more}")
    width = max([5, *map(len, report.class_names)])
    head = "".join(f"{name:>14} %{'images':>9}" for name in report.splits)
    lines += ["", f"{'class':<{width + 5}}{head}"]
    totals = {name: max(1, sum(split.pixels) + split.ignored) for name, split in report.splits.items()}
    for index, class_name in enumerate(report.class_names):
        cells = "".join(
            f"{100 * split.pixels[index] / totals[name]:>16.3f}{split.images[index]:>9,}"
            for name, split in report.splits.items()
        )
        lines.append(f"{index:>3}  {class_name:<{width}}{cells}")
    ignored = "".join(f"{100 * split.ignored / totals[name]:>16.3f}{'':>9}" for name, split in report.splits.items())
    lines += [f"     {'ignored':<{width}}{ignored}", ""]
    for kind, entries in (("note", report.notes), ("problem", report.problems)):
        lines += [f"{kind}: {entry}" for entry in entries[:_SHOWN]]
        if len(entries) > _SHOWN:
            lines.append(f"{kind}: ... and {len(entries) - _SHOWN:,} more (--json lists all)")
    lines.append(f"{len(report.problems):,} problems" if report.problems else "nothing is wrong")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data check`."""
    parser.add_argument("root", nargs="?", help="a VOC data root, or a folder of images and masks")
    parser.add_argument("--config", type=Path, metavar="YAML", help="a config whose `data:` section is checked instead")
    parser.add_argument("--data.root", dest="data_root", metavar="DIR", help="the root, in place of the config's")
    parser.add_argument("--split", nargs="+", default=[], help="splits or list files (default: train, val and test)")
    parser.add_argument("--class_names", nargs="+", metavar="NAME", help="classes of a folder of masks, in order")
    parser.add_argument("--ignore_index", type=int, nargs="+", default=[VOID], help="labels that mean no class")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: argparse.Namespace) -> int:
    """Check, print the report and return 1 where something is wrong.

    Raises:
        InputError: It cannot be told what to check.
    """
    data, unnamed = _module(args)
    report = check_module(data, args.split, args.workers)
    if unnamed:
        _drop_unused_classes(report)
        report.notes.insert(0, "no class names are known, so any label passes; give --class_names or class_names.txt")
    if args.json:
        json.dump(report.as_dict(), sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print(table(report))
    return 1 if report.problems else 0


def _module(args: argparse.Namespace) -> tuple["SegmentationDataModule", bool]:
    """The data module that the arguments describe, and whether its classes are made up."""
    # In here: workers import this module too, and have no need of torch and Lightning.
    from seg_attn.data.datamodules import MaskFolderDataModule, SegmentationDataModule, VOCDataModule

    root = args.data_root or args.root
    if args.config is not None:
        return _from_config(args.config, root, SegmentationDataModule), False
    if root is None:
        raise InputError("nothing to check: give the root of a data set, or --config with a `data:` section")
    if not Path(root).is_dir():
        raise InputError(f"{root}: there is no such folder; give the root of a data set")
    if (Path(root) / "VOCdevkit").is_dir():
        return VOCDataModule(str(root), class_names=args.class_names), False
    names = args.class_names
    if names is None and (Path(root) / CLASS_NAMES_FILE).is_file():
        names = read_list(Path(root) / CLASS_NAMES_FILE)
    made_up = [f"class {index}" for index in range(254)]
    return MaskFolderDataModule(str(root), names or made_up, ignore_index=args.ignore_index), names is None


def _from_config(path: Path, root: str | None, base: type["SegmentationDataModule"]) -> "SegmentationDataModule":
    import yaml
    from jsonargparse import ArgumentParser

    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no YAML file with a `data:` section ({type(error).__name__}: {reason})") from error
    if isinstance(section, str):
        section = {"class_path": section}
    if root is not None:
        section = {**section, "init_args": {**section.get("init_args", {}), "root": root}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "data")
    parsed = parser.parse_object({"data": section})
    # Older releases know only the second name, newer ones deprecate it.
    module: SegmentationDataModule = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed).data
    return module


def _drop_unused_classes(report: Report) -> None:
    used = 1 + max(
        (index for split in report.splits.values() for index, pixels in enumerate(split.pixels) if pixels), default=0
    )
    report.class_names = report.class_names[:used]
    for split in report.splits.values():
        split.pixels, split.images = split.pixels[:used], split.images[:used]
    report.notes = [note for note in report.notes if "occurs in no mask" not in note]


def _examine_all(
    pairs: Sequence[Pair], read_labels: Callable[[Path], UInt8Array], workers: int | None
) -> Iterator[Facts]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    workers = min(workers or cores, len(pairs) // _CHUNK + 1)
    if workers == 1:
        yield from (examine(pair, read_labels) for pair in pairs)
        return
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    # Not forked: this process has threads, and may hold a GPU.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_core) as pool:
        for facts in pool.map(_examine_chunk, chunks, [read_labels] * len(chunks)):
            yield from facts


def _examine_chunk(pairs: Iterable[Pair], read_labels: Callable[[Path], UInt8Array]) -> list[Facts]:
    return [examine(pair, read_labels) for pair in pairs]


def _one_core() -> None:
    cv2.setNumThreads(0)
