"""What every block of `ATTENTION` keeps to, whichever it is; a new one is picked up from the dict."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seg_attn.attention import ATTENTION, Gate, build_attention
from seg_attn.attention.join import Blend

GATED = ("se", "eca", "cbam", "ms_cam")
CHANNELS, SIZES, BATCHES = st.integers(1, 257), st.integers(1, 33), st.integers(1, 3)
every_block = pytest.mark.parametrize("name", list(ATTENTION))


def close(actual, expected, relative=1e-12):
    return (actual - expected).abs().max() <= relative * expected.abs().max()


@every_block
@settings(max_examples=20, deadline=None)
@given(channels=CHANNELS, height=SIZES, width=SIZES, batch=BATCHES, seed=st.integers(0, 99))
def test_shape_batch_and_state_dict(name, channels, height, width, batch, seed, randomise, features):
    block = randomise(build_attention(name, channels), seed)
    x = features(batch, channels, height, width, seed=seed)
    with torch.no_grad():
        y = block(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert not torch.equal(y, x)
        # In eval an image's result does not depend on its neighbours in the batch.
        assert close(block(x[-1:]), y[-1:], 1e-6)
        fresh = build_attention(name, channels).double().eval()
        fresh.load_state_dict(block.state_dict(), strict=True)
        assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=10, deadline=None)
@given(channels=CHANNELS, height=SIZES, width=SIZES, batch=BATCHES, seed=st.integers(0, 99))
def test_gated_blocks_never_amplify(name, channels, height, width, batch, seed, randomise, features):
    x = features(batch, channels, height, width, seed=seed)
    with torch.no_grad():
        y = randomise(build_attention(name, channels), seed)(x)
    assert (y.abs() <= x.abs()).all()
    assert (y * x >= 0).all()


@pytest.mark.parametrize("name", ["se", "eca", "ms_cam", "self"])
@settings(max_examples=10, deadline=None)
@given(channels=CHANNELS, height=SIZES, width=SIZES, seed=st.integers(0, 99))
def test_blocks_without_neighbourhoods_commute_with_permuted_positions(
    name, channels, height, width, seed, randomise, features
):
    block = randomise(build_attention(name, channels), seed)
    x = features(1, channels, height, width, seed=seed)
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))

    def permute(maps):
        return maps.flatten(2)[..., order].view_as(maps)

    with torch.no_grad():
        assert close(block(permute(x)), permute(block(x)), 1e-10)


@every_block
@pytest.mark.parametrize("channels", [1, 2, 3, 48])
def test_trains_at_batch_1_and_one_position(name, channels):
    block = build_attention(name, channels).train()
    x = torch.randn(1, channels, 1, 1, requires_grad=True)
    before = copy.deepcopy(dict(block.named_buffers()))
    block(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    assert x.grad.isfinite().all()
    # Every normalisation met one value per channel here: none of the statistics may move.
    assert all(torch.equal(buffer, before[key]) for key, buffer in block.named_buffers())


@every_block
def test_every_parameter_gets_a_gradient(name, randomise, features):
    reached = set()
    for seed in range(5):
        block = randomise(build_attention(name, 64), seed).train()
        y = block(features(2, 64, 4, 5, seed=seed))
        (y * features(*y.shape, seed=seed + 100)).sum().backward()
        reached |= {key for key, parameter in block.named_parameters() if parameter.grad.abs().max() > 0}
    assert reached == {key for key, _ in block.named_parameters()}


@every_block
@settings(max_examples=10, deadline=None)
@given(channels=CHANNELS, height=SIZES, width=SIZES, batch=BATCHES, training=st.booleans())
def test_identity_init_is_the_identity_to_the_bit(name, channels, height, width, batch, training, features):
    block = build_attention(name, channels, identity_init=True).train(training)
    x = features(batch, channels, height, width).float()
    assert torch.equal(block(x), x)


@every_block
def test_identity_init_adds_one_key_and_learns(name, randomise, features):
    torch.manual_seed(0)
    block = build_attention(name, 32, identity_init=True)
    plain = build_attention(name, 32)
    assert set(block.state_dict()) == {*plain.state_dict(), "join.alpha"}
    x, target = features(2, 32, 6, 6).float(), features(2, 32, 6, 6, seed=1).float()
    optimiser = torch.optim.SGD(block.parameters(), lr=0.5)
    start = {key: parameter.clone() for key, parameter in block.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        (block(x) - target).square().mean().backward()
        optimiser.step()
    # α opens in the first step and lets the gradient through to everything else in the next ones.
    assert all(not torch.equal(parameter, start[key]) for key, parameter in block.named_parameters())
    assert not torch.equal(block(x), x)
    # At α = 1 it is the plain block.
    randomise(block, 3)
    block.join.alpha.data.fill_(1)
    plain.double().eval().load_state_dict({k: v for k, v in block.state_dict().items() if k != "join.alpha"})
    assert close(block(x.double()), plain(x.double()))


def test_blend_keeps_half_precision():
    join = Blend()
    x, attended = torch.ones(1, 2, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
    join.alpha.data.fill_(0.25)
    assert join(x, attended).dtype == torch.bfloat16
    assert (join(x, attended) == 0.75).all()


def recorded_gates(block, x):
    gates = {}
    handles = [
        module.register_forward_hook(lambda module, _, output, key=key: gates.update({key: (module.kind, output)}))
        for key, module in block.named_modules()
        if isinstance(module, Gate)
    ]
    y = block(x)
    for handle in handles:
        handle.remove()
    return gates, y


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("se", {"gate": ("channel", (2, 12, 1, 1))}),
        ("eca", {"gate": ("channel", (2, 12, 1, 1))}),
        ("cbam", {"channel.gate": ("channel", (2, 12, 1, 1)), "spatial.gate": ("spatial", (2, 1, 5, 7))}),
        ("ms_cam", {"gate": ("element", (2, 12, 5, 7))}),
    ],
)
def test_gates_are_what_multiplies_the_features(name, expected, randomise, features):
    x = features(2, 12, 5, 7)
    gates, y = recorded_gates(randomise(build_attention(name, 12), 0), x)
    assert {key: (kind, tuple(gate.shape)) for key, (kind, gate) in gates.items()} == expected
    for _, gate in gates.values():
        assert 0 <= gate.min() < gate.max() <= 1
        x = x * gate
    assert torch.equal(x, y)


@every_block
def test_torch_export_runs_at_other_sizes(name, randomise, features):
    block = randomise(build_attention(name, 12), 0)
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(block, (features(2, 12, 8, 9),), dynamic_shapes=(dynamic,)).module()
    for shape in ((1, 12, 5, 11), (3, 12, 17, 4)):
        x = features(*shape)
        assert close(exported(x), block(x))


@every_block
def test_compiles_in_one_graph_for_all_sizes(name, randomise, features):
    block = randomise(build_attention(name, 12, identity_init=True), 0)
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((2, 12, 8, 9), (3, 12, 17, 4)):
        x = features(*shape)
        assert close(compiled(x), block(x))


@every_block
def test_onnx_export_runs_at_other_sizes(name, randomise, features, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = randomise(build_attention(name, 12), 0).float()
    dynamic = ({0: "n", 2: "h", 3: "w"},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            block, (features(2, 12, 8, 9).float(),), tmp_path / "block.onnx", dynamo=True, dynamic_shapes=dynamic
        )
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx")
    for shape in ((1, 12, 5, 11), (3, 12, 17, 4)):
        x = features(*shape).float()
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert close(torch.from_numpy(y), block(x), 1e-5)


def test_build_attention_forms():
    torch.manual_seed(0)
    block = build_attention({"name": "se", "reduction": 2}, 8, reduction=4, bias=True)
    assert block.fc1.out_channels == 4
    assert block.fc1.bias is not None
    chain = build_attention(["eca", {"name": "sk", "branches": 3}], 8, identity_init=True)
    assert isinstance(chain, nn.Sequential)
    assert [type(part) for part in chain] == [ATTENTION["eca"], ATTENTION["sk"]]
    assert len(chain[1].branches) == 3
    assert all(isinstance(part.join, Blend) for part in chain)
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(chain(x), x)
    assert torch.equal(build_attention([], 8)(x), x)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("cban", {}, r"unknown attention block 'cban': did you mean 'cbam'\? Choices: se, eca, cbam, sk, ms_cam, self"),
        ("gather-excite", {}, r"unknown attention block 'gather-excite': Choices: se, eca"),
        (["eca", "es"], {}, r"unknown attention block 'es'"),
        ("se", {"reductoin": 4}, r"unknown option of attention block 'se' 'reductoin': did you mean 'reduction'\? "),
        (
            {"name": "eca", "k": 3},
            {},
            r"unknown option of attention block 'eca' 'k': .*kernel_size, gamma, b, identity",
        ),
        ({"reduction": 3}, {}, r"must be a name or \{'name': \.\.\., \*\*options\}, got \{'reduction': 3\}"),
        (None, {}, r"must be a name or .* got None"),
    ],
)
def test_build_attention_names_the_choices(spec, options, message):
    with pytest.raises(ValueError, match=message):
        build_attention(spec, 8, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se", {"reduction": 0}, "reduction must be an integer of at least 1, got 0"),
        ("se", {"reduction": 2.5}, "reduction must be an integer of at least 1, got 2.5"),
        ("se", {"gate": "sigmoi"}, "unknown gate 'sigmoi': did you mean 'sigmoid'"),
        ("eca", {"kernel_size": 4}, "kernel_size must be odd to keep the size, got 4; use 3 or 5"),
        ("eca", {"gamma": 0}, "gamma must be a finite number above 0, got 0"),
        ("cbam", {"spatial_kernel": 6}, "spatial_kernel must be odd to keep the size, got 6; use 5 or 7"),
        ("cbam", {"reduction": True}, "reduction must be an integer of at least 1, got True"),
        ("sk", {"branches": 0}, "branches must be an integer of at least 1, got 0"),
        ("sk", {"min_width": 0}, "min_width must be an integer of at least 1, got 0"),
        ("sk", {"groups": 5}, "groups must divide channels=12, got 5; use 4"),
        ("ms_cam", {"reduction": -1}, "reduction must be an integer of at least 1, got -1"),
        ("self", {"heads": 5}, "heads must divide channels=12, got 5; use 4"),
        ("self", {"scale": "root"}, "scale must be 'sqrt' or a number above 0, got 'root'"),
        ("self", {"scale": -1}, "scale must be a finite number above 0, got -1"),
        ("self", {"reduction": 0.5, "heads": 2}, "reduction must be an integer of at least 1, got 0.5"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_attention(name, 12, **options)


@every_block
def test_bad_channels_are_named(name):
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        build_attention(name, 0)
