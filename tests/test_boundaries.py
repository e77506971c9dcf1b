"""Boundary IoU against erosions of each class's own mask, as the paper's authors take them."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from seg_attn.boundaries import boundary, boundary_counts


def near_contour(mask):
    """The authors' `mask_to_boundary`: what d erosions by 3x3 take away, the image's edge a contour."""
    steps = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    return mask & ~binary_erosion(np.pad(mask, 1), np.ones((3, 3)), steps)[1:-1, 1:-1]


def blobs(generator, shape, classes, void=0.0):
    """Labels in patches of many sizes."""
    labels = np.zeros(shape, dtype=np.uint8)
    for _ in range(12):
        top, left = (int(generator.integers(0, side)) for side in shape)
        height, width = (int(generator.integers(1, side)) for side in shape)
        labels[top : top + height, left : left + width] = generator.integers(0, classes)
    labels[generator.random(shape) < void] = 255
    return labels


@pytest.mark.parametrize("shape", [(3, 5), (40, 60), (120, 90), (200, 301)])
@pytest.mark.parametrize("void", [0.0, 0.01])
def test_counts_equal_erosions_class_by_class(shape, void):
    generator = np.random.default_rng(sum(shape))
    for _ in range(3):
        target, prediction = blobs(generator, shape, 4, void), blobs(generator, shape, 4)
        intersection, union = boundary_counts(target, prediction, 5)
        for index in range(5):
            left = near_contour(target == index)
            right = near_contour((prediction == index) & (target != 255))
            assert intersection[index] == (left & right).sum()
            assert union[index] == (left | right).sum()
    assert intersection.dtype == union.dtype == np.int64


def test_a_shift_costs_more_at_the_contour_than_inside():
    target = np.zeros((200, 200), dtype=np.uint8)
    target[50:150, 50:150] = 1
    shifted = np.roll(target, 3, axis=1)
    intersection, union = boundary_counts(target, shifted, 2)
    whole = ((target == 1) & (shifted == 1)).sum() / ((target == 1) | (shifted == 1)).sum()
    assert intersection[1] / union[1] < 0.75 < 0.9 < whole


def test_perfect_is_one_and_the_input_stays():
    target = blobs(np.random.default_rng(0), (80, 80), 4, void=0.02)
    before = target.copy()
    prediction = np.where(target == 255, 2, target).astype(np.uint8)
    intersection, union = boundary_counts(target, prediction, 4)
    assert np.array_equal(intersection, union)
    assert union.sum() == (boundary(target) != 255).sum() > 0
    assert np.array_equal(target, before)
