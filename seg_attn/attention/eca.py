"""ECA, efficient channel attention: one gate per channel, from the averages of its k neighbours.

Paper: Wang et al., ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151 (section 3).
"""

import math

from torch import Tensor, nn

from seg_attn.attention.arguments import positive_float, positive_int, positive_odd
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join


def eca_kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """Return the odd k that belongs to C channels: t = int(|(log2 C + b) / γ|), and k = t if it is odd, else t + 1.

    Args:
        channels: C, at least 1.
        gamma: γ, above 0.
        b: the offset, any number.

    Raises:
        ValueError: if `channels` is no integer of at least 1, or `gamma` no finite number above 0.

    Example:
        >>> [eca_kernel_size(channels) for channels in (1, 8, 64, 256, 512, 1024, 2048)]
        [1, 3, 3, 5, 5, 5, 7]
    """
    t = int(abs((math.log2(positive_int("channels", channels)) + b) / positive_float("gamma", gamma)))
    return t if t % 2 == 1 else t + 1


class ECA(nn.Module):
    """Efficient channel attention: s = σ(Conv1d_k(GAP(x))), y = s ⊙ x; k from C by `eca_kernel_size`.

    No reduction and no bias: k weights in all, shared by all channels.

    Differs from popular listings: they leave an even k even, so that the convolution returns C + 1 weights and the
    block crashes at C = 8 to 31, 128 to 511 and 2048 to 8191 (two of a ResNet-50's four widths); here k is odd for
    every C. Nor is k floored at 3 (as in timm): the formula gives 1 below C = 8. A `kernel_size` that is given is
    used.

    Args:
        channels: C, at least 1.
        kernel_size: k, odd; None derives it from C.
        gamma: γ of the formula; unused where `kernel_size` is given.
        b: b of the formula; unused where `kernel_size` is given.
        identity_init: start as the identity, x + α · (f(x) − x) with α = 0.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W), |y| ≤ |x|
        - `gate`: (N, C, 1, 1) in [0, 1]

    Raises:
        ValueError: if `channels` is no integer of at least 1, `kernel_size` not odd, or `gamma` not above 0.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        gamma: float = 2,
        b: float = 1,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        derived = eca_kernel_size(channels, gamma, b)
        k = derived if kernel_size is None else positive_odd("kernel_size", kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size=k, padding=k // 2, bias=False)
        self.gate = Gate("channel", nn.Sigmoid())
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each channel of `x` (N, C, H, W)."""
        scores = self.conv(x.mean((2, 3)).unsqueeze(1))  # (N, 1, C): channels are the convolution's positions
        weights = self.gate(scores.mT.unsqueeze(-1))  # (N, C, 1, 1)
        output: Tensor = self.join(x, x * weights)
        return output
