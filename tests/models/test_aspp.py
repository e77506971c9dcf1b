"""ASPP: its formula branch by branch, rates that follow the output stride, image pooling."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import deeplabv3 as torchvision_deeplabv3

from seg_attn.attention.pooling import AttentionPool2d
from seg_attn.models.aspp import ASPP
from seg_attn.models.layers import ConvNormAct, SeparableConv, resize


def test_equals_torchvisions_after_copying_weights(randomise, images, error):
    theirs = randomise(torchvision_deeplabv3.ASPP(16, [12, 24, 36], 8)).double()
    ours = ASPP(16, 8, output_stride=8).double().eval()
    # The order of the tensors is the same, the names are not: theirs has the pooling in the same nn.Sequential.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = images(2, 16, 33, 41)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-12


@pytest.mark.parametrize("separable", [False, True])
def test_each_atrous_branch_obeys_the_subsampling_identity(separable, randomise, images, error):
    aspp = randomise(ASPP(8, 4, separable=separable)).double()
    x = images(1, 8, 45, 51)  # rates to 36 and a map they fit
    for fine, coarse in ((8, 16), (16, 32)):
        outputs = {}
        for output_stride, maps in ((fine, x), (coarse, x[..., ::2, ::2])):
            aspp.set_output_stride(output_stride)
            with torch.no_grad():
                outputs[output_stride] = [branch(maps) for branch in aspp.branches[:-1]]
        for dense, sparse in zip(outputs[fine], outputs[coarse], strict=True):
            assert error(dense[..., ::2, ::2], sparse) <= 1e-12


def test_rates_left_behind_violate_the_identity(randomise, images, error):
    aspp = randomise(ASPP(8, 4)).double()
    x = images(1, 8, 45, 51)
    with torch.no_grad():
        for branch in aspp.branches[1:-1]:
            assert error(branch(x)[..., ::2, ::2], branch(x[..., ::2, ::2])) > 0.1


def test_rates_and_paddings_move_together():
    aspp = ASPP(8, 4, atrous_rates=(6, 12))
    for output_stride, rates in ((16, (6, 12)), (8, (12, 24)), (32, (3, 6)), (16, (6, 12))):
        aspp.set_output_stride(output_stride)
        assert aspp.rates == rates
        for branch, rate in zip(aspp.branches[1:-1], rates, strict=True):
            assert branch[0].dilation == branch[0].padding == (rate, rate)
    assert len(aspp.branches) == 4
    assert aspp.project[0][0].in_channels == 16


def test_image_pooling_is_the_mean_everywhere(randomise, images):
    aspp = randomise(ASPP(8, 4)).double()
    x = images(2, 8, 5, 7)
    conv, norm, _ = aspp.branches[-1][1]
    with torch.no_grad():
        expected = norm(conv(x.mean((2, 3), keepdim=True))).relu()
        torch.testing.assert_close(aspp.branches[-1](x), expected.expand(2, 4, 5, 7), rtol=1e-12, atol=1e-12)


def test_attention_pooling_starts_at_the_mean_and_learns_away_from_it(images, error):
    torch.manual_seed(0)
    average = ASPP(8, 4).double().eval()
    attention = ASPP(8, 4, image_pooling="attention").double().eval()
    assert isinstance(attention.branches[-1][0], AttentionPool2d)
    assert set(attention.state_dict()) - set(average.state_dict()) == {"branches.4.0.query"}
    attention.load_state_dict(average.state_dict(), strict=False)
    x = images(2, 8, 9, 9)
    with torch.no_grad():
        assert error(attention(x), average(x)) <= 1e-12
        attention.branches[-1][0].query.normal_()
        assert error(attention(x), average(x)) > 1e-4
    attention(x).square().sum().backward()
    assert attention.branches[-1][0].query.grad.abs().max() > 0


def test_a_rounded_rate_warns_once_for_each_change():
    with pytest.warns(
        UserWarning, match=r"atrous_rates 7, 9 .* not whole at output stride 32: the rates there are 3, 4, 5"
    ):
        aspp = ASPP(8, 4, atrous_rates=(6, 7, 9), output_stride=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aspp.set_output_stride(32)
        aspp.set_output_stride(8)
        ASPP(8, 4, output_stride=32)
    assert aspp.rates == (12, 14, 18)
    with pytest.warns(UserWarning, match="not whole at output stride 32"):
        aspp.set_output_stride(32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_pooling": "max"}, "image_pooling must be one of average, attention, got 'max'"),
        ({"atrous_rates": (0,)}, "atrous_rates must be positive integers"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ASPP(8, 4, **options)


def test_separable_unit_is_depthwise_then_pointwise(images):
    torch.manual_seed(0)
    unit = ConvNormAct(6, 4, kernel_size=3, dilation=2, separable=True).double().eval()
    assert isinstance(unit[0], SeparableConv)
    depthwise, pointwise = unit[0]
    assert (depthwise.weight.shape, pointwise.weight.shape) == ((6, 1, 3, 3), (4, 6, 1, 1))
    x = images(1, 6, 9, 11)
    with torch.no_grad():
        expected = F.conv2d(F.conv2d(x, depthwise.weight, padding=2, dilation=2, groups=6), pointwise.weight)
        torch.testing.assert_close(unit[0](x), expected)
        torch.testing.assert_close(unit(x), unit[1](expected).relu())
    assert isinstance(ConvNormAct(6, 4, separable=True)[0], nn.Conv2d)  # a 1x1 stays


def test_resize_interpolates_linearly():
    ramp = torch.arange(5, dtype=torch.float64).expand(1, 1, 3, 5)
    aligned = resize(ramp, (3, 9), align_corners=True)
    torch.testing.assert_close(aligned[0, 0, 0], torch.linspace(0, 4, 9, dtype=torch.float64))
    centred = resize(ramp, (3, 10))  # half-pixel centres: position p reads (p + 0.5) / 2 - 0.5
    torch.testing.assert_close(centred[0, 0, 0, 1:-1], (torch.arange(1, 9, dtype=torch.float64) + 0.5) / 2 - 0.5)
