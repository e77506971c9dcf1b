"""Attention blocks, each exactly its paper, and the registry by which a config names them.

Every block is built as `Block(channels, *, ..., identity_init=False)` and maps (N, C, H, W) to the same shape, for any
channel count and any size from 1x1 up. A new block is one file here and one line of `ATTENTION`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from seg_attn.attention.cbam import CBAM
from seg_attn.attention.eca import ECA
from seg_attn.attention.gate import Gate
from seg_attn.attention.ms_cam import MSCAM
from seg_attn.attention.registry import parse_spec
from seg_attn.attention.se import SqueezeExcite
from seg_attn.attention.self_attention import SelfAttention
from seg_attn.attention.sk import SelectiveKernel

__all__ = [
    "ATTENTION",
    "CBAM",
    "ECA",
    "MSCAM",
    "Gate",
    "SelectiveKernel",
    "SelfAttention",
    "SqueezeExcite",
    "build_attention",
]

ATTENTION: dict[str, type[nn.Module]] = {
    "se": SqueezeExcite,
    "eca": ECA,
    "cbam": CBAM,
    "sk": SelectiveKernel,
    "ms_cam": MSCAM,
    "self": SelfAttention,
}

AttentionSpec = str | Mapping[str, Any]


def build_attention(name: AttentionSpec | Sequence[AttentionSpec], channels: int, **kwargs: Any) -> nn.Module:
    """Build an attention block, or a chain of them, from what a config says.

    Args:
        name: a name of `ATTENTION`; or {"name": ..., **options}; or a list of these, chained in order.
        channels: C of the maps it gets and returns.
        **kwargs: options of the block (of each block of a chain); those in `name` win over them.

    Returns:
        The block; for a list an `nn.Sequential` of the blocks (an empty one is the identity).

    Raises:
        ValueError: if a name or an option is unknown (with the closest match and all choices), or an option's value is
            out of its range.

    Example:
        >>> build_attention("se", 64, reduction=4).fc1.out_channels
        16
        >>> [type(block).__name__ for block in build_attention(["eca", {"name": "sk", "branches": 3}], 64)]
        ['ECA', 'SelectiveKernel']
    """
    if isinstance(name, Sequence) and not isinstance(name, str):
        return nn.Sequential(*(build_attention(entry, channels, **kwargs) for entry in name))
    block, options = parse_spec(ATTENTION, "attention block", name, kwargs)
    return ATTENTION[block](channels, **options)
