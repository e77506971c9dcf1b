"""The summary: parameters and FLOPs against torchvision's and against formulas, what additions cost, how it prints."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import deeplabv3_resnet50, deeplabv3_resnet101

from seg_attn.models import DeepLabV3
from seg_attn.summary import AUX_HEAD, Cost, part_of, summarize

EVERYTHING = {
    "backbone": "resnet18",
    "num_classes": 5,
    "decoder_channels": 32,
    "skip_strides": (8, 4),
    "fusion": "iaff",
    "residual_fusion": "aff",
    "image_pooling": "attention",
    "aux_head": True,
    "attention": {
        "blocks": "eca",
        "layer4": ["se", "cbam"],
        "skip": {"name": "sk"},
        "aspp": "self",
        "decoder": "ms_cam",
    },
}


def parts_of(summary):
    return {part.name: (part.parameters, part.flops) for part in summary.parts}


def convolution_flops(model, x):
    """Two per multiply-add: 2 · k · k · C_in / groups per output value, summed by hooks over every convolution."""
    counted = []

    def count(conv, args, output):
        taps = conv.kernel_size[0] * conv.kernel_size[1] * conv.in_channels // conv.groups
        counted.append(2 * taps * output.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize(("backbone", "build"), [("resnet50", deeplabv3_resnet50), ("resnet101", deeplabv3_resnet101)])
@pytest.mark.parametrize("aux", [False, True])
def test_plain_form_is_torchvisions_to_the_unit(backbone, build, aux):
    with torch.device("meta"):
        theirs = build(weights=None, weights_backbone=None, aux_loss=aux).eval()
        ours = DeepLabV3(backbone, output_stride=8, multi_grid=None, skip_strides=(), aux_head=aux)
    summary = summarize(ours, 129, 97)
    assert summary.total.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    with FlopCounterMode(display=False) as counter:
        theirs(torch.empty(1, 3, 129, 97, device="meta"))
    parts = parts_of(summary)
    auxiliary = parts.pop(AUX_HEAD, (0, 0))
    assert (auxiliary[1] > 0) is aux
    # torchvision runs its auxiliary head in inference too.
    assert summary.total.flops + auxiliary[1] == counter.get_total_flops()
    assert sum(flops for _, flops in parts.values()) == summary.total.flops
    assert summary.additions == ()
    assert (summary.plain.parameters, summary.plain.flops) == (summary.total.parameters, summary.total.flops)


def test_resnet50_by_the_numbers():
    with torch.device("meta"):
        summary = summarize(DeepLabV3("resnet50", output_stride=8, skip_strides=()), 513, 513)
    parts = parts_of(summary)
    assert list(parts) == ["stem", "layer1", "layer2", "layer3", "layer4", "ASPP", "3x3 after ASPP", "classifier"]
    assert parts["stem"] == (7 * 7 * 3 * 64 + 2 * 64, 2 * 7 * 7 * 3 * 64 * 257**2)
    assert parts["3x3 after ASPP"] == (9 * 256**2 + 2 * 256, 2 * 9 * 256**2 * 65**2)
    assert parts["classifier"] == (256 * 21 + 21, 2 * 256 * 21 * 65**2)
    aspp = 4 * 256 * 2 + 2 * 2048 * 256 + 3 * 9 * 2048 * 256 + 5 * 256 * 256 + 2 * 2 * 256
    assert parts["ASPP"][0] == aspp
    assert (summary.map_size, summary.atrous_rates, summary.oversized_rates) == ((65, 65), (12, 24, 36), ())


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_flops_are_those_of_the_convolutions(output_stride):
    model = DeepLabV3("resnet18", 5, output_stride=output_stride, skip_strides=(8, 4), fusion="concat", separable=True)
    summary = summarize(model, 65, 97)
    assert summary.total.flops == convolution_flops(model.eval(), torch.zeros(1, 3, 65, 97))


@pytest.fixture(scope="module")
def everything():
    with torch.device("meta"):
        model = DeepLabV3(**EVERYTHING)
        return model, summarize(model, 257, 257)


def test_every_parameter_and_flop_is_in_one_part(everything):
    model, summary = everything
    parts = parts_of(summary)
    assert sum(parameters for parameters, _ in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(flops for name, (_, flops) in parts.items() if name != AUX_HEAD) == summary.total.flops
    assert set(parts) >= {f"attention: {position}" for position in EVERYTHING["attention"]}
    assert set(parts) >= {"fusion of residuals", "fusion of skips", AUX_HEAD}
    for module, name in (
        ("backbone.layer1.0.attention", "attention: blocks"),
        ("backbone.attention.layer4", "attention: layer4"),
        ("aspp_attention", "attention: aspp"),
        ("decoder_attention", "attention: decoder"),
        ("decoder.skips.1.attention", "attention: skip"),
        ("decoder.skips.1.fusion.local_att", "fusion of skips"),
        ("decoder.skips.1.refine", "skips"),
        ("aux_classifier", AUX_HEAD),
    ):
        assert part_of(module) == name
        assert sum(p.numel() for p in model.get_submodule(module).parameters()) <= parts[name][0]
    assert parts["attention: layer4"][0] == sum(p.numel() for p in model.backbone.attention.parameters())
    # Self-attention is a matrix product as well: it must not be left out.
    assert parts["attention: aspp"][1] > 2 * sum(p.numel() for p in model.aspp_attention.parameters())


def test_additions_are_differences_to_the_plain_network(everything):
    model, summary = everything
    plain_options = {"attention": None, "fusion": "add", "residual_fusion": "add", "image_pooling": "average"}
    with torch.device("meta"):
        plain = DeepLabV3(**{**EVERYTHING, **plain_options})

    def parameters(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert summary.plain.parameters == parameters(plain)
    additions = {addition.name: addition for addition in summary.additions}
    assert list(additions) == [
        "residual_fusion: aff",
        "image_pooling: attention",
        "fusion: iaff",
        "attention: blocks: eca",
        "attention: layer4: se, cbam",
        "attention: skip: sk",
        "attention: aspp: self",
        "attention: decoder: ms_cam",
        "together",
    ]
    assert additions["together"].parameters == parameters(model) - parameters(plain)
    assert additions["together"].flops == summary.total.flops - summary.plain.flops
    assert additions["image_pooling: attention"].parameters == 512  # one query
    assert additions["attention: blocks: eca"].parameters == sum(
        p.numel() for name, p in model.named_parameters() if part_of(name) == "attention: blocks"
    )
    each = [addition for name, addition in additions.items() if name != "together"]
    assert sum(addition.parameters for addition in each) == additions["together"].parameters
    assert sum(addition.flops for addition in each) == additions["together"].flops
    assert all(addition.parameters > 0 and addition.flops > 0 for addition in each)
    assert all(addition.latency_ms is None for addition in each)


def test_one_addition_is_not_repeated_as_all_together():
    with torch.device("meta"):
        summary = summarize(DeepLabV3("resnet18", fusion="concat", skip_channels=24), 65, 65)
    (addition,) = summary.additions
    # 24 projected channels in the place of 256, and as many more that the 3x3 after it reads.
    assert addition.parameters == (24 - 256) * (64 + 2) + 9 * 24 * 256
    assert addition.name == "fusion: concat"


def test_latency_is_measured_in_turns():
    model = DeepLabV3("resnet18", 3, decoder_channels=16, attention={"aspp": "se"})
    summary = summarize(model, 33, 33, latency_runs=3)
    assert summary.plain.latency_ms > 0
    assert summary.total.latency_ms > 0
    assert [addition.name for addition in summary.additions] == ["fusion: aff", "attention: aspp: se", "together"]
    assert all(isinstance(addition.latency_ms, float) for addition in summary.additions)
    assert " ms " in str(summary)
    assert " ms " not in str(summarize(model, 33, 33))


def test_the_model_is_left_as_it_is():
    model = DeepLabV3("resnet18", 3, decoder_channels=16, attention={"layer4": "self"}).train()
    model.backbone.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model.output_stride = 8
    summary = summarize(model, 65, 65)
    assert summary.output_stride == model.output_stride == 8
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_prints_in_100_columns_and_as_json(everything):
    _, summary = everything
    text = str(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert str(summary.dilation_plan) in text
    assert "DeepLabV3 on resnet18, 5 classes, output stride 16: image 257 x 257, last map 17 x 17" in text
    assert "warning: rate 18 is as large as both sides of the 17 x 17 map" in text
    with torch.device("meta"):
        several = str(summarize(DeepLabV3("resnet18"), 180, 180))
    assert "warning: rates 12, 18 are as large as both sides of the 12 x 12 map" in several
    assert f"GMACs are half: {summary.total.flops / 2e9:,.2f}" in text
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert total.split()[1:3] == [f"{summary.total.parameters:,}", "100.0"]
    with torch.device("meta"):
        assert "warning" not in str(summarize(DeepLabV3("resnet18"), 513, 513))
    loaded = json.loads(json.dumps(summary.as_dict()))
    assert loaded["dilation_plan"][-1] == {"name": "layer4.1", "stride": 1, "dilation": [4, 4], "effective_rate": 64}
    assert loaded["oversized_rates"] == [18]
    assert Cost(**loaded["total"]) == summary.total
    assert tuple(Cost(**part) for part in loaded["parts"]) == summary.parts
    assert tuple(Cost(**addition) for addition in loaded["additions"]) == summary.additions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 65), "height must be an integer of at least 1, got 0"),
        ((65, 1.5), "width must be an integer of at least 1, got 1.5"),
        ((65, 65, -1), "latency_runs must not be negative, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with torch.device("meta"):
        model = DeepLabV3("resnet18")
    with pytest.raises(ValueError, match=message):
        summarize(model, *arguments)
