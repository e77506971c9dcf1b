"""`seg-attn predict`: masks for photographs, from a checkpoint alone."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from seg_attn.checkpoint import load_checkpoint
from seg_attn.errors import InputError
from seg_attn.predict import Outcome, Work, plan_files, predict_plan
from seg_attn.prediction.inputs import MAX_PIXELS, find_sources
from seg_attn.prediction.outputs import OUTPUTS, PROBABILITY_FORMATS, Outputs, check_kinds
from seg_attn.prediction.settings import PRECISIONS, Settings
from seg_attn.prediction.summary import Summary

_EXAMPLES = """
examples:
  seg-attn predict --ckpt_path best.ckpt --input photos/ --output masks
  seg-attn predict --ckpt_path best.ckpt --input photos/ --recursive --output masks --save mask,overlay --skip_existing
  seg-attn predict --ckpt_path best.ckpt --input aerial.tif --output masks --tile 1024 --overlap 256
  seg-attn predict --ckpt_path best.ckpt --input 'photos/*.jpg' @list.txt --output masks --scales 0.75 1 1.25 --flip
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by fit or import")
    parser.add_argument("--output_stride", type=int, metavar="N", help="8, 16 or 32 (default: that of the training)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes, each with a device and a share (default: 1)"
    )

    inputs = parser.add_argument_group("what is predicted")
    inputs.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="image files, folders of images, quoted patterns, or lists of files as @FILE",
    )
    inputs.add_argument(
        "--list",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="text files that name one image per line",
    )
    inputs.add_argument("--recursive", action="store_true", help="folders with all folders in them, kept in the output")
    inputs.add_argument("--video", action="store_true", help="videos too, frame by frame, each into a folder")
    inputs.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger images (default: {MAX_PIXELS:,})",
    )

    outputs = parser.add_argument_group("what is written")
    outputs.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for masks and summary.csv")
    outputs.add_argument(
        "--save",
        default="mask",
        metavar="WHAT",
        help=f"all that is to be written, comma-separated, of {', '.join(OUTPUTS)} (default: mask)",
    )
    outputs.add_argument(
        "--probability",
        choices=PROBABILITY_FORMATS,
        default="npz",
        help="npz: float32, one file; png: 16 bits, one per class; tif: float32, one page per class (default: npz)",
    )
    existing = outputs.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    existing.add_argument("--skip_existing", action="store_true", help="leave them, and go on after a stop")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--scales",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="S",
        help="average over the image at these scales, such as 0.5 0.75 1 1.25 1.5 1.75 (default: 1)",
    )
    how.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    how.add_argument("--tile", type=int, metavar="N", help="cut images larger than N pixels a side into tiles of N x N")
    how.add_argument("--overlap", type=int, metavar="M", help="pixels that tiles share (default: a quarter of a tile)")
    how.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="images of one size, or tiles, per batch; at 1 masks are those of `test` to the pixel (default: 1)",
    )
    how.add_argument(
        "--precision", default="float32", help=f"{' or '.join(PRECISIONS)}, or Lightning's names (default: float32)"
    )
    how.add_argument(
        "--optimize",
        action="store_true",
        help="a faster form of the network, equal up to rounding: a few pixels in a million may differ from `test`",
    )


def run(args: argparse.Namespace) -> int:
    """Predict; return 0, or 1 if some inputs failed."""
    if not args.input and not args.list:
        raise InputError("nothing to predict: give --input or --list")
    for name in ("batch_size", "max_pixels", "devices"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    kinds = tuple(dict.fromkeys(name.strip() for name in args.save.split(",") if name.strip()))
    check_kinds(kinds, args.probability)
    settings = Settings(tuple(args.scales), args.flip, args.tile, args.overlap, args.precision)
    sources = find_sources(
        args.input, recursive=args.recursive, videos=args.video, lists=args.list, outside=args.output
    )
    existing = "overwrite" if args.overwrite else "skip" if args.skip_existing else "error"
    work = Work(
        args.ckpt_path, args.output_stride, args.device, settings, args.optimize, args.batch_size, args.max_pixels
    )
    predictor = None if args.devices > 1 else work.predictor()
    data = load_checkpoint(args.ckpt_path).data if predictor is None else predictor.data
    plan = plan_files(sources, Outputs(args.output, kinds, args.probability, data), existing)
    Summary(args.output, data.class_names).check()
    if predictor is None:
        from seg_attn.sharding import predict_shards  # Lightning is imported only where it is asked for

        outcomes = predict_shards(work, plan, args.devices)
    else:
        outcomes = predict_plan(work, predictor, plan)
    return _report(outcomes, args.output)


def _report(outcomes: Sequence[Outcome], folder: Path) -> int:
    failed = [outcome for outcome in outcomes if outcome.error]
    if len(failed) == len(outcomes) == 1:
        raise InputError(str(failed[0].error))
    for outcome in failed:
        print(f"error: {outcome.error}", file=sys.stderr)
    skipped = sum(outcome.skipped for outcome in outcomes)
    shown = os.fsencode(folder).decode(errors="backslashreplace")  # its name may be any bytes
    there = f" ({skipped} were there)" if skipped else ""
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} images predicted{there}, written to {shown}")
    return 1 if failed else 0
