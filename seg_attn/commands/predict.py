"""`seg-attn predict`: masks for photographs, from a checkpoint alone."""

import argparse
import sys
from pathlib import Path

from seg_attn.errors import InputError
from seg_attn.predict import OUTPUTS, Predictor, find_images, predict_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by fit or import")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PATH", help="image files, folders of images, or quoted patterns"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the masks")
    parser.add_argument(
        "--save",
        default="mask",
        metavar="WHAT",
        help=f"comma-separated, of {', '.join(OUTPUTS)} (default: mask)",
    )
    parser.add_argument("--output_stride", type=int, metavar="N", help="8, 16 or 32 (default: that of the training)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Predict; return 0, or 1 if some inputs failed."""
    outputs = [name.strip() for name in args.save.split(",") if name.strip()]
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise InputError(f"--save takes {', '.join(OUTPUTS)}, got {args.save!r}")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file: name a folder")
    sources = find_images(args.input)
    predictor = Predictor.from_checkpoint(args.ckpt_path, args.output_stride, args.device)
    outcomes = []
    for number, outcome in enumerate(predict_files(predictor, sources, args.output, outputs), start=1):
        outcomes.append(outcome)
        if sys.stderr.isatty():
            print(f"\r{number}/{len(sources)} images", end="" if number < len(sources) else "\n", file=sys.stderr)
    failed = [outcome for outcome in outcomes if outcome.error]
    if len(failed) == len(outcomes) == 1:
        raise InputError(str(failed[0].error))
    for outcome in failed:
        print(f"error: {outcome.error}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} images predicted, written to {args.output}")
    return 1 if failed else 0
