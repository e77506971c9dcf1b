"""`seg-attn prices`: what every attention block and fusion adds in parameters, FLOPs and time."""

import argparse
from pathlib import Path

from seg_attn.data.images import write_bytes
from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS
from seg_attn.prices import price_list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--backbone", default="resnet50", metavar="NAME", help="default: resnet50")
    parser.add_argument(
        "--position",
        nargs="+",
        default=["aspp"],
        metavar="WHERE",
        help=f"where attention stands: {', '.join(ATTENTION_POSITIONS)} (default: aspp)",
    )
    parser.add_argument("--size", nargs=2, type=int, default=[513, 513], metavar=("H", "W"), help="default: 513 513")
    parser.add_argument("--output_stride", type=int, default=16, metavar="N", help="8, 16 or 32 (default: 16)")
    parser.add_argument("--num_classes", type=int, default=21, metavar="N", help="default: 21")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="forwards timed per block; 0 times none (default: 5)"
    )
    parser.add_argument("--device", default="cpu", help="where time is measured (default: cpu)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table there, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    if args.output is not None and not args.output.parent.is_dir():
        raise InputError(f"--output {args.output}: the folder {args.output.parent} does not exist; make it first")
    height, width = args.size
    table = price_list(
        args.backbone, (height, width), args.position, args.output_stride, args.num_classes, args.repeats, args.device
    ).markdown()
    print(table, end="")
    if args.output is not None:
        write_bytes(args.output, table.encode())
    return 0
