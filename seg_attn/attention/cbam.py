"""CBAM, convolutional block attention module: a gate per channel, then a gate per position.

Paper: Woo et al., CBAM, ECCV 2018, https://arxiv.org/abs/1807.06521 (equations 1 to 3).
"""

import torch
from torch import Tensor, nn

from seg_attn.attention.arguments import positive_odd, reduced_channels
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join


class ChannelAttention(nn.Module):
    """The first half, equation 2: x ⊙ σ(MLP(GAP(x)) + MLP(GMP(x))), one shared MLP C → C/r → C without biases.

    Args:
        channels: C, at least 1.
        reduction: r; C // r is at least 1.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
        - `gate`: (N, C, 1, 1) in [0, 1]
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = reduced_channels(channels, reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1, bias=False),
        )
        self.gate = Gate("channel", nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each channel of `x` (N, C, H, W)."""
        average = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        maximum = x.amax((2, 3), keepdim=True)
        weights: Tensor = self.gate(self.mlp(average) + self.mlp(maximum))
        return x * weights


class SpatialAttention(nn.Module):
    """The second half, equation 3: x ⊙ σ(Conv_k([mean over channels; maximum over channels])).

    Args:
        kernel_size: k, odd.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
        - `gate`: (N, 1, H, W) in [0, 1]
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        padding = positive_odd("spatial_kernel", kernel_size) // 2
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=padding)
        self.gate = Gate("spatial", nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each position of `x` (N, C, H, W)."""
        average = x.mean(1, keepdim=True)  # (N, 1, H, W)
        maximum = x.amax(1, keepdim=True)
        weights: Tensor = self.gate(self.conv(torch.cat((average, maximum), dim=1)))
        return x * weights


class CBAM(nn.Module):
    """Convolutional block attention module: channel attention, then spatial attention on its result, equation 1.

    Differs from popular listings: both halves pool twice, by mean and by maximum, and in this order of the halves
    (some swap them or drop a pool); the MLP is one and shared; the 7x7 convolution has a bias and no batch
    normalisation after it (the authors' code and timm normalise its single output channel, which folds into weight and
    bias once trained).

    Args:
        channels: C, at least 1.
        reduction: r of the MLP, 16 in the paper; C // r is at least 1.
        spatial_kernel: k of the spatial convolution, odd; 7 in the paper.
        identity_init: start as the identity, x + α · (f(x) − x) with α = 0.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W), |y| ≤ |x|
        - `channel.gate`: (N, C, 1, 1) in [0, 1]; `spatial.gate`: (N, 1, H, W) in [0, 1]

    Raises:
        ValueError: if `channels` or `reduction` is no integer of at least 1, or `spatial_kernel` not odd.
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, spatial_kernel: int = 7, identity_init: bool = False
    ) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(spatial_kernel)
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each channel of `x` (N, C, H, W), then each position."""
        output: Tensor = self.join(x, self.spatial(self.channel(x)))
        return output
