"""The decoder: skips from the backbone joined to the ASPP output one after another, deep to shallow.

Papers: DeepLabv3+ (Chen 2018, arXiv 1802.02611) for the skip by concatenation; Attentional Feature Fusion (Dai 2021,
arXiv 2009.14082) for AFF and iAFF in its place. Without skips it is the 3x3 of DeepLabv3's head.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from seg_attn.models.layers import resize


class SkipFusion(nn.Module):
    """One skip: project the low-level map, resize the high-level one to it, fuse, smooth with a 3x3.

    Args:
        project: Low-level (N, C_low, H, W) to (N, C_skip, H, W).
        attention: Shape-preserving block on the projected skip.
        fusion: Joins (low-level, high-level) maps of one size.
        refine: 3x3 convolution unit on the fused map.
        align_corners: How the high-level map is resized.
    """

    def __init__(
        self, project: nn.Module, attention: nn.Module, fusion: nn.Module, refine: nn.Module, align_corners: bool
    ) -> None:
        super().__init__()
        self.project = project
        self.attention = attention
        self.fusion = fusion
        self.refine = refine
        self.align_corners = align_corners

    def forward(self, low_level: Tensor, high_level: Tensor) -> Tensor:
        """Join (N, C_low, H, W) and (N, C, h, w) to (N, C, H, W)."""
        low_level = self.attention(self.project(low_level))
        high_level = resize(high_level, low_level.shape[-2:], self.align_corners)
        output: Tensor = self.refine(self.fusion(low_level, high_level))
        return output


class Decoder(nn.Module):
    """The ASPP output, refined where asked, then joined with each skip in turn.

    Args:
        refine: 3x3 convolution unit before the first skip (all there is without skips), or an identity.
        skips: One `SkipFusion` per skip, deep to shallow.
    """

    def __init__(self, refine: nn.Module, skips: Sequence[SkipFusion]) -> None:
        super().__init__()
        self.refine = refine
        self.skips = nn.ModuleList(skips)

    def forward(self, x: Tensor, low_levels: Sequence[Tensor]) -> Tensor:
        """Join `x` (N, C, h, w) with the backbone's maps, given in the order of the skips, to (N, C, H, W)."""
        x = self.refine(x)
        for skip, low_level in zip(self.skips, low_levels, strict=True):
            x = skip(low_level, x)
        return x
