"""Self-describing checkpoints: what `fit` writes is all that is needed to rebuild the model, and nothing is guessed.

A checkpoint is Lightning's, with every hyper-parameter of the run and what the data were: class names, palette, mean
and standard deviation. Reading one executes nothing from it and downloads nothing.
"""

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg_attn.data.images import voc_palette
from seg_attn.errors import InputError
from seg_attn.models.deeplabv3 import DeepLabV3
from seg_attn.models.pretrained import check_keys, read_torch_file, weights_follow

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODEL_PREFIX = "model."
TRAINING = ("global_step", "lr_schedulers", "run")


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of the data it was trained on.

    Attributes:
        class_names: One name per class.
        palette: One colour (red, green, blue) in 0..255 per class.
        mean: Mean per channel that images were normalised with, for values in 0..1.
        std: Standard deviation per channel, likewise.
        ignore_index: Label of pixels without a class.
    """

    class_names: list[str]
    palette: list[list[int]]
    mean: list[float]
    std: list[float]
    ignore_index: int = 255

    @classmethod
    def default(cls, num_classes: int, class_names: Sequence[str] | None = None) -> "DataInfo":
        """Return ImageNet's mean and deviation, VOC's palette, and names by number where there are none."""
        return cls(
            class_names=list(class_names or (f"class {index}" for index in range(num_classes))),
            palette=voc_palette(num_classes).tolist(),
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
        )

    @classmethod
    def of(cls, datamodule: Any) -> "DataInfo":
        """Take it from a data module."""
        return cls(
            class_names=list(datamodule.class_names),
            palette=[[int(value) for value in colour] for colour in datamodule.palette],
            mean=[float(value) for value in datamodule.mean],
            std=[float(value) for value in datamodule.std],
            ignore_index=int(datamodule.ignore_index),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: Where it was read from.
        hyper_parameters: Those of the run, flat; a `DeepLabV3`'s arguments among them.
        state_dict: The weights of the task; the model's under `model.`.
        data: What the model was trained on.
        training: What the file holds of the training besides: Lightning's `global_step` and `lr_schedulers`, and `run`,
            the `id` of the run and how it trained; None for what it does not hold.
    """

    path: Path
    hyper_parameters: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    data: DataInfo
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The arguments of `DeepLabV3` that rebuild the model."""
        known = inspect.signature(DeepLabV3).parameters
        return {name: value for name, value in self.hyper_parameters.items() if name in known}

    def build_model(self, output_stride: int | None = None) -> DeepLabV3:
        """Rebuild the model with its weights, in eval mode on the CPU; another output stride may be asked for.

        Raises:
            InputError: If the weights do not fit the hyper-parameters.
        """
        try:
            with weights_follow():
                model = DeepLabV3(**self.model_arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"the hyper-parameters of {self.path} do not make a model: {error}") from error
        self.load_into(model)
        if output_stride is not None:
            model.output_stride = output_stride
        return model.eval()

    def load_into(self, model: DeepLabV3) -> None:
        """Load the weights into a model, all of them.

        Raises:
            InputError: If a key is missing, unexpected or of another shape.
        """
        prefix = len(MODEL_PREFIX)
        state = {key[prefix:]: value for key, value in self.state_dict.items() if key.startswith(MODEL_PREFIX)}
        check_keys(model.state_dict(), state, str(self.path))
        model.load_state_dict(state)


def load_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a checkpoint written by `fit` or `import`.

    Raises:
        InputError: If the file is missing, cannot be read safely, or is not such a checkpoint.
    """
    content = read_torch_file(path)
    hyper_parameters = content.get("hyper_parameters")
    state = content.get("state_dict")
    if (
        not isinstance(hyper_parameters, Mapping)
        or not isinstance(state, Mapping)
        or "backbone" not in hyper_parameters
    ):
        raise InputError(
            f"{path} is not a checkpoint of seg_attn: `seg-attn import {path} --output OUT.ckpt` makes one of "
            "torchvision's, SMP's or VainF's"
        )
    data = content.get("data")
    return Checkpoint(
        path=Path(path),
        hyper_parameters=dict(hyper_parameters),
        state_dict=state,
        data=DataInfo(**data) if data else DataInfo.default(int(hyper_parameters["num_classes"])),
        training={name: content.get(name) for name in TRAINING},
    )


def save_model(path: str | PathLike[str], model: DeepLabV3, data: DataInfo) -> None:
    """Write a model as a checkpoint that `predict`, `test`, `compare` and `fit --ckpt_path` take.

    The file appears whole or not at all.
    """
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.0",
        "loops": None,
        "hyper_parameters": {**model.config, "backbone_weights": None},
        "state_dict": {f"{MODEL_PREFIX}{key}": value for key, value in model.state_dict().items()},
        "data": data.as_dict(),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
