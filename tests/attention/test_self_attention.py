"""Self-attention against the explicit softmax(Q Kᵀ · scale) V, its identity start, and its memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seg_attn.attention import SelfAttention


def explicit_weights(block, x, heads, scale):
    """All (N, heads, HW, HW) weights, head by head."""
    weights = []
    for q, k in zip(block.query(x).chunk(heads, 1), block.key(x).chunk(heads, 1), strict=True):
        scores = torch.einsum("ncp,ncq->npq", q.flatten(2), k.flatten(2)) * scale
        weights.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
    return torch.stack(weights, 1)


@pytest.mark.parametrize(
    ("channels", "options", "scale"),
    [
        (1, {}, 1.0),
        (16, {}, 1 / math.sqrt(2)),
        (16, {"scale": 1.0}, 1.0),
        (16, {"scale": 2}, 2.0),
        (24, {"heads": 3, "reduction": 2}, 1 / math.sqrt(4)),
        (24, {"heads": 4}, 1.0),
        (10, {"reduction": 1}, 1 / math.sqrt(10)),
        (257, {}, 1 / math.sqrt(32)),
    ],
)
def test_equals_the_explicit_formula(channels, options, scale, randomise, features):
    block = randomise(SelfAttention(channels, **options))
    heads = options.get("heads", 1)
    x = features(2, channels, 5, 4)
    weights = explicit_weights(block, x, heads, scale)
    values = torch.stack(block.value(x).flatten(2).chunk(heads, 1), 1)  # (N, heads, C/heads, HW)
    attended = torch.einsum("nhpq,nhcq->nhcp", weights, values).reshape(x.shape)
    torch.testing.assert_close(block(x), x + block.gamma * attended, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    channels=st.integers(1, 257),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    batch=st.integers(1, 3),
    training=st.booleans(),
)
def test_is_the_identity_at_gamma_zero(channels, height, width, batch, training, features):
    block = SelfAttention(channels).train(training)
    x = features(batch, channels, height, width).float()
    assert torch.equal(block(x), x)
    block.gamma.data.fill_(1)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_row_is_the_softmaxs_row(heads, randomise, features):
    block = randomise(SelfAttention(16, heads=heads))
    x = features(2, 16, 5, 4)
    weights = explicit_weights(block, x, heads, block.scale)
    for row, column in ((0, 0), (3, 1), (4, 3)):
        expected = weights[:, :, row * 4 + column].reshape(2, heads, 5, 4)
        torch.testing.assert_close(block.attention_row(x, row, column), expected, rtol=1e-12, atol=1e-12)
    assert expected.std() > 0


@pytest.mark.parametrize(("row", "column"), [(5, 0), (0, 4), (-1, 0)])
def test_attention_row_outside_the_map(row, column, features):
    with pytest.raises(ValueError, match=rf"position must lie on the 5x4 map, got row={row}, column={column}"):
        SelfAttention(16).double().attention_row(features(1, 16, 5, 4), row, column)


def test_key_channels():
    assert SelfAttention(64).key.out_channels == 8
    assert SelfAttention(64, heads=4, reduction=2).query.out_channels == 32
    assert SelfAttention(12, heads=6).query.out_channels == 6
    assert SelfAttention(64, reduction=1).padding == 0
    assert SelfAttention(64).scale == 1 / math.sqrt(8)


MEASURE = """
import torch
from seg_attn.attention import SelfAttention

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

torch.set_num_threads(1)
block = SelfAttention(16)
block(torch.ones(1, 16, 8, 8)).sum().backward()
start = status("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
block(torch.ones(1, 16, 96, 96)).sum().backward()
print(status("VmHWM") - start)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_is_linear_in_positions():
    # (96 * 96)² float32 weights are 324 MiB, and the kernels that hold them keep two copies.
    peak = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
    assert int(peak) < 64 * 1024  # KiB
