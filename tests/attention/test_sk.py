"""SK against timm's, and the convexity of its mixture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SelectiveKernel as TimmSelectiveKernel

from seg_attn.attention import SelectiveKernel
from seg_attn.attention.arguments import largest_divisor


def timm_state(block):
    """Ours by timm's names."""
    state = {}
    for key, value in block.state_dict().items():
        part, *middle, last = key.split(".")
        if part == "branches":
            state[f"paths.{middle[0]}.{'conv' if middle[1] == '0' else 'bn'}.{last}"] = value
        elif part == "fuse":
            state[f"attn.{'fc_reduce' if middle[0] == '0' else 'bn'}.{last}"] = value
        else:
            state[f"attn.fc_select.{last}"] = value
    return state


@pytest.mark.parametrize(
    ("channels", "options", "width", "groups"),
    [
        (64, {}, 32, 32),
        (48, {"branches": 3, "reduction": 2, "min_width": 4}, 24, 24),
        (7, {"min_width": 1}, 1, 7),
        (36, {"groups": 4, "reduction": 3, "min_width": 2}, 12, 4),
        (1, {}, 32, 1),
    ],
)
def test_equals_timm(channels, options, width, groups, randomise, features):
    block = randomise(SelectiveKernel(channels, **options))
    kernels = [3 + 2 * index for index in range(options.get("branches", 2))]
    oracle = TimmSelectiveKernel(
        channels, kernel_size=kernels, groups=groups, rd_channels=width, split_input=False
    ).double()
    oracle.load_state_dict(timm_state(block), strict=True)
    x = features(2, channels, 9, 8)
    torch.testing.assert_close(block(x), oracle.eval()(x), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 257),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    branches=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_lies_between_its_branches(channels, height, width, branches, seed, randomise, features):
    block = randomise(SelectiveKernel(channels, branches=branches), seed)
    x = features(1, channels, height, width, seed=seed)
    weights = []
    block.gate.register_forward_hook(lambda _module, _inputs, output: weights.append(output))
    with torch.no_grad():
        y = block(x)
        outputs = torch.stack([branch(x) for branch in block.branches])
    slack = 1e-12 * outputs.abs().max()
    assert (outputs.amin(0) - slack <= y).all()
    assert (y <= outputs.amax(0) + slack).all()
    assert weights[0].shape == (1, branches, channels, 1, 1)
    torch.testing.assert_close(weights[0].sum(1), torch.ones(1, channels, 1, 1, dtype=torch.float64))
    torch.testing.assert_close((weights[0][0][:, None] * outputs).sum(0), y)


def test_groups_are_the_largest_divisor_not_above_32():
    counts = (1, 31, 32, 37, 64, 66, 257, 2048)
    assert [largest_divisor(channels, 32) for channels in counts] == [1, 31, 32, 1, 32, 22, 1, 32]
    assert SelectiveKernel(66).branches[1][0].groups == 22


def test_branches_widen_by_dilation():
    block = SelectiveKernel(8, branches=3)
    assert [branch[0].dilation for branch in block.branches] == [(1, 1), (2, 2), (3, 3)]
