"""Mean IoU against a brute-force count, torchmetrics, and the definitions it must differ from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from seg_attn.metrics import SegmentationMetrics, as_report, iou_from_confusion


def brute_force(predictions, targets, num_classes):
    """Per-class IoU by sets of pixels, one class at a time; NaN where a class occurs nowhere."""
    prediction = np.concatenate([np.ravel(p) for p in predictions])
    target = np.concatenate([np.ravel(t) for t in targets])
    prediction, target = prediction[target != 255], target[target != 255]
    ious = []
    for index in range(num_classes):
        union = ((prediction == index) | (target == index)).sum()
        both = ((prediction == index) & (target == index)).sum()
        ious.append(both / union if union else math.nan)
    return np.array(ious)


def _batches(seed, num_classes, count=3, share=1.0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(1, 12, 2)
        target = rng.integers(0, max(1, int(num_classes * share)), (1, height, width))
        prediction = np.where(rng.random(target.shape) < 0.6, target, rng.integers(0, num_classes, target.shape))
        target[rng.random(target.shape) < 0.2] = 255
        yield torch.from_numpy(prediction), torch.from_numpy(target)


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 30), share=st.sampled_from([0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_equals_brute_force_and_torchmetrics(seed, num_classes, share):
    metric = SegmentationMetrics(num_classes)
    oracle = MulticlassJaccardIndex(num_classes, ignore_index=255, average="macro")
    batches = list(_batches(seed, num_classes, share=share))
    for prediction, target in batches:
        metric.update(prediction, target)
        oracle.update(prediction, target)
    results = metric.compute()
    expected = brute_force([p.numpy() for p, _ in batches], [t.numpy() for _, t in batches], num_classes)
    np.testing.assert_array_equal(results["per_class"].numpy(), expected)
    if not np.isnan(expected).all():
        assert results["miou"].item() == pytest.approx(np.nanmean(expected), abs=1e-15)
        assert results["miou"].item() == pytest.approx(oracle.compute().item(), abs=1e-6)
    assert results["per_class"].dtype == torch.float64
    assert results["confusion"].dtype == torch.int64


def test_order_and_batching_change_nothing():
    batches = list(_batches(3, 7, count=6))
    forward, backward = SegmentationMetrics(7), SegmentationMetrics(7)
    for prediction, target in batches:
        forward.update(prediction, target)
    for prediction, target in reversed(batches):
        backward.update(prediction.flatten()[None], target.flatten()[None])
    assert torch.equal(forward.compute()["confusion"], backward.compute()["confusion"])


def test_differs_from_what_it_must_not_be():
    batches = list(_batches(1, 6, count=5))
    metric = SegmentationMetrics(6)
    per_batch, per_image = [], MeanIoU(num_classes=6, input_format="index", include_background=True)
    micro = MulticlassJaccardIndex(6, ignore_index=255, average="micro")
    for prediction, target in batches:
        metric.update(prediction, target)
        single = SegmentationMetrics(6)
        single.update(prediction, target)
        per_batch.append(single.compute()["miou"].item())
        micro.update(prediction, target)
        per_image.update(prediction, torch.where(target == 255, 0, target))
    miou = metric.compute()["miou"].item()
    for other in (np.mean(per_batch), per_image.compute().item(), micro.compute().item()):
        assert abs(miou - other) > 1e-3


def test_absent_class_is_left_out_of_the_mean_and_shown_as_none():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    iou = iou_from_confusion(confusion)
    assert iou[0].item() == 0.75
    assert iou[1].item() == 0.8
    assert math.isnan(iou[2].item())
    metric = SegmentationMetrics(3)
    metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    report = as_report(metric.compute(), ["a", "b", "c"])
    assert report["per_class"] == {"a": 1.0, "b": 1.0, "c": None}
    assert report["miou"] == 1.0


def test_counts_stay_exact_beyond_float32():
    metric = SegmentationMetrics(2)
    metric.confmat += torch.tensor([[2**30 + 1, 1], [0, 1]])
    metric._update_count = 1
    assert metric.compute()["per_class"][0].item() == (2**30 + 1) / (2**30 + 2)
