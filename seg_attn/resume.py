"""Resuming exactly: a run of 5 steps and 5 more is the run of 10, wherever in an epoch the checkpoint was written.

Lightning restores its counters as they stood. After an epoch's last batch they still describe that epoch, and depending
on where in its hooks the checkpoint was written and on whether the run counts steps or epochs, a resumed run repeats a
batch or skips an epoch's number, and with it the order of its samples.
"""

from typing import Any


def settle_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Turn the counters of a checkpoint written after an epoch's last batch into those before the next epoch's first.

    Args:
        checkpoint: A Lightning checkpoint, changed in place; one written within an epoch, or without counters, is left
            as it is.
    """
    loop = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    batches, epochs = loop.get("epoch_loop.batch_progress"), loop.get("epoch_progress")
    if not batches or not epochs or not batches.get("is_last_batch"):
        return
    batches["is_last_batch"] = False
    _level(batches["total"], batches["total"]["ready"])
    _level(batches["current"], 0)
    _level(epochs["total"], epochs["total"]["ready"])
    _level(epochs["current"], epochs["current"]["ready"])


def _level(counts: dict[str, int], value: int) -> None:
    for name in counts:
        counts[name] = value
