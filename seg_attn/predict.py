"""From a checkpoint and photographs to masks, each at its photograph's own size.

Decoding, normalisation and the step from logits to classes are those of `test`, so that both agree to the pixel.
"""

import glob
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from seg_attn.checkpoint import DataInfo, load_checkpoint
from seg_attn.data.images import ImageSource, UInt8Array, normalize, read_image, write_bytes, write_mask
from seg_attn.draw import overlay
from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import DeepLabV3

OUTPUTS = ("mask", "overlay", "probability")


class Predictor:
    """Predicts masks with a trained model.

    Args:
        model: The network; it is put into eval mode and onto `device`.
        data: Class names, palette, and what images are normalised with.
        device: Where the network runs, for example "cpu" or "cuda"; "auto" takes a GPU where there is one.

    Examples:
        >>> predictor = Predictor(DeepLabV3("resnet18", num_classes=3), DataInfo.default(3), device="cpu")
        >>> mask = predictor(np.zeros((40, 60, 3), dtype=np.uint8))
        >>> mask.shape, mask.dtype
        ((40, 60), dtype('uint8'))
    """

    def __init__(self, model: DeepLabV3, data: DataInfo, device: str | torch.device = "auto") -> None:
        self.device = torch.device(_default_device() if device == "auto" else device)
        self.model = model.eval().to(self.device)
        self.data = data

    @classmethod
    def from_checkpoint(
        cls, path: str | PathLike[str], output_stride: int | None = None, device: str | torch.device = "auto"
    ) -> Self:
        """Rebuild a model from its checkpoint, which is all that is needed.

        Args:
            path: A checkpoint of `fit` or `import`.
            output_stride: 8, 16 or 32; None is that of the training.
            device: Where the network runs.

        Raises:
            InputError: If the file is missing or is not such a checkpoint.
            ValueError: If `output_stride` is not 8, 16 or 32.
        """
        checkpoint = load_checkpoint(path)
        return cls(checkpoint.build_model(output_stride), checkpoint.data, device)

    def probabilities(self, image: ImageSource) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
        """Return class probabilities, float32 (num_classes, H, W), of one image."""
        return self._logits(read_image(image)).softmax(dim=1)[0].float().cpu().numpy()

    def __call__(self, image: ImageSource) -> UInt8Array:
        """Predict one image.

        Args:
            image: A path, a PIL image, or a uint8 array (H, W, 3), RGB.

        Returns:
            Class indices, uint8 (H, W), at the image's own size (after EXIF rotation).

        Raises:
            InputError: If the image cannot be read.
        """
        return self._classes(self._logits(read_image(image)))

    @torch.inference_mode()
    def _logits(self, image: UInt8Array) -> torch.Tensor:
        images = normalize(image, self.data.mean, self.data.std)[None].to(self.device)
        logits: torch.Tensor = self.model(images)
        return logits

    @staticmethod
    def _classes(logits: torch.Tensor) -> UInt8Array:
        return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()

    def write(self, source: Path, folder: Path, outputs: Sequence[str]) -> list[Path]:
        """Predict one file and write what is asked for into a folder, each file whole or not at all.

        Returns:
            The files written.
        """
        image = read_image(source)
        logits = self._logits(image)
        mask = self._classes(logits)
        written = []
        if "mask" in outputs:
            written.append(folder / f"{source.stem}.png")
            write_mask(written[-1], mask, self.data.palette)
        if "overlay" in outputs:
            written.append(folder / f"{source.stem}_overlay.png")
            buffer = io.BytesIO()
            Image.fromarray(overlay(image, mask, self.data.palette)).save(buffer, "PNG")
            write_bytes(written[-1], buffer.getvalue())
        if "probability" in outputs:
            written.append(folder / f"{source.stem}_probability.npz")
            buffer = io.BytesIO()
            probability = logits.softmax(dim=1)[0].float().cpu().numpy()
            np.savez_compressed(buffer, probability=probability, class_names=np.array(self.data.class_names))
            write_bytes(written[-1], buffer.getvalue())
        return written


@dataclass(frozen=True)
class Outcome:
    """What became of one input: the files written, or the reason why there are none."""

    source: Path
    written: list[Path]
    error: str | None = None


def predict_files(
    predictor: Predictor, sources: Sequence[Path], folder: Path, outputs: Sequence[str] = ("mask",)
) -> Iterator[Outcome]:
    """Predict files one by one; a file that cannot be read is reported and the others go on.

    Raises:
        InputError: If two inputs would write the same file; before anything is written.
    """
    seen: dict[str, Path] = {}
    for source in sources:
        if source.stem in seen:
            raise InputError(
                f"{seen[source.stem]} and {source} would both become {source.stem}.png: rename one of them"
            )
        seen[source.stem] = source
    folder.mkdir(parents=True, exist_ok=True)
    return _predict_files(predictor, sources, folder, outputs)


def _predict_files(
    predictor: Predictor, sources: Sequence[Path], folder: Path, outputs: Sequence[str]
) -> Iterator[Outcome]:
    for source in sources:
        try:
            yield Outcome(source, predictor.write(source, folder, outputs))
        except InputError as error:
            yield Outcome(source, [], str(error))


def find_images(inputs: Sequence[str | PathLike[str]]) -> list[Path]:
    """List the images that files, folders and glob patterns name, each once, in order.

    Raises:
        InputError: If an input names nothing, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and _is_image_name(file))
            if not files:
                raise InputError(f"no image in folder {path}")
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(given), recursive=True) if os.path.isfile(name))
            if not files:
                raise InputError(f"no such file, folder or pattern: {given}")
        found |= dict.fromkeys(files)
    return list(found)


def _is_image_name(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in Image.registered_extensions()


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
