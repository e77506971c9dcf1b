"""Settings side by side on one data set: checkpoints, output strides, scales, flip, tiles, precisions, peers' masks.

One pass per setting keeps one confusion matrix per image. Everything else follows from them: mean IoU as `test` counts
it, and for every difference to the baseline row an interval over images (`seg_attn.statistics`). Predictions come from
`Predictor`, so that a row equals both `test` at its output stride and the masks of `predict`.
"""

import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from seg_attn.boundaries import boundary_counts
from seg_attn.checkpoint import Checkpoint, DataInfo, load_checkpoint, save_model
from seg_attn.data.datamodules import SegmentationDataModule
from seg_attn.data.dataset import EvalBatches, SegmentationDataset
from seg_attn.data.images import VOID, UInt8Array
from seg_attn.data.labels import LabelReader
from seg_attn.data.progress import Progress
from seg_attn.errors import InputError
from seg_attn.memory import peak_memory
from seg_attn.metrics import iou_from_confusion
from seg_attn.predict import Predictor
from seg_attn.prediction.device import resolve_device
from seg_attn.prediction.settings import Settings
from seg_attn.report import percent, signed
from seg_attn.seeds import recipes
from seg_attn.statistics import REPLICATES, Counts, Difference, Int64Array, paired_difference, verdict

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
_PLAIN = Settings()

Warn = Callable[[str], None]


def describe(mode: Settings) -> str:
    """Say what sets a mode apart from plain prediction; empty for that itself.

    Examples:
        >>> describe(Settings()), describe(Settings(scales=(0.75, 1.0), flip=True))
        ('', 'scales 0.75 1 + flip')
    """
    parts = []
    if mode.scales != _PLAIN.scales:
        parts.append(f"scales {' '.join(f'{scale:g}' for scale in mode.scales)}")
    if mode.flip:
        parts.append("flip")
    if mode.tile is not None:
        parts.append(f"tile {mode.tile}" + ("" if mode.overlap is None else f" overlap {mode.overlap}"))
    if mode.precision != _PLAIN.precision:
        parts.append(mode.precision)
    return " + ".join(parts)


def modes(
    scales: Sequence[float] | None = None,
    flip: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    precisions: Sequence[str] = (),
) -> list[Settings]:
    """List the modes that every checkpoint and output stride is run in: how, besides its output stride.

    Plain prediction always; then one for each argument given; scales and flip also together. Nothing else is combined,
    and no mode is listed twice.

    Raises:
        ValueError: If a value is out of its range; see `Settings`.

    Examples:
        >>> [describe(mode) for mode in modes(scales=(0.5, 1.0), flip=True, precisions=["bf16"])]
        ['', 'scales 0.5 1', 'flip', 'scales 0.5 1 + flip', 'bfloat16']
    """
    found = [_PLAIN]
    if scales is not None:
        found.append(Settings(scales=tuple(scales)))
    if flip:
        found.append(Settings(flip=True))
    if scales is not None and flip:
        found.append(Settings(scales=tuple(scales), flip=True))
    if tile is not None or overlap is not None:
        found.append(Settings(tile=tile, overlap=overlap))
    found += [Settings(precision=precision) for precision in precisions]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: What the row is called, such as "8" or "seed_1 at 8, flip"; all rows' names differ.
        checkpoint: What predicts; None where masks are read.
        output_stride: At which it predicts.
        mode: How it predicts.
        predictions: Folder of masks made elsewhere; None where a checkpoint predicts.
    """

    name: str
    checkpoint: Checkpoint | None = None
    output_stride: int | None = None
    mode: Settings = _PLAIN
    predictions: Path | None = None

    def predictor(self, device: str | torch.device) -> Predictor:
        """Build the predictor from the weights in memory: the file may be another one by now."""
        assert self.checkpoint is not None
        model = self.checkpoint.build_model(self.output_stride)
        return Predictor(model, self.checkpoint.data, device, **asdict(self.mode))


def settings(
    checkpoints: Sequence[Path],
    output_strides: Sequence[int] = (),
    chosen_modes: Sequence[Settings] = (_PLAIN,),
    predictions: Sequence[Path] = (),
) -> list[Setting]:
    """List checkpoints × output strides × modes, and then the folders of masks, each with a name of its own.

    Args:
        checkpoints: Files of `fit` or `import`.
        output_strides: 8, 16 or 32; none means each checkpoint's own.
        chosen_modes: See `modes`.
        predictions: Folders of masks.

    Raises:
        InputError: If nothing is to be compared, something is named twice, or a checkpoint cannot be read.
    """
    for argument, given in (("--ckpt_path", checkpoints), ("--predictions", predictions)):
        resolved = [path.resolve() for path in given]
        if twice := [path for path in given if resolved.count(path.resolve()) > 1]:
            raise InputError(f"{argument} names {twice[0]} twice: leave one of them out")
    if len(set(output_strides)) < len(output_strides):
        raise InputError(f"--output_stride names one twice: {' '.join(map(str, output_strides))}; leave it out")
    if bad := [stride for stride in output_strides if stride not in (8, 16, 32)]:
        raise InputError(f"--output_stride takes 8, 16 and 32, got {bad[0]}")
    if not checkpoints and not predictions:
        raise InputError("nothing to compare: name checkpoints with --ckpt_path or folders of masks with --predictions")
    found = []
    for short, path in zip(short_names(checkpoints), checkpoints, strict=True):
        checkpoint = load_checkpoint(path)
        for stride in output_strides or [int(checkpoint.hyper_parameters.get("output_stride", 16))]:
            for mode in chosen_modes:
                name = ", ".join(filter(None, (str(stride), describe(mode))))
                if len(checkpoints) > 1:
                    name = f"{short} at {name}"
                found.append(Setting(name, checkpoint, stride, mode))
    for short, folder in zip(short_names(predictions), predictions, strict=True):
        if not folder.is_dir():
            raise InputError(f"--predictions {folder}: no such folder; name one that holds masks")
        found.append(Setting(f"masks in {short}", predictions=folder))
    return found


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name paths by what sets them apart: the parts that they do not share at either end; fit to print.

    Examples:
        >>> short_names([Path("runs/fit/version_0/best.ckpt"), Path("runs/fit/version_1/best.ckpt")])
        ['version_0', 'version_1']
        >>> short_names([Path("a/b.ckpt")]), short_names([Path("x/a.ckpt"), Path("x/y/a.ckpt")])
        (['b'], ['a', 'y/a'])
        >>> short_names([Path("a.ckpt"), Path("a")])
        ['a.ckpt', 'a']
    """
    bare = [path.with_suffix("") if path.is_file() or path.suffix == ".ckpt" else path for path in paths]
    parts = [path.parts for path in (bare if len(set(bare)) == len(paths) else paths)]
    if len(parts) < 2:
        return [printable(names[-1]) for names in parts]
    shortest = min(map(len, parts))
    start, end = 0, 0
    while start < shortest - 1 and len({names[start] for names in parts}) == 1:
        start += 1
    while end < shortest - start - 1 and len({names[-1 - end] for names in parts}) == 1:
        end += 1
    return [printable("/".join(names[start : len(names) - end])) for names in parts]


def printable(path: str | Path) -> str:
    r"""Write a path as text that any stream takes: bytes of a file's name that are no UTF-8 as `\xNN`.

    Examples:
        >>> print(printable("caf\udce9.jpg"))
        caf\xe9.jpg
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass
class Row:
    """What a setting came to.

    Attributes:
        setting: Which one.
        confusion: The whole set's matrix, int64 (C, C) [target, prediction].
        counts: Pixels, per image and class.
        boundary: Boundary pixels, per image and class.
        device: Where it ran, such as "cpu" or "cuda"; None for masks made elsewhere.
        images_per_s: Images per second of normalising, network and classes, over the whole pass; without decoding.
        latency_ms: Milliseconds of one batch (one image by default), median.
        peak_memory_bytes: On the CPU resident memory of a process of its own, on a GPU what the setting took there.
        gflops: Of one image of `gflops_size`, two per multiply-add.
        gflops_size: Height and width of the set's image of median area.
        parameters: Of the network, without an auxiliary head.
        masks: Every image's prediction, packed; see `unpack`.
    """

    setting: Setting
    confusion: Int64Array
    counts: Counts
    boundary: Counts
    device: str | None = None
    images_per_s: float | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None
    gflops: float | None = None
    gflops_size: tuple[int, int] | None = None
    parameters: int | None = None
    masks: list[bytes] = field(default_factory=list)

    @property
    def per_class(self) -> list[float]:
        """IoU of every class; NaN for one that occurs nowhere."""
        values: list[float] = iou_from_confusion(torch.from_numpy(self.confusion)).tolist()
        return values

    @property
    def miou(self) -> float:
        """Mean IoU, the same operations as `test`'s."""
        return float(iou_from_confusion(torch.from_numpy(self.confusion)).nanmean())


@dataclass
class Comparison:
    """Rows, and what they differ by.

    Attributes:
        rows: One per setting.
        baseline: Position of the row that the others are compared to.
        class_names: One name per class.
        palette: RGB per class.
        dataset: The images and labels; in the order of the rows' counts.
        differences: Mean IoU against the baseline, per row.
        boundary_differences: Boundary mIoU likewise.
        seed: Seed of the draws of images.
    """

    rows: list[Row]
    baseline: int
    class_names: list[str]
    palette: list[list[int]]
    dataset: SegmentationDataset
    differences: list[Difference]
    boundary_differences: list[Difference]
    seed: int

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.dataset)

    def verdicts(self) -> list[str]:
        """One sentence per row but the baseline's: what its difference shows."""
        return [self.verdict(index) for index in range(len(self.rows)) if index != self.baseline]

    def verdict(self, index: int) -> str:
        """Say what a row's difference shows."""
        setting, baseline = self.rows[index].setting, self.rows[self.baseline].setting
        same = setting.checkpoint is not None and setting.checkpoint is baseline.checkpoint
        return verdict(
            self.differences[index], setting.name, baseline.name, "this checkpoint" if same else "these predictions"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as plain values: fractions in full precision, None where unknown or undefined."""
        seeds = self._seeds()
        return [self._record(index, row, seeds[index]) for index, row in enumerate(self.rows)]

    def _record(self, index: int, row: Row, seeds: dict[str, Any] | None) -> dict[str, Any]:
        setting, difference = row.setting, self.differences[index]
        boundary = self.boundary_differences[index]
        return {
            "name": setting.name,
            "checkpoint": None if setting.checkpoint is None else str(setting.checkpoint.path),
            "predictions": None if setting.predictions is None else str(setting.predictions),
            "output_stride": setting.output_stride,
            "scales": list(setting.mode.scales) if setting.checkpoint else None,
            "flip": setting.mode.flip if setting.checkpoint else None,
            "tile": setting.mode.tile,
            "overlap": setting.mode.overlap,
            "precision": setting.mode.precision if setting.checkpoint else None,
            "device": row.device,
            "images": self.images,
            "miou": _known(row.miou),
            "per_class": self._by_name(row.per_class),
            "boundary_miou": _known(row.boundary.miou),
            "boundary_per_class": self._by_name(row.boundary.iou.tolist()),
            "baseline": index == self.baseline,
            "difference": _known(difference.value),
            "ci95": [_known(end) for end in difference.interval],
            "per_class_difference": self._by_name(difference.per_class.tolist()),
            "per_class_ci95": {
                name: [_known(end) for end in ends]
                for name, ends in zip(self.class_names, difference.per_class_interval.tolist(), strict=True)
            },
            "boundary_difference": _known(boundary.value),
            "boundary_ci95": [_known(end) for end in boundary.interval],
            "verdict": None if index == self.baseline else self.verdict(index),
            "seeds": seeds,
            "images_per_s": row.images_per_s,
            "latency_ms": row.latency_ms,
            "peak_memory_bytes": row.peak_memory_bytes,
            "gflops": row.gflops,
            "gflops_size": None if row.gflops_size is None else list(row.gflops_size),
            "parameters": row.parameters,
            "confusion": row.confusion.tolist(),
        }

    def _by_name(self, values: Sequence[float]) -> dict[str, float | None]:
        return {name: _known(value) for name, value in zip(self.class_names, values, strict=True)}

    def _seeds(self) -> list[dict[str, Any] | None]:
        """For each row, mean and deviation over the checkpoints that are seeds of one recipe in one setting."""
        keys = [
            None if recipe is None else (recipe, row.setting.output_stride, row.setting.mode)
            for recipe, row in zip(recipes([row.setting.checkpoint for row in self.rows]), self.rows, strict=True)
        ]
        found: list[dict[str, Any] | None] = []
        for key in keys:
            members = [row for row, other in zip(self.rows, keys, strict=True) if key is not None and other == key]
            found.append(self._over_seeds(members, keys[self.baseline]) if len(members) > 1 else None)
        return found

    def _over_seeds(self, members: Sequence[Row], baseline_key: tuple[Any, ...] | None) -> dict[str, Any]:
        mious = [row.miou for row in members]
        baseline = self.rows[self.baseline].setting
        # The same checkpoints in the baseline's setting, one for one.
        partners = {
            id(row.setting.checkpoint): row.miou
            for row in self.rows
            if baseline_key is not None
            and row.setting.checkpoint is not None
            and (row.setting.output_stride, row.setting.mode) == (baseline.output_stride, baseline.mode)
        }
        pairs = [
            row.miou - partners[id(row.setting.checkpoint)] for row in members if id(row.setting.checkpoint) in partners
        ]
        same = (members[0].setting.output_stride, members[0].setting.mode) == (baseline.output_stride, baseline.mode)
        paired = len(pairs) == len(members) and not same
        return {
            "checkpoints": len(members),
            "names": [row.setting.name.rpartition(" at ")[0] for row in members],
            "miou_mean": statistics.fmean(mious),
            "miou_std": statistics.stdev(mious),
            "compared_to": baseline.name.rpartition(" at ")[2] if paired else None,
            "difference_mean": statistics.fmean(pairs) if paired else None,
            "difference_std": statistics.stdev(pairs) if paired else None,
        }

    def disagreement(self) -> list[float]:
        """For each image, the share of labelled pixels on which the rows differ; for one row, of those it has wrong."""
        shares = []
        for index in range(self.images):
            _, target = self.dataset.load(index)
            assert target is not None
            masks = [unpack(row.masks[index], target.shape) for row in self.rows]
            differs = np.zeros(target.shape, dtype=bool)
            for mask in masks[1:]:
                differs |= mask != masks[0]
            if len(masks) == 1:
                differs = masks[0] != target
            labelled = target != VOID
            shares.append(float(differs[labelled].mean()) if labelled.any() else 0.0)
        return shares


def seed_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each setting that several training runs of one recipe were evaluated in.

    Args:
        records: See `Comparison.records`.
    """
    lines = []
    several = len({tuple(record["seeds"]["names"]) for record in records if record["seeds"]}) > 1
    for record in records:
        if (seeds := record["seeds"]) is None:
            continue
        setting = str(record["name"]).rpartition(" at ")[2]
        which = f" ({', '.join(seeds['names'])})" if several else ""
        line = (
            f"over {seeds['checkpoints']} training runs{which} at {setting}: mIoU {percent(seeds['miou_mean'])} ± "
            f"{percent(seeds['miou_std'])} (mean ± standard deviation)"
        )
        if seeds["difference_mean"] is not None:
            line += f"; run by run against {seeds['compared_to']}: {signed(seeds['difference_mean'])} ± "
            line += percent(seeds["difference_std"])
        lines.append(line)
    return list(dict.fromkeys(lines))


def compare(
    data: SegmentationDataModule,
    chosen: Sequence[Setting],
    baseline: str | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    replicates: int = REPLICATES,
    warn: Warn = lambda _: None,
) -> Comparison:
    """Evaluate every setting on the data's test split.

    Args:
        data: Its test split is what is predicted.
        chosen: The rows; see `settings`.
        baseline: Name of the row that the others are compared to; None takes the first.
        device: Where networks run.
        seed: Seed of the draws of images.
        replicates: Draws of images.
        warn: Called with a line on what a reader should know.

    Raises:
        InputError: If a checkpoint's classes are not the data's, a mask is missing or wrong, no row has that name, or
            this machine has no such device.
    """
    place = resolve_device(device)
    names = [setting.name for setting in chosen]
    if baseline is not None and baseline not in names:
        raise InputError(f"--baseline {baseline!r} is no row; the rows are: {'; '.join(names)}")
    data.prepare_data()
    data.setup("test")
    dataset = data.dataset(data.test_split)
    _check_checkpoints(chosen, data, warn)
    images = [pair.image for pair in dataset.pairs]
    masks = [None if setting.predictions is None else _find_masks(setting.predictions, images) for setting in chosen]
    sizes = _sizes(dataset)
    done: dict[int, Row] = {}
    # Masks come first: one that is wrong is found before hours go into networks.
    for number, position in enumerate(sorted(range(len(chosen)), key=lambda index: masks[index] is None), start=1):
        setting, found = chosen[position], masks[position]
        label = f"[{number}/{len(chosen)}] {setting.name}"
        if found is None:
            done[position] = _predict(setting, dataset, data, sizes, label, place, warn)
        else:
            done[position] = _read_masks(setting, found, dataset, data, label)
    rows = [done[position] for position in range(len(chosen))]
    first = 0 if baseline is None else names.index(baseline)
    return Comparison(
        rows=rows,
        baseline=first,
        class_names=list(data.class_names),
        palette=[list(colour) for colour in data.palette],
        dataset=dataset,
        differences=[paired_difference(row.counts, rows[first].counts, replicates, seed) for row in rows],
        boundary_differences=[paired_difference(row.boundary, rows[first].boundary, replicates, seed) for row in rows],
        seed=seed,
    )


def confusion_matrix(target: UInt8Array, prediction: UInt8Array, num_classes: int) -> Int64Array:
    """Count one image's labelled pixels, int64 (C, C) [target, prediction]; both are uint8 (H, W), 255 in `target`."""
    labelled = target != VOID
    pairs = target[labelled].astype(np.int64) * num_classes + prediction[labelled]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def unpack(packed: bytes, shape: tuple[int, ...]) -> UInt8Array:
    """Turn a row's packed mask into uint8 of its shape."""
    return np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(shape)


# --- one row ---------------------------------------------------------------------------------------------------------


class _Counter:
    """Collects what a row counts, image by image in any order."""

    def __init__(self, images: int, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.counts = Counts.zeros(images, num_classes)
        self.boundary = Counts.zeros(images, num_classes)
        self.masks = [b""] * images

    def add(self, index: int, target: UInt8Array, prediction: UInt8Array) -> None:
        confusion = confusion_matrix(target, prediction, self.num_classes)
        self.confusion += confusion
        counts = Counts.of(confusion[None])
        self.counts.intersection[index], self.counts.union[index] = counts.intersection[0], counts.union[0]
        near = boundary_counts(target, prediction, self.num_classes)
        self.boundary.intersection[index], self.boundary.union[index] = near
        self.masks[index] = zlib.compress(np.ascontiguousarray(prediction).tobytes(), 1)

    def row(self, setting: Setting, **figures: Any) -> Row:
        return Row(setting, self.confusion, self.counts, self.boundary, masks=self.masks, **figures)


def _predict(
    setting: Setting,
    dataset: SegmentationDataset,
    data: SegmentationDataModule,
    sizes: Sequence[tuple[int, int]],
    label: str,
    place: torch.device,
    warn: Warn,
) -> Row:
    predictor = setting.predictor(place)
    counter = _Counter(len(dataset), data.num_classes)
    predictor(dataset.load(0)[0])  # the first one is slower than the others
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    seconds = []
    with Progress(label, len(dataset)) as progress:
        for batch in EvalBatches(dataset, data.eval_batch_size).batches:
            images, targets = zip(*_labelled(dataset, batch), strict=True)
            start = time.perf_counter()
            masks = predictor.batch(images, len(batch))
            seconds.append(time.perf_counter() - start)
            for index, target, mask in zip(batch, targets, masks, strict=True):
                counter.add(index, target, mask)
            progress.advance(len(batch))
    areas = [height * width for height, width in sizes]
    typical = sorted(range(len(areas)), key=areas.__getitem__)[len(areas) // 2]
    largest = max(range(len(areas)), key=areas.__getitem__)
    # A faster form of the network leaves some of its operations out: counted are those of the network itself.
    mode = asdict(replace(setting.mode, precision="float32"))
    with FlopCounterMode(display=False) as flops:
        Predictor(predictor.model, predictor.data, place, **mode)(dataset.load(typical)[0])
    if place.type == "cuda":
        memory: int | None = torch.cuda.max_memory_allocated(place)
    else:
        memory = _peak_memory(setting, predictor, dataset.pairs[largest].image)
        if memory is None:
            warn(f"{setting.name}: peak memory could not be measured")
    used = [weight for name, weight in predictor.model.named_parameters() if not name.startswith("aux_classifier.")]
    return counter.row(
        setting,
        device=str(place),
        images_per_s=len(dataset) / sum(seconds),
        latency_ms=1000 * statistics.median(seconds),
        peak_memory_bytes=memory,
        gflops=flops.get_total_flops() / 1e9,
        gflops_size=sizes[typical],
        parameters=sum(weight.numel() for weight in used),
    )


def _peak_memory(setting: Setting, predictor: Predictor, image: Path) -> int | None:
    """Measure another process on a copy of the weights: the file that they came from may hold others by now."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.ckpt"
        save_model(copy, predictor.model, predictor.data)
        return peak_memory(copy, image, asdict(setting.mode), torch.get_num_threads())


def _labelled(dataset: SegmentationDataset, batch: Sequence[int]) -> Iterator[tuple[UInt8Array, UInt8Array]]:
    for index in batch:
        image, target = dataset.load(index)
        assert target is not None  # `setup` has seen to it
        yield image, target


def _sizes(dataset: SegmentationDataset) -> list[tuple[int, int]]:
    """Height and width of every image; reads every file once, before hours go into some of them."""
    sizes = []
    with Progress("reading", len(dataset)) as progress:
        for index in range(len(dataset)):
            height, width, _ = dataset.load(index)[0].shape
            sizes.append((height, width))
            progress.advance()
    return sizes


def _read_masks(
    setting: Setting, found: Sequence[Path], dataset: SegmentationDataset, data: SegmentationDataModule, label: str
) -> Row:
    reader = _mask_reader(data)
    counter = _Counter(len(dataset), data.num_classes)
    with Progress(label, len(dataset)) as progress:
        for index, path in enumerate(found):
            target = dataset.load(index)[1]
            assert target is not None
            mask = reader(path)
            if mask.shape != target.shape:
                raise InputError(
                    f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its label {target.shape[1]}x"
                    f"{target.shape[0]} (width x height); write predictions at their image's own size"
                )
            if (nothing := int(((mask == VOID) & (target != VOID)).sum())) > 0:
                raise InputError(
                    f"{path}: {nothing} pixels that count are {VOID}, which is no class; "
                    "a prediction must name a class for each of them"
                )
            counter.add(index, target, mask)
            progress.advance()
    return counter.row(setting)


def _mask_reader(data: SegmentationDataModule) -> LabelReader:
    """Reads class indices, and colours of the data's palette where they tell the classes apart."""
    distinct = len({tuple(colour) for colour in data.palette}) == data.num_classes
    return LabelReader(data.num_classes, colors=data.palette if distinct else None)


def _find_masks(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Find each image's mask by its stem, anywhere under the folder; where stems repeat, by their folders' names.

    Raises:
        InputError: If an image has none, or more than one, or two images would share one.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in MASK_SUFFIXES and path.is_file():
            by_stem.setdefault(path.stem, []).append(path)
    found, missing = [], []
    owners: dict[Path, Path] = {}
    for image in images:
        candidates = by_stem.get(image.stem, [])
        if len(candidates) > 1:
            shared = [_shared_parents(path.relative_to(folder), image) for path in candidates]
            candidates = [path for path, depth in zip(candidates, shared, strict=True) if depth == max(shared)]
        if len(candidates) > 1:
            raise InputError(
                f"--predictions {folder}: {candidates[0]} and {candidates[1]} could both be the mask of {image}; "
                "leave one of them out"
            )
        if not candidates:
            missing.append(image)
            continue
        found += candidates
        if (other := owners.setdefault(candidates[0], image)) != image:
            raise InputError(
                f"--predictions {folder}: {candidates[0]} could be the mask of {other} and of {image}; "
                "put the masks into folders named as the images' are"
            )
    if missing:
        more = f" (and {len(missing) - 1} more of {len(images)})" if missing[1:] else ""
        raise InputError(f"--predictions {folder}: no mask {missing[0].stem}.png for {missing[0]}{more}")
    return found


def _shared_parents(mask: Path, image: Path) -> int:
    depth = 0
    for left, right in zip(reversed(mask.parts[:-1]), reversed(image.parts[:-1]), strict=False):
        if left != right:
            break
        depth += 1
    return depth


def _check_checkpoints(chosen: Sequence[Setting], data: SegmentationDataModule, warn: Warn) -> None:
    """Compare each checkpoint's classes with the data's, and see that its weights make a network."""
    checkpoints = [setting.checkpoint for setting in chosen if setting.checkpoint is not None]
    for checkpoint in {checkpoint.path: checkpoint for checkpoint in checkpoints}.values():
        _check_data(checkpoint.path, checkpoint.data, data, warn)
        checkpoint.build_model()


def _check_data(path: Path, info: DataInfo, data: SegmentationDataModule, warn: Warn) -> None:
    if len(info.class_names) != data.num_classes:
        raise InputError(
            f"{path} has {len(info.class_names)} classes and the data {data.num_classes} "
            f"({', '.join(data.class_names)}): compare checkpoints of these data, or name theirs"
        )
    if info.class_names != DataInfo.default(data.num_classes).class_names:  # which say nothing
        pairs = zip(info.class_names, data.class_names, strict=True)
        if differing := [(index, *names) for index, names in enumerate(pairs) if names[0] != names[1]]:
            index, own, given = differing[0]
            more = f" (and {len(differing) - 1} more)" if differing[1:] else ""
            warn(
                f"{path}: class {index} is {own!r} to the checkpoint and {given!r} in the data{more}; "
                "unless that is another name for the same, its row counts the wrong pixels"
            )
    if (list(info.mean), list(info.std)) != (list(data.mean), list(data.std)):
        warn(
            f"{path}: images are normalised as in its training (mean {info.mean}, std {info.std}), "
            f"not as the data say (mean {data.mean}, std {data.std})"
        )


def _known(value: float) -> float | None:
    return None if value != value else value
