"""A trained network as one file for other runtimes: ONNX, or torch.export's `.pt2`, for images of any size.

Exported once, checked at another size and batch than it was traced at: a graph that has kept the traced size, or
computes something else, is never left on disk.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from seg_attn.checkpoint import DataInfo
from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import DeepLabV3

FORMATS = (".onnx", ".pt2")
OUTPUTS = ("logits", "classes")
TOLERANCE = 1e-4
"""Most that logits may differ by, relative to the largest: float32 rounding of another order of sums."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LEAST_CHECKED_SIDE = 97

Runner = Callable[[Tensor], Tensor]


class Deployed(nn.Module):
    """The network between the bytes of a photograph and the classes of its pixels, where that is wanted.

    Args:
        model: The network.
        data: What images are normalised with.
        normalize: The input is RGB bytes, and mean and deviation are part of the graph.
        classes: The output is class indices.

    Shape:
        images: float32 (N, C, H, W), normalised, or uint8 (N, 3, H, W), RGB.
        Returns: logits, float32 (N, num_classes, H, W), or class indices, uint8 (N, H, W).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: DeepLabV3, data: DataInfo, *, normalize: bool = False, classes: bool = False) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize
        self.classes = classes
        self.register_buffer("mean", 255 * torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(data.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits or classes."""
        if self.normalize:
            images = (images.float() - self.mean) / self.std
        logits: Tensor = self.model(images)
        return logits.argmax(dim=1).to(torch.uint8) if self.classes else logits


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares to the network it was made of.

    Attributes:
        path: The file.
        size: (height, width) it was traced at.
        checked_size: (height, width) it was run at by the other runtime.
        error: Of logits there: max |difference| / max |logit|. None where the graph gives classes.
        equal_pixels: Share of pixels there that get the same class.
    """

    path: Path
    size: tuple[int, int]
    checked_size: tuple[int, int]
    error: float | None
    equal_pixels: float


def export_model(
    model: DeepLabV3,
    data: DataInfo,
    path: str | PathLike[str],
    *,
    size: tuple[int, int] = (513, 513),
    normalize: bool = False,
    output: str = "logits",
) -> Exported:
    """Export a network, and run the file at another size and batch before it takes its place.

    The graph takes any batch and any image from about four output strides a side upwards. Class names, palette, mean
    and deviation travel with it: as ONNX metadata, or as the `.pt2`'s extra file `seg_attn.json`.

    Args:
        model: The network, at the output stride that is wanted; it is put into eval mode, on the CPU.
        data: Class names, palette, mean and deviation.
        path: File to write, `.onnx` or `.pt2`.
        size: (height, width) to trace at.
        normalize: Take RGB bytes, uint8 (N, 3, H, W), and normalise them in the graph.
        output: "logits", float32 (N, num_classes, H, W), or "classes", uint8 (N, H, W).

    Raises:
        ValueError: `output` is unknown, or `size` is too small.
        InputError: The file's ending is neither of the two, a package is missing, the network does not fit the options,
            or the file computes something else than the network.
    """
    path = Path(path)
    _check_arguments(model, data, path, size, normalize, output)
    module = Deployed(model.cpu().eval(), data, normalize=normalize, classes=output == "classes").eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own: exporters may write files beside the one they are told.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, torch.no_grad(), _quiet():
        temporary = Path(folder) / path.name
        program = torch.export.export(module, (_images(module, 2, size),), dynamic_shapes=_any_size())
        about = json.dumps({**data.as_dict(), "output_stride": model.output_stride, "output": output})
        write = _write_onnx if path.suffix == ".onnx" else _write_pt2
        runner = write(program, temporary, about)
        exported = _compared(module, runner, path, size)
        os.replace(temporary, path)
    return exported


def _check_arguments(
    model: DeepLabV3, data: DataInfo, path: Path, size: tuple[int, int], normalize: bool, output: str
) -> None:
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: the file's ending tells the format: name a .onnx or a .pt2 file")
    if output not in OUTPUTS:
        raise ValueError(f"output must be 'logits' or 'classes', got {output!r}")
    least = 4 * model.output_stride
    if len(size) != 2 or min(size) < least:
        raise ValueError(f"size must be (height, width) of at least {least} each, got {tuple(size)}")
    channels = model.config["in_channels"]
    if normalize and (channels != 3 or len(data.mean) != 3):
        raise InputError(f"normalising in the graph is for RGB: the network takes {channels} channels")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'seg_attn[export]', or export to .pt2")


def _any_size() -> tuple[Any, ...]:
    # AUTO finds the range by itself; where it would keep the traced size, the check at another size says so.
    return ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)


def _write_onnx(program: ExportedProgram, path: Path, about: str) -> Runner:
    import onnxruntime

    # Weights inside: one file to ship. They stay below protobuf's 2 GiB.
    exported = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
    assert exported is not None
    exported.model.metadata_props["seg_attn"] = about
    exported.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run


def _write_pt2(program: ExportedProgram, path: Path, about: str) -> Runner:
    torch.export.save(program, path, extra_files={"seg_attn.json": about})
    module: Runner = torch.export.load(path).module()
    return module


def _images(module: Deployed, batch: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if module.normalize:
        return torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, module.model.config["in_channels"], *size, generator=generator)


def _compared(module: Deployed, runner: Runner, path: Path, size: tuple[int, int]) -> Exported:
    """Run the file at another batch, size and shape than traced, and compare.

    Raises:
        InputError: It fails there, or computes something else.
    """
    least = max(_LEAST_CHECKED_SIDE, 4 * module.model.output_stride + 1)
    checked = (max(least, size[0] // 2 + 1), max(least, 3 * size[1] // 4 + 2))
    images = _images(module, 1, checked)
    expected = module(images)
    try:
        actual = runner(images)
    except Exception as failure:  # each runtime has exceptions of its own
        reason = " ".join(str(failure).split())[:300]
        raise InputError(
            f"{path}: not written, for it does not run at {checked[0]}x{checked[1]}: {reason}"
        ) from failure
    if actual.shape != expected.shape:
        raise InputError(f"{path}: not written, for it gives {tuple(actual.shape)} in place of {tuple(expected.shape)}")
    error: float | None = None
    if module.classes:
        equal = (actual == expected).float().mean().item()
    else:
        error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        equal = (actual.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
    if (error is not None and not error <= TOLERANCE) or equal < 0.999:
        figure = f"{100 * equal:.3f} % equal pixels" if error is None else f"relative error {error:.1e}"
        raise InputError(
            f"{path}: not written, for at {checked[0]}x{checked[1]} it differs from the network ({figure}); "
            "a network whose float32 logits are themselves rounding cannot be checked"
        )
    return Exported(path, size, checked, error, equal)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters say of their own progress and of their own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
