"""Attention pooling: score, softmax, weighted sum; as a function, as kernel regression, and as a 2-d pooling layer.

Kernel regression: Nadaraya, On Estimating Regression, 1964, https://doi.org/10.1137/1109020; Watson, Smooth Regression
Analysis, Sankhyā 26, 1964. The dot-product score: Vaswani et al., Attention Is All You Need, NeurIPS 2017,
https://arxiv.org/abs/1706.03762 (equation 1).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_attn.attention.arguments import positive_int, unknown_message
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join

Scoring = Literal["gaussian", "dot", "uniform"]


def gaussian_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return -||q - k||² / 2, through (..., Q, K, D) differences: exact far from the origin too."""
    return -(queries.unsqueeze(-2) - keys.unsqueeze(-3)).square().sum(-1) / 2


def dot_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return q · k / √D."""
    return queries @ keys.mT / math.sqrt(queries.shape[-1])


def uniform_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return 0 for each pair: every key weighs the same."""
    return queries.new_zeros(*queries.shape[:-1], keys.shape[-2])


SCORING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": gaussian_scores,
    "dot": dot_scores,
    "uniform": uniform_scores,
}


def attention_weights(queries: Tensor, keys: Tensor, scoring: Scoring = "gaussian") -> Tensor:
    """Return the weights softmax_i(a(q, k_i)) of `attention_pool`.

    Args:
        queries: (..., Q, D), any float dtype.
        keys: (..., K, D); the leading dimensions broadcast.
        scoring: a, see `attention_pool`.

    Returns:
        (..., Q, K), in [0, 1], summing to 1 over K.

    Raises:
        ValueError: if `scoring` is unknown.
    """
    if scoring not in SCORING:
        raise ValueError(unknown_message("scoring", scoring, SCORING))
    return SCORING[scoring](queries, keys).softmax(-1)


def attention_pool(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring = "gaussian") -> Tensor:
    """Pool values by attention: f(q) = Σ_i softmax_i(a(q, k_i)) v_i.

    Args:
        queries: (..., Q, D), any float dtype.
        keys: (..., K, D); the leading dimensions of all three broadcast.
        values: (..., K, V).
        scoring: a(q, k): "gaussian" is -||q - k||² / 2 (Nadaraya-Watson regression), "dot" is q · k / √D, "uniform" is
            0 (the average of the values).

    Returns:
        (..., Q, V), each value between the least and the greatest of the values it pools.

    Raises:
        ValueError: if `scoring` is unknown.

    Example:
        >>> keys, values = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [20.0]])
        >>> attention_pool(torch.tensor([[1.0]]), keys, values)
        tensor([[15.]])
    """
    return attention_weights(queries, keys, scoring) @ values


class NadarayaWatson(nn.Module):
    """Nadaraya-Watson kernel regression: attention pooling with the score -||(q - k) · w||² / 2.

    w is 1 (non-parametric, nothing to train) or one learned scalar that starts at 1 (parametric): 1/w is the width of
    the Gaussian kernel.

    Args:
        learn_width: whether w is learned.

    Shape:
        - queries: (..., Q, D), keys: (..., K, D), values: (..., K, V); the leading dimensions broadcast
        - output: (..., Q, V)
    """

    def __init__(self, learn_width: bool = False) -> None:
        super().__init__()
        self.width: nn.Parameter | float = nn.Parameter(torch.ones(())) if learn_width else 1.0

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Regress `values` (..., K, V), known at `keys` (..., K, D), to `queries` (..., Q, D)."""
        return attention_pool(queries * self.width, keys * self.width, values, "gaussian")


class PositionSoftmax(nn.Module):
    """Softmax over the positions of a map.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W), in [0, 1], summing to 1 over H and W
    """

    def forward(self, scores: Tensor) -> Tensor:
        """Normalise `scores` (N, C, H, W)."""
        return scores.flatten(2).softmax(-1).view_as(scores)


class AttentionPool2d(nn.Module):
    """Global pooling by attention: Σ_p softmax_p(q · x_p / √C) x_p over all positions p, with one learned query q.

    In the place of global average pooling, which is what a query of zeros computes; there it starts.

    Args:
        channels: C, at least 1.
        identity_init: start as the average pooling to the bit and not just to rounding: mean + α · (f(x) − mean) with
            α = 0. The query then starts as normal noise: were both 0, each would keep the other's gradient at 0 for
            ever.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, 1, 1), each value between the least and the greatest of its channel
        - `gate`: (N, 1, H, W) in [0, 1], summing to 1 over the positions

    Raises:
        ValueError: if `channels` is no integer of at least 1.
    """

    def __init__(self, channels: int, identity_init: bool = False) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(positive_int("channels", channels))
        start = torch.randn if identity_init else torch.zeros
        self.query = nn.Parameter(start(1, channels, 1, 1))
        self.gate = Gate("spatial", PositionSoftmax())
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Pool `x` (N, C, H, W) to (N, C, 1, 1)."""
        weights = self.gate(F.conv2d(x, self.query) * self.scale)  # (N, 1, H, W)
        pooled = (weights * x).sum((2, 3), keepdim=True)
        output: Tensor = self.join(x.mean((2, 3), keepdim=True), pooled)
        return output
