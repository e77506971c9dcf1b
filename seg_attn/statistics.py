"""Is a difference of mean IoU more than chance: the paired bootstrap over images, and its verdict in words.

Both rows have seen the same images, so images are drawn with replacement, the same ones for both, and the difference of
mean IoU is taken on every draw (Efron & Tibshirani 1993, chapter 13; percentile interval). A draw is a sum of per-image
counts, so that all of them are one matrix product. The interval answers one doubt: other images of the same kind. It
says nothing about another training run.

The classes are those of the full set. A class that a draw leaves without a pixel in one of the rows has no IoU there
and is left out of both rows' means in that draw, so that both are always means over the same classes. A class without a
target pixel that only one row predicts has an IoU of 0 in that row, on the full set and in every draw.

Of the intervals that were tried on simulated sets, the percentile interval keeps its 95 % best: a mean of ratios is
biased, basic and BCa intervals take that for skewness and fall to 91 or 92 % where classes are rare.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from seg_attn.report import percent, signed

Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float64]

REPLICATES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1_000


@dataclass(frozen=True)
class Counts:
    """What IoU is made of, per image and class.

    Attributes:
        intersection: Pixels where target and prediction are the class, int64 (N, C).
        union: Pixels where either is, int64 (N, C).
    """

    intersection: Int64Array
    union: Int64Array

    @classmethod
    def zeros(cls, images: int, classes: int) -> Self:
        """Start with nothing counted."""
        return cls(np.zeros((images, classes), dtype=np.int64), np.zeros((images, classes), dtype=np.int64))

    @classmethod
    def of(cls, confusion: NDArray[np.integer[Any]]) -> Self:
        """Take them from confusion matrices, integers (N, C, C) [image, target, prediction]."""
        confusion = confusion.astype(np.int64)
        intersection = np.diagonal(confusion, axis1=1, axis2=2)
        return cls(intersection.copy(), confusion.sum(1) + confusion.sum(2) - intersection)

    @property
    def iou(self) -> FloatArray:
        """IoU of every class over all images, float64 (C,); NaN where there is no pixel."""
        return _ratio(self.intersection.sum(0), self.union.sum(0))

    @property
    def miou(self) -> float:
        """Mean over the classes that occur; NaN where none does."""
        iou = self.iou
        return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


@dataclass(frozen=True)
class Difference:
    """A row's mean IoU minus the baseline's, and how far it could be off with other images.

    Attributes:
        value: Difference of mean IoU, a fraction.
        interval: Lower and upper end of its interval; NaN for one image, which has none.
        per_class: Differences of IoU, float64 (C,); NaN where a row has none.
        per_class_interval: Their intervals, float64 (C, 2).
        images: How many images.
    """

    value: float
    interval: tuple[float, float]
    per_class: FloatArray
    per_class_interval: FloatArray
    images: int

    @property
    def kind(self) -> Literal["better", "worse", "none"]:
        """What the interval shows; "none" where it does not leave zero out."""
        return "better" if self.interval[0] > 0 else "worse" if self.interval[1] < 0 else "none"


def resamples(images: int, replicates: int, seed: int) -> Iterator[Int64Array]:
    """How often each image is drawn, int64 (at most 1000, N) at a time, together `replicates` rows that sum to N each.

    The rows are those of one `numpy.random.default_rng(seed).multinomial(N, [1 / N] * N, size=replicates)`.
    """
    generator = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    for start in range(0, replicates, _CHUNK):
        yield generator.multinomial(images, share, size=min(_CHUNK, replicates - start))


def paired_difference(
    row: Counts,
    baseline: Counts,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Compare two rows that saw the same images in the same order.

    Args:
        row: The one in question.
        baseline: What it is compared to.
        replicates: Draws of N images.
        seed: Seed of the draws; equal seeds draw equal images.
        confidence: Share of the draws inside of the interval.

    Raises:
        ValueError: If the two differ in images or classes, or a number is out of its range.

    Examples:
        >>> better = Counts(np.array([[9], [9], [8]]), np.array([[10], [10], [10]]))
        >>> worse = Counts(np.array([[5], [4], [5]]), np.array([[10], [10], [10]]))
        >>> difference = paired_difference(better, worse)
        >>> round(difference.value, 4), difference.kind
        (0.4, 'better')
    """
    if row.union.shape != baseline.union.shape:
        raise ValueError(
            f"row and baseline must hold the same images and classes, got {row.union.shape} and {baseline.union.shape}"
        )
    if replicates < 1 or not 0 < confidence < 1 or seed < 0:
        raise ValueError(
            "replicates must be positive, confidence between 0 and 1 and seed not negative, "
            f"got {replicates}, {confidence} and {seed}"
        )
    images, classes = row.union.shape
    if images == 1:
        nothing = np.full((classes, 2), np.nan)
        return Difference(row.miou - baseline.miou, (np.nan, np.nan), row.iou - baseline.iou, nothing, images)
    occurs = np.stack([row.union.sum(0) > 0, baseline.union.sum(0) > 0])
    counts = np.concatenate([row.intersection, row.union, baseline.intersection, baseline.union], axis=1)
    # Counts and weights are integers: below 2 ** 53 their float64 products are exact, in any order.
    counts = counts.astype(np.float64)
    means, differences = [], []
    for weights in resamples(images, replicates, seed):
        drawn = (weights.astype(np.float64) @ counts).reshape(-1, 4, classes)
        iou = _ratio(drawn[:, 0::2], drawn[:, 1::2])
        differences.append(iou[:, 0] - iou[:, 1])
        means.append(_fixed_mean(iou, occurs))
    mean = np.concatenate(means)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered")  # a class that a row never has
        low, high = np.nanquantile(mean, tails)
        per_class_interval = np.nanquantile(np.concatenate(differences), tails, axis=0).T
    return Difference(
        value=row.miou - baseline.miou,
        interval=(float(low), float(high)),
        per_class=row.iou - baseline.iou,
        per_class_interval=per_class_interval,
        images=images,
    )


def verdict(difference: Difference, row: str, baseline: str, subject: str = "") -> str:
    """Say in words what a difference shows, in points of mean IoU (percent).

    An interval is written as ± where it lies evenly around the difference, to a tenth of its half, and by its ends
    where it does not.

    Args:
        difference: The row's difference from the baseline.
        row: The row's name.
        baseline: The baseline's name.
        subject: What both have in common, such as "this checkpoint"; may be empty.

    Examples:
        >>> nothing = np.zeros((0,))
        >>> verdict(Difference(0.0084, (0.0053, 0.0115), nothing, nothing, 60), "8", "16", "this checkpoint")
        'for this checkpoint, on these 60 images: 8 is better than 16 by 0.84 ± 0.31'
        >>> verdict(Difference(0.0467, (0.0324, 0.1288), nothing, nothing, 9), "8", "16")
        'on these 9 images: 8 is better than 16 by 4.67 (95 % interval +3.24 to +12.88)'
        >>> verdict(Difference(0.0004, (-0.003, 0.0037), nothing, nothing, 60), "8", "16")
        'on these 60 images: no difference shown between 8 and 16 (+0.04, 95 % interval −0.30 to +0.37)'
    """
    where = f"on {'this one image' if difference.images == 1 else f'these {difference.images:,} images'}"
    head = f"for {subject}, {where}" if subject else where
    if difference.images == 1:
        return f"{head}: {row} minus {baseline} is {signed(difference.value)}; one image has no interval"
    low, high = difference.interval
    if difference.value == 0 and low == high == 0:
        return f"{head}: {row} and {baseline} count the same"
    ends = f"95 % interval {signed(low)} to {signed(high)}"
    if difference.kind == "none":
        return f"{head}: no difference shown between {row} and {baseline} ({signed(difference.value)}, {ends})"
    middle, half = (low + high) / 2, (high - low) / 2
    extent = f"± {percent(half)}" if abs(difference.value - middle) <= half / 10 else f"({ends})"
    return f"{head}: {row} is {difference.kind} than {baseline} by {percent(abs(difference.value))} {extent}"


def _fixed_mean(iou: FloatArray, occurs: NDArray[np.bool_]) -> FloatArray:
    """Difference of two rows' mean IoU on every draw, (draws,): IoU is (draws, 2, C), who has a class at all (2, C)."""
    both = np.logical_and(occurs[0], occurs[1])
    only_one = np.logical_xor(occurs, both)  # without a target pixel, for the other row would have it too
    kept = np.asarray(~np.isnan(iou[:, :, both]).any(axis=1))  # (draws, classes of both)
    sums = np.where(kept[:, None], iou[:, :, both], 0.0).sum(axis=2)
    number = kept.sum(axis=1)[:, None] + only_one.sum(axis=1)
    means = _ratio(sums, number)
    difference: FloatArray = means[:, 0] - means[:, 1]
    return difference


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> FloatArray:
    """A division whose 0 / 0 is NaN without a word."""
    nothing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    ratio: FloatArray = np.divide(numerator, denominator, out=nothing, where=denominator > 0)
    return ratio
