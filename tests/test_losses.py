"""The loss against PyTorch's own, and where PyTorch's is not defined."""

import pytest
import torch
from torch import nn

from seg_attn.losses import CrossEntropy, build_loss


def _case(seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 7, 9, generator=generator, requires_grad=True)
    target = torch.randint(0, classes, (2, 7, 9), generator=generator)
    target[0, :3] = 255
    return logits, target


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 0.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_pytorch(weights, smoothing):
    logits, target = _case()
    tensor = None if weights is None else torch.tensor(weights)
    oracle = nn.CrossEntropyLoss(weight=tensor, ignore_index=255, label_smoothing=smoothing)
    ours = CrossEntropy(255, weights, smoothing)
    torch.testing.assert_close(ours(logits, target), oracle(logits, target), rtol=1e-6, atol=1e-7)


def test_nothing_labelled_costs_nothing():
    logits, target = _case()
    loss = CrossEntropy()(logits, torch.full_like(target, 255))
    loss.backward()
    assert loss.item() == 0.0
    assert not torch.isnan(logits.grad).any()
    assert logits.grad.abs().sum() == 0


def test_ignored_pixels_have_no_gradient():
    logits, target = _case()
    CrossEntropy()(logits, target).backward()
    per_pixel = logits.grad.abs().sum(1)
    assert (per_pixel[target == 255] == 0).all()
    assert (per_pixel[target != 255] > 0).all()


def test_half_precision_logits_are_summed_in_float32():
    logits, target = _case()
    loss = CrossEntropy()(logits.bfloat16(), target)
    assert loss.dtype == torch.float32


def test_unknown_loss_names_the_closest():
    with pytest.raises(ValueError, match=r"unknown loss 'crossentropy'. Did you mean 'cross_entropy'\?"):
        build_loss("crossentropy", 255, None)


def test_options_reach_the_loss():
    assert build_loss({"name": "cross_entropy", "label_smoothing": 0.2}, 255, None).label_smoothing == 0.2
