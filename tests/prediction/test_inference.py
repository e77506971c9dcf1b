"""Scales, mirror images, tiles: each against the identity that defines it."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seg_attn import DeepLabV3, Predictor, task
from seg_attn.data.images import normalize
from seg_attn.data.sample import draw_scene, plan_scenes
from seg_attn.models.classes import best_classes
from seg_attn.prediction import inference
from seg_attn.prediction.inference import Inference, TileAxis
from seg_attn.prediction.settings import Settings, tile_starts


def predictor_of(model, data, **how):
    return Predictor(model, data, device="cpu", **how)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_best_classes_is_the_first_arg_max_and_its_softmax(device, seed, logits):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (2, 5, 7, 9), generator=generator).float()  # few values: ties everywhere
    if not logits:
        scores = scores.softmax(dim=1)
    classes, confidence = (tensor.cpu() for tensor in best_classes(scores.to(device), logits))
    assert np.array_equal(classes.numpy(), scores.numpy().argmax(axis=1))  # NumPy takes the first of equal ones
    chances = scores.softmax(dim=1) if logits else scores
    np.testing.assert_allclose(confidence.numpy(), chances.numpy().max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits", [False, True])
def test_the_confidence_of_what_is_not_finite_is_not_either(device, logits):
    scores = torch.linspace(-1, 1, 5 * 6).reshape(1, 5, 1, 6)
    for index in range(5):
        scores[0, index, 0, index] = float("nan")
    _, confidence = best_classes(scores.to(device), logits)
    assert confidence.isnan().tolist() == [[[True] * 5 + [False]]]
    scores[:] = torch.tensor([-1.0, float("inf"), 0, 0, 0]).reshape(5, 1, 1)
    assert not best_classes(scores.to(device), logits)[1].isfinite().any()


def test_fit_test_and_predict_share_the_step_from_logits_to_classes(model, data, photograph, monkeypatch):
    def last(scores, logits=False):
        classes, confidence = best_classes(scores, logits)
        return torch.full_like(classes, 3), confidence

    for module in (task, inference):
        monkeypatch.setattr(module, "best_classes", last)
    assert torch.equal(task.predicted_classes(torch.zeros(1, 4, 2, 3)), torch.full((1, 2, 3), 3))
    assert task.predicted_classes(torch.zeros(1, 4, 2, 3)).dtype == torch.int64  # as labels are
    assert (predictor_of(model, data)(photograph) == 3).all()
    assert (predictor_of(model, data, tile=64)(photograph) == 3).all()


def test_one_scale_without_mirror_image_is_plain(model, data, photograph):
    with torch.inference_mode():
        logits = model(normalize(photograph, data.mean, data.std)[None])
    mask = predictor_of(model, data, scales=[1])(photograph)
    assert np.array_equal(mask, logits.argmax(dim=1)[0].numpy())
    assert len(np.unique(mask)) > 1


def test_several_scales_are_the_mean_of_probabilities(model, data, photograph):
    image = normalize(photograph, data.mean, data.std)[None]
    expected = torch.zeros(1, 4, 75, 101)
    with torch.inference_mode():
        for size in ((38, 50), (75, 101), (112, 152)):  # round(scale * size): 37.5 -> 38, 50.5 -> 50, 112.5 -> 112
            for mirrored in (False, True):
                seen = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
                logits = model(seen.flip(3)).flip(3) if mirrored else model(seen)
                expected += F.interpolate(logits, size=(75, 101), mode="bilinear", align_corners=False).softmax(1) / 6
    predictor = predictor_of(model, data, scales=(0.5, 1.0, 1.5), flip=True)
    np.testing.assert_allclose(predictor.probabilities(photograph), expected[0].numpy(), atol=1e-5)
    assert np.array_equal(predictor(photograph), predictor.probabilities(photograph).argmax(axis=0))


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.25)])
def test_mirrored_image_gives_the_mirrored_mask(model, data, photograph, scales):
    predictor = predictor_of(model, data, scales=scales, flip=True)
    mirrored = np.ascontiguousarray(photograph[:, ::-1])
    assert np.array_equal(predictor.probabilities(mirrored), predictor.probabilities(photograph)[..., ::-1])
    plain = predictor_of(model, data)
    assert not np.array_equal(plain.probabilities(mirrored), plain.probabilities(photograph)[..., ::-1])


@pytest.mark.parametrize("tile", [101, 512])
def test_a_tile_that_holds_the_image_is_the_whole_image(model, data, photograph, tile):
    whole, tiled = predictor_of(model, data), predictor_of(model, data, tile=tile, overlap=20)
    assert np.array_equal(tiled.probabilities(photograph), whole.probabilities(photograph))
    assert np.array_equal(tiled(photograph), whole(photograph))


class _PerPixel(nn.Module):
    """A network that sees one pixel at a time: cutting an image changes nothing for it."""

    def forward(self, x):
        return torch.stack([x.sum(1), -2 * x[:, 0], 3 * x[:, 1] - x[:, 2]], dim=1)


@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    tile=st.integers(32, 80),
    overlap=st.floats(0, 0.99),
    batch_size=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_tiles_are_seamless(height, width, tile, overlap, batch_size):
    """Of a network without context, tiles of any layout give what the whole image gives: weights sum to one."""
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    how = Settings(tile=tile, overlap=min(tile - 1, int(overlap * tile)))
    tiled = Inference(_PerPixel(), [0.5] * 3, [0.3] * 3, how, torch.device("cpu"))
    whole = Inference(_PerPixel(), [0.5] * 3, [0.3] * 3, Settings(), torch.device("cpu"))
    expected = whole.whole([image], probabilities=True)[0]
    counted = []
    strips = list(tiled.strips(image, True, batch_size, counted.append))
    assert [strip.top for strip in strips] == np.cumsum([0, *(len(s.classes) for s in strips)])[:-1].tolist()
    chances = np.concatenate([strip.probabilities for strip in strips], axis=1)
    np.testing.assert_allclose(chances, expected.probabilities, atol=1e-5)
    confidence = np.concatenate([strip.confidence for strip in strips])
    np.testing.assert_allclose(confidence, expected.confidence, atol=1e-5)
    classes = np.concatenate([strip.classes for strip in strips])
    chosen = np.take_along_axis(chances, classes[None].astype(np.int64), axis=0)[0]
    assert np.array_equal(chosen, chances.max(axis=0))
    assert sum(counted) == how.number_of_tiles(height, width)


class _Watching(nn.Module):
    """A network of five classes that counts the scores of whole tiles that are in memory when it is asked."""

    def __init__(self):
        super().__init__()
        self.live = []

    def forward(self, x):
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape[-3:] == (5, 64, 64)]
        self.live.append(len(tensors))
        return x.mean(dim=1, keepdim=True).expand(-1, 5, -1, -1).clone()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_of_a_tile_are_let_go_before_the_next_is_predicted(batch_size):
    network = _Watching()
    asked = Inference(network, [0.5] * 3, [0.3] * 3, Settings(tile=64, overlap=16), torch.device("cpu"))
    list(asked.strips(np.zeros((150, 200, 3), dtype=np.uint8), True, batch_size))
    assert network.live == [0] * (12 // batch_size)


@given(length=st.integers(1, 500), tile=st.integers(1, 100), share=st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_tiles_cover_a_side_evenly(length, tile, share):
    overlap = min(tile - 1, int(share * tile))
    axis = TileAxis(length, tile, overlap)
    size = min(tile, length)
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert 0 <= start <= length - size
        total[start : start + size] += weights.numpy()
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert all(size - (b - a) >= overlap for a, b in zip(axis.starts, axis.starts[1:], strict=False))
    assert sum(axis.finished(index) for index in range(len(axis.starts))) == length


class _Neighbourhood(nn.Module):
    """A network that sees 15 x 15 pixels, and zeros beyond the borders."""

    def forward(self, x):
        return F.avg_pool2d(torch.cat([3 * x, -x], dim=1), 15, stride=1, padding=7)


def test_overlap_brings_tiles_closer_to_the_whole():
    image = np.full((200, 260, 3), 230, dtype=np.uint8)

    def probabilities(how):
        asked = Inference(_Neighbourhood(), [0.5] * 3, [0.3] * 3, how, torch.device("cpu"))
        return np.concatenate([strip.probabilities for strip in asked.strips(image, True)], axis=1)

    whole = probabilities(Settings())
    none, half = (np.abs(probabilities(Settings(tile=96, overlap=overlap)) - whole) for overlap in (0, 48))
    assert half.max() < 0.3 * none.max()
    assert half.mean() < 0.7 * none.mean()


def _scene(seed, size):
    return draw_scene(plan_scenes(seed + 1, np.random.default_rng(5))[seed], size, np.random.default_rng([5, seed]))


@pytest.mark.exhaustive
def test_share_of_pixels_that_tiles_leave_as_they_are(data):
    """Tiles see less around a pixel than a network does that was trained for a minute on whole scenes."""
    torch.manual_seed(0)
    data = replace(data, class_names=[str(index) for index in range(9)], palette=[[0, 0, 0]] * 9)
    network = DeepLabV3("resnet18", num_classes=9, decoder_channels=16, atrous_rates=(2, 4, 6)).train()
    images, masks = zip(*(_scene(seed, (160, 120)) for seed in range(48)), strict=True)
    inputs = torch.stack([normalize(image, data.mean, data.std) for image in images])
    labels = torch.from_numpy(np.stack(masks)).long()
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=160)
    for _ in range(160):
        chosen = torch.randperm(len(inputs))[:4]
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[chosen]), labels[chosen], ignore_index=255).backward()
        optimizer.step()
        schedule.step()
    scenes = [_scene(seed, (480, 360))[0] for seed in (48, 49, 50)]
    wholes = [predictor_of(network, data)(scene) for scene in scenes]
    assert len(np.unique(wholes)) > 3
    shares = {}
    for tile, overlap in ((480, 120), (240, 0), (240, 120)):
        predictor = predictor_of(network, data, tile=tile, overlap=overlap)
        pairs = zip(scenes, wholes, strict=True)
        shares[tile, overlap] = float(np.mean([predictor(scene) == whole for scene, whole in pairs]))
        print(f"equal pixels, tiles of {tile} that share {overlap}: {shares[tile, overlap]:.4%}")
    assert shares[480, 120] == 1
    assert shares[240, 120] > max(0.9, shares[240, 0])


def test_a_batch_holds_images_of_any_sizes(model, data):
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(40, 50), (60, 50), (40, 50), (33, 34)]]
    predictor = predictor_of(model, data)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    masks = predictor.batch(images)
    hook.remove()
    assert sorted(seen) == [(1, 3, 33, 34), (1, 3, 60, 50), (2, 3, 40, 50)]
    for mask, image in zip(masks, images, strict=True):
        assert (mask == predictor(image)).mean() > 0.999  # batches differ by rounding
    alone = predictor.batch(images, batch_size=1)
    assert all(np.array_equal(mask, predictor(image)) for mask, image in zip(alone, images, strict=True))
    assert predictor.batch([]) == []


def test_threads_share_a_predictor(model, data):
    rng = np.random.default_rng(7)
    images = [rng.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8) for n in range(6)]
    predictor = predictor_of(model, data, flip=True)
    expected = [predictor(image) for image in images]
    found = [None] * len(images)

    def work(index):
        found[index] = predictor(images[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bfloat16_is_close(model, data, photograph):
    full, half = (predictor_of(model, data, precision=p).probabilities(photograph) for p in ("float32", "bf16-mixed"))
    assert half.dtype == np.float32
    assert np.abs(full - half).max() > 0
    assert np.abs(full - half).mean() < 0.02


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scales": ()}, r"scales must be one or more positive numbers"),
        ({"scales": (1, 0)}, r"scales must be one or more positive numbers .*got \[1\.0, 0\.0\]"),
        ({"scales": (float("nan"),)}, "scales must be"),
        ({"tile": 8}, "tile must be at least 32 pixels, got 8"),
        ({"overlap": 8}, "overlap 8 needs tiles to overlap: give tile too"),
        ({"tile": 64, "overlap": 64}, "overlap must be at least 0 and below the tile's 64 pixels, got 64"),
        ({"precision": "float64"}, "precision must be float32 or bfloat16, got 'float64'"),
    ],
)
def test_settings_out_of_range(how, message):
    with pytest.raises(ValueError, match=message):
        Settings(**how)


def test_tiles_start_where_they_should():
    assert tile_starts(1000, 512, 128) == [0, 244, 488]
    assert tile_starts(512, 512, 128) == [0]
