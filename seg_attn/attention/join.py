"""How a block's result takes the place of its input: at once, or from an exact identity on.

With `identity_init` a block put into a pretrained network leaves it unchanged, to the bit, until training opens α. The
two joins differ in one key, `alpha`, and a block's forward is the same line with either.
"""

import torch
from torch import Tensor, nn


class Replace(nn.Module):
    """f(x) in place of x."""

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return `attended`."""
        return attended


class Blend(nn.Module):
    """x + α · (f(x) − x) with a learned scalar α that starts at 0.

    α has no dimensions: a tensor of one would promote half-precision features to its own float32.

    Shape:
        - x, attended: any equal shapes
        - output: the same shape; equal to x at the start wherever `attended` is finite
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Blend `attended` into `x`."""
        return x + self.alpha * (attended - x)


def build_join(identity_init: bool) -> Replace | Blend:
    """Return `Blend` where the block is to start as the identity, `Replace` elsewhere."""
    return Blend() if identity_init else Replace()
