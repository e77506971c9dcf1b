"""The atrous plan as pure arithmetic: tables from the papers, the exact form's invariant, the error texts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seg_attn.models.atrous import (
    BlockLayout,
    atrous_plan,
    check_output_stride,
    resolve_multi_grid,
    scale_atrous_rates,
    unscalable_rates,
)

BASIC = BlockLayout(kernels=(3, 3), strided=0)
BOTTLENECK = BlockLayout(kernels=(1, 3, 1), strided=1)
CAFFE = BlockLayout(kernels=(1, 3, 1), strided=0)
SENET = BlockLayout(kernels=(1, 3, 1), strided=1, shortcut_kernel=3)
LAYOUTS = (BASIC, BOTTLENECK, CAFFE, SENET)
RESNET50 = (3, 4, 6, 3)

layouts, depths = st.sampled_from(LAYOUTS), st.tuples(*[st.integers(1, 4)] * 4)
unit_rates = st.lists(st.integers(1, 5), min_size=4, max_size=4)


def dilations(plan, stage):
    return [block.dilations for block in plan if block.name.startswith(f"layer{stage}.")]


@pytest.mark.parametrize(
    ("layout", "output_stride", "layer3", "layer4"),
    [
        # Rate 2 after layer4's removed stride, except up to the convolution that carried it: torchvision's form.
        (BOTTLENECK, 32, [(1,)] * 3, [(1,)] * 3),
        (BOTTLENECK, 16, [(1,)] * 3, [(1,), (2,), (2,)]),
        (BOTTLENECK, 8, [(1,), (2,), (2,)], [(2,), (4,), (4,)]),
        # A basic block strides in its first 3x3, so the second already takes the new rate.
        (BASIC, 16, [(1, 1)] * 3, [(1, 2), (2, 2), (2, 2)]),
        (BASIC, 8, [(1, 2), (2, 2), (2, 2)], [(2, 4), (4, 4), (4, 4)]),
        # Caffe's SE-ResNets stride in the first 1x1, before the 3x3.
        (CAFFE, 16, [(1,)] * 3, [(2,), (2,), (2,)]),
        (CAFFE, 8, [(2,), (2,), (2,)], [(4,), (4,), (4,)]),
    ],
)
def test_exact_form(layout, output_stride, layer3, layer4):
    plan = atrous_plan((3, 3, 3, 3), layout, output_stride)
    assert dilations(plan, 1) == dilations(plan, 2) == [(1,) * len(plan[0].spatial)] * 3
    assert (dilations(plan, 3), dilations(plan, 4)) == (layer3, layer4)


@pytest.mark.parametrize(
    ("blocks", "layout", "output_stride", "rates"),
    [
        (RESNET50, BOTTLENECK, 16, [2, 4, 8]),
        (RESNET50, BOTTLENECK, 8, [4, 8, 16]),
        (RESNET50, BOTTLENECK, 32, [1, 2, 4]),
        ((2, 2, 2, 2), BASIC, 16, [2, 4]),
        ((2, 2, 2, 2), BASIC, 8, [4, 8]),
    ],
)
def test_default_multi_grid(blocks, layout, output_stride, rates):
    plan = atrous_plan(blocks, layout, output_stride, "auto")
    last = plan[-blocks[-1] :]
    assert [block.dilation for block in last] == rates
    # One rate per residual block, on each of its 3x3 convolutions and on none of its 1x1.
    for block, rate in zip(last, rates, strict=True):
        assert [conv.dilation for conv in block.convs] == [rate if kernel == 3 else 1 for kernel in layout.kernels]
    assert plan[: -blocks[-1]] == atrous_plan(blocks, layout, output_stride)[: -blocks[-1]]


def test_whole_stage_dilation():
    plan = atrous_plan(RESNET50, BOTTLENECK, 8, contract_dilation=False)
    assert dilations(plan, 3) == [(2,)] * 6
    assert dilations(plan, 4) == [(4,)] * 3
    assert [block.shortcut.dilation for block in plan] == [1] * 16  # a 1x1 has no rate
    shortcuts = atrous_plan((1, 1, 1, 1), SENET, 8, contract_dilation=False)
    assert [block.shortcut.dilation for block in shortcuts] == [1, 1, 2, 4]
    assert [block.shortcut.dilation for block in atrous_plan((1, 1, 1, 1), SENET, 8)] == [1, 1, 1, 2]


@given(blocks=depths, layout=layouts, rates=unit_rates, contract=st.booleans())
def test_strides_multiply_to_the_output_stride(blocks, layout, rates, contract):
    for output_stride, multi_grid in itertools.product((8, 16, 32), (None, rates[: blocks[-1]])):
        plan = atrous_plan(blocks, layout, output_stride, multi_grid, contract)
        assert len(plan) == sum(blocks)
        grid = 4
        for block in plan:
            assert block.convs[0].grid == block.shortcut.grid == grid
            assert [conv.stride for conv in block.convs].count(block.stride) >= 1
            assert block.shortcut.stride == block.stride
            grid *= block.stride
        assert grid == output_stride


@given(blocks=depths, layout=layouts, rates=unit_rates)
def test_the_exact_form_looks_at_the_same_places_at_every_output_stride(blocks, layout, rates):
    def places(output_stride, multi_grid):
        plan = atrous_plan(blocks, layout, output_stride, multi_grid)
        first = [block for block in plan if block.name.endswith(".0")]
        shortcuts = [block.shortcut for block in first] if layout.shortcut_kernel > 1 else []
        return [conv.effective_rate for conv in itertools.chain(shortcuts, *(block.spatial for block in plan))]

    fitting = rates[: blocks[-1]]
    assert places(8, None) == places(16, None) == places(32, None)
    assert places(8, fitting) == places(16, fitting)


def test_whole_stage_dilation_looks_elsewhere():
    def places(output_stride):
        plan = atrous_plan(RESNET50, BOTTLENECK, output_stride, contract_dilation=False)
        return [block.effective_rate for block in plan]

    assert [index for index, pair in enumerate(zip(places(8), places(32), strict=True)) if len(set(pair)) > 1] == [
        7,
        13,
    ]


def test_plan_prints_as_a_table():
    assert str(atrous_plan((1, 1, 1, 2), BASIC, 8, "auto")).splitlines() == [
        "block     stride  dilation  effective rate (px)",
        "--------  ------  --------  -------------------",
        "layer1.0  1       1, 1      4",
        "layer2.0  2       1, 1      8",
        "layer3.0  1       1, 2      16",
        "layer4.0  1       4, 4      32",
        "layer4.1  1       8, 8      64",
    ]


def test_multi_grid_of_any_length_that_fits():
    assert resolve_multi_grid((3, 1, 2), 3) == (3, 1, 2)
    assert resolve_multi_grid([5], 1) == (5,)
    assert resolve_multi_grid("auto", 4) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("multi_grid", "message"),
    [
        ((1, 2), r"one rate for each of the 3 blocks of the last stage, got 2: \[1, 2\]"),
        ((1, 2, 4, 8), r"the 3 blocks of the last stage, got 4: \[1, 2, 4, 8\]"),
        ((), "the 3 blocks of the last stage, got 0"),
        ((1, 0, 2), r"multi_grid must hold positive integers, got \[1, 0, 2\]"),
        ((1, 2.0, 4), "must hold positive integers"),
        ((True, 1, 1), "must hold positive integers"),
        ("doubling", "multi_grid must be 'auto', None or a list of unit rates, got 'doubling'"),
        (2, "multi_grid must be 'auto', None or a list of unit rates, got 2"),
    ],
)
def test_bad_multi_grid(multi_grid, message):
    with pytest.raises(ValueError, match=message):
        atrous_plan(RESNET50, BOTTLENECK, 16, multi_grid)


@pytest.mark.parametrize("output_stride", [4, 64, 0, True, None, "16", 16.0])
def test_bad_output_stride(output_stride):
    with pytest.raises(ValueError, match=rf"output_stride must be 8, 16 or 32, got {output_stride!r}"):
        check_output_stride(output_stride)


@pytest.mark.parametrize(
    ("rates", "output_stride", "scaled", "rounded"),
    [
        ((6, 12, 18), 16, (6, 12, 18), ()),
        ((6, 12, 18), 8, (12, 24, 36), ()),
        ((6, 12, 18), 32, (3, 6, 9), ()),
        ((1, 7, 18), 32, (1, 4, 9), (1, 7)),
        ((4.5, 9, 13.5), 8, (9, 18, 27), ()),
        ((4.5, 9, 13.5), 16, (5, 9, 14), (4.5, 13.5)),
        ((0.5,), 32, (1,), (0.5,)),
    ],
)
def test_atrous_rates_follow_the_output_stride(rates, output_stride, scaled, rounded):
    assert scale_atrous_rates(rates, output_stride) == scaled
    assert unscalable_rates(rates, output_stride) == rounded


@pytest.mark.parametrize("rates", [(), (0, 6), (-6,), (6.25,), (True,), ("6",), (float("inf"),), (float("nan"),)])
def test_bad_atrous_rates(rates):
    with pytest.raises(ValueError, match="atrous_rates must be positive integers"):
        scale_atrous_rates(rates, 16)
