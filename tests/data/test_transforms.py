import random
import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from seg_attn.data.images import normalize
from seg_attn.data.transforms import (
    LUMA,
    ColorJitter,
    RandomScaleCrop,
    axis_window,
    chroma_matrix,
    seed_transform,
    train_transform,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)


def ramp(kind, height, width):
    """Pixels that encode their own label: at most one grey level per pixel, 0 to 254."""
    y, x = np.mgrid[:height, :width]
    value = {"right": x, "down": y, "left": width - 1 - x, "diagonal": (x + y) // 2}[kind] + 5
    assert value.max() < 255
    label = value.astype(np.uint8)
    return np.repeat(label[..., None], 3, axis=2), label


def run(transform, image, mask, *seed):
    seed_transform(transform, *seed)
    out = transform(image=image, mask=mask)
    return out["image"], out["mask"]


class TestRamp:
    @pytest.mark.parametrize("kind", ["right", "down", "left", "diagonal"])
    @pytest.mark.parametrize(
        ("crop", "size"), [((65, 97), (120, 160)), ((160, 160), (120, 160)), ((129, 129), (250, 187))]
    )
    @pytest.mark.parametrize("class_max", [1.0, 0.1])
    def test_image_and_label_stay_aligned(self, kind, crop, size, class_max):
        image, mask = ramp(kind, *size)
        transform = train_transform(crop, mean=MEAN, color_jitter=(0, 0, 0, 0), class_max=class_max)
        biases, padded = [], 0
        for draw in range(100):
            out, label = run(transform, image, mask, 0, draw)
            assert out.shape == (*crop, 3)
            assert label.shape == crop
            inside = label != 255
            padded += np.count_nonzero(~inside)
            error = out[inside].astype(int) - label[inside].astype(int)[:, None]
            assert np.abs(error).max() <= 1
            biases.append(error.mean())
            assert (out[~inside] == FILL).all()
        assert abs(np.mean(biases)) < 0.2
        assert padded > 0 or crop == (65, 97)

    def test_the_check_sees_half_a_pixel_and_blending(self):
        """With OpenCV's plain nearest or with blended labels, the check above would fail."""
        _, mask = ramp("right", 200, 240)
        small = cv2.resize(mask, (97, 97), interpolation=cv2.INTER_AREA).astype(int)
        exact = cv2.resize(mask, (97, 97), interpolation=cv2.INTER_NEAREST_EXACT)
        plain = cv2.resize(mask, (97, 97), interpolation=cv2.INTER_NEAREST)
        assert abs((small - exact).mean()) < 0.2
        assert abs((small - plain).mean()) > 0.5
        edge = np.repeat(np.uint8([[0, 200]]), 50, axis=1)
        assert len(np.unique(cv2.resize(edge, (151, 9), interpolation=cv2.INTER_NEAREST_EXACT))) == 2
        assert len(np.unique(cv2.resize(edge, (151, 9), interpolation=cv2.INTER_LINEAR))) > 2

    def test_padding_is_ignored_and_has_no_gradient(self):
        image, mask = ramp("right", 50, 60)
        out, label = run(train_transform((96, 128), mean=MEAN, color_jitter=(0, 0, 0, 0), scale=(1, 1)), image, mask, 3)
        assert np.count_nonzero(label != 255) == 50 * 60
        logits = torch.zeros(1, 255, 96, 128, requires_grad=True)
        F.cross_entropy(logits, torch.from_numpy(label)[None].long(), ignore_index=255).backward()
        outside = torch.from_numpy(label) == 255
        assert not logits.grad[0, :, outside].any()
        assert logits.grad[0, :, ~outside].any(dim=0).all()
        # And the padding is the mean: zero after normalisation, to the rounding of a byte.
        assert normalize(out, MEAN, STD)[:, outside].abs().max() < 0.5 / 255 / min(STD) + 1e-6


class TestRandomScaleCrop:
    @settings(max_examples=200, deadline=None)
    @given(
        length=st.integers(1, 3000),
        crop=st.integers(1, 700),
        factor=st.floats(0.25, 4),
        seed=st.integers(0, 2**32),
    )
    def test_windows_fit(self, length, crop, factor, seed):
        start, extent, offset, out = axis_window(length, crop, factor, random.Random(seed))
        assert start >= 0
        assert extent >= 1
        assert start + extent <= length
        assert offset >= 0
        assert out >= 1
        assert offset + out <= crop
        scaled = max(1, round(length * factor))
        if scaled <= crop:
            assert (start, extent, out) == (0, length, scaled)
        else:  # the window that fills the crop, in whole source pixels
            assert (offset, out) == (0, crop)
            assert abs(extent - crop * length / scaled) <= max(0.5, 1 - crop * length / scaled)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2), (700, 900)])
    def test_any_size(self, shape):
        rng = np.random.default_rng(0)
        image, mask = rng.integers(0, 256, (*shape, 3), dtype=np.uint8), rng.integers(0, 5, shape, dtype=np.uint8)
        transform = train_transform((33, 47), mean=MEAN)
        for draw in range(20):
            out, label = run(transform, image, mask, draw)
            assert out.shape == (33, 47, 3)
            assert label.shape == (33, 47)
            assert set(np.unique(label)) <= {*range(5), 255}
            assert (label != 255).any()

    def test_scale_one_is_a_plain_crop(self):
        rng = np.random.default_rng(0)
        image, mask = rng.integers(0, 256, (80, 90, 3), dtype=np.uint8), rng.integers(0, 200, (80, 90), dtype=np.uint8)
        seen = set()
        for draw in range(200):
            out, label = run(A.Compose([RandomScaleCrop((78, 87), (1.0, 1.0))]), image, mask, draw)
            place = [(y, x) for y in range(3) for x in range(4) if (image[y : y + 78, x : x + 87] == out).all()]
            assert len(place) == 1
            y, x = place[0]
            np.testing.assert_array_equal(label, mask[y : y + 78, x : x + 87])
            seen.add(place[0])
        assert len(seen) == 12  # every position occurs

    def test_shrinking_does_not_alias(self):
        """White noise loses the variance that averaging takes; without antialiasing most of it would stay."""
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        out, _ = run(A.Compose([RandomScaleCrop((128, 128), (0.32, 0.32))]), noise, noise[..., 0], 0)
        expected = noise.std() * 0.32
        assert out.std() == pytest.approx(expected, rel=0.15)
        assert cv2.resize(noise, (128, 128), interpolation=cv2.INTER_LINEAR).std() > 1.4 * expected

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"size": (0, 4)}, r"size must be a positive \(height, width\), got \(0, 4\)"),
            ({"size": (4, 4), "scale": (2.0, 0.5)}, "scale must be"),
            ({"size": (4, 4), "scale": (0.0, 0.5)}, "scale must be"),
            ({"size": (4, 4), "class_max": 0.0}, r"class_max must lie in \(0, 1\], got 0.0"),
        ],
    )
    def test_wrong_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            RandomScaleCrop(**arguments)

    def test_class_max_avoids_crops_of_one_class(self):
        mask = np.zeros((200, 200), np.uint8)
        mask[80:120, 80:120] = 1
        image = np.repeat(mask[..., None], 3, axis=2)

        def share(class_max):
            transform = A.Compose([RandomScaleCrop((64, 64), (1.0, 1.0), class_max=class_max)])
            return np.mean([(run(transform, image, mask, draw)[1] == 1).mean() < 0.25 for draw in range(200)])

        assert share(1.0) > 0.8
        assert share(0.75) < 0.4  # ten draws at most

    def test_class_max_counts_labelled_pixels_only_and_gives_up(self):
        mask = np.full((100, 100), 255, np.uint8)
        mask[:10] = 3
        out, label = run(
            A.Compose([RandomScaleCrop((64, 64), (1.0, 1.0), class_max=0.5)]),
            np.zeros((100, 100, 3), np.uint8),
            mask,
            0,
        )
        assert out.shape == (64, 64, 3)
        assert set(np.unique(label)) <= {3, 255}

    def test_same_distribution_as_the_plain_chain(self):
        """Scale, position and label frequencies agree with RandomScale, PadIfNeeded and RandomCrop in a row."""
        height, width, crop = 120, 160, 128
        y, x = np.mgrid[:height, :width]
        image = np.dstack([x, y, np.zeros_like(x)]).astype(np.uint8)
        mask = np.digitize(x + y, [60, 140, 220]).astype(np.uint8)
        plain = A.Compose(
            [
                A.RandomScale((-0.5, 1.0), mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1),
                A.PadIfNeeded(crop, crop, position="random", fill=FILL, fill_mask=255),
                A.RandomCrop(crop, crop),
            ]
        )
        ours = A.Compose([RandomScaleCrop((crop, crop), (0.5, 2.0), FILL)])

        def statistics(transform):
            rows = []
            for draw in range(1500):
                out, label = run(transform, image, mask, draw)
                inside = label != 255
                xs = np.where(inside[inside.any(1).argmax()], out[inside.any(1).argmax(), :, 0], -1)
                first, last = np.flatnonzero(inside.any(0))[[0, -1]]
                source = out[inside].reshape(-1, 3).astype(float)
                scale = (last - first) / max(1.0, float(xs.max()) - float(xs[xs >= 0].min()))
                rows.append(
                    [scale, source[:, 0].mean(), source[:, 1].mean(), inside.mean(), first]
                    + [(label == k).mean() for k in range(4)]
                )
            return np.array(rows)

        a, b = statistics(ours), statistics(plain)
        error = np.sqrt((a.var(0) + b.var(0)) / 1500)
        assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error + 1e-9).all()
        # Whole distributions, not only means: two-sample Kolmogorov-Smirnov below its 0.1 % bound.
        for column in range(a.shape[1]):
            # Rounded: a crop that holds the whole axis has one mean coordinate, to the noise of interpolation.
            samples = [np.sort((s[:, column] + 0.3).round(0 if column in (1, 2) else 3)) for s in (a, b)]
            values = np.concatenate(samples)
            cdf = [np.searchsorted(sample, values, side="right") / 1500 for sample in samples]
            limit = 1.95 * np.sqrt(2 / 1500) + (0.02 if column == 0 else 0)  # scales come in steps of whole pixels
            assert np.abs(cdf[0] - cdf[1]).max() < limit, column


class TestColorJitter:
    def colours(self):
        return np.random.default_rng(0).integers(60, 190, (40, 50, 3), dtype=np.uint8)

    @pytest.mark.parametrize("value", [0.8, 1.0, 1.2])
    @pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
    def test_equals_torchvision(self, kind, value):
        image = self.colours()
        got = ColorJitter().apply(image, **{kind: value})
        oracle = getattr(tv, f"adjust_{kind}")(torch.from_numpy(image).permute(2, 0, 1), value)
        assert np.abs(got.astype(int) - oracle.permute(1, 2, 0).numpy()).max() <= 1

    @settings(max_examples=50, deadline=None)
    @given(
        brightness=st.floats(0.8, 1.2),
        contrast=st.floats(0.8, 1.2),
        saturation=st.floats(0.8, 1.2),
        hue=st.floats(-0.5, 0.5),
    )
    def test_the_formula(self, brightness, contrast, saturation, hue):
        image = self.colours()
        got = ColorJitter().apply(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        mean = (image.reshape(-1, 3) @ LUMA).mean()
        exact = brightness * (contrast * image @ chroma_matrix(saturation, hue).T + (1 - contrast) * mean)
        assert np.abs(got - np.clip(exact, 0, 255)).max() <= 1.01

    @given(saturation=st.floats(0, 2), hue=st.floats(-0.5, 0.5))
    def test_chroma_matrix_keeps_luma_and_grey(self, saturation, hue):
        matrix = chroma_matrix(saturation, hue)
        np.testing.assert_allclose(LUMA @ matrix, LUMA, atol=1e-9)
        np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-5)

    def test_turning_back_and_forth(self):
        np.testing.assert_allclose(chroma_matrix(1, 0.2) @ chroma_matrix(1, -0.2), np.eye(3), atol=1e-9)
        np.testing.assert_allclose(chroma_matrix(1, 1.0), np.eye(3), atol=1e-9)
        # A third of a turn takes red towards green, not towards blue... and keeps its luma.
        turned = chroma_matrix(1, 1 / 3) @ np.array([200.0, 0, 0])
        assert turned @ LUMA == pytest.approx(200 * LUMA[0])

    def test_draws_cover_the_ranges(self):
        jitter = ColorJitter(0.3, 0.2, 0.1, 0.05)
        jitter.set_random_seed(0)
        draws = [jitter.get_params() for _ in range(2000)]
        for name, centre, width in (
            ("brightness", 1, 0.3),
            ("contrast", 1, 0.2),
            ("saturation", 1, 0.1),
            ("hue", 0, 0.05),
        ):
            values = np.array([draw[name] for draw in draws])
            assert values.min() == pytest.approx(centre - width, abs=0.01 * width)
            assert values.max() == pytest.approx(centre + width, abs=0.01 * width)
            assert values.mean() == pytest.approx(centre, abs=0.05 * width)

    @pytest.mark.parametrize(("name", "value"), [("brightness", -0.1), ("contrast", 1.5), ("hue", 0.6)])
    def test_wrong_arguments(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            ColorJitter(**{name: value})


class TestPipeline:
    def test_seed_decides_all(self):
        rng = np.random.default_rng(0)
        image, mask = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8), rng.integers(0, 9, (90, 70), dtype=np.uint8)
        one, two = (train_transform((64, 64), mean=MEAN) for _ in range(2))
        first = run(one, image, mask, 7, 0, 3)
        run(one, image, mask, 1, 2, 3)
        again = run(one, image, mask, 7, 0, 3)
        other = run(two, image, mask, 7, 0, 3)
        for a, b in ((first, again), (first, other)):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(a[1], b[1])
        for seed in ((8, 0, 3), (7, 1, 3), (7, 0, 4)):
            assert (run(one, image, mask, *seed)[0] != first[0]).any()

    def test_transforms_draw_independently(self):
        """albumentations' own `set_random_seed` gives every transform one stream: flips would follow the scale."""
        image, mask = ramp("right", 60, 60)
        transform = train_transform((60, 60), mean=MEAN, color_jitter=(0, 0, 0, 0))
        flipped, scale = [], []
        for draw in range(600):
            _, label = run(transform, image, mask, draw)
            row = label[np.flatnonzero((label != 255).any(1))[0]].astype(int)
            row = row[row != 255]
            flipped.append(row[-1] < row[0])
            scale.append((label != 255).mean())
        assert np.mean(flipped) == pytest.approx(0.5, abs=0.08)
        assert abs(np.corrcoef(flipped, scale)[0, 1]) < 0.15

    @pytest.mark.parametrize(("flip", "expected"), [(0.0, 0), (1.0, 50)])
    def test_flip(self, flip, expected):
        image, mask = ramp("right", 60, 60)
        transform = train_transform((60, 60), mean=MEAN, flip=flip, scale=(1, 1), color_jitter=(0, 0, 0, 0))
        outs = [run(transform, image, mask, draw) for draw in range(50)]
        assert (
            sum(bool((label == mask[:, ::-1]).all() and (out == image[:, ::-1]).all()) for out, label in outs)
            == expected
        )

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"), ({"color_jitter": (0.1,)}, "color_jitter must be")],
    )
    def test_wrong_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            train_transform((8, 8), mean=MEAN, **arguments)


def test_albumentations_does_not_ask_the_network():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import seg_attn.data.transforms, os
assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
"""
    environment = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, env=environment)
