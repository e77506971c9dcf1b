"""The training loss. Pixels labelled `ignore_index` take no part in it, and a crop of nothing else costs 0, not NaN."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(nn.Module):
    """Pixel-wise cross-entropy, averaged over the labelled pixels of the batch.

    With class weights it is the weighted mean, Σ w_t · ce / Σ w_t, as `torch.nn.CrossEntropyLoss` computes it.

    Args:
        ignore_index: Label of pixels to leave out.
        class_weights: One weight per class, or None.
        label_smoothing: Share of the target spread over all classes (Szegedy 2016, arXiv 1512.00567).

    Shape:
        - logits: float (N, C, H, W); target: int64 (N, H, W)
        - output: float32 scalar
    """

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over the labelled pixels; 0 where there are none."""
        total = F.cross_entropy(
            logits.float(),
            target,
            weight=self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        labelled = target != self.ignore_index
        weights = labelled if self.class_weights is None else self.class_weights[target * labelled] * labelled
        count = weights.sum().to(total.dtype)
        return total / torch.where(count > 0, count, 1)  # no `if`: reading the count would wait for the device


LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": CrossEntropy}


def build_loss(spec: str | Mapping[str, Any], ignore_index: int, class_weights: Sequence[float] | None) -> nn.Module:
    """Build a loss from its name or {"name": ..., **options}.

    Raises:
        ValueError: For an unknown name; the message lists the choices and the closest match.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in LOSSES:
        close = difflib.get_close_matches(str(name), LOSSES, n=1, cutoff=0.0)
        raise ValueError(f"unknown loss {name!r}. Did you mean {close[0]!r}? Known: {', '.join(LOSSES)}")
    return LOSSES[name](ignore_index=ignore_index, class_weights=class_weights, **options)
