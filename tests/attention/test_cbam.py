"""CBAM against timm's, whose normalisation after the spatial convolution is folded into ours."""

import pytest
import torch
from timm.layers.cbam import CbamModule

from seg_attn.attention import CBAM


@pytest.mark.parametrize(("channels", "reduction", "kernel"), [(1, 16, 7), (32, 16, 7), (20, 4, 3), (130, 16, 5)])
def test_equals_timm(channels, reduction, kernel, randomise, features):
    oracle = randomise(
        CbamModule(channels, rd_channels=max(channels // reduction, 1), spatial_kernel_size=kernel), seed=1
    )
    block = randomise(CBAM(channels, reduction=reduction, spatial_kernel=kernel))
    conv, norm = oracle.spatial.conv.conv, oracle.spatial.conv.bn
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    block.channel.mlp[0].weight.data = oracle.channel.fc1.weight.data
    block.channel.mlp[2].weight.data = oracle.channel.fc2.weight.data
    block.spatial.conv.weight.data = conv.weight.data * factor[:, None, None, None]
    block.spatial.conv.bias.data = norm.bias.data - norm.running_mean * factor.data
    x = features(2, channels, 9, 8)
    torch.testing.assert_close(block(x), oracle(x), rtol=1e-12, atol=1e-12)


def test_options_set_the_sizes():
    assert CBAM(64).channel.mlp[0].out_channels == 4
    assert CBAM(64).spatial.conv.kernel_size == (7, 7)
    assert CBAM(64, reduction=8, spatial_kernel=3).channel.mlp[0].out_channels == 8
    assert CBAM(3, spatial_kernel=3).spatial.conv.kernel_size == (3, 3)


def test_the_channel_half_comes_first(randomise, features):
    block = randomise(CBAM(16, reduction=4))
    x = features(1, 16, 7, 7)
    torch.testing.assert_close(block(x), block.spatial(block.channel(x)), rtol=0, atol=0)
    assert not torch.allclose(block(x), block.channel(block.spatial(x)))
