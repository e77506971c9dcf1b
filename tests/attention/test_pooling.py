"""Attention pooling against loops, PyTorch's own attention, and average pooling."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seg_attn.attention import Gate
from seg_attn.attention.pooling import AttentionPool2d, NadarayaWatson, attention_pool, attention_weights


def looped(queries, keys, values, width=1.0):
    """Nadaraya-Watson regression for one set of queries, keys and values, as a ratio of kernel sums."""
    output = np.zeros((len(queries), values.shape[1]))
    for row, query in enumerate(queries):
        kernels = [math.exp(-sum((width * (a - b)) ** 2 for a, b in zip(query, key, strict=True)) / 2) for key in keys]
        for column in range(values.shape[1]):
            output[row, column] = sum(kernel * value for kernel, value in zip(kernels, values[:, column], strict=True))
            output[row, column] /= sum(kernels)
    return torch.from_numpy(output)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_gaussian_equals_the_loops(dimensions, features):
    queries, keys, values = features(4, dimensions), features(6, dimensions, seed=1), features(6, 2, seed=2)
    expected = looped(queries.numpy(), keys.numpy(), values.numpy())
    torch.testing.assert_close(attention_pool(queries, keys, values), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(NadarayaWatson()(queries, keys, values), expected, rtol=1e-12, atol=1e-12)


def test_gaussian_is_exact_far_from_the_origin(features):
    queries, keys, values = features(4, 1), features(6, 1, seed=1), features(6, 2, seed=2)
    far = attention_pool(queries + 2**20, keys + 2**20, values)
    torch.testing.assert_close(far, attention_pool(queries, keys, values), rtol=1e-8, atol=1e-8)


def test_learned_width_equals_the_loops(features):
    queries, keys, values = features(4, 3), features(6, 3, seed=1), features(6, 2, seed=2)
    regression = NadarayaWatson(learn_width=True).double()
    torch.testing.assert_close(
        regression(queries, keys, values), NadarayaWatson()(queries, keys, values), rtol=0, atol=0
    )
    regression.width.data.fill_(2.5)
    expected = looped(queries.numpy(), keys.numpy(), values.numpy(), width=2.5)
    torch.testing.assert_close(regression(queries, keys, values), expected, rtol=1e-12, atol=1e-12)


def test_learning_the_width_fits_better():
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(50, 1, generator=generator).sort(0).values * 5
    values = 2 * torch.sin(keys) + keys**0.8 + torch.randn(50, 1, generator=generator) * 0.2
    queries = torch.arange(0, 5, 0.1)[:, None]
    truth = 2 * torch.sin(queries) + queries**0.8
    regression = NadarayaWatson(learn_width=True)
    optimiser = torch.optim.SGD(regression.parameters(), lr=0.5)
    others = ~torch.eye(50, dtype=torch.bool)
    left_out_keys = keys.T.expand(50, 50)[others].view(50, 49, 1)  # each point is predicted from the other 49
    left_out_values = values.T.expand(50, 50)[others].view(50, 49, 1)
    for _ in range(60):
        optimiser.zero_grad()
        prediction = regression(keys[:, None], left_out_keys, left_out_values)
        F.mse_loss(prediction, values[:, None]).backward()
        optimiser.step()
    error = F.mse_loss(regression(queries, keys, values), truth)
    assert regression.width > 2
    assert error < F.mse_loss(NadarayaWatson()(queries, keys, values), truth) / 3
    assert list(regression.state_dict()) == ["width"]
    assert not list(NadarayaWatson().parameters())


def test_dot_equals_scaled_dot_product_attention(features):
    queries, keys, values = features(2, 3, 4, 8), features(2, 3, 6, 8, seed=1), features(2, 3, 6, 5, seed=2)
    expected = F.scaled_dot_product_attention(queries, keys, values)
    torch.testing.assert_close(attention_pool(queries, keys, values, "dot"), expected, rtol=1e-12, atol=1e-12)


def test_uniform_is_the_average(features):
    queries, keys, values = features(2, 1, 4, 8), features(3, 6, 8, seed=1), features(2, 3, 6, 5, seed=2)
    pooled = attention_pool(queries, keys, values, scoring="uniform")
    assert pooled.shape == (2, 3, 4, 5)
    torch.testing.assert_close(pooled, values.mean(-2, keepdim=True).expand(2, 3, 4, 5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scoring", ["gaussian", "dot", "uniform"])
@settings(max_examples=20, deadline=None)
@given(queries=st.integers(1, 9), keys=st.integers(1, 9), dimensions=st.integers(1, 9), batch=st.integers(1, 3))
def test_weights_are_convex_and_leading_dimensions_broadcast(scoring, queries, keys, dimensions, batch, features):
    q, k = features(batch, queries, dimensions), features(keys, dimensions, seed=1)
    v = features(2, 1, keys, 3, seed=2)
    weights = attention_weights(q, k, scoring)
    assert weights.shape == (batch, queries, keys)
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, queries, dtype=torch.float64))
    pooled = attention_pool(q, k, v, scoring)
    assert pooled.shape == (2, batch, queries, 3)
    assert (v.amin(-2, keepdim=True) - 1e-12 <= pooled).all()
    assert (pooled <= v.amax(-2, keepdim=True) + 1e-12).all()
    alone = torch.stack([attention_pool(q[b], k, v[a, 0], scoring) for a in range(2) for b in range(batch)])
    torch.testing.assert_close(pooled.flatten(0, 1), alone, rtol=1e-12, atol=1e-12)


def test_unknown_scoring():
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"unknown scoring 'gauss': did you mean 'gaussian'\? Choices: gaussian, dot"):
        attention_pool(x, x, x, scoring="gauss")


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 257), height=st.integers(1, 33), width=st.integers(1, 33), batch=st.integers(1, 3))
def test_pool2d_starts_as_average_pooling(channels, height, width, batch, features):
    x = features(batch, channels, height, width)
    pool = AttentionPool2d(channels).double()
    torch.testing.assert_close(pool(x), F.adaptive_avg_pool2d(x, 1), rtol=1e-12, atol=1e-12)
    exact = AttentionPool2d(channels, identity_init=True).double()
    assert torch.equal(exact(x), F.adaptive_avg_pool2d(x, 1))
    # With a query it is attention_pool over the positions, and lies between the least and the greatest value.
    pool.query.data.copy_(features(1, channels, 1, 1, seed=1) * 3)
    positions = x.flatten(2).mT
    expected = attention_pool(pool.query.flatten()[None], positions, positions, "dot")
    torch.testing.assert_close(pool(x), expected.mT.unsqueeze(-1), rtol=1e-12, atol=1e-12)
    assert (x.amin((2, 3), keepdim=True) - 1e-12 <= pool(x)).all()
    assert (pool(x) <= x.amax((2, 3), keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("identity_init", [False, True])
def test_pool2d_learns_where_to_look(identity_init):
    torch.manual_seed(0)
    # Channel 0 marks one position in each image; channel 1 holds the answer there and noise elsewhere.
    x = torch.randn(64, 2, 4, 4)
    marked = torch.randint(16, (64,))
    x[:, 0] = F.one_hot(marked, 16).view(64, 4, 4) * 4.0
    answer = x[:, 1].flatten(1)[torch.arange(64), marked]
    pool = AttentionPool2d(2, identity_init=identity_init)
    optimiser = torch.optim.Adam(pool.parameters(), lr=0.2)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = F.mse_loss(pool(x)[:, 1, 0, 0], answer)
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < losses[0] / 20
    assert all(parameter.grad is not None for parameter in pool.parameters())


def test_pool2d_gate_is_its_map(features):
    pool = AttentionPool2d(6).double()
    pool.query.data.copy_(features(1, 6, 1, 1, seed=1))
    maps = []
    gates = [module for module in pool.modules() if isinstance(module, Gate)]
    gates[0].register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    x = features(2, 6, 4, 5)
    y = pool(x)
    assert [gate.kind for gate in gates] == ["spatial"]
    assert maps[0].shape == (2, 1, 4, 5)
    torch.testing.assert_close(maps[0].sum((2, 3)), torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close((maps[0] * x).sum((2, 3), keepdim=True), y)


def test_pool2d_refuses_no_channels():
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        AttentionPool2d(0)


class Regression(nn.Module):
    """Nadaraya-Watson over a map's positions: something to export."""

    def __init__(self):
        super().__init__()
        self.regression = NadarayaWatson(learn_width=True)

    def forward(self, x):
        positions = x.flatten(2).mT
        return self.regression(positions, positions, positions)


@pytest.mark.parametrize("build", [lambda: AttentionPool2d(6, identity_init=True), Regression])
def test_torch_export_and_compile_at_other_sizes(build, randomise, features):
    module = randomise(build())
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(module, (features(2, 6, 8, 9),), dynamic_shapes=(dynamic,)).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((1, 6, 5, 11), (3, 6, 17, 4)):
        x = features(*shape)
        torch.testing.assert_close(exported(x), module(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [lambda: AttentionPool2d(6, identity_init=True), Regression])
def test_onnx_export_runs_at_other_sizes(build, randomise, features, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = randomise(build()).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            module,
            (features(2, 6, 8, 9).float(),),
            tmp_path / "pool.onnx",
            dynamo=True,
            dynamic_shapes=({0: "n", 2: "h", 3: "w"},),
        )
    session = onnxruntime.InferenceSession(tmp_path / "pool.onnx")
    for shape in ((1, 6, 5, 11), (3, 6, 17, 4)):
        x = features(*shape).float()
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-5, atol=1e-5)
