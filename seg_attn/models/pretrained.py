"""Backbone weights for training: ImageNet's from caches or the network, or a user's own file. All or nothing.

A state dict must fit the backbone key by key; nothing is loaded partially and nothing starts at random in silence.
"""

import argparse
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

from seg_attn.errors import InputError

LOGGER = logging.getLogger("seg_attn")
CLASSIFIER_PREFIXES = ("fc.", "last_linear.")
RESNET_MARK = "layer4.0.conv1.weight"
SMP_FILE = "model.safetensors"
NETWORK_TIMEOUT = 10.0
WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow(follow: bool = True) -> Iterator[None]:
    """Within it, where `follow`, models are built without `backbone_weights`: a checkpoint's weights follow.

    So a checkpoint whose run started from ImageNet weights is loaded without a download.
    """
    token = _weights_follow.set(follow or _weights_follow.get())
    try:
        yield
    finally:
        _weights_follow.reset(token)


def weights_will_follow() -> bool:
    """Whether a model that is built now gets its weights from a checkpoint (see `weights_follow`)."""
    return _weights_follow.get()


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | PathLike[str]) -> str:
    """Load ImageNet weights, or those of a file, into a backbone.

    Args:
        backbone: An `AtrousBackbone`, or another module with a plain ResNet's keys.
        name: Its name in `BACKBONES`.
        weights: "imagenet", or a .pth or .safetensors file. "imagenet" is looked for in torchvision's hub cache, then
            in the Hugging Face cache that SMP fills, then on the network.

    Returns:
        What was loaded, in words; it is logged too.

    Raises:
        InputError: If the weights cannot be had, or a key is missing, unexpected or of another shape.
    """
    if _weights_follow.get():
        return "left to the checkpoint that is being loaded"
    if str(weights) == "imagenet":
        state, source = _imagenet(name)
    elif not Path(weights).is_file():
        raise InputError(f"backbone_weights must be 'imagenet' or a state dict file: there is no file {weights}")
    else:
        state, source = read_state_dict(weights), str(weights)
    count = load_backbone_state(backbone, state, source)
    said = f"backbone_weights: {count} tensors of {name} from {source}"
    LOGGER.info(said)
    return said


def load_backbone_state(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> int:
    """Load a plain ResNet state dict into a backbone, strictly; its classifier is left out.

    The first convolution is adapted where the backbone reads another number of channels than three: its kernels are
    summed for one channel, and repeated and scaled by 3 / channels for more, as SMP does.

    Returns:
        The number of tensors loaded.

    Raises:
        InputError: Listing the keys that are missing, unexpected or of another shape.
    """
    own = plain_state_dict(backbone)
    # What is no whole ResNet is left as it is, and listed.
    state = plain_resnet(state) or _without_classifier(state)
    first = next(key for key, value in own.items() if value.ndim == 4)
    if first in state and state[first].shape[1:2] == (3,) != own[first].shape[1:2]:
        state[first] = _adapt_first_conv(state[first], own[first].shape[1])
    check_keys(own, with_counters(own, state), source)
    backbone.load_state_dict(state, strict=False)
    return len(state)


def with_counters(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `given` with the batch counters it lacks: old files have none, and nothing depends on them."""
    return {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **given}


def check_keys(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise `InputError` unless two state dicts have the same keys and shapes; the message lists the differences."""
    differences = key_differences(
        {key: tuple(value.shape) for key, value in own.items()},
        {key: tuple(value.shape) for key, value in given.items()},
    )
    if differences:
        raise InputError(f"the weights of {source} do not fit the model: {differences}")


def key_differences(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    """Say which keys of `given` are missing, unexpected or of another shape; "" if none is."""
    found = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {given[key]} instead of {own[key]}" for key in own if key in given and own[key] != given[key]
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {listing(keys)}" for what, keys in found.items() if keys)


def listing(keys: Sequence[str], most: int = 8) -> str:
    """Join the first `most` keys with commas, and say how many more there are."""
    return ", ".join(keys[:most]) + (f", ... ({len(keys) - most} more)" if len(keys) > most else "")


def plain_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's state without what attention and fusion add: the keys of the pretrained network."""
    added = [name for name, _ in backbone.named_modules() if name.split(".")[-1] in ("attention", "fusion")]
    return {
        key: value
        for key, value in backbone.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in added)
    }


def plain_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a plain ResNet's tensors without its classifier and wrappers' prefixes, such as DataParallel's `module.`.

    None if the state dict holds no such network, or something beside it.
    """
    prefix = next((key.removesuffix(RESNET_MARK) for key in state if key.endswith(RESNET_MARK)), None)
    if prefix is None or not all(key.startswith(prefix) for key in state):
        return None
    return _without_classifier({key.removeprefix(prefix): value for key, value in state.items()})


def _without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(CLASSIFIER_PREFIXES)}


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or of a pickle, which may hold nothing but tensors and plain values.

    A state dict under `state_dict`, `model_state`, `model_state_dict` or `model` is taken from there.

    Raises:
        InputError: If the file is missing, is not such a file, or holds no tensors.
    """
    content = read_torch_file(path)
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    tensors = content if wrapper is None else content[wrapper]
    state = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{path} holds no tensors: a state dict (.pth, .safetensors) is needed")
    return state


def read_torch_file(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a dictionary written by `torch.save`, or a .safetensors file, executing nothing from it.

    Besides tensors and Python's plain values, NumPy scalars (a best score beside the weights, as VainF saves it) and
    `argparse.Namespace` (the arguments, as torchvision's reference training saves them) are let through.

    Raises:
        InputError: If the file is missing or is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a file of arbitrary bytes raises depends on the bytes
        raise InputError(_unreadable(path, str(error))) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


# Harmless to build, whatever the file says: a scalar from bytes, and a bag of attributes. NumPy 2 moved `scalar`; files
# name it by its old address or its new one.
_numpy_scalar = np.float64().__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]


def _unreadable(path: Path, reason: str) -> str:
    found = re.search(r"Unsupported (?:global|class)[^\n]*?([\w.]+\.\w+)", reason)
    if found:
        return (
            f"{path} is not opened: it pickles {found.group(1)}, and a pickled object can run code. Save nothing but "
            "tensors where the file comes from: torch.save(model.state_dict(), path), or a .safetensors file"
        )
    return f"{path} is not a file of weights, or not whole: a state dict by torch.save or .safetensors is needed"


def _adapt_first_conv(weight: Tensor, in_channels: int) -> Tensor:
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-in_channels // 3)
    return weight.repeat(1, repeats, 1, 1)[:, :in_channels] * (3 / in_channels)


def _imagenet(name: str) -> tuple[dict[str, Tensor], str]:
    if not _torchvision_weights(name) and _smp_settings(name) is None:
        raise InputError(f"there are no ImageNet weights of {name}: set backbone_weights to null or to a file")
    tried: list[str] = []
    for find in (_from_torchvision_cache, _from_smp_cache, _from_smp_hub, _from_torchvision_hub):
        found = find(name, tried)
        if found is not None:
            return found
    raise InputError(
        f"the ImageNet weights of {name} are neither cached nor reachable ({'; '.join(tried)}): "
        "set backbone_weights to null to start at random, or to a state dict file (.pth, .safetensors)"
    )


def _torchvision_weights(name: str) -> list[WeightsEnum]:
    try:
        # IMAGENET1K_V1 first: the recipe that the published numbers and SMP's copies are from.
        return sorted(get_model_weights(name), key=lambda weights: str(weights.name))
    except ValueError:
        return []


def hub_cache_file(url: str) -> Path:
    """Where torchvision keeps the file of that address on this machine, downloaded or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download(url: str) -> dict[str, Tensor]:
    """Download a state dict of torchvision's into its hub cache, verified by the hash in the file's name.

    Raises:
        OSError: If the network or the server cannot be reached within ten seconds, or the file is damaged.
    """
    # Asked first: torch.hub sets no timeout, and prints before it fails.
    with urlopen(Request(url, method="HEAD"), timeout=NETWORK_TIMEOUT):
        pass
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except RuntimeError as error:  # torch.hub's answer to a wrong hash
        raise OSError(str(error)) from error
    return dict(state)


def _from_torchvision_cache(name: str, tried: list[str]) -> tuple[dict[str, Tensor], str] | None:
    for weights in _torchvision_weights(name):
        path = hub_cache_file(weights.url)
        if path.is_file():
            return read_state_dict(path), f"{path} (torchvision {weights.name})"
        tried.append(f"no {path}")
    return None


def _from_torchvision_hub(name: str, tried: list[str]) -> tuple[dict[str, Tensor], str] | None:
    for weights in _torchvision_weights(name)[:1]:
        try:
            return download(weights.url), f"{weights.url} (torchvision {weights.name})"
        except OSError as error:
            tried.append(f"{urlsplit(weights.url).netloc}: {_reason(error)}")
    return None


def _smp_settings(name: str) -> Mapping[str, str] | None:
    settings: Mapping[str, Mapping[str, str]] = smp_encoders.get(name, {}).get("pretrained_settings", {})
    return settings.get("imagenet")


def _from_smp_cache(name: str, tried: list[str]) -> tuple[dict[str, Tensor], str] | None:
    settings = _smp_settings(name)
    if settings is None:
        return None
    repo, revision = settings["repo_id"], settings["revision"]
    path = try_to_load_from_cache(repo, SMP_FILE, revision=revision)
    if not isinstance(path, str):
        tried.append(f"no {repo} in the Hugging Face cache")
        return None
    return read_state_dict(path), f"{path} (SMP, {repo})"


def _from_smp_hub(name: str, tried: list[str]) -> tuple[dict[str, Tensor], str] | None:
    settings = _smp_settings(name)
    if settings is None:
        return None
    repo, revision = settings["repo_id"], settings["revision"]
    url = hf_hub_url(repo, SMP_FILE, revision=revision)
    try:
        # Asked first: without an answer, the download would try again for half a minute.
        get_hf_file_metadata(url, timeout=NETWORK_TIMEOUT)
        path = hf_hub_download(repo, SMP_FILE, revision=revision)
    except Exception as error:  # each release of the hub's client brings its network library's own family of errors
        tried.append(f"{urlsplit(url).netloc}: {_reason(error)}")
        return None
    return read_state_dict(path), f"{url} (SMP)"


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}, {text[0]}" if text else type(error).__name__
