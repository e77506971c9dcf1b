"""From a checkpoint and photographs to masks, each at its photograph's own size.

Decoding, normalisation and the step from logits to classes are those of `test`, so that both agree to the pixel.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import torch

from seg_attn.checkpoint import DataInfo, load_checkpoint
from seg_attn.data.images import ImageSource, UInt8Array, read_image
from seg_attn.data.progress import Progress
from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import DeepLabV3
from seg_attn.models.inference import optimized
from seg_attn.prediction.device import resolve_device
from seg_attn.prediction.files import check_writable, remove_leftovers
from seg_attn.prediction.inference import Float32Array, Inference, Strip
from seg_attn.prediction.inputs import MAX_PIXELS, Source, find_images, size_of
from seg_attn.prediction.outputs import OUTPUTS, Outputs, check_targets
from seg_attn.prediction.settings import Settings
from seg_attn.prediction.stream import Advance, Outcome, Stream, pillow_without_limit
from seg_attn.prediction.summary import Summary

__all__ = ["OUTPUTS", "Outcome", "Plan", "Predictor", "find_images", "plan_files", "predict_files"]

EXISTING = ("error", "overwrite", "skip")


class Predictor:
    """Predicts masks with a trained model.

    Several threads may use one predictor: it keeps no state between calls.

    Args:
        model: The network; it is put into eval mode and onto `device`.
        data: Class names, palette, and what images are normalised with.
        device: Where the network runs, for example "cpu" or "cuda"; "auto" takes a GPU where there is one.
        scales: Factors that images are resized by; class probabilities are averaged over them.
        flip: Average over each image and its mirror image too.
        tile: Side of the tiles that a larger image is cut into; None predicts every image whole.
        overlap: Pixels that neighbouring tiles share at least; None is a quarter of a tile.
        precision: "float32", or "bfloat16": half the memory, and faster where the device has instructions for it; masks
            differ a little.
        optimize: Run an equivalent network that is faster: batch normalisation folded into convolutions, and those
            computed by minimal filtering. Logits differ by rounding, so that of a million pixels a few may fall to
            another class than in `test`. Implied by "bfloat16".

    Attributes:
        model: The network that was given.
        data: As given.
        settings: Scales, flip, tiles and precision.

    Raises:
        InputError: If this machine has no such device.
        ValueError: For a setting out of its range.

    Examples:
        >>> predictor = Predictor(DeepLabV3("resnet18", num_classes=3), DataInfo.default(3), device="cpu")
        >>> mask = predictor(np.zeros((40, 60, 3), dtype=np.uint8))
        >>> mask.shape, mask.dtype
        ((40, 60), dtype('uint8'))
    """

    def __init__(
        self,
        model: DeepLabV3,
        data: DataInfo,
        device: str | torch.device = "auto",
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        precision: str = "float32",
        optimize: bool = False,
    ) -> None:
        self.settings = Settings(tuple(scales), flip, tile, overlap, precision)
        self.device = resolve_device(device)
        self.model = model.eval().to(self.device)
        self.data = data
        dtype = torch.bfloat16 if self.settings.precision == "bfloat16" else torch.float32
        network = optimized(self.model, dtype) if optimize or dtype is not torch.float32 else self.model
        self.inference = Inference(network, data.mean, data.std, self.settings, self.device, dtype)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PathLike[str],
        output_stride: int | None = None,
        device: str | torch.device = "auto",
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        precision: str = "float32",
        optimize: bool = False,
    ) -> Self:
        """Rebuild a model from its checkpoint, which is all that is needed.

        Args:
            path: A checkpoint of `fit` or `import`.
            output_stride: 8, 16 or 32; None is that of the training.
            device: Where the network runs.
            scales: See `Predictor`.
            flip: See `Predictor`.
            tile: See `Predictor`.
            overlap: See `Predictor`.
            precision: See `Predictor`.
            optimize: See `Predictor`.

        Raises:
            InputError: If the file is missing or is not such a checkpoint, or this machine has no such device.
            ValueError: If `output_stride` is not 8, 16 or 32, or a setting is out of its range.
        """
        checkpoint = load_checkpoint(path)
        return cls(
            checkpoint.build_model(output_stride),
            checkpoint.data,
            device,
            scales=scales,
            flip=flip,
            tile=tile,
            overlap=overlap,
            precision=precision,
            optimize=optimize,
        )

    def __call__(self, image: ImageSource) -> UInt8Array:
        """Predict one image.

        Args:
            image: A path, a PIL image, or a uint8 array (H, W, 3), RGB.

        Returns:
            Class indices, uint8 (H, W), at the image's own size (after EXIF rotation).

        Raises:
            InputError: If the image cannot be read.
        """
        return np.concatenate([strip.classes for strip in self.inference.strips(read_image(image))])

    def batch(self, images: Sequence[ImageSource], batch_size: int = 8) -> list[UInt8Array]:
        """Predict images of any sizes; those of one size go through the network together.

        Args:
            images: As `__call__` takes them.
            batch_size: Images in one batch at most. At 1 the masks are those of `__call__` and `test` to the pixel;
                otherwise logits differ by rounding.

        Returns:
            A mask per image, in their order: class indices, uint8 (H, W).

        Raises:
            InputError: If an image cannot be read.
            ValueError: If `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        arrays = [read_image(image) for image in images]
        masks: dict[int, UInt8Array] = {}
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, array in enumerate(arrays):
            by_size.setdefault(array.shape, []).append(index)
        for (height, width, _), indices in by_size.items():
            if self.settings.is_tiled(height, width):
                masks |= {index: self(arrays[index]) for index in indices}
                continue
            for first in range(0, len(indices), batch_size):
                together = indices[first : first + batch_size]
                strips = self.inference.whole([arrays[index] for index in together])
                masks |= {index: strip.classes for index, strip in zip(together, strips, strict=True)}
        return [masks[index] for index in range(len(arrays))]

    def probabilities(self, image: ImageSource) -> Float32Array:
        """Return class probabilities, float32 (num_classes, H, W), of one image.

        Raises:
            InputError: If the image cannot be read.
        """
        strips = self.inference.strips(read_image(image), probabilities=True)
        return np.concatenate([_present(strip) for strip in strips], axis=1)


@dataclass(frozen=True)
class Plan:
    """What is to be predicted and what was there before; checked, nothing written yet.

    Attributes:
        outputs: What is written where.
        sources: Every input.
        skipped: Those whose outputs exist and are left as they are.
    """

    outputs: Outputs
    sources: Sequence[Source]
    skipped: frozenset[Source]

    @property
    def remaining(self) -> list[Source]:
        """The inputs to predict, in order."""
        return [source for source in self.sources if source not in self.skipped]


def plan_files(sources: Sequence[Source], outputs: Outputs, existing: str = "error") -> Plan:
    """Check inputs against outputs before any work.

    Args:
        sources: The inputs.
        outputs: What is written where.
        existing: What to do where an output exists: "error", "overwrite" or "skip" (an input of which all exist).

    Raises:
        InputError: If two inputs would write one file, an output would replace an input, an output exists and
            `existing` is "error", or nothing can be written into the output folder.
        ValueError: If `existing` is something else.
    """
    if existing not in EXISTING:
        raise ValueError(f"existing must be one of {', '.join(EXISTING)}, got {existing!r}")
    check_targets(outputs, sources)
    check_writable(outputs.folder)
    if existing == "overwrite" or not outputs.folder.exists():
        return Plan(outputs, sources, frozenset())
    if existing == "skip":
        done = frozenset(source for source in sources if all(map(os.path.isfile, outputs.files(source))))
        return Plan(outputs, sources, done)
    for source in sources:
        for file in outputs.files(source):
            if os.path.exists(file):
                raise InputError(
                    f"{file} exists: --skip_existing goes on after a stop, --overwrite predicts again, or name another "
                    "--output folder"
                )
    return Plan(outputs, sources, frozenset())


def predict_files(
    predictor: Predictor,
    sources: Sequence[Path | Source],
    folder: Path,
    outputs: Sequence[str] = ("mask",),
    *,
    probability: str = "npz",
    batch_size: int = 1,
    existing: str = "error",
    max_pixels: int = MAX_PIXELS,
    summary: bool = False,
    advance: Advance | None = None,
) -> Iterator[Outcome]:
    """Predict files; one that cannot be read is reported and the others go on.

    Reading, the network and writing overlap. Every file appears whole or not at all.

    Args:
        predictor: The predictor.
        sources: Files, or what `seg_attn.prediction.inputs.find_sources` lists.
        folder: The output folder.
        outputs: Of `OUTPUTS`.
        probability: How probabilities are written: "npz", "png" or "tif".
        batch_size: Images of one size per batch. At 1 masks are those of `test` to the pixel.
        existing: What to do where an output exists: "error", "overwrite" or "skip".
        max_pixels: An image with more is refused.
        summary: Write `summary.csv`.
        advance: Told the number of tiles done (an image predicted whole is one), each time some are.

    Returns:
        An iterator of what became of each source, in their order; the work is done as it is drawn from.

    Raises:
        InputError: Before anything is written: see `plan_files`.
    """
    named = [source if isinstance(source, Source) else Source(source, Path(source.stem)) for source in sources]
    plan = plan_files(named, Outputs(folder, tuple(outputs), probability, predictor.data), existing)
    if summary:
        Summary(folder, predictor.data.class_names).check()
    return _outcomes(predictor, plan, batch_size, max_pixels, summary, advance)


def _outcomes(
    predictor: Predictor, plan: Plan, batch_size: int, max_pixels: int, summary: bool, advance: Advance | None
) -> Iterator[Outcome]:
    with start_folder(plan, summary) as table:
        stream = Stream(predictor.inference, plan.outputs, batch_size, max_pixels, table, advance)
        with contextlib.closing(stream(plan.remaining)) as predicted:
            yield from with_skipped(plan, predicted)


@dataclass(frozen=True)
class Work:
    """How the command line asks for predictions, in plain values that another process can be given.

    Attributes:
        checkpoint: The checkpoint's path.
        output_stride: Of the model, or None for its own.
        device: Where the network runs.
        settings: Scales, flip, tiles, precision.
        optimize: See `Predictor`.
        batch_size: Images of one size, or tiles, per batch.
        max_pixels: An image with more is refused.
    """

    checkpoint: str
    output_stride: int | None
    device: str
    settings: Settings
    optimize: bool
    batch_size: int
    max_pixels: int

    def check(self) -> None:
        """Build the network, as every process will, and drop it.

        Raises:
            InputError: If the checkpoint does not make one, or this machine has no such device.
            ValueError: If `output_stride` is not 8, 16 or 32.
        """
        resolve_device(self.device)
        load_checkpoint(self.checkpoint).build_model(self.output_stride)

    def predictor(self, device: str | torch.device | None = None) -> Predictor:
        """Rebuild the predictor, on another device if one is given."""
        how = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        return Predictor.from_checkpoint(
            self.checkpoint, self.output_stride, device or self.device, **how, optimize=self.optimize
        )


def predict_plan(work: Work, predictor: Predictor, plan: Plan) -> list[Outcome]:
    """Predict what a plan holds in this process, show how far it is, and write the summary."""
    with start_folder(plan) as table:
        return list(with_skipped(plan, predict_share(work, predictor, plan, plan.remaining, table)))


def predict_share(
    work: Work, predictor: Predictor, plan: Plan, share: Sequence[Source], table: Summary | None
) -> list[Outcome]:
    """Predict some of a plan's sources and show how far it is."""
    with pillow_without_limit():
        total = sum(_tiles_of(source, work.settings) for source in share)
        label = "predicting images" if total == len(share) else "predicting tiles"
        with Progress(label, total) as progress:
            stream = Stream(
                predictor.inference, plan.outputs, work.batch_size, work.max_pixels, table, progress.advance
            )
            return list(stream(share))


def _tiles_of(source: Source, settings: Settings) -> int:
    if settings.tile is None:
        return 1
    size = size_of(source)
    return settings.number_of_tiles(*size) if size else 1


def with_skipped(plan: Plan, predicted: Iterable[Outcome]) -> Iterator[Outcome]:
    """Yield what became of every source of a plan, in order, given what became of those that remained."""
    following = iter(predicted)
    for source in plan.sources:
        if source in plan.skipped:
            yield Outcome(source.path, plan.outputs.files(source), skipped=True)
        else:
            yield next(following)


def start_folder(plan: Plan, summary: bool = True) -> contextlib.AbstractContextManager[Summary | None]:
    """Make the output folder, settle what stopped runs left in it, and open its summary if there is to be one."""
    plan.outputs.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers({file.parent for source in plan.sources for file in plan.outputs.files(source)})
    remove_leftovers([plan.outputs.folder])
    return Summary(plan.outputs.folder, plan.outputs.data.class_names) if summary else contextlib.nullcontext()


def _present(strip: Strip) -> Float32Array:
    assert strip.probabilities is not None
    return strip.probabilities
