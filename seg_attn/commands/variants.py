"""`seg-attn variants`: train one recipe with each attention block and each fusion, and compare."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS
from seg_attn.variants import DEFAULT_VARIANTS, Recipe, base_model, resolve_variants, run_variants

RESERVED = ("--model.attention", "--model.fusion", "--ckpt_path", "--seed_everything", "--trainer.default_root_dir")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="recipe that all variants share, as for `fit`; given again, the later one wins",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the runs and the table")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help="attention blocks (se, or se@layer4), fusions, `none`, or YAML overlays; the first is what the others are "
        f"compared to (default: {' '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--position",
        default="aspp",
        metavar="WHERE",
        help=f"where attention blocks stand: {', '.join(ATTENTION_POSITIONS)} (default: aspp)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of every variant (default: 0 1 2)"
    )


def run(arguments: Sequence[str]) -> int:
    """Train, test and compare; return 0, or 1 if some runs failed.

    Args:
        arguments: The command line, the command's name first; what is not declared here goes to `fit`.
    """
    parser = _Parser(
        prog="seg-attn variants",
        description="Train one recipe with each attention block and each fusion over the same seeds, and compare.",
        epilog="Other arguments, such as --data.root DIR or --trainer.max_epochs 5, are those of `seg-attn fit`. "
        "A command that was stopped goes on where it was when it is given again.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    args, overrides = parser.parse_known_args(list(arguments)[1:])
    for override in overrides:
        if override.partition("=")[0].startswith(RESERVED):
            raise InputError(f"{override} is set by `variants` itself: put it into the config, or into an overlay")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise InputError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, args.seeds))}")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file: name a folder")
    variants = resolve_variants(args.variants, args.position, base_model(args.config))
    table = run_variants(Recipe(args.config, overrides), variants, args.seeds, args.output, say=_say)
    print(f"\n{table.markdown()}")
    print(f"written: {', '.join(f'{args.output}/variants.{kind}' for kind in ('md', 'json', 'csv'))}")
    failed = [f"{row.variant}, seed {seed}: {text}" for row in table.rows for seed, text in row.errors.items()]
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def _say(line: str) -> None:
    print(line, flush=True)
