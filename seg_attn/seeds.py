"""Which checkpoints are seeds: the same recipe trained as long, in runs of their own, so that chance alone differs.

A checkpoint says all three. The recipe is its hyper-parameters, what it was trained on, and how: crops, batches, split,
precision, processes; where the files lay is no part of it. A run has an id of its own that a resumed run keeps: best
and last of one run are no seeds. A run's length is not kept, but the learning rate is, and with it how much of the
schedule is left; a best checkpoint's own step would not do, for it is another one in every run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seg_attn.checkpoint import Checkpoint


def recipes(checkpoints: Sequence[Checkpoint | None]) -> list[str | None]:
    """Return a text per checkpoint that is equal for seeds of one recipe.

    Returns:
        None for no checkpoint, for one that no training wrote, such as an imported network, and for a recipe that one
        run gave several checkpoints of.
    """
    files: dict[str, dict[str, set[Path]]] = {}
    found: list[str | None] = []
    for checkpoint in checkpoints:
        run = None if checkpoint is None else checkpoint.training.get("run")
        if checkpoint is None or not run:
            found.append(None)
            continue
        how = (checkpoint.hyper_parameters, run["training"])
        recipe = repr((planned_steps(checkpoint), checkpoint.data, *(sorted(_plain(part).items()) for part in how)))
        files.setdefault(recipe, {}).setdefault(run["id"], set()).add(checkpoint.path)
        found.append(recipe)
    mixed = {recipe for recipe, runs in files.items() if any(len(paths) > 1 for paths in runs.values())}
    return [None if recipe in mixed else recipe for recipe in found]


def planned_steps(checkpoint: Checkpoint) -> int:
    """Count the steps that a checkpoint's training was to take in all; those taken where no schedule tells.

    The learning rate at a step is base * rise * (1 - step / total) ** power (`SegmentationTask`); this solves it for
    `total`.
    """
    schedules = checkpoint.training.get("lr_schedulers")
    taken = int(checkpoint.training.get("global_step") or 0)
    if not schedules:
        return taken
    state, hyper_parameters = schedules[0], checkpoint.hyper_parameters
    step, warmup = int(state["last_epoch"]), float(hyper_parameters.get("warmup_steps", 0))
    power = float(hyper_parameters.get("poly_power", 0.9))
    # The fastest group's: a part of the network may be held at a learning rate of 0.
    base, rate = max(zip(state["base_lrs"], state["_last_lr"], strict=True))
    if not base or not power:
        return taken
    rise = min(1.0, (step + 1) / (warmup + 1))
    left = (rate / base / rise) ** (1 / power)
    return round(step / (1 - left)) if left < 1 else taken


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
