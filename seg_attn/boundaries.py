"""Boundary IoU (Cheng, Girshick, Dollár, Berg, Kirillov 2021, arXiv 2103.16562): IoU of the pixels near contours.

Of every class, only pixels count that lie within d of the contour of their own mask, d = 2 % of the image's diagonal;
equation 1 of the paper, its distance as in the authors' code: steps of a 3x3 erosion, the image's edge a contour too.
Differs from the paper in how it is summed: over all images and then per class, as Pascal VOC's IoU is. Pixels without a
label belong to no mask, neither in the target nor in the prediction, and count nowhere.
"""

import cv2
import numpy as np

from seg_attn.data.images import VOID, UInt8Array
from seg_attn.statistics import Int64Array

DIAGONAL_SHARE = 0.02


def boundary(labels: UInt8Array) -> UInt8Array:
    """Keep the labels near contours and make the rest 255.

    Args:
        labels: uint8 (H, W), class indices and 255.

    Returns:
        uint8 (H, W).
    """
    height, width = labels.shape
    reach = max(1, round(DIAGONAL_SHARE * float(np.hypot(height, width))))
    kept = labels.copy()
    if min(height, width) <= 2 * reach:
        return kept
    window = np.ones((2 * reach + 1, 2 * reach + 1), dtype=np.uint8)
    # A pixel survives `reach` erosions of its own mask where the whole window around it has one label.
    inside = (cv2.erode(labels, window) == cv2.dilate(labels, window))[reach:-reach, reach:-reach]
    kept[reach:-reach, reach:-reach][inside] = VOID
    return kept


def boundary_counts(target: UInt8Array, prediction: UInt8Array, num_classes: int) -> tuple[Int64Array, Int64Array]:
    """Count one image's boundary pixels.

    Args:
        target: uint8 (H, W), class indices and 255.
        prediction: uint8 (H, W), class indices.
        num_classes: C.

    Returns:
        Per class, int64 (C,): pixels near the contour in both, and pixels near the contour in either.
    """
    prediction = np.where(target == VOID, np.uint8(VOID), prediction)
    near_target, near_prediction = boundary(target), boundary(prediction)
    both = near_target[near_target == near_prediction]
    intersection, of_target, of_prediction = (
        np.bincount(labels.ravel(), minlength=256)[:num_classes].astype(np.int64)
        for labels in (both, near_target, near_prediction)
    )
    return intersection, of_target + of_prediction - intersection
