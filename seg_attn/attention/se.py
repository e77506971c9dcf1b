"""SE, squeeze and excitation: one gate per channel, from the global average of all channels.

Paper: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, https://arxiv.org/abs/1709.01507 (equations 2 to 4).
"""

from typing import Literal

from torch import Tensor, nn

from seg_attn.attention.arguments import reduced_channels, unknown_message
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join

GATE_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: s = σ(W2 · ReLU(W1 · GAP(x))), y = s ⊙ x; W1: C → C/r, W2: C/r → C.

    Differs from popular listings: C // r is at least 1 (at C < r they build a layer without outputs), nothing is
    rounded to a multiple of 8, and the layers have no biases unless asked for.

    Args:
        channels: C, at least 1.
        reduction: r, 16 in the paper.
        bias: give both layers a bias.
        gate: "sigmoid", or "hard_sigmoid", ReLU6(s + 3) / 6, as in MobileNetV3 (https://arxiv.org/abs/1905.02244).
        identity_init: start as the identity, x + α · (f(x) − x) with α = 0.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W), |y| ≤ |x|
        - `gate`: (N, C, 1, 1) in [0, 1]

    Raises:
        ValueError: if `channels` or `reduction` is no integer of at least 1, or `gate` is unknown.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        bias: bool = False,
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        hidden = reduced_channels(channels, reduction)
        if gate not in GATE_ACTIVATIONS:
            raise ValueError(unknown_message("gate", gate, GATE_ACTIVATIONS))
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1, bias=bias)
        self.activation = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1, bias=bias)
        self.gate = Gate("channel", GATE_ACTIVATIONS[gate]())
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each channel of `x` (N, C, H, W)."""
        pooled = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        weights = self.gate(self.fc2(self.activation(self.fc1(pooled))))
        output: Tensor = self.join(x, x * weights)
        return output
