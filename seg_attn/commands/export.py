"""`seg-attn export`: a checkpoint becomes ONNX or torch.export's `.pt2`, checked at a second size."""

import argparse
from pathlib import Path

from seg_attn.checkpoint import load_checkpoint
from seg_attn.errors import InputError
from seg_attn.export import OUTPUTS, export_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by fit or import")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="model.onnx or model.pt2; its ending is the format",
    )
    parser.add_argument("--output_stride", type=int, metavar="N", help="8, 16 or 32 (default: that of the training)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(513, 513),
        metavar=("H", "W"),
        help="size to trace at; the file takes any other (default: 513 513)",
    )
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="take RGB bytes, uint8 (N, 3, H, W), with mean and deviation in the graph (default: normalised float32)",
    )
    parser.add_argument(
        "--classes",
        dest="graph_output",
        action="store_const",
        const=OUTPUTS[1],
        default=OUTPUTS[0],
        help="give class indices, uint8 (N, H, W) (default: logits, float32 (N, classes, H, W))",
    )


def run(args: argparse.Namespace) -> int:
    """Export, check, and say how close the file is."""
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder: name a file")
    checkpoint = load_checkpoint(args.ckpt_path)
    model = checkpoint.build_model(args.output_stride)
    exported = export_model(
        model,
        checkpoint.data,
        args.output,
        size=tuple(args.size),
        normalize=args.normalize,
        output=args.graph_output,
    )
    error = "" if exported.error is None else f"logits differ by {exported.error:.1e} of the largest, "
    print(
        f"written: {exported.path} (output stride {model.output_stride}, traced at {_by(exported.size)}); "
        f"run at {_by(exported.checked_size)}: {error}{100 * exported.equal_pixels:.3f} % of the pixels equal"
    )
    return 0


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
