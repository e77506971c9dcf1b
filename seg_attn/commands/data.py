"""`seg-attn data ...`: make data sets, fetch them, check them."""

import argparse
from pathlib import Path

from seg_attn.data import check, prepare
from seg_attn.data.sample import write_sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    sample = commands.add_parser("sample", help="write the sample data set, drawn from a seed, as a VOCdevkit")
    sample.add_argument("root", type=Path, metavar="DIR", help="DIR/VOCdevkit/VOC2012 is written")
    sample.add_argument("--seed", type=int, default=0, help="what the scenes are drawn from (default: 0)")
    sample.set_defaults(run=run_sample)
    for name, module, help_line in (
        ("voc", prepare, "fetch and prepare Pascal VOC 2012 and SBD"),
        ("check", check, "verify a data set and say what is wrong with which file"),
    ):
        command = commands.add_parser(name, help=help_line)
        module.add_arguments(command)
        command.set_defaults(run=module.run)


def run_sample(args: argparse.Namespace) -> int:
    """Write the sample data set."""
    folder = write_sample(args.root, seed=args.seed)
    print(f"sample data: {folder}")
    return 0
