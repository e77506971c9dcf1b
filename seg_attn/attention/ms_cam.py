"""MS-CAM, multi-scale channel attention: a gate for each channel at each position, from local and global context.

Paper: Dai et al., Attentional Feature Fusion, WACV 2021, https://arxiv.org/abs/2009.14082 (section 3). The two context
branches are also what AFF and iAFF are made of.
"""

from torch import Tensor, nn

from seg_attn.attention.arguments import reduced_channels
from seg_attn.attention.gate import Gate
from seg_attn.attention.join import build_join
from seg_attn.norm import BatchNorm2d


class LocalContext(nn.Sequential):
    """L(x) = BN(PW2(ReLU(BN(PW1(x))))), equation 2: PW1: C → C/r, PW2: C/r → C, both 1x1.

    Args:
        channels: C.
        reduction: r; C // r is at least 1.
        bias: whether the convolutions have a bias. Batch normalisation removes it again, so only weights of the
            authors' code need it.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W), unbounded scores
    """

    def __init__(self, channels: int, reduction: int, bias: bool = False) -> None:
        hidden = reduced_channels(channels, reduction)
        super().__init__(
            nn.Conv2d(channels, hidden, kernel_size=1, bias=bias),
            BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1, bias=bias),
            BatchNorm2d(channels),
        )


class GlobalContext(nn.Sequential):
    """g(x): `LocalContext`'s formula on the global average of x.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, 1, 1), unbounded scores
    """

    def __init__(self, channels: int, reduction: int, bias: bool = False) -> None:
        # Unpacked, so that the keys are those of the authors' code: 1, 2, 4, 5 after the pooling's 0.
        super().__init__(nn.AdaptiveAvgPool2d(1), *LocalContext(channels, reduction, bias))


class MSCAM(nn.Module):
    """Multi-scale channel attention: y = x ⊙ σ(L(x) + g(x)), equation 3.

    The gate has one value per channel and position: the global branch says which channels matter in this image, the
    local one where. In training a batch of one image is fine: the global branch then uses its running statistics.

    Differs from popular listings, the authors' PyTorch port among them, in two details that leave the function as it
    is: the 1x1 convolutions have no bias (batch normalisation would remove it), and C // r is at least 1, so any
    channel count works. The other parameters carry the port's names.

    Args:
        channels: C, at least 1.
        reduction: r, 4 in the paper.
        identity_init: start as the identity, x + α · (f(x) − x) with α = 0.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W), |y| ≤ |x|
        - `gate`: (N, C, H, W) in [0, 1]

    Raises:
        ValueError: if `channels` or `reduction` is no integer of at least 1.
    """

    def __init__(self, channels: int, *, reduction: int = 4, identity_init: bool = False) -> None:
        super().__init__()
        self.local_att = LocalContext(channels, reduction)
        self.global_att = GlobalContext(channels, reduction)
        self.gate = Gate("element", nn.Sigmoid())
        self.join = build_join(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each channel of `x` (N, C, H, W) at each position."""
        weights = self.gate(self.local_att(x) + self.global_att(x))
        output: Tensor = self.join(x, x * weights)
        return output
