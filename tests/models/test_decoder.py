"""The decoder: which map meets which, in which order, at which size."""

import torch
from torch import nn

from seg_attn.fusion import Concat
from seg_attn.models.decoder import Decoder, SkipFusion
from seg_attn.models.layers import resize


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Difference(nn.Module):
    def forward(self, low_level, high_level):
        return low_level - high_level


def skip(project=1.0, attention=1.0, refine=1.0, align_corners=False, fusion=None):
    return SkipFusion(Scale(project), Scale(attention), fusion or Difference(), Scale(refine), align_corners)


def test_each_skip_is_joined_in_turn(images):
    x, deep, shallow = images(1, 2, 3, 4), images(1, 2, 5, 7, seed=1), images(1, 2, 9, 13, seed=2)
    decoder = Decoder(refine=Scale(2), skips=[skip(project=3, attention=5), skip(refine=7)])
    joined = 15 * deep - resize(2 * x, (5, 7))
    torch.testing.assert_close(decoder(x, [deep, shallow]), 7 * (shallow - resize(joined, (9, 13))))


def test_without_skips_only_the_refinement_is_left(images):
    x = images(1, 2, 3, 4)
    assert torch.equal(Decoder(refine=Scale(3), skips=[])(x, []), 3 * x)


def test_low_level_is_the_first_input_of_the_fusion_and_sizes_may_be_odd(images):
    low, high = images(1, 3, 9, 7), images(1, 2, 5, 4, seed=1)
    output = skip(fusion=Concat())(low, high)
    assert torch.equal(output[:, :3], low)
    assert torch.equal(output[:, 3:], resize(high, (9, 7)))


def test_align_corners_reaches_the_resizing(images):
    low, high = images(1, 2, 9, 7), images(1, 2, 5, 4, seed=1)
    aligned = skip(align_corners=True)(low, high)
    assert torch.equal(aligned, low - resize(high, (9, 7), align_corners=True))
    assert not torch.allclose(aligned, skip()(low, high))
