"""Peak memory of predicting an image, measured in a process of its own.

Memory that an earlier setting took and gave back to the allocator, but not to the system, would count for the next
one; so each setting gets a fresh process, which loads the checkpoint, forgets its peak so far (`/proc/self/clear_refs`)
and predicts. The figure is `VmHWM` of `/proc/self/status`: all memory that was resident, Python and libraries included.
`getrusage` would not do: a child starts with its parent's `ru_maxrss`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seg_attn.predict import Predictor


def peak_memory(checkpoint: Path, image: Path, arguments: Mapping[str, Any], threads: int) -> int | None:
    """Measure the peak of resident memory while an image is predicted on the CPU, in bytes.

    Args:
        checkpoint: Checkpoint to load.
        image: What is predicted, twice.
        arguments: Further arguments of `Predictor.from_checkpoint`; plain values.
        threads: Threads of the network.

    Returns:
        Bytes; None where the system does not tell, or the process did not come through.
    """
    if not _status("self").exists():
        return None
    order = json.dumps([str(checkpoint), str(image), dict(arguments), threads])
    command = [sys.executable, "-m", "seg_attn.memory", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return int(lines[-1]) if done.returncode == 0 and lines else None


def high_water(process: int | None = None) -> int:
    """Most bytes of memory that were resident in a process since it began, or since `forget_high_water`.

    Args:
        process: Its number; None is this one.

    Returns:
        0 for a process that has ended and is yet to be waited for.

    Raises:
        OSError: If there is no such process, or the system does not tell.
    """
    fields = dict(line.split(":", 1) for line in _status(process or "self").read_text().splitlines())
    return 1024 * int(fields.get("VmHWM", "0").split()[0])


def _status(process: int | str) -> Path:
    return Path(f"/proc/{process}/status")


def forget_high_water() -> None:
    """Let the peak begin anew at what is resident now; where the system refuses, it stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _measure(order: str) -> int:
    checkpoint, image, arguments, threads = json.loads(order)
    torch.set_num_threads(threads)
    predictor = Predictor.from_checkpoint(checkpoint, **{**arguments, "device": "cpu"})
    forget_high_water()
    for _ in range(2):
        predictor(image)
    return high_water()


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
