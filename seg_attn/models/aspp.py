"""Atrous spatial pyramid pooling: one feature map read at several rates and as a whole.

Paper: DeepLabv3 (Chen 2017, arXiv 1706.05587), section 3.3; separable form: DeepLabv3+ (Chen 2018, arXiv 1802.02611).
Differs from most PyTorch ports in that its rates follow the output stride, as the papers' do.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seg_attn.attention.pooling import AttentionPool2d
from seg_attn.models.atrous import scale_atrous_rates, unscalable_rates
from seg_attn.models.layers import ConvNormAct

IMAGE_POOLING = ("average", "attention")


class ImagePooling(nn.Sequential):
    """Pool a map to one position, project it, and spread it over the map again.

    Args:
        pool: (N, C, H, W) to (N, C, 1, 1).
        in_channels: Channels C of the map.
        out_channels: Channels of the result.
    """

    def __init__(self, pool: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__(pool, ConvNormAct(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H, W), constant over positions."""
        pool, project = self
        pooled: Tensor = project(pool(x))  # (N, out_channels, 1, 1)
        return pooled.expand(-1, -1, *x.shape[-2:])


def build_image_pooling(name: str, channels: int) -> nn.Module:
    """Return what pools (N, C, H, W) to (N, C, 1, 1): "average", or "attention" with a learned query.

    Raises:
        ValueError: For another name.
    """
    if name not in IMAGE_POOLING:
        raise ValueError(f"image_pooling must be one of {', '.join(IMAGE_POOLING)}, got {name!r}")
    return AttentionPool2d(channels) if name == "attention" else nn.AdaptiveAvgPool2d(1)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, one 3x3 per rate and image pooling, concatenated and projected.

    Args:
        in_channels: Channels of the backbone's last map.
        out_channels: Channels of every branch and of the output.
        atrous_rates: Rates of the 3x3 branches at output stride 16.
        output_stride: 8, 16 or 32; rates are doubled at 8 and halved at 32. A rate that is not whole there (an odd
            one at 32) is rounded half up, with a warning.
        image_pooling: "average" or "attention".
        separable: Atrous separable convolutions in the 3x3 branches.
        dropout: Probability of dropping an output value in training.

    Shape:
        - input: (N, in_channels, H, W), any float dtype
        - output: (N, out_channels, H, W)

    Raises:
        ValueError: For a rate that is not positive, or an unknown `image_pooling`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        atrous_rates: Sequence[float] = (6, 12, 18),
        output_stride: int = 16,
        image_pooling: str = "average",
        separable: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        scale_atrous_rates(atrous_rates, output_stride)  # raises for what are no rates, before anything is built
        self.atrous_rates = tuple(atrous_rates)
        atrous = [ConvNormAct(in_channels, out_channels, kernel_size=3, separable=separable) for _ in self.atrous_rates]
        pooling = ImagePooling(build_image_pooling(image_pooling, in_channels), in_channels, out_channels)
        self.branches = nn.ModuleList([ConvNormAct(in_channels, out_channels), *atrous, pooling])
        self.project = nn.Sequential(ConvNormAct(len(self.branches) * out_channels, out_channels), nn.Dropout(dropout))
        self.set_output_stride(output_stride)

    @property
    def rates(self) -> tuple[int, ...]:
        """The rates in force, at the present output stride."""
        return tuple(branch.spatial_conv.dilation[0] for branch in self._atrous)

    @property
    def _atrous(self) -> list[ConvNormAct]:
        return [branch for branch in self.branches[1:-1] if isinstance(branch, ConvNormAct)]

    def set_output_stride(self, output_stride: int) -> None:
        """Move the rates to another output stride, with a warning where one has to be rounded.

        Raises:
            ValueError: If `output_stride` is not 8, 16 or 32.
        """
        rates = scale_atrous_rates(self.atrous_rates, output_stride)
        rounded = unscalable_rates(self.atrous_rates, output_stride)
        if rounded and rates != self.rates:
            warnings.warn(
                f"atrous_rates {', '.join(map(str, rounded))} (at output stride 16) are not whole at output stride "
                f"{output_stride}: the rates there are {', '.join(map(str, rates))}, and these branches see other "
                "places than in training. Take rates that are whole at every stride you use (even ones for 32)",
                stacklevel=2,
            )
        for branch, rate in zip(self._atrous, rates, strict=True):
            branch.set_dilation(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        output: Tensor = self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        return output
