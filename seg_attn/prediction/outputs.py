"""What is written for an image: mask, overlay, contour, probabilities, run lengths; each file whole or not at all."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from seg_attn.checkpoint import DataInfo
from seg_attn.data.images import UInt8Array
from seg_attn.draw import contour, legend, overlay
from seg_attn.errors import InputError
from seg_attn.prediction.files import whole_file
from seg_attn.prediction.inference import Float32Array, Strip
from seg_attn.prediction.inputs import Source
from seg_attn.prediction.png import PngStrips, open_png
from seg_attn.prediction.rle import coco_segments

OUTPUTS = ("mask", "overlay", "contour", "probability", "rle")
PROBABILITY_FORMATS = ("npz", "png", "tif")
LARGEST_WHOLE_PROBABILITY = 1 << 30
"""Bytes of float32 probabilities, at most, that are held in memory for a file that cannot be written in strips."""


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

    def bytes_held(self, height: int, width: int, tiled: bool) -> int:
        """Bytes that an image and what is predicted of it take until they are written."""
        pixels = height * width
        image = 3 * pixels
        if self.needs_probabilities and (self._holds_probabilities or not tiled):
            image += self._probability_bytes(pixels)
        return image if tiled else image + 5 * pixels  # classes and confidence

    def check_size(self, source: Source, height: int, width: int, tiled: bool) -> None:
        """Refuse probabilities that would have to be held in memory whole and are too large for it.

        Raises:
            InputError: If that is so.
        """
        size = self._probability_bytes(height * width)
        if self._holds_probabilities and size > LARGEST_WHOLE_PROBABILITY:
            strips = "--probability png" if tiled else "--tile 1024 --probability png"
            raise InputError(
                f"{source}: probabilities of {height}x{width} pixels as .{self.probability} would take "
                f"{size / 2**30:.1f} GiB of memory: take {strips}, which is written in strips"
            )

    @property
    def _holds_probabilities(self) -> bool:
        return self.needs_probabilities and self.probability != "png"

    def _probability_bytes(self, pixels: int) -> int:
        return 4 * len(self.data.class_names) * pixels

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

        Raises:
            InputError: If its confidence is not finite: no file is written then.
        """
        height, width = image.shape[:2]
        counts = np.zeros(256, dtype=np.int64)
        total = 0.0
        above: UInt8Array | None = None
        mask = np.empty((height, width) if "rle" in self.kinds else 0, dtype=np.uint8)
        chances: Float32Array | None = None
        for file in self.files(source):
            file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            pngs = {kind: self._open(stack, kind, source, width) for kind in ("mask", "overlay", "contour")}
            per_class = self._open_probabilities(stack, source, width)
            whole = {
                kind: stack.enter_context(whole_file(self._files_of(kind, source)[0]))
                for kind, is_written in (("probability", self._holds_probabilities), ("rle", mask.size > 0))
                if is_written
            }
            for strip in strips:
                counts += np.bincount(strip.classes.ravel(), minlength=256)
                total += float(strip.confidence.sum(dtype=np.float64))
                if not math.isfinite(total):
                    raise InputError(
                        f"the network's output for {source} is not finite: its weights may not be, or their training "
                        "diverged; take another checkpoint"
                    )
                inside = slice(strip.top, strip.top + len(strip.classes))
                rows = image[inside]
                if png := pngs["mask"]:
                    png.write(strip.classes)
                if png := pngs["overlay"]:
                    png.write(overlay(rows, strip.classes, self.data.palette, above=above))
                if png := pngs["contour"]:
                    png.write(contour(rows, strip.classes, self.data.palette, above=above))
                if strip.probabilities is not None:
                    for index, png in enumerate(per_class):
                        png.write(np.round(strip.probabilities[index] * 65535).astype(np.uint16))
                    if "probability" in whole:
                        chances = _joined(chances, strip.probabilities, inside, height)
                if "rle" in whole:
                    mask[inside] = strip.classes
                above = strip.classes[-1].copy()
                del strip  # or it would be held while the next one is made
            for png in (pngs["overlay"], pngs["contour"]):
                if png:
                    shown = np.flatnonzero(counts).tolist()
                    names = [f"{self.data.class_names[i]} {counts[i] / (height * width):.1%}" for i in shown]
                    png.write(legend(names, [self.data.palette[i] for i in shown], width))
            if chances is not None:
                self._write_probabilities(whole["probability"], chances)
            if "rle" in whole:
                self._write_segments(whole["rle"], source, mask)
            seen = Seen(height, width, counts[: len(self.data.class_names)].tolist(), total / (height * width))
            if note is not None:
                note(seen)
        return seen

    def _open(self, stack: ExitStack, kind: str, source: Source, width: int) -> PngStrips | None:
        if kind not in self.kinds:
            return None
        palette = self.data.palette if kind == "mask" else None
        return stack.enter_context(open_png(self._files_of(kind, source)[0], width, palette))

    def _open_probabilities(self, stack: ExitStack, source: Source, width: int) -> list[PngStrips]:
        if not self.needs_probabilities or self.probability != "png":
            return []
        files = self._files_of("probability", source)
        return [stack.enter_context(open_png(file, width, bits=16)) for file in files]

    def _write_probabilities(self, file: BinaryIO, chances: Float32Array) -> None:
        if self.probability == "npz":
            np.savez_compressed(file, probability=chances, class_names=np.array(self.data.class_names))
            return
        with AppendingTiffWriter(file) as tiff:  # `save_all` would have all pages in memory once more
            for page in chances:
                Image.fromarray(page).save(tiff, "TIFF", compression="tiff_adobe_deflate")
                tiff.newFrame()

    def _write_segments(self, file: BinaryIO, source: Source, mask: UInt8Array) -> None:
        content = {
            "file": source.path.name,
            "height": mask.shape[0],
            "width": mask.shape[1],
            "annotations": coco_segments(mask, self.data.class_names),
        }
        file.write((json.dumps(content) + "\n").encode())


def check_kinds(kinds: Sequence[str], probability: str) -> None:
    """Refuse outputs that there are not.

    Raises:
        InputError: If `kinds` or `probability` names something else than `OUTPUTS` and `PROBABILITY_FORMATS`.
    """
    if not kinds or any(kind not in OUTPUTS for kind in kinds):
        raise InputError(f"--save takes {', '.join(OUTPUTS)}, got {','.join(kinds)!r}")
    if probability not in PROBABILITY_FORMATS:
        raise InputError(f"--probability takes {', '.join(PROBABILITY_FORMATS)}, got {probability!r}")


def _joined(whole: Float32Array | None, part: Float32Array, inside: slice, height: int) -> Float32Array:
    """Put rows (C, rows, W) into the array of all of them, which a single strip already is."""
    if part.shape[1] == height:
        return part
    if whole is None:
        whole = np.empty((len(part), height, part.shape[2]), dtype=np.float32)
    whole[:, inside] = part
    return whole


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
