"""Prediction shared among several devices or processes, started by Lightning: each takes every n-th input."""

import contextlib
import pickle
import tempfile
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric

from seg_attn.errors import InputError
from seg_attn.predict import Outcome, Plan, Work, predict_share, start_folder, with_skipped
from seg_attn.prediction.device import resolve_device
from seg_attn.prediction.inputs import Source
from seg_attn.prediction.summary import Summary


def predict_shards(work: Work, plan: Plan, devices: int) -> list[Outcome]:
    """Predict what a plan holds with several processes, one per device, and write the summary.

    Args:
        work: How to predict; its device names the kind: "cpu" is that many processes that share the processors.
        plan: What to predict.
        devices: Number of processes.

    Returns:
        What became of each source, in the plan's order.

    Raises:
        InputError: If there are fewer devices of the kind, the checkpoint does not make a network, or nothing more can
            be written.
        ValueError: If the output stride is none.
    """
    work.check()
    kind = resolve_device(work.device).type
    if kind != "cpu" and devices > torch.cuda.device_count():
        raise InputError(f"--devices {devices}: there are {torch.cuda.device_count()} of {kind}; ask for no more")
    with start_folder(plan), tempfile.TemporaryDirectory() as scratch:
        fabric = Fabric(accelerator=kind, devices=devices, strategy="ddp_spawn")
        threads = max(1, torch.get_num_threads() // devices)
        # Pickled here: Lightning looks for tensors in what it is given, and refuses frozen dataclasses.
        fabric.launch(partial(_share, pickle.dumps((work, plan)), Path(scratch), threads))
        shares = [pickle.loads((Path(scratch) / str(rank)).read_bytes()) for rank in range(devices)]
        for share in shares:
            if isinstance(share, InputError):
                raise share
    done = {source: outcome for share in shares for source, outcome in share}
    return list(with_skipped(plan, (done[source] for source in plan.remaining)))


def _share(content: bytes, scratch: Path, threads: int, fabric: Fabric) -> None:
    """What one process does."""
    work, plan = pickle.loads(content)
    rank = fabric.global_rank
    if fabric.device.type == "cpu":
        torch.set_num_threads(threads)
    share = plan.remaining[rank :: fabric.world_size]
    result: list[tuple[Source, Outcome]] | InputError
    try:
        with contextlib.closing(Summary(plan.outputs.folder, plan.outputs.data.class_names)) as table:
            outcomes = predict_share(work, work.predictor(fabric.device), plan, share, table)
        result = list(zip(share, outcomes, strict=True))
    except InputError as error:  # said in one line by the process that started this one
        result = error
    (scratch / str(rank)).write_bytes(pickle.dumps(result))
