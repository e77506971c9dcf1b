"""The fusions against loops written from the paper's equations, and AFF's algebra."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seg_attn.attention import Gate
from seg_attn.fusion import AFF, FUSION, Add, Concat, IterativeAFF, build_fusion

CHANNELS, SIZES, BATCHES = st.integers(1, 257), st.integers(1, 33), st.integers(1, 3)
SHAPES = {"channels": CHANNELS, "height": SIZES, "width": SIZES, "batch": BATCHES, "seed": st.integers(0, 99)}
attentional = pytest.mark.parametrize("fusion", [AFF, IterativeAFF])


def randomise(module, seed=0):
    """Draw every parameter and statistic; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return module


def pair(*shape, seed=0):
    x, y = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, y


def pointwise(values, conv):
    weight = conv.weight.detach().numpy()
    bias = np.zeros(len(weight)) if conv.bias is None else conv.bias.detach().numpy()
    return [bias[o] + sum(weight[o, i, 0, 0] * values[i] for i in range(len(values))) for o in range(len(weight))]


def normalise(values, norm):
    mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return [(v - mean[c]) / np.sqrt(variance[c] + norm.eps) * weight[c] + bias[c] for c, v in enumerate(values)]


def context(values, layers):
    conv1, norm1, conv2, norm2 = (layer for layer in layers if isinstance(layer, nn.Conv2d | nn.BatchNorm2d))
    hidden = [max(value, 0.0) for value in normalise(pointwise(values, conv1), norm1)]
    return normalise(pointwise(hidden, conv2), norm2)


def looped_fuse(x, y, guide, local_att, global_att, gain):
    """Mix one image's maps (C, H, W) by the weights that `guide` (C, H, W) gives, position by position."""
    channels, height, width = x.shape
    mixed = np.empty(x.shape)
    g = context([np.mean(guide[c]) for c in range(channels)], global_att)
    for row in range(height):
        for column in range(width):
            local = context(guide[:, row, column], local_att)
            for c in range(channels):
                w = 1 / (1 + np.exp(-(local[c] + g[c])))
                mixed[c, row, column] = gain * (w * x[c, row, column] + (1 - w) * y[c, row, column])
    return mixed


def looped_aff(block, x, y, gain):
    return np.stack(
        [
            looped_fuse(a, b, a + b, block.local_att, block.global_att, gain)
            for a, b in zip(x.numpy(), y.numpy(), strict=True)
        ]
    )


def looped_iaff(block, x, y, gain, second_global):
    fused = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        first = looped_fuse(a, b, a + b, block.local_att, block.global_att, 1)
        fused.append(looped_fuse(a, b, first, block.local_att2, second_global, gain))
    return np.stack(fused)


@pytest.mark.parametrize("gain", [1, 2, 0.7])
@pytest.mark.parametrize(("channels", "reduction"), [(1, 4), (6, 2), (9, 4)])
def test_aff_equals_the_equations(channels, reduction, gain):
    block = randomise(AFF(channels, reduction=reduction, gain=gain))
    x, y = pair(2, channels, 3, 4)
    torch.testing.assert_close(block(x, y), torch.from_numpy(looped_aff(block, x, y, gain)), rtol=1e-12, atol=1e-12)
    assert block.local_att[0].out_channels == max(channels // reduction, 1)


@pytest.mark.parametrize("gain", [1, 2])
@pytest.mark.parametrize(("channels", "reduction"), [(1, 4), (6, 2)])
def test_iaff_equals_the_equations(channels, reduction, gain):
    block = randomise(IterativeAFF(channels, reduction=reduction, gain=gain))
    x, y = pair(2, channels, 3, 4)
    expected = looped_iaff(block, x, y, gain, block.global_att2)
    torch.testing.assert_close(block(x, y), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_legacy_iaff_is_the_authors_port():
    block = randomise(IterativeAFF(8, legacy=True))
    convolutions = [f"{branch}.{i}" for branch, first in BRANCHES.items() for i in (first, first + 3)]
    norms = [f"{branch}.{i}" for branch, first in BRANCHES.items() for i in (first + 1, first + 4)]
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    port_keys = {f"{key}.{part}" for key in convolutions for part in ("weight", "bias")}
    port_keys |= {f"{key}.{part}" for key in norms for part in statistics}
    assert set(block.state_dict()) == port_keys
    assert block.local_att[0].weight.shape == (2, 8, 1, 1)
    x, y = pair(2, 8, 3, 4)
    expected = looped_iaff(block, x, y, 1, block.global_att)
    torch.testing.assert_close(block(x, y), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert not np.allclose(expected, looped_iaff(block, x, y, 1, block.global_att2))
    block(x, y).sum().backward()
    without = {key.rsplit(".", 2)[0] for key, parameter in block.named_parameters() if parameter.grad is None}
    assert without == {"global_att2"}


BRANCHES = {"local_att": 0, "global_att": 1, "local_att2": 0, "global_att2": 1}


@attentional
@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_lies_between_its_inputs_at_gain_1(fusion, channels, height, width, batch, seed):
    block = randomise(fusion(channels), seed)
    x, y = pair(batch, channels, height, width, seed=seed)
    with torch.no_grad():
        z = block(x, y)
        assert z.shape == x.shape
        assert (torch.minimum(x, y) - 1e-12 <= z).all()
        assert (z <= torch.maximum(x, y) + 1e-12).all()
        torch.testing.assert_close(block(x, x), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block(x[-1:], y[-1:]), z[-1:], rtol=1e-6, atol=1e-6)
        fresh = fusion(channels).double().eval()
        fresh.load_state_dict(block.state_dict(), strict=True)
        assert torch.equal(fresh(x, y), z)


@attentional
@settings(max_examples=15, deadline=None)
@given(**SHAPES, magnitude=st.integers(-44, 30), training=st.booleans())
def test_zero_init_at_gain_2_is_addition_to_the_bit(fusion, channels, height, width, batch, seed, magnitude, training):
    # From subnormal to huge, short of overflowing sums; the statistics of such maps are no concern of an addition.
    x, y = (maps.float() * 10.0**magnitude / 8 for maps in pair(batch, channels, height, width, seed=seed))
    block = fusion(channels, gain=2, zero_init=True).train(training and abs(magnitude) < 15)
    assert torch.equal(block(x, y), x + y)


@attentional
def test_zero_init_at_gain_1_is_the_mean(fusion):
    block = fusion(8, zero_init=True).double()
    weights = []
    for gate in (module for module in block.modules() if isinstance(module, Gate)):
        gate.register_forward_hook(lambda _module, _inputs, output: weights.append(output))
    x, y = pair(2, 8, 4, 5)
    torch.testing.assert_close(block(x, y), (x + y) / 2, rtol=1e-15, atol=1e-15)
    assert all((weight == 0.5).all() for weight in weights)
    assert len(weights) == (1 if fusion is AFF else 2)


@attentional
def test_zero_init_opens_in_training(fusion):
    torch.manual_seed(0)
    block = fusion(16, gain=2, zero_init=True).double()
    x, y = pair(8, 16, 6, 6)
    start = {key: parameter.clone() for key, parameter in block.named_parameters()}
    optimiser = torch.optim.SGD(block.parameters(), lr=0.5)
    for _ in range(5):
        optimiser.zero_grad()
        (block(x, y) - x).square().mean().backward()
        optimiser.step()
    assert not [key for key, parameter in block.named_parameters() if torch.equal(parameter, start[key])]


@attentional
def test_every_parameter_gets_a_gradient(fusion):
    reached = set()
    for seed in range(5):
        block = randomise(fusion(16), seed).train()
        z = block(*pair(2, 16, 4, 5, seed=seed))
        (z * pair(2, 16, 4, 5, seed=seed + 100)[0]).sum().backward()
        reached |= {key for key, parameter in block.named_parameters() if parameter.grad.abs().max() > 0}
    assert reached == {key for key, _ in block.named_parameters()}


@attentional
@pytest.mark.parametrize("channels", [1, 2, 48])
def test_trains_at_batch_1_and_one_position(fusion, channels):
    block = fusion(channels).train()
    x, y = (maps.float().requires_grad_() for maps in pair(1, channels, 1, 1))
    block(x, y).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    assert block.global_att[2].num_batches_tracked == 0


@attentional
def test_gates_weigh_the_first_input(fusion):
    block = randomise(fusion(12))
    weights = {}
    for key, module in block.named_modules():
        if isinstance(module, Gate):
            assert module.kind == "fusion"
            module.register_forward_hook(lambda _module, _inputs, output, key=key: weights.update({key: output}))
    x, y = pair(2, 12, 5, 7)
    z = block(x, y)
    assert list(weights) == (["gate"] if fusion is AFF else ["gate", "gate2"])
    last = list(weights.values())[-1]
    assert last.shape == x.shape
    torch.testing.assert_close(last * x + (1 - last) * y, z, rtol=1e-12, atol=1e-12)


def test_add_and_concat():
    x, y = pair(2, 3, 4, 5)
    assert torch.equal(Add()(x, y), x + y)
    joined = Concat()(x, y[:, :2])
    assert torch.equal(joined[:, :3], x)
    assert torch.equal(joined[:, 3:], y[:, :2])


@pytest.mark.parametrize("name", list(FUSION))
def test_out_channels(name):
    fusion = build_fusion(name, 4)
    x, y = pair(1, 4, 3, 3)
    assert fusion.float().eval()(x.float(), y.float()).shape[1] == fusion.out_channels(4, 4)
    if name == "concat":
        assert fusion.out_channels(48, 256) == 304
    else:
        with pytest.raises(ValueError, match=r"equal channel counts, got x_channels=48 and y_channels=256; project"):
            fusion.out_channels(48, 256)


def test_build_fusion_options_win_over_defaults():
    aff = build_fusion({"name": "aff", "gain": 1.5}, 8, gain=2, zero_init=True, reduction=2)
    assert aff.gain == 1.5
    assert aff.local_att[0].out_channels == 4
    assert not aff.local_att[-1].weight.any()
    assert build_fusion("iaff", 8, gain=2).gain == 2
    assert build_fusion({"name": "iaff", "legacy": True}, 8).local_att[0].bias is not None
    assert isinstance(build_fusion("add", 8, gain=2, zero_init=True), Add)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("iafff", {}, r"unknown fusion 'iafff': did you mean 'iaff'\? Choices: add, concat, aff, iaff"),
        ({"name": "aff", "gian": 2}, {}, r"unknown option of fusion 'aff' 'gian': did you mean 'gain'\? Choices: redu"),
        ({"name": "add", "gain": 2}, {}, r"unknown option of fusion 'add' 'gain': it has none"),
        ("add", {"gian": 2}, r"unknown fusion option 'gian': did you mean 'gain'"),
        ({"gain": 2}, {}, r"fusion must be a name or \{'name': \.\.\., \*\*options\}, got \{'gain': 2\}"),
        ({"name": "aff", "gain": 0}, {}, r"gain must be a finite number above 0, got 0"),
        ({"name": "aff", "reduction": 0}, {}, r"reduction must be an integer of at least 1, got 0"),
    ],
)
def test_build_fusion_names_the_choices(spec, options, message):
    with pytest.raises(ValueError, match=message):
        build_fusion(spec, 8, **options)


@pytest.mark.parametrize("name", list(FUSION))
def test_bad_channels_are_named(name):
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        build_fusion(name, 0)


@pytest.mark.parametrize("name", ["aff", "iaff"])
def test_onnx_export_runs_at_other_sizes(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = randomise(build_fusion(name, 12, gain=2)).float()
    x, y = (maps.float() for maps in pair(2, 12, 8, 9))
    dynamic = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(block, (x, y), tmp_path / "fusion.onnx", dynamo=True, dynamic_shapes=(dynamic, dynamic))
    session = onnxruntime.InferenceSession(tmp_path / "fusion.onnx")
    for shape in ((1, 12, 5, 11), (3, 12, 17, 4)):
        x, y = (maps.float() for maps in pair(*shape))
        names = [node.name for node in session.get_inputs()]
        (z,) = session.run(None, dict(zip(names, (x.numpy(), y.numpy()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(z), block(x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [*FUSION, {"name": "iaff", "legacy": True}])
def test_torch_export_and_compile_at_other_sizes(spec):
    block = randomise(build_fusion(spec, 12, gain=2))
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(block, pair(2, 12, 8, 9), dynamic_shapes=(dynamic, dynamic)).module()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((1, 12, 5, 11), (3, 12, 17, 4)):
        x, y = pair(*shape)
        torch.testing.assert_close(exported(x, y), block(x, y), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled(x, y), block(x, y), rtol=1e-12, atol=1e-12)
