"""`seg-attn compare`: settings side by side on one data set, with intervals, as a table, JSON, CSV and a page."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from seg_attn.compare import compare, modes, printable, settings
from seg_attn.comparison_report import show, write_comparison
from seg_attn.data import MaskFolderDataModule, SampleDataModule, VOCDataModule
from seg_attn.data.datamodules import SegmentationDataModule
from seg_attn.errors import InputError
from seg_attn.prediction.files import check_writable
from seg_attn.statistics import REPLICATES

DATA_MODULES = (VOCDataModule, MaskFolderDataModule, SampleDataModule)
"""Imported here so that a config may name them without their module path."""

DESCRIPTION = """
Compare settings on the test split of a data set. There is one row for every checkpoint and output stride. --scales,
--flip, --tile and --precision each add one more row per checkpoint and output stride, with that alone changed; --scales
and --flip given both also add a row with both. Every folder of --predictions is a row of its own. All rows are compared
to one, the baseline, image by image: each difference of mean IoU has a 95 % interval over images.
"""


def run(arguments: Sequence[str]) -> int:
    """Compare, print, and write `compare.json`, `compare.csv` and `compare.html`.

    Args:
        arguments: The command line, the command's name first.
    """
    parser = _parser()
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args(_with_data_only(arguments[1:], Path(folder)))
    if args.data is None:
        raise InputError("no data to compare on: give --config FILE, a config of `fit`, or --data and --data.root")
    if args.output is None:
        raise InputError("--output is missing: name a folder for the table and the page")
    output = Path(args.output)
    check_writable(output)
    for name, least in (("images", 0), ("seed", 0), ("replicates", 100)):
        if args[name] < least:
            raise InputError(f"--{name} must be at least {least}, got {args[name]}")
    chosen = settings(
        [Path(path) for path in args.ckpt_path or []],
        args.output_stride or [],
        modes(args.scales, args.flip, args.tile, args.overlap, args.precision or []),
        [Path(path) for path in args.predictions or []],
    )
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    data = parser.instantiate_classes(args).data
    comparison = compare(
        data, chosen, args.baseline, device=args.device, seed=args.seed, replicates=args.replicates, warn=_warn
    )
    # Written first: nobody may be there to read what is shown.
    written = write_comparison(comparison, output, args.title, args.images)
    show(comparison)
    for path in written:
        print(f"written: {printable(path)}")
    return 0


def _parser() -> Any:
    parser = jsonargparse.ArgumentParser(prog="seg-attn compare", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument(
        "-c",
        "--config",
        action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
        help="a config of `fit`; only its data are looked at",
    )
    parser.add_argument("--ckpt_path", nargs="+", type=str, metavar="FILE", help="checkpoints of `fit` or `import`")
    parser.add_argument(
        "--output_stride", nargs="+", type=int, metavar="N", help="8, 16, 32 (default: each checkpoint's own)"
    )
    parser.add_argument("--output", type=str, metavar="DIR", help="folder for compare.json, compare.csv, compare.html")
    parser.add_argument(
        "--scales", nargs="+", type=float, metavar="S", help="also average over these scales: one more row"
    )
    parser.add_argument("--flip", action="store_true", help="also average with the mirrored image: one more row")
    parser.add_argument("--tile", type=int, metavar="N", help="also predict in tiles of this side: one more row")
    parser.add_argument("--overlap", type=int, metavar="M", help="pixels that tiles share (default: the predictor's)")
    parser.add_argument(
        "--precision", nargs="+", type=str, metavar="P", help="also predict in it, such as bfloat16: one more row each"
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        type=str,
        metavar="DIR",
        help="folders of masks made by any tool, <image's stem>.png holding class indices: one more row each",
    )
    parser.add_argument("--baseline", type=str, metavar="ROW", help="name of the baseline row (default: the first)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws of images (default: 0)")
    parser.add_argument(
        "--replicates", type=int, default=REPLICATES, metavar="N", help=f"draws of images (default: {REPLICATES})"
    )
    parser.add_argument("--images", type=int, default=12, metavar="N", help="images that the page shows (default: 12)")
    parser.add_argument("--title", type=str, default="Comparison", help="heading of the page")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_subclass_arguments(SegmentationDataModule, "data", required=False)
    return parser


def _with_data_only(arguments: Sequence[str], folder: Path) -> list[str]:
    """Let `--config` name copies that hold nothing but data: a run's config has a `ckpt_path` of its own, and more."""
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name == "--config":
            found += [name, _data_of(value, folder, len(found))]
        elif found and found[-1] in ("-c", "--config"):
            found.append(_data_of(argument, folder, len(found)))
        else:
            found.append(argument)
    return found


def _data_of(config: str, folder: Path, number: int) -> str:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {config}: cannot be read ({error.strerror}); name a config of `fit`") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {config}: not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {config}: not a config of `fit`: it must hold `data:`")
    copy = folder / f"{number}.yaml"
    copy.write_text(yaml.safe_dump({"data": content["data"]} if "data" in content else {}), encoding="utf-8")
    return str(copy)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
