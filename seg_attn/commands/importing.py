"""`seg-attn import`: a peer's checkpoint becomes one of ours."""

import argparse
from pathlib import Path

from seg_attn.checkpoint import DataInfo, save_model
from seg_attn.data.voc import VOC_CLASSES
from seg_attn.errors import InputError
from seg_attn.models.importing import SOURCES, import_weights, released_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source_file",
        metavar="SRC",
        help="a checkpoint of torchvision, SMP or VainF, a plain ResNet's, or the name of torchvision's released "
        "weights (deeplabv3_resnet50, DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="C.ckpt", help="checkpoint to write")
    parser.add_argument(
        "--source", default="auto", choices=("auto", *SOURCES), help="whose it is (default: by its keys)"
    )
    parser.add_argument(
        "--output_stride", type=int, metavar="N", help="the stride it ran at (default: its peer's default)"
    )
    parser.add_argument(
        "--atrous_rates",
        type=int,
        nargs="+",
        metavar="R",
        help="the ASPP rates it ran at (default: its peer's default)",
    )
    parser.add_argument(
        "--class_names", nargs="+", metavar="NAME", help="class names (default: VOC's where there are 21)"
    )


def run(args: argparse.Namespace) -> int:
    """Import and write."""
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder: name a file")
    model = import_weights(args.source_file, args.source, args.output_stride, args.atrous_rates)
    names = args.class_names or _known_names(args.source_file, model.num_classes)
    if names is not None and len(names) != model.num_classes:
        raise InputError(f"--class_names must hold {model.num_classes} names, got {len(names)}")
    save_model(args.output, model, DataInfo.default(model.num_classes, names))
    config = model.config
    print(
        f"written: {args.output} ({config['backbone']}, {model.num_classes} classes, "
        f"output stride {model.output_stride}, atrous rates {', '.join(map(str, model.aspp.rates))})"
    )
    return 0


def _known_names(source: str, num_classes: int) -> list[str] | None:
    released = None if Path(source).exists() else released_weights(source)
    if released is not None:
        return ["background", *released.meta["categories"][1:]]
    return list(VOC_CLASSES) if num_classes == len(VOC_CLASSES) else None
