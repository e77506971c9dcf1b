"""Pascal VOC's mean intersection over union (Everingham 2010, section 4.1.2): one confusion matrix over a whole set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


def iou_from_confusion(confusion: Tensor) -> Tensor:
    """Intersection over union of every class, float64 (C,), from a confusion matrix, int64 (C, C) [target, prediction].

    A class that occurs neither in the target nor in the prediction is NaN.
    """
    confusion = confusion.to(torch.float64)
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / torch.where(union > 0, union, torch.nan)


class SegmentationMetrics(MulticlassConfusionMatrix):
    """Mean IoU, per-class IoU and pixel accuracy from one int64 confusion matrix over all that was seen.

    The mean runs over the classes that occur in target or prediction, as in
    `torchmetrics.classification.MulticlassJaccardIndex(average="macro")`; here in float64, with NaN for absent classes.

    Args:
        num_classes: C.
        ignore_index: Label of target pixels to leave out.

    Shape:
        - update: predictions int (N, H, W) and target int (N, H, W)
    """

    full_state_update = False

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__(num_classes=num_classes, ignore_index=ignore_index, normalize=None, validate_args=False)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return float64 `miou` and `pixel_accuracy` (scalars), `per_class` (C,), and int64 `confusion` (C, C)."""
        confusion = super().compute()
        per_class = iou_from_confusion(confusion)
        total = confusion.sum()
        correct = confusion.diagonal().sum()
        return {
            "miou": per_class.nanmean(),
            "pixel_accuracy": correct.to(torch.float64) / total,
            "per_class": per_class,
            "confusion": confusion,
        }


def as_report(results: dict[str, Tensor], class_names: Sequence[str]) -> dict[str, Any]:
    """Turn the results of `SegmentationMetrics` into plain values for JSON: fractions, None for an absent class."""
    per_class = {
        name: None if value != value else value
        for name, value in zip(class_names, results["per_class"].tolist(), strict=True)
    }
    return {
        "miou": results["miou"].item(),
        "pixel_accuracy": results["pixel_accuracy"].item(),
        "per_class": per_class,
        "confusion": results["confusion"].tolist(),
    }
