"""`seg-attn summary`: dilation plan, parameters and FLOPs per part, and what attention and fusion add."""

import inspect
import json
from collections.abc import Sequence
from typing import Any

import jsonargparse

from seg_attn.attention import ATTENTION
from seg_attn.models.deeplabv3 import DeepLabV3
from seg_attn.models.pretrained import weights_follow
from seg_attn.parsing import show_choices
from seg_attn.summary import summarize
from seg_attn.task import SegmentationTask

NOT_LOOKED_AT = ("data", "trainer", "ckpt_path", "seed_everything")


def run(arguments: Sequence[str]) -> int:
    """Print a network's summary.

    Args:
        arguments: The command line, the command's name first.
    """
    parser = jsonargparse.ArgumentParser(
        prog="seg-attn summary",
        description="Dilation plan, parameters and FLOPs per part, and what attention and fusion add.",
        exit_on_error=False,
    )
    parser.add_argument(
        "-c",
        "--config",
        action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
        help="a config of `fit`; only its model is looked at",
    )
    parser.add_argument("--height", type=int, default=513, help="height of the image that FLOPs are counted for")
    parser.add_argument("--width", type=int, default=513, help="width of that image")
    parser.add_argument("--latency_runs", type=int, default=0, help="time every variant so often; 0 counts only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_class_arguments(SegmentationTask, "model")
    show_choices(parser, "model.attention", "Names", ATTENTION)
    for name in NOT_LOOKED_AT:
        parser.add_argument(f"--{name}", type=Any, default=None, help="as in a config of `fit`; not looked at")
    parsed = parser.parse_args(list(arguments[1:]))
    known = inspect.signature(DeepLabV3).parameters
    with weights_follow():  # the numbers do not depend on them
        model = DeepLabV3(**{name: value for name, value in dict(parsed.model).items() if name in known})
    summary = summarize(model, parsed.height, parsed.width, parsed.latency_runs)
    print(json.dumps(summary.as_dict(), indent=2) if parsed.json else summary)
    return 0
