"""How fast `predict` is: against the loop that one would write, with the same network and weights on the same files.

The loop: Pillow opens and decodes, torchvision's transforms and `deeplabv3_resnet50` in eval and inference mode with
all threads, argmax, Pillow writes a palette PNG. Both go over all images in turns in one process; times are wall times.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import segmentation_models_pytorch
import torch
from PIL import Image
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.transforms import functional as transforms

from seg_attn.checkpoint import DataInfo, save_model
from seg_attn.data.benchmark import write_scenes
from seg_attn.data.images import image_size, read_image, read_mask, voc_palette
from seg_attn.errors import InputError
from seg_attn.memory import high_water
from seg_attn.metrics import SegmentationMetrics, as_report
from seg_attn.models.deeplabv3 import DeepLabV3
from seg_attn.models.importing import import_weights
from seg_attn.models.pretrained import check_keys, read_state_dict
from seg_attn.predict import Predictor, find_images, predict_files

LOOP = "plain loop"
HUGE = ((3000, 3000), (6000, 6000), (9000, 12000))
# Settings of ours that are measured.
OURS: dict[str, dict[str, Any]] = {
    "predict": {},
    "predict --optimize": {"optimize": True},
    "predict --precision bfloat16": {"precision": "bfloat16"},
}


class PlainLoop:
    """Image by image, stage after stage.

    Args:
        network: A peer's.
        data: Mean, deviation and palette.

    Attributes:
        seconds: What decoding (with normalisation), network (with argmax) and writing took, of the last run.
    """

    def __init__(self, network: nn.Module, data: DataInfo) -> None:
        self.network = network
        self.data = data
        self.seconds = {"decoding": 0.0, "network": 0.0, "writing": 0.0}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Path], folder: Path) -> None:
        """Write a mask per image."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        palette = np.concatenate([self.data.palette, voc_palette()[len(self.data.palette) :]]).astype(np.uint8)
        for path in images:
            moments = [time.perf_counter()]
            with Image.open(path) as file:
                tensor = transforms.to_tensor(file.convert("RGB"))
            batch = transforms.normalize(tensor, self.data.mean, self.data.std)[None]
            moments.append(time.perf_counter())
            logits = self.network(batch)
            logits = logits["out"] if isinstance(logits, dict) else logits
            classes = logits.argmax(dim=1)[0].to(torch.uint8).numpy()
            moments.append(time.perf_counter())
            mask = Image.fromarray(classes)
            mask.putpalette(palette.tobytes())
            mask.save(folder / f"{path.stem}.png")
            moments.append(time.perf_counter())
            for stage, began, ended in zip(self.seconds, moments, moments[1:], strict=False):
                self.seconds[stage] += ended - began


def _torchvision(classes: int) -> nn.Module:
    network: nn.Module = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes)
    return network


def _smp(classes: int) -> nn.Module:
    network: nn.Module = segmentation_models_pytorch.DeepLabV3("resnet50", encoder_weights=None, classes=classes)
    return network


# How a peer's DeepLabV3 with ResNet-50 at output stride 8 is made, and which of its weights has a row per class.
PEERS = {"torchvision": (_torchvision, "classifier.4.weight"), "smp": (_smp, "segmentation_head.0.weight")}


def peer_network(peer: str, weights: Path | None, images: Sequence[Path], data: DataInfo) -> nn.Module:
    """A peer's network with weights from a file, or else random ones whose statistics are those of the images.

    Raises:
        InputError: If the weights are not that network's.
    """
    torch.manual_seed(0)
    build, last = PEERS[peer]
    state = None if weights is None else read_state_dict(weights)
    if state is not None:
        if last not in state:
            raise InputError(f"{weights} does not hold the weights of {peer}'s DeepLabV3 with ResNet-50: no {last}")
        network = build(len(state[last]))
        own = {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}
        check_keys(network.state_dict(), own, str(weights))
        network.load_state_dict(own)
        return network.eval()
    network = build(len(data.class_names))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches seen
    batch = torch.stack([transforms.to_tensor(cv2.resize(read_image(path), (160, 120))) for path in images[:4]])
    batch = torch.cat([batch, batch / 2])  # more than one, so that pooled values have a deviation
    with torch.no_grad():
        network.train()(transforms.normalize(batch, data.mean, data.std))
    return network.eval()


def measure(
    images: Sequence[Path],
    rounds: int,
    weights: Path | None = None,
    labels: Path | None = None,
    peer: str = "torchvision",
) -> list[dict[str, Any]]:
    """Time the loop and ours in turns, after one turn that is not timed.

    Args:
        images: Photographs.
        rounds: Timed turns.
        weights: Weights of the peer's network; None makes random ones.
        labels: Folder of index masks with the photographs' stems, for mean IoU.
        peer: Whose DeepLabV3 with ResNet-50 the loop runs, and whose weights ours takes over: "torchvision" or "smp".

    Returns:
        A row for the loop and each of ours: `way`, `images_per_s` (median), `ratio` (of the loop's time to it, median
        over the turns), `ratio_range`, `equal` (share of pixels as in the loop's masks), `miou` (where there are
        labels), and for the loop `shares` of its stages and `bound`: the ratio that a way would reach that spends the
        loop's time on the network and none on the rest.

    Raises:
        InputError: If the weights are not the peer's, or it does not take the photographs' sizes.
    """
    if peer == "smp":
        for path in images:
            height, width = image_size(path)
            if height % 8 or width % 8:
                raise InputError(f"{path} is {width}x{height}: SMP's network takes sizes that 8 divides, and no other")
    data = DataInfo.default(21)
    network = peer_network(peer, weights, images, data)
    model = import_weights(network.state_dict(), source=peer)
    data = DataInfo.default(model.num_classes)
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch) / "model.ckpt", model, data)
        loop = PlainLoop(network, data)
        ways: dict[str, Callable[[Path], object]] = {LOOP: lambda folder: loop(images, folder)}
        for name, how in OURS.items():
            predictor = Predictor.from_checkpoint(Path(scratch) / "model.ckpt", device="cpu", **how)
            ways[name] = _ours(predictor, images)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        stages: list[dict[str, float]] = []
        for turn in range(rounds + 1):
            for name, way in ways.items():
                folder = Path(scratch) / name.replace(" ", "_")
                folder.mkdir(exist_ok=True)
                began = time.perf_counter()
                way(folder)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                    if name == LOOP:
                        stages.append(loop.seconds)
        rows = []
        for name, times in seconds.items():
            ratios = [theirs / own for theirs, own in zip(seconds[LOOP], times, strict=True)]
            folder = Path(scratch) / name.replace(" ", "_")
            row: dict[str, Any] = {
                "way": name,
                "images_per_s": len(images) / statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "equal": _share_equal(images, Path(scratch) / LOOP.replace(" ", "_"), folder),
            }
            if labels is not None:
                row["miou"] = _miou(images, folder, labels, model)
            if name == LOOP:
                totals = {stage: sum(turn[stage] for turn in stages) for stage in loop.seconds}
                row["shares"] = {stage: total / sum(totals.values()) for stage, total in totals.items()}
                row["bound"] = 1 / row["shares"]["network"]
            rows.append(row)
    return rows


def memory_by_size(sizes: Sequence[tuple[int, int]], tile: int, **model: Any) -> list[dict[str, Any]]:
    """Predict one drawn image per size by tiles, each in a process of its own, and watch its memory.

    Args:
        sizes: Heights and widths.
        tile: Side of the tiles.
        **model: Arguments of `DeepLabV3`; its weights are random, it has 21 classes.

    Returns:
        A row per size: `height`, `width`, `peak_bytes` (the most that was resident), `image_and_mask_bytes`, `seconds`.

    Raises:
        InputError: If a prediction fails.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "model.ckpt"
        torch.manual_seed(0)
        save_model(checkpoint, DeepLabV3(num_classes=21, **model), DataInfo.default(21))
        for height, width in sizes:
            image = Path(scratch) / f"{width}x{height}.jpg"
            coarse = np.random.default_rng(0).integers(0, 256, (height // 50, width // 50, 3), dtype=np.uint8)
            cv2.imwrite(str(image), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
            command = [sys.executable, "-m", "seg_attn", "predict", "--ckpt_path", str(checkpoint), "--device", "cpu"]
            command += ["--input", str(image), "--output", f"{scratch}/out", "--tile", str(tile)]
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                peak = _watch(process)
            if process.returncode:
                raise InputError(f"prediction of {width}x{height} ended with exit code {process.returncode}")
            rows.append(
                {
                    "height": height,
                    "width": width,
                    "peak_bytes": peak,
                    "image_and_mask_bytes": 4 * height * width,
                    "seconds": time.perf_counter() - began,
                }
            )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark predict`."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of photographs (default: 16 drawn ones)")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="their index masks: adds mean IoU")
    parser.add_argument(
        "--peer", choices=PEERS, default="torchvision", help="whose DeepLabV3 the loop runs (default: torchvision)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of the peer's DeepLabV3 with ResNet-50 (default: random)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N photographs")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--memory", action="store_true", help="peak memory of huge images by tiles, instead of speed")
    parser.add_argument("--tile", type=int, default=1024, help="side of the tiles of --memory (default: 1024)")
    parser.add_argument("--backbone", default="resnet50", help="backbone of --memory (default: resnet50)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        InputError: There are no images.
    """
    if args.rounds < 1 or (args.limit is not None and args.limit < 1):
        raise InputError("--rounds and --limit must be at least 1")
    if args.memory:
        rows = memory_by_size(HUGE, args.tile, backbone=args.backbone)
        lines = [f"{'image':<14}{'peak GiB':>10}{'image + mask':>14}{'rest':>8}{'seconds':>9}"]
        for row in rows:
            peak, own = (row[name] / 2**30 for name in ("peak_bytes", "image_and_mask_bytes"))
            size = f"{row['width']}x{row['height']}"
            lines.append(f"{size:<14}{peak:>10.2f}{own:>14.2f}{peak - own:>8.2f}{row['seconds']:>9.0f}")
        return _print(rows, lines, args.json)
    with tempfile.TemporaryDirectory() as scratch:
        if args.images is None:
            images = [pair.image for pair in write_scenes(Path(scratch), 16, size=(376, 504))]
        else:
            images = find_images([args.images])
        images = images[: args.limit]
        rows = measure(images, args.rounds, args.weights, args.labels, args.peer)
    lines = [
        f"network of {args.peer}: {len(images)} images, {torch.get_num_threads()} threads, median of {args.rounds}",
        f"{'way':<32}{'images/s':>9}{'speed, loop = 1':>24}{'equal pixels':>14}{'mIoU':>8}",
    ]
    for row in rows:
        low, high = row["ratio_range"]
        speed = f"{row['ratio']:.2f} ({low:.2f}..{high:.2f})"
        miou = f"{100 * row['miou']:.2f}" if "miou" in row else "–"
        lines.append(f"{row['way']:<32}{row['images_per_s']:>9.2f}{speed:>24}{row['equal']:>14.4%}{miou:>8}")
    shares = ", ".join(f"{stage} {share:.1%}" for stage, share in rows[0]["shares"].items())
    lines.append(f"the loop's time: {shares}; without all but the network it would be {rows[0]['bound']:.2f} as fast")
    return _print(rows, lines, args.json)


def _print(rows: list[dict[str, Any]], lines: Sequence[str], as_json: bool) -> int:
    print(json.dumps(rows, indent=2) if as_json else "\n".join(lines))
    return 0


def _ours(predictor: Predictor, images: Sequence[Path]) -> Callable[[Path], object]:
    def run_ours(folder: Path) -> None:
        for outcome in predict_files(predictor, images, folder, existing="overwrite", summary=True):
            if outcome.error:
                raise InputError(outcome.error)

    return run_ours


def _share_equal(images: Sequence[Path], one: Path, other: Path) -> float:
    equal = pixels = 0
    for path in images:
        mask = read_mask(one / f"{path.stem}.png")
        equal += int((mask == read_mask(other / f"{path.stem}.png")).sum())
        pixels += mask.size
    return equal / pixels


def _miou(images: Sequence[Path], predictions: Path, labels: Path, model: DeepLabV3) -> float:
    metric = SegmentationMetrics(model.num_classes, 255)
    for path in images:
        label = torch.from_numpy(read_mask(labels / f"{path.stem}.png")).long()
        label[label >= model.num_classes] = 255
        metric.update(torch.from_numpy(read_mask(predictions / f"{path.stem}.png")).long()[None], label[None])
    names = [str(index) for index in range(model.num_classes)]
    report = as_report(metric.compute(), names)
    return float(report["miou"])


def _watch(process: "subprocess.Popen[bytes]") -> int:
    """The most memory that a process had resident, in bytes, asked for until it ends."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            peak = max(peak, high_water(process.pid))
        time.sleep(0.05)
    process.wait()
    return peak
