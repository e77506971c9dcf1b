import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from seg_attn import DeepLabV3, SegmentationTask
from seg_attn.attention import ATTENTION, build_attention
from seg_attn.attention.pooling import AttentionPool2d
from seg_attn.fusion import AFF, IterativeAFF
from seg_attn.recording import position_of, record_gates, stage_modules

SMALL = {"backbone": "resnet18", "num_classes": 3, "decoder_channels": 8, "atrous_rates": [1, 2, 3]}


def _draw(module, seed=0):
    """Random parameters and statistics: at their start values a zero γ or a BN of ones hides what a gate does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.eval()


def _hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    attention = {
        "blocks": "eca",
        "layer2": "cbam",
        "layer3": "sk",
        "skip": "ms_cam",
        "aspp": ["se", {"name": "self", "heads": 2}],
        "decoder": {"name": "se", "identity_init": True},
    }
    return DeepLabV3(**SMALL, attention=attention, fusion="iaff", image_pooling="attention").eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def test_gates_are_what_multiplies_the_features():
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    seen = {}
    for name in ATTENTION:
        block = _draw(build_attention(name, 8))
        with record_gates(block) as recording, torch.no_grad():
            output = block(x)
        seen[name] = recording
        gates = recording.gates
        if name in ("se", "eca", "ms_cam"):
            assert torch.equal(output, x * gates["gate"].weights)
        elif name == "cbam":
            assert torch.equal(output, x * gates["channel.gate"].weights * gates["spatial.gate"].weights)
        elif name == "sk":
            branches = torch.stack([branch(x) for branch in block.branches], dim=1)
            torch.testing.assert_close(output, (branches * gates["gate"].weights).sum(1))
    assert {name: [(gate.kind, gate.block) for gate in seen[name].gates.values()] for name in seen} == {
        "se": [("channel", "SqueezeExcite")],
        "eca": [("channel", "ECA")],
        "cbam": [("channel", "CBAM"), ("spatial", "CBAM")],
        "sk": [("branch", "SelectiveKernel")],
        "ms_cam": [("element", "MSCAM")],
        "self": [],
    }
    assert list(seen["self"].rows) == [""]


@pytest.mark.parametrize("fusion", [AFF, IterativeAFF])
def test_fusion_weights_are_those_of_the_first_input(fusion):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 8, 5, 6, generator=generator)
    block = _draw(fusion(8))
    with record_gates(block) as recording, torch.no_grad():
        output = block(x, y)
    last = list(recording.of_kind("fusion"))[-1]
    assert last.name == ("gate" if fusion is AFF else "gate2")
    torch.testing.assert_close(output, last.weights * x + (1 - last.weights) * y)
    assert torch.equal(last.position_map(), last.weights.mean(1))


def test_self_attention_row_is_the_row_of_the_whole_softmax():
    x = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    block = _draw(build_attention({"name": "self", "heads": 2}, 8))
    with record_gates(block, point=(0.99, 0.3)) as recording, torch.no_grad():
        block(x=x)  # as a keyword, too
    row = recording.rows[""]
    assert (row.row, row.column) == (1, 5)
    query, key = (block.split_heads(layer(x)) for layer in (block.query, block.key))
    weights = (query @ key.mT * block.scale).softmax(-1)[0]  # (heads, HW, HW)
    torch.testing.assert_close(row.weights[0].flatten(1), weights[:, 1 * 6 + 5])
    assert row.gamma == pytest.approx(block.gamma.item())


def test_every_gate_of_a_network_by_its_module_name(model, images):
    with record_gates(model) as recording, torch.inference_mode():
        model(images)
    blocks = [f"backbone.layer{stage}.{index}.attention.gate" for stage in (1, 2, 3, 4) for index in (0, 1)]
    assert list(recording.gates) == [
        *blocks[:4],
        "backbone.attention.layer2.channel.gate",
        "backbone.attention.layer2.spatial.gate",
        *blocks[4:6],
        "backbone.attention.layer3.gate",
        *blocks[6:],
        "aspp.branches.4.0.gate",
        "aspp_attention.0.gate",
        "decoder.skips.0.attention.gate",
        "decoder.skips.0.fusion.gate",
        "decoder.skips.0.fusion.gate2",
        "decoder_attention.gate",
    ]
    assert list(recording.rows) == ["aspp_attention.1"]
    assert recording.gates["aspp.branches.4.0.gate"].over_positions
    assert not recording.gates["decoder.skips.0.attention.gate"].over_positions
    assert recording.gates["decoder_attention.gate"].strength == 0.0
    assert recording.gates["aspp_attention.0.gate"].strength is None
    for gate in recording.gates.values():
        assert not gate.weights.requires_grad
        assert 0 <= gate.weights.min() <= gate.weights.max() <= 1
    assert recording.gates["backbone.attention.layer3.gate"].weights.shape == (2, 2, 256, 1, 1)


def test_stages_are_what_the_network_computes(model, images):
    with record_gates(model) as recording, torch.inference_mode():
        model(images)
    with torch.inference_mode():
        stages = model.backbone(images)
        aspp = model.aspp_attention(model.aspp(stages[-1]))
        decoder = model.decoder_attention(model.decoder(aspp, [stages[0]]))
    expected = {"layer1": stages[0], "layer2": stages[1], "layer3": stages[2], "layer4": stages[3]}
    expected |= {"aspp": aspp, "decoder": decoder}
    assert list(recording.features) == list(expected)
    for name, value in expected.items():
        assert torch.equal(recording.features[name], value), name


def test_nothing_of_the_model_changes(model, images):
    with torch.inference_mode():
        before = model(images)
    with record_gates(model), torch.inference_mode():
        during = model(images)
    assert torch.equal(before, during)
    assert _hooks(model) == 0


def test_hooks_are_gone_after_an_exception(model):
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"), record_gates(model):
        model(torch.zeros(1, 5, 8, 8))
    assert _hooks(model) == 0
    with pytest.raises(ValueError, match="unknown module 'layer9'"), record_gates(model, features=["layer9"]):
        pass
    assert _hooks(model) == 0


def test_gradients_flow_while_recording():
    block = _draw(build_attention("cbam", 4))
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with record_gates(block) as recording:
        block(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not recording.gates["spatial.gate"].weights.requires_grad


def test_a_recording_holds_the_last_forward(model, images):
    with record_gates(model, point=(0.0, 1.0)) as recording, torch.inference_mode():
        model(images)
        model(images[:1, :, :32, :32])
    assert recording.gates["aspp_attention.0.gate"].weights.shape[0] == 1
    assert recording.features["layer4"].shape[-2:] == (2, 2)
    row = recording.rows["aspp_attention.1"]
    assert (row.row, row.column) == (1, 0)
    assert not any("#" in name for name in recording.gates)


def test_a_shared_gate_is_recorded_at_each_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = _draw(build_attention("se", 4))

        def forward(self, x):
            return self.block(self.block(x))

    model, x = Twice(), torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with record_gates(model, features={"twice": "block"}) as recording, torch.no_grad():
        output = model(x)
    assert list(recording.gates) == ["block.gate", "block.gate#2"]
    first, second = (gate.weights for gate in recording.gates.values())
    assert torch.equal(output, x * first * second)
    assert torch.equal(recording.features["twice"], output)


def test_features_are_copies():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True))
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with record_gates(model, features=["0"]) as recording, torch.no_grad():
        model(x)
    assert torch.equal(recording.features["0"], model[0](x))
    assert recording.features["0"].min() < 0


def test_a_network_inside_a_task_has_its_stages():
    task = SegmentationTask(**SMALL)
    assert stage_modules(task)["layer3"] == "model.backbone.attention.layer3"
    assert stage_modules(task)["decoder"] == "model.decoder_attention"
    assert stage_modules(nn.Conv2d(1, 1, 1)) == {}


def test_attention_pooling_on_its_own():
    pool = AttentionPool2d(3)
    with record_gates(pool) as recording, torch.no_grad():
        pool(torch.randn(1, 3, 4, 5))
    gate = recording.gates["gate"]
    assert gate.over_positions
    torch.testing.assert_close(gate.weights, torch.full((1, 1, 4, 5), 1 / 20))


def test_channel_gates_have_no_map():
    block = build_attention("se", 4)
    with record_gates(block) as recording, torch.no_grad():
        block(torch.randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match="gate is a channel gate: its weights have no positions"):
        recording.gates["gate"].position_map()


@pytest.mark.parametrize("point", [(-0.1, 0.5), (0.5, 1.1)])
def test_points_outside_are_refused(point):
    with (
        pytest.raises(ValueError, match="point must be \\(x, y\\) as shares"),
        record_gates(nn.Identity(), point=point),
    ):
        pass


@given(st.floats(0, 1), st.floats(0, 1), st.integers(min_value=1, max_value=99), st.integers(min_value=1, max_value=99))
def test_the_position_covers_the_point(x, y, height, width):
    row, column = position_of((x, y), height, width)
    assert 0 <= row < height
    assert 0 <= column < width
    assert row - 1e-9 <= y * height <= row + 1 + 1e-9
    assert column - 1e-9 <= x * width <= column + 1 + 1e-9
