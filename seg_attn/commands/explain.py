"""`seg-attn explain`: what a model attends to, drawn over photographs, from a checkpoint alone."""

import argparse
import sys
from pathlib import Path

from seg_attn.errors import InputError
from seg_attn.explain import Explainer
from seg_attn.predict import Predictor, find_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by fit or import")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="IMG", help="image files, folders of images, or quoted patterns"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--point",
        nargs=2,
        type=int,
        metavar=("X", "Y"),
        help="pixel whose self-attention is drawn, from the upper left corner (default: the image's centre)",
    )
    parser.add_argument("--output_stride", type=int, metavar="N", help="8, 16 or 32 (default: that of the training)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Draw; return 0, or 1 if some inputs failed."""
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file: name a folder")
    sources = find_images(args.input)
    _refuse_equal_names(sources)
    explainer = Explainer(Predictor.from_checkpoint(args.ckpt_path, args.output_stride, device=args.device))
    args.output.mkdir(parents=True, exist_ok=True)
    point = None if args.point is None else (args.point[0], args.point[1])
    failed: list[str] = []
    for source in sources:
        try:
            written = explainer.write(source, args.output, point)
        except InputError as error:
            if len(sources) == 1:
                raise
            failed.append(str(error))
            continue
        print(f"{source}: {', '.join(path.name for path in written)}", flush=True)
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    print(f"{len(sources) - len(failed)} of {len(sources)} images explained, written to {args.output}")
    return 1 if failed else 0


def _refuse_equal_names(sources: list[Path]) -> None:
    """Two inputs of one stem would overwrite each other's pictures."""
    seen: dict[str, Path] = {}
    for source in sources:
        if source.stem in seen:
            raise InputError(f"{seen[source.stem]} and {source} would write the same pictures: rename one of them")
        seen[source.stem] = source
