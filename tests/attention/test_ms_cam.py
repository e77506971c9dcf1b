"""MS-CAM against a reference in loops, written from the paper's equations."""

import numpy as np
import pytest
import torch

from seg_attn.attention import MSCAM


def normalise(values, norm):
    """Batch normalisation in eval mode of one value per channel."""
    mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return [(values[c] - mean[c]) / np.sqrt(variance[c] + norm.eps) * weight[c] + bias[c] for c in range(len(values))]


def pointwise(values, conv):
    """A 1x1 convolution at one position."""
    weight = conv.weight.detach().numpy()
    return [sum(weight[o, i, 0, 0] * values[i] for i in range(len(values))) for o in range(len(weight))]


def context(values, conv1, norm1, conv2, norm2):
    hidden = [max(value, 0.0) for value in normalise(pointwise(values, conv1), norm1)]
    return normalise(pointwise(hidden, conv2), norm2)


@pytest.mark.parametrize(("channels", "reduction"), [(1, 4), (6, 2), (9, 4)])
def test_equals_the_equations(channels, reduction, randomise, features):
    block = randomise(MSCAM(channels, reduction=reduction))
    x = features(2, channels, 3, 4)
    expected = np.empty(x.shape)
    for n, image in enumerate(x.numpy()):
        pooled = [np.mean(image[c]) for c in range(channels)]
        g = context(pooled, *(block.global_att[i] for i in (1, 2, 4, 5)))
        for row in range(3):
            for column in range(4):
                local = context(image[:, row, column], *(block.local_att[i] for i in (0, 1, 3, 4)))
                for c in range(channels):
                    gate = 1 / (1 + np.exp(-(local[c] + g[c])))
                    expected[n, c, row, column] = image[c, row, column] * gate
    torch.testing.assert_close(block(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_has_the_names_of_the_authors_code_without_biases():
    weights = [key for key in MSCAM(8).state_dict() if "running" not in key and "num_batches" not in key]
    assert weights == [
        *(f"local_att.{key}" for key in ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias")),
        *(f"global_att.{key}" for key in ("1.weight", "2.weight", "2.bias", "4.weight", "5.weight", "5.bias")),
    ]


def test_reduction_sets_the_width():
    assert MSCAM(64).local_att[0].out_channels == 16
    assert MSCAM(64, reduction=16).global_att[1].out_channels == 4
    assert MSCAM(3).local_att[0].out_channels == 1
