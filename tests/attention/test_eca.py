"""ECA: its kernel for every channel count, and the block against timm's."""

import pytest
import torch
from timm.layers import EcaModule

from seg_attn.attention import ECA
from seg_attn.attention.eca import eca_kernel_size


def exact_kernel_size(channels):
    """γ = 2, b = 1 in integers: int((log2 C + 1) / 2) is the greatest t with 4**t <= 2 C."""
    t = max(t for t in range(8) if 4**t <= 2 * channels)
    return t if t % 2 else t + 1


def test_kernel_and_shape_for_every_channel_count():
    with torch.no_grad():
        for channels in range(1, 4097):
            block = ECA(channels)
            kernel = block.conv.kernel_size[0]
            assert kernel % 2 == 1
            assert kernel == exact_kernel_size(channels) == block.conv.weight.numel()
            assert block(torch.ones(1, channels, 1, 1)).shape == (1, channels, 1, 1)


@pytest.mark.parametrize(("gamma", "b", "expected"), [(2, 1, 5), (1, 1, 9), (2, -1, 3), (1, -10, 3), (3, 0.5, 3)])
def test_kernel_from_gamma_and_b(gamma, b, expected):
    assert eca_kernel_size(256, gamma, b) == expected
    assert ECA(256, gamma=gamma, b=b).conv.kernel_size == (expected,)


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("channels", [1, 8, 130, 512])
def test_equals_timm_with_the_given_kernel(channels, kernel_size, randomise, features):
    block = randomise(ECA(channels, kernel_size=kernel_size))
    oracle = EcaModule(channels=None, kernel_size=kernel_size).double()
    oracle.load_state_dict(block.state_dict(), strict=True)
    x = features(2, channels, 6, 5)
    torch.testing.assert_close(block(x), oracle(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [8, 64, 256, 2048])
def test_equals_timm_with_the_derived_kernel(channels, randomise, features):
    block = randomise(ECA(channels))
    oracle = EcaModule(channels=channels).double()
    oracle.load_state_dict(block.state_dict(), strict=True)
    x = features(2, channels, 3, 2)
    torch.testing.assert_close(block(x), oracle(x), rtol=1e-12, atol=1e-12)
