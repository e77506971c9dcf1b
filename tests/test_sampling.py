"""Sampling positions: equal to what gradients say, and in place whatever the output stride."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seg_attn import DeepLabV3
from seg_attn.explain import figure_png
from seg_attn.sampling import aspp_rates, draw_paths, draw_taps, last_stage_rates, path_counts, tap_offsets


@pytest.fixture(scope="module")
def model():
    return DeepLabV3("resnet50", num_classes=2, decoder_channels=8)


@settings(deadline=None, max_examples=20)
@given(rates=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_paths_are_the_gradient_of_convolutions_of_ones(rates):
    counts, step = path_counts(rates)
    side = 2 * sum(rates) + 1
    image = torch.zeros(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    x = image
    for rate in rates:
        conv = nn.Conv2d(1, 1, 3, padding=rate, dilation=rate, bias=False, dtype=torch.float64)
        nn.init.ones_(conv.weight)
        x = conv(x)
    x[0, 0, side // 2, side // 2].backward()
    gradient = image.grad[0, 0].numpy()
    assert np.array_equal(gradient[::step, ::step], counts)
    assert gradient.sum() == counts.sum() == 9 ** len(rates)  # and nothing lies between


def test_taps_are_those_of_a_convolution():
    image = torch.zeros(1, 1, 15, 15, requires_grad=True)
    nn.functional.conv2d(image, torch.ones(1, 1, 3, 3), padding=6, dilation=6)[0, 0, 7, 7].backward()
    assert np.array_equal(np.argwhere(image.grad[0, 0].numpy()) - 7, tap_offsets(6))


def test_rates_stay_in_place(model):
    assert aspp_rates(model, 8) == aspp_rates(model, 16) == aspp_rates(model, 32) == [96, 192, 288]
    assert last_stage_rates(model, 8) == last_stage_rates(model, 16) == [32, 64, 128]
    assert model.output_stride == 16
    plain = DeepLabV3("resnet50", num_classes=2, decoder_channels=8, multi_grid=None)
    assert last_stage_rates(plain, 8) == last_stage_rates(plain, 16) == [16, 32, 32]


def test_drawings(model):
    taps = draw_taps(model, (16, 8))
    assert [axes.get_title() for axes in taps.axes] == [
        "output stride 16: a value every 16 px",
        "output stride 8: a value every 8 px",
    ]
    drawn = taps.axes[1].lines[1].get_xydata()
    assert sorted(set(drawn[:, 0])) == [-96, 0, 96]
    assert [text.get_text() for text in taps.axes[1].get_legend().get_texts()] == [
        "12: 96 px",
        "24: 192 px",
        "36: 288 px",
    ]
    figure_png(taps)
    bottom, room = taps.axes[1].get_legend().get_window_extent().ymin, taps.bbox.ymin
    assert bottom >= room, "the legend is cut off"
    paths = draw_paths({"with": model, "without": DeepLabV3("resnet18", num_classes=2, multi_grid=None)})
    assert paths.axes[0].get_title() == "with\nrates 32, 64, 128 px"
    assert paths.axes[0].collections[0].get_array().sum() == 9**3
    assert paths.axes[1].collections[0].get_array().sum() == 9**4


@pytest.mark.parametrize("call", [lambda: tap_offsets(0), lambda: path_counts([]), lambda: path_counts([1, 0])])
def test_wrong_rates(call):
    with pytest.raises(ValueError, match="at least 1"):
        call()


def test_wrong_stride(model):
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        aspp_rates(model, 4)
