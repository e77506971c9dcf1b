"""What is written for an image: mask, overlay, contour, probabilities, run lengths; each file whole or not at all."""

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seg_attn.checkpoint import DataInfo
from seg_attn.data.images import UInt8Array, write_bytes
from seg_attn.draw import contour, legend, overlay
from seg_attn.errors import InputError
from seg_attn.prediction.inference import Float32Array, Strip
from seg_attn.prediction.inputs import Source
from seg_attn.prediction.png import PngStrips
from seg_attn.prediction.rle import coco_segments

OUTPUTS = ("mask", "overlay", "contour", "probability", "rle")
PROBABILITY_FORMATS = ("npz", "png", "tif")
LARGEST_WHOLE_PROBABILITY = 2 << 30
"""Bytes of float32 probabilities that are held in memory for a file that cannot be written in strips."""


@dataclass(frozen=True)
class Seen:
    """What a prediction holds: the pixels of each class, and how sure the network was on average.

    Attributes:
        height: Rows of the image.
        width: Columns of the image.
        counts: Pixels per class.
        confidence: Mean probability of the predicted class.
    """

    height: int
    width: int
    counts: list[int]
    confidence: float


@dataclass(frozen=True)
class Outputs:
    """Which files are written, where, and how.

    Attributes:
        folder: The output folder.
        kinds: Of `OUTPUTS`.
        probability: Of `PROBABILITY_FORMATS`: "npz" (float32, all classes in one array), "png" (16 bits, one file per
            class, 65535 is certain) or "tif" (float32, one page per class).
        data: Class names and palette.

    Raises:
        InputError: If `kinds` or `probability` names something else.
    """

    folder: Path
    kinds: tuple[str, ...]
    probability: str
    data: DataInfo

    def __post_init__(self) -> None:
        check_kinds(self.kinds, self.probability)

    @property
    def needs_probabilities(self) -> bool:
        """Whether class probabilities are written."""
        return "probability" in self.kinds

    def files(self, source: Source) -> list[Path]:
        """The files that a source becomes."""
        return [path for kind in OUTPUTS if kind in self.kinds for path in self._files_of(kind, source)]

    def _files_of(self, kind: str, source: Source) -> list[Path]:
        stem = self.folder / source.name.parent / source.name.name
        if kind == "mask":
            return [_with_ending(stem, ".png")]
        if kind == "rle":
            return [_with_ending(stem, "_rle.json")]
        if kind == "probability":
            if self.probability == "png":
                return [_with_ending(stem, f"_probability_{i:02d}.png") for i in range(len(self.data.class_names))]
            return [_with_ending(stem, f"_probability.{self.probability}")]
        return [_with_ending(stem, f"_{kind}.png")]

    def check_size(self, source: Source, height: int, width: int, tiled: bool) -> None:
        """Refuse probabilities that would have to be held in memory whole and are too large for it.

        Raises:
            InputError: If that is so.
        """
        size = 4 * len(self.data.class_names) * height * width
        if tiled and self.needs_probabilities and self.probability != "png" and size > LARGEST_WHOLE_PROBABILITY:
            raise InputError(
                f"{source}: probabilities of {height}x{width} pixels as .{self.probability} would take "
                f"{size / 2**30:.1f} GiB of memory: take --probability png, which is written in strips"
            )

    def write(
        self,
        source: Source,
        image: UInt8Array,
        strips: Iterable[Strip],
        note: Callable[[Seen], None] | None = None,
    ) -> Seen:
        """Write a source's files from the strips of its prediction, each under its name only when it is whole.

        Args:
            source: What was predicted.
            image: uint8 (H, W, 3).
            strips: Its rows from top to bottom.
            note: Told what the prediction holds, before any file has its name.

        Returns:
            What the prediction holds.
        """
        height, width = image.shape[:2]
        counts = np.zeros(256, dtype=np.int64)
        total = 0.0
        above: UInt8Array | None = None
        masks: list[UInt8Array] = []
        chances: list[Float32Array] = []
        for file in self.files(source):
            file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            pngs = {kind: self._open(stack, kind, source, width) for kind in ("mask", "overlay", "contour")}
            per_class = self._open_probabilities(stack, source, width)
            for strip in strips:
                counts += np.bincount(strip.classes.ravel(), minlength=256)
                total += float(strip.confidence.sum(dtype=np.float64))
                rows = image[strip.top : strip.top + len(strip.classes)]
                if png := pngs["mask"]:
                    png.write(strip.classes)
                if png := pngs["overlay"]:
                    png.write(overlay(rows, strip.classes, self.data.palette, above=above))
                if png := pngs["contour"]:
                    png.write(contour(rows, strip.classes, self.data.palette, above=above))
                if strip.probabilities is not None:
                    for index, png in enumerate(per_class):
                        png.write(np.round(strip.probabilities[index] * 65535).astype(np.uint16))
                    if not per_class:
                        chances.append(strip.probabilities)
                if "rle" in self.kinds:
                    masks.append(strip.classes)
                above = strip.classes[-1]
            for png in (pngs["overlay"], pngs["contour"]):
                if png:
                    shown = np.flatnonzero(counts).tolist()
                    names = [f"{self.data.class_names[i]} {counts[i] / (height * width):.1%}" for i in shown]
                    png.write(legend(names, [self.data.palette[i] for i in shown], width))
            seen = Seen(height, width, counts[: len(self.data.class_names)].tolist(), total / (height * width))
            if note is not None:
                note(seen)
            if self.needs_probabilities and not per_class:
                self._write_probabilities(source, np.concatenate(chances, axis=1))
            if masks:
                self._write_segments(source, np.concatenate(masks))
        return seen

    def _open(self, stack: ExitStack, kind: str, source: Source, width: int) -> PngStrips | None:
        if kind not in self.kinds:
            return None
        palette = self.data.palette if kind == "mask" else None
        return stack.enter_context(PngStrips(self._files_of(kind, source)[0], width, palette))

    def _open_probabilities(self, stack: ExitStack, source: Source, width: int) -> list[PngStrips]:
        if not self.needs_probabilities or self.probability != "png":
            return []
        files = self._files_of("probability", source)
        return [stack.enter_context(PngStrips(file, width, bits=16)) for file in files]

    def _write_probabilities(self, source: Source, chances: Float32Array) -> None:
        buffer = io.BytesIO()
        if self.probability == "npz":
            np.savez_compressed(buffer, probability=chances, class_names=np.array(self.data.class_names))
        else:
            pages = [Image.fromarray(page) for page in chances]
            pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate")
        write_bytes(self._files_of("probability", source)[0], buffer.getvalue())

    def _write_segments(self, source: Source, mask: UInt8Array) -> None:
        content = {
            "file": source.path.name,
            "height": mask.shape[0],
            "width": mask.shape[1],
            "annotations": coco_segments(mask, self.data.class_names),
        }
        write_bytes(self._files_of("rle", source)[0], (json.dumps(content) + "\n").encode())


def check_kinds(kinds: Sequence[str], probability: str) -> None:
    """Refuse outputs that there are not.

    Raises:
        InputError: If `kinds` or `probability` names something else than `OUTPUTS` and `PROBABILITY_FORMATS`.
    """
    if not kinds or any(kind not in OUTPUTS for kind in kinds):
        raise InputError(f"--save takes {', '.join(OUTPUTS)}, got {','.join(kinds)!r}")
    if probability not in PROBABILITY_FORMATS:
        raise InputError(f"--probability takes {', '.join(PROBABILITY_FORMATS)}, got {probability!r}")


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove the unfinished files of processes that are no more: `.NAME.PID-RANDOM.part`."""
    for folder in folders:
        for path in folder.glob(".*.part"):
            process = path.name.removesuffix(".part").rpartition(".")[2].partition("-")[0]
            if process.isdigit() and not _is_alive(int(process)):
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def check_targets(outputs: Outputs, sources: Sequence[Source]) -> None:
    """Refuse two inputs that would write one file, and an output that would replace an input.

    Raises:
        InputError: If that is so.
    """
    writes: dict[Path, Source] = {}
    inputs = {source.path.resolve() for source in sources}
    for source in sources:
        for file in outputs.files(source):
            if file in writes:
                name = file.relative_to(outputs.folder)
                raise InputError(f"{writes[file]} and {source} would both become {name}: rename one of them")
            writes[file] = source
            if file.resolve() in inputs:
                raise InputError(f"{source} would be written over the input {file}: name another --output folder")
