"""The convolution unit of ASPP, decoder and heads; how a convolution gets its rate; how maps are resized."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from seg_attn.norm import BatchNorm2d


def set_rate(conv: nn.Conv2d, dilation: int, stride: int = 1) -> None:
    """Give a convolution with odd kernel its dilation and stride, and the padding that keeps its grid in place."""
    conv.stride = (stride, stride)
    conv.dilation = (dilation, dilation)
    conv.padding = (dilation * (conv.kernel_size[0] // 2), dilation * (conv.kernel_size[1] // 2))


class SeparableConv(nn.Sequential):
    """An atrous separable convolution (DeepLabv3+, arXiv 1802.02611): depthwise, then 1x1.

    Differs from the paper's code in having neither normalisation nor activation between the two, as in SMP and VainF.

    Args:
        in_channels: Channels of the input (N, in_channels, H, W).
        out_channels: Channels of the output (N, out_channels, H, W).
        kernel_size: Odd size of the depthwise kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, kernel_size, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
        )


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; keeps the spatial size.

    Args:
        in_channels: Channels of the input (N, in_channels, H, W).
        out_channels: Channels of the output (N, out_channels, H, W).
        kernel_size: Odd size of the kernel.
        dilation: Rate of the kernel.
        separable: A `SeparableConv` in place of the convolution; a 1x1 convolution stays as it is.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, separable: bool = False
    ) -> None:
        conv = (
            SeparableConv(in_channels, out_channels, kernel_size)
            if separable and kernel_size > 1
            else nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        )
        super().__init__(conv, BatchNorm2d(out_channels), nn.ReLU(inplace=True))
        self.set_dilation(dilation)

    @property
    def spatial_conv(self) -> nn.Conv2d:
        """The convolution with the kernel: the depthwise one of a separable unit."""
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d))

    def set_dilation(self, dilation: int) -> None:
        """Change the rate of the kernel, and the padding with it."""
        set_rate(self.spatial_conv, dilation)


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Resize (N, C, H, W) to (N, C, *size) bilinearly."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)
