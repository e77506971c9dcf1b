"""`seg-attn benchmark ...`: ours against peers doing the same work, in one process, as ratios."""

import argparse

from seg_attn import throughput
from seg_attn.data import benchmark as data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser("data", help="training samples per second against torchvision v2 and albumentations")
    data.add_arguments(command)
    command.set_defaults(run=data.run)
    command = commands.add_parser("predict", help="photographs per second against a plain loop, and peak memory")
    throughput.add_arguments(command)
    command.set_defaults(run=throughput.run)
