"""Atrous residual backbones: SMP's ResNet family with output stride, multi-grid, fusion and attention.

The networks and their state-dict keys are SMP's (which are torchvision's for ResNet, ResNeXt and Wide ResNet, and
Cadene's for the SE family). What is ours is where strides and dilations come from (`seg_attn.models.atrous`) and how
a residual block joins its branch.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders import senet as smp_senet
from segmentation_models_pytorch.encoders.senet import SENetEncoder
from torch import Tensor, nn
from torchvision.models import resnet as tv_resnet

from seg_attn.fusion import Add
from seg_attn.models.atrous import (
    STEM_STRIDE,
    BlockLayout,
    BlockRates,
    DilationPlan,
    atrous_plan,
    resolve_multi_grid,
)
from seg_attn.models.layers import set_rate
from seg_attn.norm import use_single_value_batch_norm

NOMINAL_STRIDES: Mapping[str, int] = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}

# The stem's modules in the order they run: torchvision's names, then those of the SE family.
_STEM = ("conv1", "bn1", "relu", "maxpool", "layer0", "layer0_pool")

Builder = Callable[[int], nn.Module]


class _JoinedBlock(nn.Module):
    """A residual block as relu(fusion(shortcut(x), attention(branch(x)))), where fusion is x + y unless replaced.

    A mixin before the block's own class, which builds the modules and so gives them their names.
    """

    layout: ClassVar[BlockLayout]
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    bn1: nn.Module
    bn2: nn.Module
    relu: nn.Module
    downsample: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.downsample = self.downsample or nn.Identity()  # None where input and output have one shape
        self.attention: nn.Module = nn.Identity()
        self.fusion: nn.Module = Add()

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, up to and with its last batch normalisation (and SE gate)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H / stride, W / stride)."""
        y = self.attention(self.branch(x))
        output: Tensor = self.relu(self.fusion(self.downsample(x), y))
        return output

    def set_rates(self, rates: BlockRates) -> None:
        """Give every convolution of the block its stride, dilation and padding."""
        for index, rate in enumerate(rates.convs, start=1):
            set_rate(getattr(self, f"conv{index}"), rate.dilation, rate.stride)
        for module in self.downsample.modules():
            if isinstance(module, nn.Conv2d):
                set_rate(module, rates.shortcut.dilation, rates.shortcut.stride)


class _Basic(_JoinedBlock, tv_resnet.BasicBlock):  # type: ignore[misc]
    layout = BlockLayout(kernels=(3, 3), strided=0)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        output: Tensor = self.bn2(self.conv2(x))
        return output


class _Bottleneck(_JoinedBlock, tv_resnet.Bottleneck):  # type: ignore[misc]
    layout = BlockLayout(kernels=(1, 3, 1), strided=1)
    conv3: nn.Conv2d
    bn3: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        output: Tensor = self.bn3(self.conv3(x))
        return output


class _SEBranch(_JoinedBlock):
    conv3: nn.Conv2d
    bn3: nn.Module
    se_module: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        output: Tensor = self.se_module(self.bn3(self.conv3(x)))
        return output


class _SENetBottleneck(_SEBranch, smp_senet.SEBottleneck):  # type: ignore[misc]
    layout = BlockLayout(kernels=(1, 3, 1), strided=1, shortcut_kernel=3)


class _SEResNetBottleneck(_SEBranch, smp_senet.SEResNetBottleneck):  # type: ignore[misc]
    layout = BlockLayout(kernels=(1, 3, 1), strided=0)  # Caffe's: the first 1x1 carries the stride


class _SEResNeXtBottleneck(_SEBranch, smp_senet.SEResNeXtBottleneck):  # type: ignore[misc]
    layout = BlockLayout(kernels=(1, 3, 1), strided=1)


_BLOCKS: Mapping[type[nn.Module], type[_JoinedBlock]] = {
    tv_resnet.BasicBlock: _Basic,
    tv_resnet.Bottleneck: _Bottleneck,
    smp_senet.SEBottleneck: _SENetBottleneck,
    smp_senet.SEResNetBottleneck: _SEResNetBottleneck,
    smp_senet.SEResNeXtBottleneck: _SEResNeXtBottleneck,
}


def _wide(name: str) -> dict[str, Any]:
    entry = smp_encoders[name]
    return {"encoder": entry["encoder"], "params": {**entry["params"], "width_per_group": 128}}


BACKBONES: Mapping[str, Mapping[str, Any]] = {
    **{name: entry for name, entry in smp_encoders.items() if entry["params"].get("block") in _BLOCKS},
    # torchvision's; SMP reaches them only through timm, under other keys.
    "wide_resnet50_2": _wide("resnet50"),
    "wide_resnet101_2": _wide("resnet101"),
}
"""The backbones this package knows: every encoder of SMP whose blocks the atrous rule is proven for, and two more."""


def check_backbone(name: str) -> str:
    """Return `name` if it is one of `BACKBONES`.

    Raises:
        ValueError: If it is not; the message has the closest match.
    """
    if name in BACKBONES:
        return name
    family = str(name).removeprefix("tu-").removeprefix("timm-")
    longer = [known for known in BACKBONES if known.startswith(family)]  # resnext50 means resnext50_32x4d
    closest = (longer or difflib.get_close_matches(family, BACKBONES, n=1, cutoff=0.0))[0]
    # Known to SMP, or timm's through SMP: a network that exists, but not with blocks that the rule is proven for.
    exists = str(name) in smp_encoders or family != str(name)
    said = f"backbone {name!r} cannot change its output stride exactly" if exists else f"unknown backbone {name!r}"
    raise ValueError(f"{said}: did you mean {closest!r}? Choices: {', '.join(BACKBONES)}")


def _floor_pool() -> nn.Module:
    """The SE family's 3x3 pooling of stride 2, with the same result but without `ceil_mode`.

    Its incomplete last window becomes a whole one on zeros, which never win after a ReLU. `torch.export` can then leave
    the size open: rounding up has another formula for odd sizes than for even ones.
    """
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(kernel_size=3, stride=2))


def _blocks(stage: nn.Sequential) -> list[_JoinedBlock]:
    return [block for block in stage if isinstance(block, _JoinedBlock)]


class AtrousBackbone(nn.Module):
    """A four-stage residual network whose output stride can be changed while it lives.

    Args:
        name: One of `BACKBONES`.
        in_channels: Channels of the input image.
        output_stride: 8, 16 or 32.
        multi_grid: "auto", None or one unit rate per block of the last stage.
        contract_dilation: See `seg_attn.models.atrous.atrous_plan`.
        block_fusion: Builds what joins shortcut and branch of every block from its channel count; None is addition.
        block_attention: Builds what stands on every block's branch from its channel count; None is nothing.
        stage_attention: Builders by stage name, `layer1` to `layer4`, of what stands on that stage's output.

    Attributes:
        out_channels: Channels of the four feature maps.

    Raises:
        ValueError: For an unknown backbone, an output stride that is not 8, 16 or 32, or a multi-grid of wrong length.
    """

    def __init__(
        self,
        name: str = "resnet50",
        in_channels: int = 3,
        output_stride: int = 16,
        multi_grid: str | Sequence[int] | None = "auto",
        contract_dilation: bool = True,
        block_fusion: Builder | None = None,
        block_attention: Builder | None = None,
        stage_attention: Mapping[str, Builder] | None = None,
    ) -> None:
        super().__init__()
        entry = BACKBONES[check_backbone(name)]
        params = {**entry["params"], "block": _BLOCKS[entry["params"]["block"]]}
        encoder = entry["encoder"](**params)
        encoder.set_in_channels(in_channels, pretrained=False)
        use_single_value_batch_norm(encoder)

        self.out_channels: list[int] = list(params["out_channels"][2:])
        self.stem = [child for child in _STEM if hasattr(encoder, child)]
        for child in (*self.stem, *NOMINAL_STRIDES):
            self.add_module(child, encoder.get_submodule(child))
        if entry["encoder"] is SENetEncoder:
            self.layer0_pool = _floor_pool()
        self.multi_grid = resolve_multi_grid(multi_grid, len(self.stages[-1]))
        self.contract_dilation = contract_dilation
        self.output_stride = output_stride

        for stage, channels in zip(self.stages, self.out_channels, strict=True):
            for block in _blocks(stage):
                if block_fusion is not None:
                    block.fusion = block_fusion(channels)
                if block_attention is not None:
                    block.attention = block_attention(channels)
        builders = stage_attention or {}
        self.attention = nn.ModuleDict(
            {s: builders[s](self.channels_of(s)) if s in builders else nn.Identity() for s in NOMINAL_STRIDES}
        )

    @property
    def stages(self) -> list[nn.Sequential]:
        """The four stages, `layer1` to `layer4`."""
        return [stage for stage in map(self.get_submodule, NOMINAL_STRIDES) if isinstance(stage, nn.Sequential)]

    def channels_of(self, stage: str) -> int:
        """Channels of a stage's output, by its name."""
        return self.out_channels[list(NOMINAL_STRIDES).index(stage)]

    @property
    def output_stride(self) -> int:
        """Stride of the last feature map. Setting it moves strides, dilations and paddings; no weight changes.

        Raises:
            ValueError: If set to anything but 8, 16 or 32.
        """
        return self._output_stride

    @output_stride.setter
    def output_stride(self, output_stride: int) -> None:
        plan = self._plan_at(output_stride)
        blocks = [block for stage in self.stages for block in _blocks(stage)]
        for block, rates in zip(blocks, plan, strict=True):
            block.set_rates(rates)
        self._output_stride = output_stride

    def dilation_plan(self) -> DilationPlan:
        """Stride, dilation and effective rate of every residual block; prints as a table."""
        return self._plan_at(self.output_stride)

    def _plan_at(self, output_stride: int) -> DilationPlan:
        return atrous_plan(
            blocks=[len(stage) for stage in self.stages],
            layout=_blocks(self.stages[0])[0].layout,
            output_stride=output_stride,
            multi_grid=self.multi_grid,
            contract_dilation=self.contract_dilation,
        )

    def last_map_size(self, image_size: int) -> int:
        """Height of the last feature map for an image's height, or width for its width."""
        pool = self.get_submodule(self.stem[-1])
        halved = math.ceil(image_size / 2)
        # torchvision pads its pooling on all sides; the SE family does not, and has one position less at times.
        pooled: int = pool(torch.empty(1, 1, halved, halved, device="meta")).shape[-1]
        return math.ceil(pooled * STEM_STRIDE / self.output_stride)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the output of `layer1` to `layer4`.

        Args:
            images: float (N, in_channels, H, W).

        Returns:
            Four maps (N, C, H / s, W / s), rounded up, of strides s = 4, 8, 16 and 32, none above the output stride.
            (The SE family pools without padding: its maps are one position smaller at some odd sizes.)
        """
        x = images
        for name in self.stem:
            x = self.get_submodule(name)(x)
        features = []
        for stage in NOMINAL_STRIDES:
            x = self.attention[stage](self.get_submodule(stage)(x))
            features.append(x)
        return features
