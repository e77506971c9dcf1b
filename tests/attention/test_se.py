"""SE against timm's and torchvision's."""

import pytest
import torch
from timm.layers import SEModule
from torch import nn
from torchvision.ops import SqueezeExcitation

from seg_attn.attention import SqueezeExcite


@pytest.mark.parametrize(("channels", "reduction"), [(1, 16), (7, 2), (64, 16), (48, 4), (130, 16)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_equals_timm(channels, reduction, bias, gate, randomise, features):
    block = randomise(SqueezeExcite(channels, reduction=reduction, bias=bias, gate=gate))
    oracle = SEModule(channels, rd_channels=max(channels // reduction, 1), bias=bias, gate_layer=gate).double()
    oracle.load_state_dict(block.state_dict(), strict=True)
    x = features(2, channels, 6, 5)
    torch.testing.assert_close(block(x), oracle(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gate", "activation"), [("sigmoid", nn.Sigmoid), ("hard_sigmoid", nn.Hardsigmoid)])
def test_equals_torchvision(gate, activation, randomise, features):
    block = randomise(SqueezeExcite(24, reduction=4, bias=True, gate=gate))
    oracle = SqueezeExcitation(24, 6, scale_activation=activation).double()
    oracle.load_state_dict(block.state_dict(), strict=True)
    x = features(2, 24, 6, 5)
    torch.testing.assert_close(block(x), oracle(x), rtol=1e-12, atol=1e-12)


def test_has_no_bias_by_default():
    assert sum(parameter.numel() for parameter in SqueezeExcite(64).parameters()) == 2 * 64 * 4
