"""SK, selective kernel: branches of growing receptive field, mixed per channel by weights that sum to 1.

Paper: Li et al., Selective Kernel Networks, CVPR 2019, https://arxiv.org/abs/1903.06586 (equations 1 to 6).
"""

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from seg_attn.attention.arguments import largest_divisor, positive_int, reduced_channels
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join
from seg_attn.norm import BatchNorm2d

MAX_GROUPS = 32  # of the paper


class SelectiveKernel(nn.Module):
    """Selective kernel convolution: y = Σ_m a_m ⊙ U_m over M branches U_m of different dilation.

    Split: U_m = ReLU(BN(Conv3x3(x))), dilation m for m = 1 to M (dilation 2 stands for the paper's 5x5 kernel).
    Fuse: U = Σ_m U_m; z = ReLU(BN(W · GAP(U))) with d = max(C/r, L) channels.
    Select: a = softmax over the branches, for each channel, of A_m · z.

    Differs from popular listings: the input is not split between the branches (timm's default), each sees all channels;
    the groups are the largest divisor of C not above the paper's 32, so any channel count works; d is exactly
    max(C // r, L), not rounded to a multiple of 8. In training a batch of one image is fine: z's batch
    normalisation then uses its running statistics.

    Args:
        channels: C, at least 1.
        branches: M, 2 in the paper; with 1 the weights are all 1.
        reduction: r, 16 in the paper.
        min_width: L, the least width of z, 32 in the paper.
        groups: groups of the 3x3 convolutions, a divisor of C; None takes the largest not above 32.
        identity_init: start as the identity, x + α · (f(x) − x) with α = 0.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W), each value between the least and the greatest branch's, so never below 0
          (unless `identity_init` mixes x in)
        - `gate`: (N, M, C, 1, 1) in [0, 1], summing to 1 over M

    Raises:
        ValueError: if an argument is no integer of at least 1, or `groups` does not divide `channels`.
    """

    def __init__(
        self,
        channels: int,
        *,
        branches: int = 2,
        reduction: int = 16,
        min_width: int = 32,
        groups: int | None = None,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        width = reduced_channels(channels, reduction, minimum=positive_int("min_width", min_width))
        groups = largest_divisor(channels, MAX_GROUPS) if groups is None else positive_int("groups", groups)
        if channels % groups:
            raise ValueError(
                f"groups must divide channels={channels}, got {groups}; use {largest_divisor(channels, groups)}"
            )
        self.branches = nn.ModuleList(
            Conv2dNormActivation(channels, channels, 3, dilation=1 + index, groups=groups, norm_layer=BatchNorm2d)
            for index in range(positive_int("branches", branches))
        )
        self.fuse = Conv2dNormActivation(channels, width, 1, norm_layer=BatchNorm2d)
        self.select = nn.Sequential(
            nn.Conv2d(width, branches * channels, kernel_size=1, bias=False),
            nn.Unflatten(1, (branches, channels)),
        )
        self.gate = Gate("branch", nn.Softmax(dim=1))
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the branches of `x` (N, C, H, W)."""
        features = torch.stack([branch(x) for branch in self.branches], dim=1)  # (N, M, C, H, W)
        fused = self.fuse(features.sum(1).mean((2, 3), keepdim=True))  # (N, d, 1, 1)
        weights = self.gate(self.select(fused))  # (N, M, C, 1, 1)
        output: Tensor = self.join(x, (weights * features).sum(1))
        return output
