"""DeepLabv3 with attention-fused skips: backbone, ASPP, decoder, classifier.

Papers: DeepLabv3 (arXiv 1706.05587), DeepLabv3+ (arXiv 1802.02611), AFF (arXiv 2009.14082).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seg_attn.attention import build_attention
from seg_attn.attention.arguments import positive_int, unknown_message
from seg_attn.fusion import build_fusion
from seg_attn.models.aspp import ASPP
from seg_attn.models.atrous import DilationPlan
from seg_attn.models.backbone import NOMINAL_STRIDES, AtrousBackbone
from seg_attn.models.decoder import Decoder, SkipFusion
from seg_attn.models.layers import ConvNormAct, resize
from seg_attn.models.pretrained import load_backbone_weights

ATTENTION_POSITIONS = ("blocks", *NOMINAL_STRIDES, "skip", "aspp", "decoder")
CONCAT_SKIP_CHANNELS = 48  # DeepLabv3+, section 4.1
SKIP_STAGES = {stride: stage for stage, stride in NOMINAL_STRIDES.items() if stride < 32}

# The `separable` argument: whether ASPP is, whether the decoder is.
SEPARABLE: Mapping[bool | str, tuple[bool, bool]] = {
    False: (False, False),
    True: (True, True),
    "aspp": (True, False),
    "decoder": (False, True),
}


class FCNHead(nn.Sequential):
    """The auxiliary head: 3x3 to a quarter of the channels, dropout, 1x1 (Long 2015, arXiv 1411.4038; torchvision's).

    Args:
        in_channels: Channels of the map it reads.
        num_classes: Channels of its logits.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        hidden = in_channels // 4
        super().__init__(
            ConvNormAct(in_channels, hidden, kernel_size=3), nn.Dropout(0.1), nn.Conv2d(hidden, num_classes, 1)
        )


class DeepLabV3(nn.Module):
    """DeepLabv3 on an atrous ResNet whose output stride can be changed on the live model.

    Args:
        backbone: A ResNet of SMP's family: resnet18/34/50/101/152, resnext50_32x4d, se_resnet50, ...
        num_classes: Channels of the logits.
        in_channels: Channels of the images.
        output_stride: Stride of the backbone's last map: 8, 16 or 32.
        multi_grid: One unit rate per residual block of the last stage, multiplied by its base rate (DeepLabv3,
            section 3.2.1); "auto" is (1, 2, 4) for three blocks and (1, 2) for two; None is no multi-grid.
        contract_dilation: A de-strided stage without multi-grid keeps the previous rate up to its removed stride (the
            exact atrous form of the pretrained network); False dilates the whole stage.
        atrous_rates: Rates of ASPP at output stride 16; doubled at 8, halved at 32. An odd rate is rounded up at 32,
            with a warning.
        image_pooling: What ASPP's image branch pools with: "average" or "attention" (a learned query).
        skip_strides: Backbone stages joined to the ASPP output, deep to shallow, by nominal stride: 16 is `layer3`,
            8 `layer2`, 4 `layer1`, whatever the output stride. Empty is plain DeepLabv3.
        skip_channels: Width of a projected skip; None is 48 for "concat" and the decoder's width otherwise.
        fusion: How each skip is joined: "add", "concat", "aff", "iaff" or {"name": ..., **options}.
        residual_fusion: How every residual block joins its branch: "add", "aff", "iaff" or {"name": ..., **options}.
            AFF and iAFF start as plain addition (gain 2, last normalisation zero), so that pretrained weights keep
            their function.
        attention: Attention blocks by position: {position: name | [names] | {"name": ..., **options}}. Positions:
            "blocks" (every residual branch), "layer1" to "layer4" (a stage's output), "skip" (each projected skip),
            "aspp" (ASPP's output), "decoder" (before the classifier).
        aux_head: Adds an FCN head on `layer3` for training; see `forward_with_aux`.
        separable: Atrous separable convolutions in ASPP and decoder; "aspp" or "decoder" for one of the two.
        align_corners: Bilinear resizing; True only for weights trained that way (SMP's).
        backbone_weights: None, "imagenet", or a file with a ResNet state dict (.pth or .safetensors).
        decoder_channels: Width of ASPP and decoder.
        dropout: Probability of dropping a value of ASPP's output, in training.
        refine_aspp: A 3x3 convolution after ASPP even where skips follow (SMP's DeepLabV3Plus has it; plain DeepLabv3
            always does).

    Attributes:
        config: The arguments as scalars, lists and dicts, with the present `output_stride`: `DeepLabV3(**config)` has
            the same state-dict keys and, with the same state dict, the same logits.

    Raises:
        ValueError: For an argument out of its range; the message names argument, rule and value.
        InputError: If `backbone_weights` cannot be had or do not fit.

    Examples:
        >>> import torch
        >>> model = DeepLabV3("resnet18", num_classes=5).eval()
        >>> model(torch.zeros(1, 3, 65, 97)).shape
        torch.Size([1, 5, 65, 97])
        >>> model.output_stride = 8
        >>> [block.dilation for block in model.dilation_plan()[-2:]]
        [4, 8]
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 21,
        in_channels: int = 3,
        output_stride: int = 16,
        multi_grid: str | Sequence[int] | None = "auto",
        contract_dilation: bool = True,
        atrous_rates: Sequence[float] = (6, 12, 18),
        image_pooling: str = "average",
        skip_strides: Sequence[int] = (4,),
        skip_channels: int | None = None,
        fusion: str | dict[str, Any] = "aff",
        residual_fusion: str | dict[str, Any] = "add",
        attention: dict[str, Any] | None = None,
        aux_head: bool = False,
        separable: bool | str = False,
        align_corners: bool = False,
        backbone_weights: str | Path | None = None,  # of `str | PathLike` jsonargparse makes a path named None
        decoder_channels: int = 256,
        dropout: float = 0.5,
        refine_aspp: bool = False,
    ) -> None:
        arguments = locals().copy()  # on the first line: self, super's __class__, and the arguments
        super().__init__()
        self.config = {name: _plain(value) for name, value in arguments.items() if name not in ("self", "__class__")}
        for name in ("num_classes", "in_channels", "decoder_channels"):
            positive_int(name, arguments[name])
        skips = _check_skip_strides(skip_strides)
        specs = _check_attention(attention)
        aspp_separable, decoder_separable = _check_separable(separable)
        if _name(residual_fusion) == "concat":
            raise ValueError("residual_fusion must keep the channels: one of add, aff, iaff, got 'concat'")
        width = decoder_channels
        skip_width = _skip_width(skip_channels, fusion, width)

        self.backbone = AtrousBackbone(
            backbone,
            in_channels=in_channels,
            output_stride=output_stride,
            multi_grid=multi_grid,
            contract_dilation=contract_dilation,
            block_fusion=partial(_residual_fusion, residual_fusion),
            block_attention=partial(build_attention, specs["blocks"]) if "blocks" in specs else None,
            stage_attention={s: partial(build_attention, specs[s]) for s in NOMINAL_STRIDES if s in specs},
        )
        self.aspp = ASPP(
            self.backbone.channels_of("layer4"),
            width,
            atrous_rates=atrous_rates,
            output_stride=output_stride,
            image_pooling=image_pooling,
            separable=aspp_separable,
            dropout=dropout,
        )
        self.aspp_attention = _attention(specs, "aspp", width)
        conv3x3 = partial(ConvNormAct, kernel_size=3, separable=decoder_separable)

        def skip_fusion(stage: str) -> SkipFusion:
            joined = build_fusion(fusion, width)
            return SkipFusion(
                project=ConvNormAct(self.backbone.channels_of(stage), skip_width),
                attention=_attention(specs, "skip", skip_width),
                fusion=joined,
                refine=conv3x3(joined.out_channels(skip_width, width), width),
                align_corners=align_corners,
            )

        self.skip_stages = [SKIP_STAGES[stride] for stride in skips]
        self._skip_indices = [list(NOMINAL_STRIDES).index(stage) for stage in self.skip_stages]
        self.decoder = Decoder(
            refine=conv3x3(width, width) if refine_aspp or not skips else nn.Identity(),
            skips=[skip_fusion(stage) for stage in self.skip_stages],
        )
        self.decoder_attention = _attention(specs, "decoder", width)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.aux_classifier = FCNHead(self.backbone.channels_of("layer3"), num_classes) if aux_head else None
        self.align_corners = align_corners
        if backbone_weights is not None:
            load_backbone_weights(self.backbone, backbone, backbone_weights)

    @property
    def output_stride(self) -> int:
        """Stride of the backbone's last map, 8, 16 or 32.

        Setting it moves strides, dilations, paddings, multi-grid and ASPP rates together and touches no weight.

        Raises:
            ValueError: If set to anything but 8, 16 or 32.
        """
        return self.backbone.output_stride

    @output_stride.setter
    def output_stride(self, output_stride: int) -> None:
        self.backbone.output_stride = output_stride
        self.aspp.set_output_stride(output_stride)
        self.config["output_stride"] = output_stride

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.classifier.out_channels

    def dilation_plan(self) -> DilationPlan:
        """Stride, dilation and effective rate of every residual block; prints as a table."""
        return self.backbone.dilation_plan()

    def oversized_rates(self, height: int, width: int) -> tuple[int, ...]:
        """ASPP rates at which, for an image of this size, a 3x3 kernel sees nothing but its centre.

        A rate as large as both sides of the feature map puts all other taps on the padding: the branch has become a
        1x1 convolution (DeepLabv3, section 3.3).
        """
        longest = self.backbone.last_map_size(max(height, width))
        return tuple(rate for rate in self.aspp.rates if rate >= longest)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits.

        Args:
            images: float (N, in_channels, H, W), normalised as in training.

        Returns:
            float (N, num_classes, H, W).
        """
        return self._segment(self.backbone(images), images.shape[-2:])

    def forward_with_aux(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the auxiliary head's logits, both float (N, num_classes, H, W).

        Raises:
            ValueError: If the model was built without `aux_head=True`.
        """
        if self.aux_classifier is None:
            raise ValueError("forward_with_aux needs a model built with aux_head=True")
        features = self.backbone(images)
        aux = resize(self.aux_classifier(features[2]), images.shape[-2:], self.align_corners)
        return self._segment(features, images.shape[-2:]), aux

    def _segment(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        low_levels = [features[stage] for stage in self._skip_indices]
        x = self.aspp_attention(self.aspp(features[-1]))
        x = self.decoder_attention(self.decoder(x, low_levels))
        return resize(self.classifier(x), size, self.align_corners)


def _plain(value: Any) -> Any:
    """A constructor argument as YAML and a checkpoint hold it: scalars, lists and dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, PathLike):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _name(spec: Any) -> Any:
    return spec.get("name") if isinstance(spec, Mapping) else spec


def _residual_fusion(spec: str | dict[str, Any], channels: int) -> nn.Module:
    # Gain 2 and a zero last normalisation: AFF then starts as the addition that the pretrained block was trained with.
    return build_fusion(spec, channels, gain=2, zero_init=True)


def _attention(specs: Mapping[str, Any], position: str, channels: int) -> nn.Module:
    return build_attention(specs[position], channels) if position in specs else nn.Identity()


def _skip_width(skip_channels: int | None, fusion: str | dict[str, Any], width: int) -> int:
    if skip_channels is None:
        return CONCAT_SKIP_CHANNELS if _name(fusion) == "concat" else width
    if _name(fusion) != "concat" and skip_channels != width:
        raise ValueError(
            f"skip_channels must be the decoder's width, {width}, unless fusion is 'concat', got {skip_channels!r}"
        )
    return positive_int("skip_channels", skip_channels)


def _check_separable(separable: bool | str) -> tuple[bool, bool]:
    """Return whether ASPP and whether the decoder is separable."""
    if separable not in SEPARABLE:
        raise ValueError(f"separable must be True, False, 'aspp' or 'decoder', got {separable!r}")
    return SEPARABLE[separable]


def _check_skip_strides(skip_strides: Sequence[int]) -> list[int]:
    skips = list(skip_strides)
    if any(stride not in SKIP_STAGES for stride in skips) or skips != sorted(set(skips), reverse=True):
        raise ValueError(f"skip_strides must be taken from 16, 8, 4, in this order (deep to shallow), got {skips}")
    return skips


def _check_attention(attention: Mapping[str, Any] | None) -> Mapping[str, Any]:
    specs = {position: spec for position, spec in (attention or {}).items() if spec is not None}
    for position in specs:
        if position not in ATTENTION_POSITIONS:
            raise ValueError(unknown_message("attention position", position, ATTENTION_POSITIONS))
    return specs
