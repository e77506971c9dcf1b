"""Peers' checkpoints as models of ours: torchvision's, SMP's and VainF's DeepLabv3 and v3+, and plain ResNets.

Architecture (backbone, classes, skip, separable convolutions, auxiliary head) is read from the tensors; what tensors do
not hold (output stride, rates, how resizing aligns, how a stage is dilated) are the peer's conventions, in `LAYOUTS`.
Every tensor of the network finds its place, or the import is an error that lists keys.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights, list_models

from seg_attn.attention.arguments import positive_int
from seg_attn.errors import InputError
from seg_attn.models.atrous import check_output_stride
from seg_attn.models.backbone import BACKBONES, AtrousBackbone
from seg_attn.models.deeplabv3 import SEPARABLE, DeepLabV3
from seg_attn.models.pretrained import (
    check_keys,
    download,
    hub_cache_file,
    key_differences,
    listing,
    load_backbone_state,
    plain_resnet,
    plain_state_dict,
    read_state_dict,
    with_counters,
)

Rules = tuple[tuple[str, str], ...]
Shapes = Mapping[str, tuple[int, ...]]

RELEASED = "deeplabv3_resnet"
RATES_AT_16 = (6, 12, 18)
FIRST_KERNELS = ("conv1.weight", "layer0.conv1.weight")  # torchvision's, and the SE family's


@dataclass(frozen=True)
class Layout:
    """One peer network's keys and conventions.

    Attributes:
        source: The peer, as `import_weights` names it.
        mark: A key that every such state dict has and no other layout's.
        backbone: Its backbone's prefix.
        aspp: Its ASPP's prefix, as a regular expression.
        rules: Regular expressions from whole keys of the rest to ours; the first that matches counts.
        output_stride: What it runs at by default.
        rates: ASPP's default rates at whatever stride it runs, or None where they follow it (6, 12, 18 at 16).
        contract_dilation: Whether it dilates in the exact form.
        align_corners: How it resizes.
        skip: Whether it joins a skip at stride 4 (v3+).
        refine_aspp: Whether a 3x3 stands between ASPP and that skip.
        high_level_first: Whether it concatenates (high-level, low-level); ours is (low-level, high-level).
    """

    source: str
    mark: str
    backbone: str
    aspp: str
    rules: Rules
    output_stride: int
    rates: tuple[int, ...] | None
    contract_dilation: bool = True
    align_corners: bool = False
    skip: bool = False
    refine_aspp: bool = False
    high_level_first: bool = False


LAYOUTS: Sequence[Layout] = (
    Layout(
        source="torchvision",
        mark="classifier.0.convs.0.0.weight",
        backbone="backbone.",
        aspp=r"classifier\.0",
        rules=(
            (r"classifier\.1\.(.+)", r"decoder.refine.0.\1"),
            (r"classifier\.2\.(.+)", r"decoder.refine.1.\1"),
            (r"classifier\.4\.(.+)", r"classifier.\1"),
            (r"aux_classifier\.([01])\.(.+)", r"aux_classifier.0.\1.\2"),
            (r"aux_classifier\.4\.(.+)", r"aux_classifier.2.\1"),
        ),
        output_stride=8,
        rates=(12, 24, 36),
    ),
    Layout(
        source="smp",
        mark="decoder.conv.weight",
        backbone="encoder.",
        aspp=r"decoder\.aspp",
        rules=(
            (r"decoder\.conv\.(.+)", r"decoder.refine.0.\1"),
            (r"decoder\.bn\.(.+)", r"decoder.refine.1.\1"),
            (r"segmentation_head\.0\.(.+)", r"classifier.\1"),
        ),
        output_stride=8,
        rates=(12, 24, 36),
        contract_dilation=False,
        align_corners=True,
    ),
    # SMP's DeepLabV3 before 0.4, whose decoder was one nn.Sequential.
    Layout(
        source="smp",
        mark="decoder.0.convs.0.0.weight",
        backbone="encoder.",
        aspp=r"decoder\.0",
        rules=(
            (r"decoder\.1\.(.+)", r"decoder.refine.0.\1"),
            (r"decoder\.2\.(.+)", r"decoder.refine.1.\1"),
            (r"segmentation_head\.0\.(.+)", r"classifier.\1"),
        ),
        output_stride=8,
        rates=(12, 24, 36),
        contract_dilation=False,
        align_corners=True,
    ),
    Layout(
        source="smp",
        mark="decoder.block1.0.weight",
        backbone="encoder.",
        aspp=r"decoder\.aspp\.0",
        rules=(
            (r"decoder\.aspp\.1\.(.+)", r"decoder.refine.0.\1"),
            (r"decoder\.aspp\.2\.(.+)", r"decoder.refine.1.\1"),
            (r"decoder\.block1\.([01])\.(.+)", r"decoder.skips.0.project.\1.\2"),
            (r"decoder\.block2\.([01])\.(.+)", r"decoder.skips.0.refine.\1.\2"),
            (r"segmentation_head\.0\.(.+)", r"classifier.\1"),
        ),
        output_stride=16,
        rates=(12, 24, 36),
        contract_dilation=False,
        align_corners=True,
        skip=True,
        refine_aspp=True,
        high_level_first=True,
    ),
    Layout(
        source="vainf",
        mark="classifier.classifier.0.convs.0.0.weight",
        backbone="backbone.",
        aspp=r"classifier\.classifier\.0",
        rules=(
            (r"classifier\.classifier\.1\.(?:body\.)?(.+)", r"decoder.refine.0.\1"),
            (r"classifier\.classifier\.2\.(.+)", r"decoder.refine.1.\1"),
            (r"classifier\.classifier\.4\.(.+)", r"classifier.\1"),
        ),
        output_stride=16,
        rates=None,
    ),
    Layout(
        source="vainf",
        mark="classifier.project.0.weight",
        backbone="backbone.",
        aspp=r"classifier\.aspp",
        rules=(
            (r"classifier\.project\.([01])\.(.+)", r"decoder.skips.0.project.\1.\2"),
            (r"classifier\.classifier\.0\.(?:body\.)?(.+)", r"decoder.skips.0.refine.0.\1"),
            (r"classifier\.classifier\.1\.(.+)", r"decoder.skips.0.refine.1.\1"),
            (r"classifier\.classifier\.3\.(.+)", r"classifier.\1"),
        ),
        output_stride=16,
        rates=None,
        skip=True,
    ),
)
SOURCES = tuple(dict.fromkeys(layout.source for layout in LAYOUTS))


def import_weights(
    state_dict_or_path: Mapping[str, Tensor] | str | PathLike[str],
    source: str = "auto",
    output_stride: int | None = None,
    atrous_rates: Sequence[int] | None = None,
) -> DeepLabV3:
    """Turn a peer's weights into a `DeepLabV3` with equal logits.

    Args:
        state_dict_or_path: A state dict, a file that holds one (.pth, .ckpt, .safetensors; wrappers such as
            `model_state` and prefixes such as `module.` are taken off), or the name of released weights of torchvision
            ("DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1", "deeplabv3_resnet101", the file's name), taken from
            its hub cache or downloaded.
        source: "torchvision", "smp", "vainf", or "auto" to tell from the keys.
        output_stride: The stride the peer's network ran at. None is the peer's default: 8 for torchvision and SMP's
            DeepLabV3, 16 for SMP's DeepLabV3Plus and VainF.
        atrous_rates: The rates its ASPP ran at, at that stride. None is the peer's default: 12, 24, 36 for torchvision
            and SMP at any stride, rates that follow the stride (6, 12, 18 at 16) for VainF.

    Returns:
        The model in eval mode, float32, on the CPU. Its output stride can be changed like any other's. A plain ResNet
        gives a model whose backbone is loaded and whose head is new; a warning says so. A warning also names tensors
        that lie beside the network (a Lightning module's loss weights or normalisation buffers) and are left out.

    Raises:
        ValueError: For an unknown `source`, an output stride that is not 8, 16 or 32, or rates that are not positive
            integers.
        InputError: If the tensors are not such a network, or any of them does not fit; keys are listed.
    """
    if source not in ("auto", *SOURCES):
        raise ValueError(f"source must be one of auto, {', '.join(SOURCES)}, got {source!r}")
    if output_stride is not None:
        check_output_stride(output_stride)
    for rate in atrous_rates or ():
        positive_int("atrous_rates", rate)
    if isinstance(state_dict_or_path, Mapping):
        state, said = dict(state_dict_or_path), "the given state dict"
    else:
        state, said = _read(str(state_dict_or_path)), str(state_dict_or_path)
    layout = _find_layout(state, source, said)
    build = _from_backbone if layout is None else partial(_from_layout, layout)
    return build(state, said, output_stride, atrous_rates).eval()


def detect_backbone(state: Mapping[str, Tensor], said: str) -> str:
    """Name the backbone whose tensors have these keys and shapes, whatever its number of input channels.

    Args:
        state: A backbone's state dict, without its classifier.
        said: What the error calls it.

    Raises:
        InputError: If there is none: with what is missing, unexpected or of another shape in the nearest one.
    """
    given = _shapes(state)
    nearest = min(BACKBONES, key=lambda name: len(given.items() ^ _backbone_shapes(name).items()))
    known = _backbone_shapes(nearest)
    if given == known:
        return nearest
    if len(given.items() & known.items()) < len(known) / 2:
        first = ", ".join(list(state)[:5])
        raise InputError(f"the backbone of {said} is none of {', '.join(BACKBONES)}: its first keys are {first}")
    raise InputError(f"the backbone of {said} is nearly {nearest}, but not quite: {key_differences(known, given)}")


def released_weights(name: str) -> WeightsEnum | None:
    """Return torchvision's released DeepLabv3 weights by the name of the enum, the model or the file, or None."""
    for model in list_models():
        if model.startswith(RELEASED):
            for weights in get_model_weights(model):
                default = f"{type(weights).__name__}.DEFAULT"
                if name in (str(weights), default, model, hub_cache_file(weights.url).name):
                    return weights
    return None


def _read(source: str) -> dict[str, Tensor]:
    if Path(source).is_file():
        return read_state_dict(source)
    weights = released_weights(source)
    if weights is None:
        names = ", ".join(model for model in list_models() if model.startswith(RELEASED))
        raise InputError(f"no such file: {source} (and no name of torchvision's released weights, such as {names})")
    cached = hub_cache_file(weights.url)
    if cached.is_file():
        return read_state_dict(cached)
    try:
        return download(weights.url)
    except OSError as error:
        raise InputError(
            f"{weights} is not in torchvision's hub cache and cannot be downloaded ({error}): "
            f"put {cached.name} into {cached.parent}"
        ) from error


def _find_layout(state: Mapping[str, Tensor], source: str, said: str) -> Layout | None:
    """Return the layout of a state dict, None for a plain ResNet's."""
    found = [layout for layout in LAYOUTS if _prefixes(state, layout)]
    wanted = [layout for layout in found if source in ("auto", layout.source)]
    if wanted:
        return wanted[0]
    if found:
        raise InputError(f"{said} has the keys of {found[0].source}, not of {source}: take source='{found[0].source}'")
    if any(key.endswith("aspp.branches.0.0.weight") for key in state):
        raise InputError(f"{said} is one of our own models: it needs no import")
    if plain_resnet(state) is not None:
        return None
    peers = ", ".join(SOURCES)
    raise InputError(
        f"{said} has neither the keys of a DeepLabv3 or v3+ (of {peers}) nor those of a plain ResNet; "
        f"its first keys are {', '.join(list(state)[:5])}"
    )


def _prefixes(state: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """What stands before a network's keys, wherever one of this layout is found: "" or wrappers' names and a dot."""
    heads = [key.removesuffix(layout.mark) for key in state if key.endswith(layout.mark)]
    return [
        head
        for head in heads
        if (not head or head.endswith(".")) and any(key.startswith(head + layout.backbone) for key in state)
    ]


def _from_backbone(
    state: Mapping[str, Tensor], said: str, output_stride: int | None, atrous_rates: Sequence[int] | None
) -> DeepLabV3:
    plain = plain_resnet(state) or {}
    stride = output_stride or 16
    model = DeepLabV3(
        backbone=detect_backbone(plain, said),
        in_channels=_in_channels(plain),
        output_stride=stride,
        atrous_rates=_rates_at_16(atrous_rates, stride),
    )
    load_backbone_state(model.backbone, plain, said)
    warnings.warn(
        f"{said} holds a backbone only: ASPP, decoder and classifier start at random and must be trained", stacklevel=3
    )
    return model


def _from_layout(
    layout: Layout,
    state: Mapping[str, Tensor],
    said: str,
    output_stride: int | None,
    atrous_rates: Sequence[int] | None,
) -> DeepLabV3:
    renamed = _rename(_network(state, layout, said), layout, said)
    stride = output_stride or layout.output_stride
    rates = _rates_at_16(atrous_rates or layout.rates, stride)
    branches = len({key.split(".")[2] for key in renamed if key.startswith("aspp.branches.")}) - 2
    if branches != len(rates):
        raise InputError(f"the ASPP of {said} has {branches} atrous branches: atrous_rates must name {branches} rates")
    is_separable = "aspp.branches.1.0.1.weight" in renamed, any(key in renamed for key in _SEPARABLE_DECODER)
    backbone = {key.removeprefix("backbone."): value for key, value in renamed.items() if key.startswith("backbone.")}
    skip = renamed.get("decoder.skips.0.project.0.weight")
    num_classes, width = renamed["classifier.weight"].shape[:2]
    model = DeepLabV3(
        backbone=detect_backbone(backbone, said),
        num_classes=num_classes,
        in_channels=_in_channels(backbone),
        output_stride=stride,
        multi_grid=None,
        contract_dilation=layout.contract_dilation,
        atrous_rates=rates,
        skip_strides=(4,) if layout.skip else (),
        skip_channels=None if skip is None else skip.shape[0],
        fusion="concat",
        aux_head="aux_classifier.2.weight" in renamed,
        separable=next(value for value, parts in SEPARABLE.items() if parts == is_separable),
        align_corners=layout.align_corners,
        decoder_channels=width,
        refine_aspp=layout.refine_aspp,
    )
    if layout.high_level_first:
        for key in _AFTER_CONCAT & renamed.keys():
            renamed[key] = _low_level_first(renamed[key], width)
    renamed = with_counters(model.state_dict(), renamed)
    check_keys(model.state_dict(), renamed, said)
    model.load_state_dict(renamed)
    return model


_SEPARABLE_DECODER = ("decoder.refine.0.1.weight", "decoder.skips.0.refine.0.1.weight")
# The convolution that reads the concatenation: plain, or depthwise and pointwise.
_AFTER_CONCAT = {f"decoder.skips.0.refine.0.{part}weight" for part in ("", "0.", "1.")}


def _network(state: Mapping[str, Tensor], layout: Layout, said: str) -> dict[str, Tensor]:
    """The network's tensors without prefixes; a warning names what lies beside it."""
    prefixes = _prefixes(state, layout)
    if len(prefixes) > 1:
        raise InputError(
            f"{said} holds {len(prefixes)} networks, under {', '.join(repr(prefix) for prefix in prefixes)}: "
            "pass the state dict of one"
        )
    prefix = prefixes[0]
    beside = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if beside:
        warnings.warn(
            f"left out of {said}, beside the network under {prefix!r}: "
            + ", ".join(_describe(key, value) for key, value in beside.items()),
            stacklevel=4,
        )
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _describe(key: str, value: Tensor) -> str:
    # A normalisation's mean and std are worth reading: whoever predicts with the network needs them.
    few = 4
    return f"{key} = {[round(number, 4) for number in value.flatten().tolist()]}" if value.numel() <= few else key


def _rename(state: Mapping[str, Tensor], layout: Layout, said: str) -> dict[str, Tensor]:
    rules = ((re.escape(layout.backbone) + "(.+)", r"backbone.\1"), *_aspp_rules(layout.aspp, state), *layout.rules)
    renamed, unplaced = {}, []
    for key, value in state.items():
        target = next((re.sub(pattern, new, key) for pattern, new in rules if re.fullmatch(pattern, key)), None)
        if target is None:
            unplaced.append(key)
        else:
            renamed[target] = value
    if unplaced:
        raise InputError(
            f"{said} is not a DeepLabv3 of {layout.source} and nothing else: unexpected {listing(unplaced)}"
        )
    if "classifier.weight" not in renamed:
        raise InputError(f"{said} is not a whole DeepLabv3 of {layout.source}: its classifier is missing")
    return renamed


def _aspp_rules(prefix: str, state: Mapping[str, Tensor]) -> Rules:
    # The pooled branch is the last; its pooling stands at index 0 of theirs, before convolution and normalisation.
    pooled = "|".join(
        match.group(1) for key in state if (match := re.fullmatch(rf"{prefix}\.convs\.(\d+)\.2\.weight", key))
    )
    return (
        (rf"{prefix}\.convs\.({pooled})\.1\.(.+)", r"aspp.branches.\1.1.0.\2"),
        (rf"{prefix}\.convs\.({pooled})\.2\.(.+)", r"aspp.branches.\1.1.1.\2"),
        (rf"{prefix}\.convs\.(\d+)\.0\.(?:body\.)?(.+)", r"aspp.branches.\1.0.\2"),
        (rf"{prefix}\.convs\.(\d+)\.1\.(.+)", r"aspp.branches.\1.1.\2"),
        (rf"{prefix}\.project\.([01])\.(.+)", r"aspp.project.0.\1.\2"),
    )


def _low_level_first(weight: Tensor, high_channels: int) -> Tensor:
    """Reorder the input channels of a convolution on [high, low] for [low, high]."""
    axis = 0 if weight.shape[1] == 1 else 1  # a depthwise kernel has its channels in front
    high, low = torch.tensor_split(weight, [high_channels], dim=axis)
    return torch.cat([low, high], dim=axis)


def _rates_at_16(rates: Sequence[int] | None, output_stride: int) -> list[float]:
    """Turn rates that ran at a stride into ours, which are those at output stride 16; None is ours."""
    scaled = [rate * output_stride / 16 for rate in rates] if rates else list(RATES_AT_16)
    return [int(rate) if rate == int(rate) else rate for rate in scaled]


def _in_channels(backbone: Mapping[str, Tensor]) -> int:
    return next(backbone[key].shape[1] for key in FIRST_KERNELS if key in backbone)


@cache
def _backbone_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return _shapes(plain_state_dict(AtrousBackbone(name)))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by key, without batch counters and with the first kernel's input channels left open."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for key in FIRST_KERNELS:
        if len(shapes.get(key, ())) == 4:
            shapes[key] = (shapes[key][0], 0, *shapes[key][2:])
    return shapes
