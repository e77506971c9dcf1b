"""Self-attention over positions: each position gathers the values of all others, by the likeness of their features.

Papers: Wang et al., Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971 (equations 1 and 6); the
    zero
γ: Zhang et al., SAGAN, ICML 2019, https://arxiv.org/abs/1805.08318 (equation 3); in segmentation: Fu et al., Dual
Attention Network, CVPR 2019, https://arxiv.org/abs/1809.02983 (section 3.2); the scale and the heads: Vaswani et al.,
Attention Is All You Need, NeurIPS 2017, https://arxiv.org/abs/1706.03762 (section 3.2).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_attn.attention.arguments import largest_divisor, positive_float, positive_int, reduced_channels
from seg_attn.attention.join import build_join


class SelfAttention(nn.Module):
    """Self-attention: y = x + γ · softmax(Q Kᵀ · scale) V over the H·W positions, γ a learned scalar that starts at 0.

    Q, K: 1x1 convolutions C → C/r; V: C → C; none has a bias (none of the formulas has one, and softmax cancels K's).
    With several heads each attends by its own share of the channels, and the results are concatenated; there is no
    output projection (as in SAGAN's formula and in DANet).

    Memory grows linearly with H·W: PyTorch's fused kernels never hold the (H·W)² weights. The CPU's wants Q, K and V of
    one width and otherwise falls back, without a word, to a kernel that holds them all; hence Q and K are padded with
    zeros to V's width, which leaves Q Kᵀ as it is (C = 64, 128x128 positions, float32: 20 MiB at the peak in place of
    2.3 GiB, and a fifth of the time). On CUDA, flash attention takes float16 and bfloat16 with up to 256 channels per
    head, the memory-efficient kernel other widths and float32; for float64 CUDA has no fused kernel and holds all
    weights. Time grows with (H·W)² everywhere.

    Differs from popular listings: they multiply the matrices explicitly, (H·W)² weights and all, and leave the scale at
    1, which saturates the softmax at large C; here it is 1/√d by default, and `scale=1.0` gives DANet's.

    Args:
        channels: C, a multiple of `heads`.
        heads: number of heads.
        scale: "sqrt" for 1/√d with d the key channels of a head, or a number above 0.
        reduction: r of queries and keys, 8 in SAGAN and DANet; each head keeps at least one channel.
        identity_init: start as the identity through x + α · (f(x) − x) with α = 0. γ starts at 1 then: were both 0,
            each would keep the other's gradient at 0 for ever.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W)

    Raises:
        ValueError: if `channels`, `heads` or `reduction` is no integer of at least 1, `heads` does not divide
            `channels`, or `scale` is neither "sqrt" nor a finite number above 0.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        scale: Literal["sqrt"] | float = "sqrt",
        reduction: int = 8,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        if positive_int("channels", channels) % positive_int("heads", heads):
            raise ValueError(
                f"heads must divide channels={channels}, got {heads}; use {largest_divisor(channels, heads)}"
            )
        if isinstance(scale, str) and scale != "sqrt":
            raise ValueError(f"scale must be 'sqrt' or a number above 0, got {scale!r}")
        key_width = reduced_channels(channels // heads, reduction)  # of one head
        self.heads = heads
        self.scale = 1 / math.sqrt(key_width) if scale == "sqrt" else positive_float("scale", scale)
        self.query = nn.Conv2d(channels, heads * key_width, kernel_size=1, bias=False)
        self.key = nn.Conv2d(channels, heads * key_width, kernel_size=1, bias=False)
        self.value = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.padding = channels // heads - key_width
        self.gamma = nn.Parameter(torch.full((), float(identity_init)))
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of `x` (N, C, H, W)."""
        query = F.pad(self.split_heads(self.query(x)), (0, self.padding))
        key = F.pad(self.split_heads(self.key(x)), (0, self.padding))
        attended = F.scaled_dot_product_attention(query, key, self.split_heads(self.value(x)), scale=self.scale)
        attended = attended.mT.reshape_as(x)  # (N, heads, HW, C/heads) → (N, C, H, W)
        output: Tensor = self.join(x, x + self.gamma * attended)
        return output

    def split_heads(self, features: Tensor) -> Tensor:
        """Reshape (N, heads · d, H, W) to (N, heads, H · W, d), contiguous: what the fused kernels ask for."""
        return torch.unflatten(features.flatten(2), 1, (self.heads, -1)).mT.contiguous()

    def attention_row(self, x: Tensor, row: int, column: int) -> Tensor:
        """Return where one position looks: its row of the softmax, without computing the others.

        Args:
            x: the block's input, (N, C, H, W).
            row: index of the position, 0 to H − 1.
            column: index of the position, 0 to W − 1.

        Returns:
            (N, heads, H, W), in [0, 1], summing to 1 over the positions.

        Raises:
            ValueError: if the position lies outside the map.
        """
        height, width = x.shape[2:]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"position must lie on the {height}x{width} map, got row={row}, column={column}")
        query = self.split_heads(self.query(x[:, :, row : row + 1, column : column + 1]))  # (N, heads, 1, d)
        scores = query @ self.split_heads(self.key(x)).mT * self.scale  # (N, heads, 1, HW)
        return torch.unflatten(scores.softmax(-1).squeeze(2), 2, (height, width))
