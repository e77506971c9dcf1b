"""How two feature maps become one: addition, concatenation, and attentional feature fusion (AFF, iAFF).

Paper: Dai et al., Attentional Feature Fusion, WACV 2021, https://arxiv.org/abs/2009.14082 (section 4). Everywhere x is
the low-level or identity input and y the high-level or residual-branch one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seg_attn.attention.arguments import positive_float, positive_int, unknown_message
from seg_attn.attention.gate import Gate
from seg_attn.attention.ms_cam import GlobalContext, LocalContext
from seg_attn.attention.registry import options_of, parse_spec


class Fusion(nn.Module):
    """What joins two maps: forward (x, y) → fused, and the rule for the channel count of the result."""

    @classmethod
    def out_channels(cls, x_channels: int, y_channels: int) -> int:
        """Return the channel count of the fused map.

        Raises:
            ValueError: if the fusion needs equal counts and they differ.
        """
        if x_channels != y_channels:
            raise ValueError(
                f"{cls.__name__} joins maps of equal channel counts, got x_channels={x_channels} and "
                f"y_channels={y_channels}; project one of them to the other's count, or use 'concat'"
            )
        return x_channels


class Add(Fusion):
    """z = x + y.

    Args:
        channels: C of both inputs; only there so that all fusions are built alike.

    Shape:
        - x, y: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add `x` and `y`."""
        return x + y


class Concat(Fusion):
    """z = [x; y] over channels, in this order; the channel counts may differ.

    Args:
        channels: only there so that all fusions are built alike.

    Shape:
        - x: (N, Cx, H, W), y: (N, Cy, H, W)
        - output: (N, Cx + Cy, H, W)
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()

    @classmethod
    def out_channels(cls, x_channels: int, y_channels: int) -> int:
        """Return the sum of both channel counts."""
        return x_channels + y_channels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Concatenate `x` and `y`."""
        return torch.cat((x, y), dim=1)


def weighted_sum(x: Tensor, y: Tensor, weights: Tensor, gain: float) -> Tensor:
    """Return gain · (w ⊙ x + (1 − w) ⊙ y).

    The gain multiplies the weights, not the sum: at w = ½ and gain 2 both factors are exactly 1, so that the result is
    x + y to the bit, for every x and y.
    """
    return (gain * weights) * x + (gain * (1 - weights)) * y


class AFF(Fusion):
    """Attentional feature fusion: w = σ(L(x + y) + g(x + y)); z = gain · (w ⊙ x + (1 − w) ⊙ y), equation 4.

    L and g are MS-CAM's local and global branch. At gain 1, the paper's, every value of z lies between those of x and
    y, and AFF(x, x) = x.

    Differs from popular listings: the authors' code has gain 2, so that AFF equals x + y where w = ½; here that is
    `gain=2`, and with `zero_init=True` it is where training starts: AFF put in place of a pretrained addition then
    changes nothing, to the bit. The 1x1 convolutions have no bias (batch normalisation would remove it); the other
    parameters carry the names of the authors' code.

    Args:
        channels: C of both inputs, at least 1.
        reduction: r of both branches, 4 in the paper; C // r is at least 1.
        gain: the factor of the result, above 0.
        zero_init: zero the weight of the last batch normalisation of both branches, so that w = ½ at the start.

    Shape:
        - x: (N, C, H, W), the low-level or identity input; y: the same shape, the high-level or branch input
        - output: (N, C, H, W)
        - `gate`: (N, C, H, W) in [0, 1], the weight of x; 1 − gate is that of y

    Raises:
        ValueError: if `channels` or `reduction` is no integer of at least 1, or `gain` no finite number above 0.
    """

    def __init__(self, channels: int, reduction: int = 4, gain: float = 1, zero_init: bool = False) -> None:
        super().__init__()
        self.gain = positive_float("gain", gain)
        self.local_att = LocalContext(channels, reduction)
        self.global_att = GlobalContext(channels, reduction)
        self.gate = Gate("fusion", nn.Sigmoid())
        if zero_init:
            zero_last_norm(self.local_att, self.global_att)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Fuse `x` and `y`, both (N, C, H, W)."""
        total = x + y
        weights = self.gate(self.local_att(total) + self.global_att(total))
        return weighted_sum(x, y, weights, self.gain)


class IterativeAFF(Fusion):
    """Iterative attentional feature fusion, equations 4 and 5: AFF whose weights come from a first AFF's result.

    z1 = w ⊙ x + (1 − w) ⊙ y with w = σ(L(x + y) + g(x + y));
    z = gain · (w2 ⊙ x + (1 − w2) ⊙ y) with w2 = σ(L2(z1) + g2(z1)).

    Differs from popular listings: the authors' PyTorch port, and most copies of it, build the second global branch
    `global_att2` and never call it; the first one's g serves twice. Here g2 is used. `legacy=True` is the port, for
    weights trained with it: its keys and shapes (biases of the convolutions included) and g(z1) in place of g2(z1). The
    unused branch is then kept for its keys alone and gets no gradient (under DDP: `find_unused_parameters=True`).

    Args:
        channels: C of both inputs, at least 1.
        reduction: r of all branches, 4 in the paper; C // r is at least 1.
        gain: the factor of the result, above 0; the first fusion's is always 1.
        zero_init: zero the weight of the last batch normalisation of every branch, so that w = w2 = ½ at the start.
        legacy: compute what the authors' port computes, with its state-dict keys.

    Shape:
        - x: (N, C, H, W), the low-level or identity input; y: the same shape, the high-level or branch input
        - output: (N, C, H, W)
        - `gate`: (N, C, H, W) in [0, 1], the weight of x in the first fusion; `gate2`: that in the result

    Raises:
        ValueError: if `channels` or `reduction` is no integer of at least 1, or `gain` no finite number above 0.
    """

    def __init__(
        self, channels: int, reduction: int = 4, gain: float = 1, zero_init: bool = False, legacy: bool = False
    ) -> None:
        super().__init__()
        self.gain = positive_float("gain", gain)
        self.local_att = LocalContext(channels, reduction, bias=legacy)
        self.global_att = GlobalContext(channels, reduction, bias=legacy)
        self.gate = Gate("fusion", nn.Sigmoid())
        self.local_att2 = LocalContext(channels, reduction, bias=legacy)
        self.global_att2 = GlobalContext(channels, reduction, bias=legacy)
        self.gate2 = Gate("fusion", nn.Sigmoid())
        # A name and no second reference: one would add keys to the state dict.
        self.second_global = "global_att" if legacy else "global_att2"
        if zero_init:
            zero_last_norm(self.local_att, self.global_att, self.local_att2, self.global_att2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Fuse `x` and `y`, both (N, C, H, W)."""
        total = x + y
        weights = self.gate(self.local_att(total) + self.global_att(total))
        first = weighted_sum(x, y, weights, gain=1)
        weights = self.gate2(self.local_att2(first) + self.get_submodule(self.second_global)(first))
        return weighted_sum(x, y, weights, self.gain)


def zero_last_norm(*branches: nn.Sequential) -> None:
    """Set the weight of each branch's last module, a batch normalisation, to 0; its bias is 0 already."""
    for branch in branches:
        nn.init.zeros_(branch[-1].get_parameter("weight"))


FUSION: dict[str, type[Fusion]] = {
    "add": Add,
    "concat": Concat,
    "aff": AFF,
    "iaff": IterativeAFF,
}


def build_fusion(name: str | Mapping[str, Any], channels: int, **defaults: Any) -> Fusion:
    """Build a fusion from what a config says.

    Args:
        name: a name of `FUSION`, or {"name": ..., **options}. Its options win over `defaults`.
        channels: C of both inputs ("concat" does without it).
        **defaults: options for the fusions that have them: `build_fusion(spec, 64, gain=2, zero_init=True)` builds
            "aff" so, and "add", which has no gain, as ever.

    Returns:
        The module, forward (x, y) → fused.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value is out of its range.

    Example:
        >>> build_fusion({"name": "aff", "reduction": 8}, 64, gain=2).gain
        2.0
    """
    chosen, given = parse_spec(FUSION, "fusion", name)
    positive_int("channels", channels)
    all_options = dict.fromkeys(option for fusion in FUSION.values() for option in options_of(fusion))
    for option in defaults:
        if option not in all_options:
            raise ValueError(unknown_message("fusion option", option, all_options))
    known = options_of(FUSION[chosen])
    applicable = {option: value for option, value in defaults.items() if option in known}
    return FUSION[chosen](channels, **{**applicable, **given})
