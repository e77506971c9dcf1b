"""Batch normalisation that trains at one value per channel, and is PyTorch's everywhere else."""

import copy

import pytest
import torch
from torch import nn

from seg_attn.norm import BatchNorm2d, use_single_value_batch_norm


def pair():
    """Ours and PyTorch's with the same drawn state."""
    generator = torch.Generator().manual_seed(0)
    theirs = nn.BatchNorm2d(3).double()
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(3, generator=generator, dtype=torch.float64) + (0.5 if "var" in name else 0))
    ours = BatchNorm2d(3).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (1, 3, 2, 1), (2, 3, 4, 5)])
def test_is_pytorchs_with_more_than_one_value(shape):
    ours, theirs = pair()
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert ours.num_batches_tracked == 2


def test_one_value_is_normalised_with_running_statistics_that_stay():
    ours, theirs = pair()
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(x)
    y = ours(x)
    assert torch.equal(y, theirs.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    y.sum().backward()
    scale = ours.weight / (ours.running_var + ours.eps).sqrt()
    torch.testing.assert_close(x.grad.flatten(), scale.detach())
    assert ours.weight.grad is not None
    assert torch.equal(ours.bias.grad, torch.ones(3, dtype=torch.float64))


def test_eval_is_pytorchs():
    ours, theirs = pair()
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_conversion_keeps_state_and_hooks_and_touches_plain_ones_only():
    class Other(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(Other(3), nn.BatchNorm1d(3)))
    norm = network[1]
    before = copy.deepcopy(network.state_dict())
    assert use_single_value_batch_norm(network) is network
    assert network[1] is norm
    assert [type(module) for module in network.modules() if hasattr(module, "running_mean")] == [
        BatchNorm2d,
        Other,
        nn.BatchNorm1d,
    ]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network[:2].train()(torch.ones(1, 3, 1, 1)).shape == (1, 3, 1, 1)
