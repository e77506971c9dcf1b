"""The faster form of a network: the same logits, for every way a network can be built."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seg_attn import DeepLabV3
from seg_attn.models.inference import PointwiseConv, TapConv, WinogradConv, optimized


def _conv(in_channels, out_channels, kernel, rate):
    conv = nn.Conv2d(in_channels, out_channels, kernel, dilation=rate, padding=rate * (kernel // 2))
    return conv.requires_grad_(False)


@pytest.mark.parametrize("form", [TapConv, WinogradConv])
@pytest.mark.parametrize("rate", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("size", [(1, 1), (7, 10), (30, 23)])
def test_convolutions_against_float64(form, rate, size):
    torch.manual_seed(rate)
    conv = _conv(6, 5, 3, rate)
    x = torch.randn(2, 6, *size)
    expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=rate, dilation=rate)
    assert (form(conv)(x).double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_pointwise_convolution():
    torch.manual_seed(0)
    conv = _conv(6, 5, 1, 1)
    x = torch.randn(2, 6, 4, 7)
    torch.testing.assert_close(PointwiseConv(conv)(x), conv(x))


def _random(model):
    """Statistics and scales of normalisation that are not those of a fresh network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": "resnet18", "output_stride": 8},
        {"backbone": "resnet50", "output_stride": 8, "skip_strides": (), "image_pooling": "attention"},
        {"backbone": "resnext50_32x4d", "fusion": "iaff", "separable": True},
        {"backbone": "se_resnet50", "fusion": "concat", "attention": {"blocks": "se", "aspp": "self"}},
        {"backbone": "resnet18", "residual_fusion": "aff", "skip_strides": (8, 4), "align_corners": True},
    ],
    ids=["os8", "plain", "grouped", "caffe", "aff"],
)
def test_logits_are_those_of_the_network(arguments):
    torch.manual_seed(0)
    model = _random(DeepLabV3(num_classes=5, decoder_channels=32, **arguments))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 65, 97).contiguous(memory_format=torch.channels_last)
    faster = optimized(model)
    with torch.inference_mode():
        expected, found = model(images), faster(images)
        half = optimized(model, torch.bfloat16)(images.bfloat16())
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert half.dtype == torch.float32
    assert (half - expected).abs().mean() <= 0.05 * expected.abs().max()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    folded = sum(isinstance(module, nn.BatchNorm2d) for module in faster.modules())
    assert folded < sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
