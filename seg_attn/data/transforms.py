"""Training augmentation as an albumentations pipeline: random scale and crop, flip, colour jitter.

Scaling, padding and cropping are one resampling step: the window of the source image that the crop will show is cut out
first and resized straight to its place in the crop, so no pixel is computed that the crop throws away. Image and label
use the same window and the same half-pixel convention, so they stay aligned to a fraction of a pixel; what lies outside
of the image is the fill colour in the image and 255 in the label.
"""

import math
import os
import random
from collections.abc import Sequence
from typing import Any

# albumentations asks the network for its newest version when it is imported, unless told not to before.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from albumentations.core.type_definitions import Targets
from numpy.typing import NDArray

from seg_attn.data.images import VOID, UInt8Array

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luma (ITU-R BT.601)."""

# Rows: the two chroma axes of YIQ; together with LUMA an invertible change of basis.
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])

_MAX_CROP_ATTEMPTS = 10  # as mmsegmentation's RandomCrop(cat_max_ratio=...)


class RandomScaleCrop(A.DualTransform):  # type: ignore[misc]  # albumentations ships no types
    """Scale by a random factor, pad where the image is too small, and take a random crop, in one resampling step.

    The factor is uniform in `scale`, as in the DeepLab papers' recipe (arXiv 1706.05587, section 4.1) and its
    reproductions. A crop position is uniform among those inside the image; along an axis where the scaled image is
    smaller than the crop, the image's place inside the crop is uniform too. Bilinear, antialiased when shrinking;
    labels by exact nearest neighbour, never blended.

    Windows have whole source pixels, so the true factor differs from the drawn one by half a source pixel per window
    (0.1 % for a crop of 513).

    Args:
        size: (height, width) of the crop.
        scale: (smallest, largest) factor, uniform between them.
        fill: RGB of the padding, three integers in [0, 255].
        fill_mask: Label of the padding.
        class_max: Draw the crop again, up to ten times, while one class covers more than this share of its labelled
            pixels; 1 takes the first crop.
        p: Must stay 1 for a fixed output size.

    Targets:
        image: uint8 (H, W, 3) to (height, width, 3); mask: uint8 (H, W) to (height, width).
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        fill: tuple[int, ...] = (124, 116, 104),
        fill_mask: int = VOID,
        class_max: float = 1.0,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive (height, width), got {size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (smallest, largest) with 0 < smallest <= largest, got {scale}")
        if not 0 < class_max <= 1:
            raise ValueError(f"class_max must lie in (0, 1], got {class_max}")
        self.size = size
        self.scale = scale
        self.fill = fill
        self.fill_mask = fill_mask
        self.class_max = class_max

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw one window per axis, again while one class fills it."""
        factor = self.py_random.uniform(*self.scale)
        height, width = params["shape"][:2]
        mask = data.get("mask")
        for _ in range(_MAX_CROP_ATTEMPTS if self.class_max < 1 and mask is not None else 1):
            rows = axis_window(height, self.size[0], factor, self.py_random)
            columns = axis_window(width, self.size[1], factor, self.py_random)
            if self.class_max == 1 or mask is None:
                break
            labels = mask[rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]]
            # Every second pixel per axis decides as well as all of them.
            counts = np.bincount(labels[::2, ::2].ravel(), minlength=256)
            counts[self.fill_mask] = 0
            if np.count_nonzero(counts) > 1 and counts.max() < self.class_max * counts.sum():
                break
        return {"rows": rows, "columns": columns}

    def apply(
        self, img: UInt8Array, rows: tuple[int, ...] = (), columns: tuple[int, ...] = (), **params: Any
    ) -> UInt8Array:
        """Resample the image's window into the crop."""
        shrinking = min(rows[1] / rows[3], columns[1] / columns[3])  # source pixels per crop pixel
        if shrinking <= 1:
            return self._place(img, rows, columns, cv2.INTER_LINEAR, self.fill)
        if shrinking > 2:
            return self._place(img, rows, columns, cv2.INTER_AREA, self.fill)
        (y, height, *top), (x, width, *left) = rows, columns
        window = antialias(img[y : y + height, x : x + width], shrinking)
        return self._place(window, (0, height, *top), (0, width, *left), cv2.INTER_LINEAR, self.fill)

    def apply_to_mask(
        self, mask: UInt8Array, rows: tuple[int, ...] = (), columns: tuple[int, ...] = (), **params: Any
    ) -> UInt8Array:
        """Pick the label nearest to each pixel's centre."""
        # Plain INTER_NEAREST is half a pixel off INTER_LINEAR.
        return self._place(mask, rows, columns, cv2.INTER_NEAREST_EXACT, (self.fill_mask,))

    def _place(
        self,
        array: UInt8Array,
        rows: tuple[int, ...],
        columns: tuple[int, ...],
        interpolation: int,
        fill: tuple[int, ...],
    ) -> UInt8Array:
        (y, height, top, out_height), (x, width, left, out_width) = rows, columns
        window = cv2.resize(array[y : y + height, x : x + width], (out_width, out_height), interpolation=interpolation)
        below, right = self.size[0] - top - out_height, self.size[1] - left - out_width
        if top or left or below or right:
            window = cv2.copyMakeBorder(window, top, below, left, right, cv2.BORDER_CONSTANT, value=fill)
        return np.asarray(window, dtype=np.uint8)


def antialias(image: UInt8Array, shrinking: float) -> UInt8Array:
    """Blur so that bilinear sampling, which sees two pixels per axis, does not alias; thrice as fast as averaging.

    The kernel (a, 1 - 2a, a) has the variance that an average over `shrinking` pixels has beyond that over one pixel:
    2a = (shrinking² - 1) / 12.

    Args:
        image: uint8 (H, W, 3).
        shrinking: Source pixels per target pixel, in [1, 2].
    """
    # In steps of 1/256, the fixed-point unit of OpenCV's filters: the weights keep their sum, the image its brightness.
    side = round(256 * (shrinking**2 - 1) / 24) / 256
    kernel = np.array([side, 1 - 2 * side, side], dtype=np.float32)
    return np.asarray(cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE), dtype=np.uint8)


def axis_window(length: int, crop: int, factor: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Where a crop's axis comes from and where it goes.

    Args:
        length: Source pixels along the axis.
        crop: Crop pixels along the axis.
        factor: Scale factor.
        rng: Draws the position.

    Returns:
        (start, extent) of the window in the source and (offset, extent) of its image in the crop.
    """
    scaled = max(1, round(length * factor))
    if scaled <= crop:
        return 0, length, rng.randint(0, crop - scaled), scaled
    extent = min(length, max(1, round(crop * length / scaled)))
    return rng.randint(0, length - extent), extent, 0, crop


class ColorJitter(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations ships no types
    """Random brightness, contrast, saturation and hue as one affine map of RGB, applied to each pixel once.

    With factors b, c, s and angle a: y = b·c·K x + b·(1 - c)·m, where m is the image's mean luma and K keeps luma,
    scales chroma by s and turns it by a in the IQ plane. Brightness, contrast and saturation are those of torchvision's
    `ColorJitter`; without clipping in between they commute, so there is no order to draw. Hue differs from it: a
    rotation in YIQ, linear and cheap, instead of a shift in HSV.

    Args:
        brightness: b is uniform in [1 - brightness, 1 + brightness].
        contrast: c likewise.
        saturation: s likewise.
        hue: a is uniform in [-hue, hue] turns.
        p: Probability of being applied.

    Targets:
        image: uint8 (H, W, 3).
    """

    def __init__(
        self,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.05,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        for name, value, bound in (
            ("brightness", brightness, 1.0),
            ("contrast", contrast, 1.0),
            ("saturation", saturation, 1.0),
            ("hue", hue, 0.5),
        ):
            if not 0 <= value <= bound:
                raise ValueError(f"{name} must lie in [0, {bound:g}], got {value}")
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def get_params(self) -> dict[str, Any]:
        """Draw the three factors and the angle."""
        draw = self.py_random.uniform
        return {
            "brightness": 1 + draw(-self.brightness, self.brightness),
            "contrast": 1 + draw(-self.contrast, self.contrast),
            "saturation": 1 + draw(-self.saturation, self.saturation),
            "hue": draw(-self.hue, self.hue),
        }

    def apply(
        self,
        img: UInt8Array,
        brightness: float = 1.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: float = 0.0,
        **params: Any,
    ) -> UInt8Array:
        """Map every pixel by one 3x4 matrix."""
        mean_luma = float(LUMA @ cv2.mean(img[::4])[:3])  # a quarter of the rows tells it well enough
        matrix = np.empty((3, 4))
        matrix[:, :3] = brightness * contrast * chroma_matrix(saturation, hue)
        matrix[:, 3] = brightness * (1 - contrast) * mean_luma
        return np.asarray(cv2.transform(img, matrix), dtype=np.uint8)


def chroma_matrix(saturation: float, hue: float) -> NDArray[np.float64]:
    """The (3, 3) map of RGB that keeps luma, scales chroma by `saturation` and turns it by `hue` in the IQ plane."""
    angle = 2 * math.pi * hue
    turn = saturation * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    to_yiq = np.vstack([LUMA, _CHROMA])
    in_yiq = np.eye(3)
    in_yiq[1:, 1:] = turn
    return np.asarray(np.linalg.solve(to_yiq, in_yiq @ to_yiq))


def train_transform(
    crop_size: tuple[int, int],
    *,
    mean: Sequence[float],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    color_jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
    class_max: float = 1.0,
) -> A.Compose:
    """Build the training pipeline: uint8 image (H, W, 3) and uint8 mask (H, W) to both at `crop_size`.

    Args:
        crop_size: (height, width).
        mean: Channel means of images scaled to [0, 1]; they fill what lies outside of the image.
        scale: Range of the uniform scale factor.
        flip: Probability of a horizontal flip.
        color_jitter: Brightness, contrast, saturation and hue of `ColorJitter`; all 0 leaves colours alone.
        class_max: See `RandomScaleCrop`.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must lie in [0, 1], got {flip}")
    if len(color_jitter) != 4:
        raise ValueError(f"color_jitter must be [brightness, contrast, saturation, hue], got {list(color_jitter)}")
    fill = tuple(round(255 * value) for value in mean)
    steps: list[Any] = [RandomScaleCrop(crop_size, scale, fill, VOID, class_max)]
    if flip > 0:
        steps.append(A.HorizontalFlip(p=flip))
    if any(color_jitter):
        steps.append(ColorJitter(*color_jitter))
    return A.Compose(steps)


def seed_transform(transform: A.Compose, *entropy: int) -> None:
    """Start a pipeline's random numbers from non-negative integers, such as (seed, epoch, sample)."""
    sequence = np.random.SeedSequence(entropy)
    # One pair of generators for the whole pipeline: Compose.set_random_seed gives every transform the same stream, so
    # that, say, flips would go with large scales.
    transform.set_random_state(
        np.random.default_rng(sequence), random.Random(int.from_bytes(sequence.generate_state(4).tobytes(), "little"))
    )
