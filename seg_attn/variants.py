"""Does it help: one recipe trained with each attention block and each fusion, over the same seeds, as one table.

Every run is `seg-attn fit` and then `seg-attn test` in this process, in a folder of its own. What is finished is kept:
started again, the same command goes on where it was stopped, within a run too.
"""

import contextlib
import csv
import gc
import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer

from seg_attn import training
from seg_attn.attention import ATTENTION
from seg_attn.attention.arguments import unknown_message
from seg_attn.callbacks import RunInterruptedError
from seg_attn.checkpoint import load_checkpoint
from seg_attn.data.images import write_bytes
from seg_attn.errors import InputError
from seg_attn.fusion import FUSION
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS
from seg_attn.prices import describe_device, forward_seconds
from seg_attn.report import ABSENT
from seg_attn.summary import summarize

PLAIN = "none"
DEFAULT_VARIANTS = (PLAIN, *ATTENTION, *FUSION)
DEFAULT_FUSION = "aff"  # that of DeepLabV3
TIMED_FORWARDS = 10
FINAL = "final.ckpt"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One network of a comparison.

    Attributes:
        name: Its name in the table, and that of its folder.
        overlay: What its config lays over the base config.
    """

    name: str
    overlay: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What all variants share.

    Attributes:
        configs: Config files, later ones over earlier ones.
        overrides: Arguments of `seg-attn fit` that win over the config files, such as ``--trainer.max_epochs 5``.
    """

    configs: Sequence[Path]
    overrides: Sequence[str] = ()

    def fingerprint(self, variant: Variant, seed: int) -> str:
        """Tell runs with other settings apart: a hash of the configs' contents, the overlay, overrides and seed."""
        contents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in self.configs]
        text = json.dumps([contents, variant.overlay, list(self.overrides), seed], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        seed: Its seed.
        miou: On the test split after the last epoch, a fraction.
        per_class: IoU by class name; None for a class that occurs nowhere.
        fit_seconds: Wall time of the training, its validations included.
        checkpoint: What was tested.
        fingerprint: See `Recipe.fingerprint`.
    """

    seed: int
    miou: float
    per_class: dict[str, float | None]
    fit_seconds: float
    checkpoint: str
    fingerprint: str


@dataclass
class Row:
    """One line of the table.

    Attributes:
        variant: The variant's name.
        attention: The network's `attention`.
        fusion: The network's `fusion`.
        same_as: The variant that is the same network, whose runs these are.
        runs: The finished runs.
        errors: What went wrong in the others, by seed.
        parameters: Of the network.
        flops: Of one forward at the comparison's size.
        seconds_per_image: Of one forward at the comparison's size, median.
    """

    variant: str
    attention: Any = None
    fusion: Any = None
    same_as: str | None = None
    runs: list[Run] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    parameters: int | None = None
    flops: int | None = None
    seconds_per_image: float | None = None

    @property
    def miou(self) -> tuple[float, float] | None:
        """Mean and standard deviation (n − 1; NaN for one seed) over the seeds."""
        return _mean_std([run.miou for run in self.runs])

    @property
    def fit_seconds(self) -> float | None:
        """Mean over the seeds."""
        return statistics.fmean(run.fit_seconds for run in self.runs) if self.runs else None

    def difference(self, baseline: "Row") -> tuple[float, float] | None:
        """Mean and standard deviation of mIoU minus the baseline's, seed by seed."""
        other = {run.seed: run.miou for run in baseline.runs}
        return _mean_std([run.miou - other[run.seed] for run in self.runs if run.seed in other])


@dataclass
class Comparison:
    """The table.

    Attributes:
        title: What was compared, in a line.
        seeds: The seeds of every variant.
        rows: One per variant; the first is what the others are compared to.
        measured: On what FLOPs and time were measured.
    """

    title: str
    seeds: list[int]
    rows: list[Row]
    measured: str = "not measured yet"

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as plain values: fractions, seconds and counts in full precision, None where unknown."""
        records = []
        for row in self.rows:
            miou, difference = row.miou or (None, None), row.difference(self.rows[0]) or (None, None)
            records.append(
                {
                    "variant": row.variant,
                    "attention": row.attention,
                    "fusion": row.fusion,
                    "same_as": row.same_as,
                    "seeds": len(row.runs),
                    "miou_mean": miou[0],
                    "miou_std": _known(miou[1]),
                    "difference_mean": difference[0],
                    "difference_std": _known(difference[1]),
                    "parameters": row.parameters,
                    "flops": row.flops,
                    "seconds_per_image": row.seconds_per_image,
                    "fit_seconds": row.fit_seconds,
                    "runs": [asdict(run) for run in row.runs],
                    "errors": {str(seed): message for seed, message in row.errors.items()},
                }
            )
        return records

    def markdown(self) -> str:
        """Lay the table out as Markdown, with what the columns mean below it."""
        first = self.rows[0].variant
        lines = [
            self.title,
            "",
            f"| variant | mIoU (%) | against `{first}` | parameters (M) | GFLOPs | ms per image | training (min) |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            alike = f" (is `{row.same_as}`)" if row.same_as else ""
            cells = [
                f"`{row.variant}`{alike}",
                _percent(row.miou),
                ABSENT if row is self.rows[0] else _percent(row.difference(self.rows[0]), signed=True),
                ABSENT if row.parameters is None else f"{row.parameters / 1e6:.3f}",
                ABSENT if row.flops is None else f"{row.flops / 1e9:.3f}",
                ABSENT if row.seconds_per_image is None else f"{1e3 * row.seconds_per_image:.1f}",
                ABSENT if row.fit_seconds is None else f"{row.fit_seconds / 60:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        seeds = ", ".join(map(str, self.seeds))
        lines += [
            "",
            f"mIoU on the test split after the last epoch: mean ± standard deviation over the seeds {seeds}. "
            "Differences are taken seed by seed; one that is not several times its ± is noise. FLOPs (two per "
            f"multiply-add) and time: {self.measured}.",
        ]
        failed = [(row.variant, seed, text) for row in self.rows for seed, text in row.errors.items()]
        lines += ["", *(f"- failed: `{name}`, seed {seed}: {text}" for name, seed, text in failed)] if failed else []
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write `variants.md`, `variants.json` and `variants.csv` into a folder, each whole or not at all."""
        records = self.records()
        content = {"title": self.title, "measured": self.measured, "seeds": self.seeds, "rows": records}
        table = io.StringIO()
        flat = [_flat(record, self.seeds) for record in records]
        writer = csv.DictWriter(table, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        texts = {
            "variants.md": self.markdown(),
            "variants.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
            "variants.csv": table.getvalue(),
        }
        for name, text in texts.items():
            write_bytes(folder / name, text.encode())
        return [folder / name for name in texts]


class KeepLastEpoch(Callback):
    """Keeps the run as it is after every epoch, in `checkpoints/final.ckpt` of its folder.

    Variants are compared after the last epoch: the best one of several on the data it is judged by would flatter
    whatever varies most. Lightning's `save_last` does not do: it copies what was saved last, which is the best epoch.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; the file is replaced in one step."""
        trainer.save_checkpoint(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / FINAL)


def resolve_variants(names: Sequence[str], position: str, base_model: Mapping[str, Any]) -> list[Variant]:
    """Turn what the user names into overlays.

    Args:
        names: "none" (no attention); a block of `ATTENTION`, at `position` or as ``name@position``; a fusion of
            `FUSION`; or the path of a YAML overlay.
        position: Where attention blocks stand.
        base_model: The base config's `model` section: blocks are tried with its fusion, fusions with its attention.

    Raises:
        InputError: For a name, position or file that does not exist, or a name given twice.

    Examples:
        >>> [variant.overlay["model"] for variant in resolve_variants(["se@layer4", "add"], "aspp", {})]
        [{'attention': {'layer4': 'se'}, 'fusion': 'aff'}, {'attention': None, 'fusion': 'add'}]
    """
    variants: dict[str, Variant] = {}
    for name in names:
        variant = _resolve(name, position, base_model)
        if variant.name in variants:
            raise InputError(f"--variants names {variant.name!r} twice: leave one of them out")
        variants[variant.name] = variant
    return list(variants.values())


def base_model(configs: Sequence[Path]) -> dict[str, Any]:
    """Return the `model` section of some config files, later ones over earlier ones.

    Raises:
        InputError: If a file is missing or is no config.
    """
    model: dict[str, Any] = {}
    for path in configs:
        model |= _read_yaml(path).get("model") or {}
    return model


def run_variants(
    recipe: Recipe, variants: Sequence[Variant], seeds: Sequence[int], folder: Path, say: Say = print
) -> Comparison:
    """Train and test every variant with every seed, and write the table after every run.

    Args:
        recipe: What the variants share.
        variants: The networks; the first is what the others are compared to.
        seeds: Seeds of every variant.
        folder: One folder per variant and seed is made in it, and the table.
        say: Called with a line for every run.

    Returns:
        The table; runs that failed are in it, with their messages.

    Raises:
        InputError: If `folder` holds runs with other settings, or every run failed for one reason.
        RunInterruptedError: If a signal stopped it; the same call goes on from there.
    """
    rows = [Row(variant.name) for variant in variants]
    first_of: dict[str, Row] = {}
    for variant, row in zip(variants, rows, strict=True):
        twin = first_of.setdefault(json.dumps(variant.overlay, sort_keys=True, default=str), row)
        row.same_as = None if twin is row else twin.variant
    table = Comparison(_title(recipe, variants, seeds), list(seeds), rows)
    own = [(variant, row) for variant, row in zip(variants, rows, strict=True) if row.same_as is None]
    _check_kept_runs(recipe, [variant for variant, _ in own], seeds, folder)
    # Seed by seed, so that a comparison that is stopped has compared something.
    todo = [(variant, row, seed) for seed in seeds for variant, row in own]
    for number, (variant, row, seed) in enumerate(todo, start=1):
        head = f"[{number}/{len(todo)}] {variant.name}, seed {seed}"
        try:
            run, fresh = _finished(folder, variant, seed), False
            if run is None:
                say(f"{head}: training in {_run_folder(folder, variant, seed)}")
                run, fresh = _train(recipe, variant, seed, folder), True
        except RunInterruptedError:
            say("the same command goes on from here")
            raise
        except Exception as error:
            row.errors[seed] = " ".join(str(error).split()) or type(error).__name__
            say(f"{head}: failed: {row.errors[seed]}")
            continue
        row.runs.append(run)
        say(f"{head}: mIoU {100 * run.miou:.2f} %, {run.fit_seconds:.0f} s{'' if fresh else ', from an earlier call'}")
        _share(rows)
        table.write(folder)
    messages = {message for row in rows for message in row.errors.values()}
    if len(messages) == 1 and not any(row.runs for row in rows):
        raise InputError(f"every variant failed: {messages.pop()}")
    _measure(table)
    _share(rows)
    table.write(folder)
    return table


# --- variants --------------------------------------------------------------------------------------------------------


def _resolve(name: str, position: str, base: Mapping[str, Any]) -> Variant:
    if name.endswith((".yaml", ".yml")):
        return Variant(Path(name).stem, _read_yaml(Path(name)))
    block, _, own_position = name.partition("@")
    place = own_position or position
    if place not in ATTENTION_POSITIONS:
        raise InputError(unknown_message("attention position", place, ATTENTION_POSITIONS))
    model = {"attention": base.get("attention"), "fusion": base.get("fusion", DEFAULT_FUSION)}
    if block in ATTENTION:
        model["attention"] = {place: block}
    elif name == PLAIN:
        model["attention"] = None
    elif name in FUSION:
        model["fusion"] = name
    else:
        raise InputError(f"{unknown_message('variant', name, DEFAULT_VARIANTS)}, or a YAML overlay")
    return Variant(name, {"model": model})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a YAML config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a config: it must hold keys such as `model:`")
    return content


# --- runs ------------------------------------------------------------------------------------------------------------


def _run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / variant.name / f"seed_{seed}"


def _finished(folder: Path, variant: Variant, seed: int) -> Run | None:
    path = _run_folder(folder, variant, seed) / "result.json"
    return Run(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _check_kept_runs(recipe: Recipe, variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> None:
    """Refuse to mix runs of different settings, and leave a mark of ours in every folder that is to be written."""
    for variant in variants:
        for seed in seeds:
            run_folder = _run_folder(folder, variant, seed)
            mark, fingerprint = run_folder / "fingerprint.txt", recipe.fingerprint(variant, seed)
            if mark.exists() and mark.read_text(encoding="utf-8").strip() != fingerprint:
                raise InputError(
                    f"{run_folder} holds a run with other settings: name another --output, or remove that folder"
                )
    for variant in variants:
        for seed in seeds:
            run_folder = _run_folder(folder, variant, seed)
            run_folder.mkdir(parents=True, exist_ok=True)
            write_bytes(run_folder / "fingerprint.txt", f"{recipe.fingerprint(variant, seed)}\n".encode())


def _train(recipe: Recipe, variant: Variant, seed: int, folder: Path) -> Run:
    run_folder = _run_folder(folder, variant, seed)
    overlay = folder / variant.name / "overlay.yaml"
    write_bytes(overlay, yaml.safe_dump(dict(variant.overlay), sort_keys=False).encode())
    arguments = [argument for path in [*recipe.configs, overlay] for argument in ("--config", str(path))]
    arguments += [*recipe.overrides, f"--seed_everything={seed}", f"--trainer.default_root_dir={run_folder}"]
    kept = f"fit/version_*/checkpoints/{FINAL}"
    begun = _latest([*run_folder.glob(kept), *run_folder.glob("fit/version_*/checkpoints/interrupted.ckpt")])
    clock = run_folder / "fit_seconds.txt"
    spent = float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0
    start = time.perf_counter()
    try:
        resume = [] if begun is None else [f"--ckpt_path={begun}"]
        training.run(["fit", *arguments, "--trainer.callbacks+=seg_attn.variants.KeepLastEpoch", *resume])
    finally:
        spent += time.perf_counter() - start
        write_bytes(clock, repr(spent).encode())
        gc.collect()  # loaders and their processes, which hang on to each other in cycles
    last = _latest(run_folder.glob(kept))
    if last is None:
        raise InputError("the run ended without finishing an epoch: give it at least one")
    with contextlib.redirect_stdout(io.StringIO()):
        training.run(["test", *arguments, f"--ckpt_path={last}"])
    metrics = _latest(run_folder.glob("test/version_*/test_metrics.json"))
    assert metrics is not None
    report = json.loads(metrics.read_text(encoding="utf-8"))
    run = Run(seed, report["miou"], report["per_class"], spent, str(last), recipe.fingerprint(variant, seed))
    write_bytes(run_folder / "result.json", (json.dumps(asdict(run), indent=2) + "\n").encode())
    return run


def _latest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


# --- the table -------------------------------------------------------------------------------------------------------


def _measure(table: Comparison) -> None:
    """Fill in what the networks are and cost; all are timed in turns, on the CPU."""
    trained = [row for row in table.rows if row.runs and row.same_as is None]
    if not trained:
        return
    height, width = _crop_size(Path(trained[0].runs[0].checkpoint))
    table.measured = f"one image of {height} × {width}, {describe_device(torch.device('cpu'))}"
    models = [load_checkpoint(row.runs[0].checkpoint).build_model() for row in trained]
    image = torch.zeros(1, models[0].config["in_channels"], height, width)
    timings = forward_seconds(models, image, [[] for _ in models], TIMED_FORWARDS)
    for row, model, timing in zip(trained, models, timings, strict=True):
        total = summarize(model, height, width).total
        row.attention, row.fusion = model.config["attention"], model.config["fusion"]
        row.parameters, row.flops = total.parameters, total.flops
        row.seconds_per_image = timing.whole


def _share(rows: Sequence[Row]) -> None:
    """Give a variant that is the same network as another its numbers."""
    by_name = {row.variant: row for row in rows}
    for row in rows:
        if row.same_as is not None:
            twin = by_name[row.same_as]
            for name in ("attention", "fusion", "runs", "errors", "parameters", "flops", "seconds_per_image"):
                setattr(row, name, getattr(twin, name))


def _crop_size(checkpoint: Path) -> tuple[int, int]:
    """The training crop, from the config that the run wrote beside its checkpoints."""
    config = _read_yaml(checkpoint.parent.parent / "config.yaml")
    crop = config["data"]["init_args"]["crop_size"]
    return (crop, crop) if isinstance(crop, int) else (crop[0], crop[1])


def _title(recipe: Recipe, variants: Sequence[Variant], seeds: Sequence[int]) -> str:
    configs = ", ".join(f"`{path}`" for path in recipe.configs)
    with_overrides = f" with `{' '.join(recipe.overrides)}`" if recipe.overrides else ""
    return f"{len(variants)} variants of {configs}{with_overrides}, {len(seeds)} seed{'s' * (len(seeds) > 1)} each"


def _flat(record: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """A record for CSV: mIoU per seed in columns of their own, nothing nested."""
    by_seed = {run["seed"]: run["miou"] for run in record["runs"]}
    flat = {name: value for name, value in record.items() if name not in ("runs", "errors")}
    flat |= {name: json.dumps(record[name]) for name in ("attention", "fusion") if isinstance(record[name], dict)}
    flat |= {f"miou_seed_{seed}": by_seed.get(seed) for seed in seeds}
    return flat | {"error": "; ".join(dict.fromkeys(record["errors"].values()))}


def _mean_std(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def _known(value: float | None) -> float | None:
    return None if value is None or value != value else value


def _percent(pair: tuple[float, float] | None, signed: bool = False) -> str:
    if pair is None:
        return ABSENT
    mean, std = pair
    text = f"{100 * mean:+.2f}" if signed else f"{100 * mean:.2f}"
    return text if std != std else f"{text} ± {100 * std:.2f}"
