"""What is written: each format read back by another reader than the code that wrote it."""

import json
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from seg_attn.data.images import read_mask, write_mask
from seg_attn.draw import contour, legend, overlay
from seg_attn.errors import InputError
from seg_attn.prediction.inference import Strip
from seg_attn.prediction.inputs import Source
from seg_attn.prediction.outputs import Outputs
from seg_attn.prediction.png import open_png
from seg_attn.prediction.rle import coco_segments, compress, run_lengths


def decode_counts(text):
    """COCO's string to run lengths, as `rleFrString` of maskApi.c reads it."""
    counts, position = [], 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            byte = ord(text[position]) - 48
            value |= (byte & 0x1F) << shift
            more = bool(byte & 0x20)
            position += 1
            shift += 5
            if not more and byte & 0x10:
                value |= -1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
    return counts


def decode_mask(segmentation):
    height, width = segmentation["size"]
    flat = np.zeros(height * width, dtype=bool)
    position = 0
    for index, length in enumerate(decode_counts(segmentation["counts"])):
        flat[position : position + length] = index % 2
        position += length
    assert position == height * width
    return flat.reshape(width, height).T


def test_known_string():
    """pycocotools' string of a 25 x 25 mask whose ones are pixels 3 to 5 of its first column."""
    binary = np.zeros((25, 25), dtype=bool)
    binary[3:6, 0] = True
    assert run_lengths(binary) == [3, 3, 619]
    assert compress([3, 3, 619]) == "33[c0"
    assert decode_counts("33[c0") == [3, 3, 619]


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=20))
def test_strings_of_run_lengths(lengths):
    assert decode_counts(compress(lengths)) == lengths


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_run_lengths_of_masks(seed, height, width, classes):
    mask = np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8)
    segments = coco_segments(mask, ["a", "b", "c", "d"])
    assert [segment["category_id"] for segment in segments] == np.unique(mask).tolist()
    for segment in segments:
        binary = mask == segment["category_id"]
        assert np.array_equal(decode_mask(segment["segmentation"]), binary)
        assert segment["area"] == binary.sum()
        x, y, w, h = segment["bbox"]
        assert binary[y : y + h, x : x + w].sum() == binary.sum()
        rows, columns = np.nonzero(binary)
        assert (rows.min(), columns.min(), rows.max() - y + 1, columns.max() - x + 1) == (y, x, h, w)


@pytest.mark.parametrize("cuts", [[37], [1, 2, 34], [20, 17]])
@pytest.mark.parametrize("kind", ["index", "rgb", "grey16"])
def test_strips_become_one_png(tmp_path, kind, cuts):
    rng = np.random.default_rng(0)
    if kind == "index":
        image, how = rng.integers(0, 256, (37, 21), dtype=np.uint8), {"palette": [[1, 2, 3], [4, 5, 6]]}
    elif kind == "rgb":
        image, how = rng.integers(0, 256, (37, 21, 3), dtype=np.uint8), {}
    else:
        image, how = rng.integers(0, 65536, (37, 21), dtype=np.uint16), {"bits": 16}
    with open_png(tmp_path / "a.png", 21, **how) as png:
        for rows in np.split(image, np.cumsum(cuts)[:-1]):
            png.write(rows)
            assert not (tmp_path / "a.png").exists()
    with Image.open(tmp_path / "a.png") as stored:
        assert np.array_equal(np.asarray(stored), image)
        if kind == "index":
            write_mask(tmp_path / "b.png", image, [[1, 2, 3], [4, 5, 6]])
            with Image.open(tmp_path / "b.png") as other:
                assert stored.getpalette() == other.getpalette()
            assert np.array_equal(read_mask(tmp_path / "a.png"), image)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 0


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="reshape"), open_png(tmp_path / "a.png", 3, [[0, 0, 0]]) as png:
        png.write(np.zeros((0, 3), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


def _strips(mask, chances, cuts):
    confidence = chances.max(axis=0)
    top = 0
    for rows in np.split(np.arange(len(mask)), cuts):
        part = slice(rows[0], rows[-1] + 1)
        yield Strip(top, mask[part], confidence[part], chances[:, part])
        top += len(rows)


@pytest.mark.parametrize("cuts", [[], [5, 6, 20]], ids=["whole", "strips"])
@pytest.mark.parametrize("probability", ["npz", "png", "tif"])
def test_every_output_read_back(tmp_path, data, cuts, probability):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (30, 400, 3), dtype=np.uint8)
    chances = rng.dirichlet(np.ones(4), (30, 400)).transpose(2, 0, 1).astype(np.float32)
    chances[3] = 0  # a class that nothing belongs to
    mask = chances.argmax(axis=0).astype(np.uint8)
    outputs = Outputs(tmp_path, ("mask", "overlay", "contour", "probability", "rle"), probability, data)
    source = Source(tmp_path / "x.jpg", tmp_path.relative_to(tmp_path) / "deep" / "x.1")
    seen = outputs.write(source, image, _strips(mask, chances, cuts))
    files = {path.relative_to(tmp_path / "deep").as_posix(): path for path in outputs.files(source)}
    assert set(files) == {path.name for path in (tmp_path / "deep").iterdir()}

    assert np.array_equal(read_mask(files["x.1.png"]), mask)
    shown = legend(
        [f"{data.class_names[i]} {(mask == i).mean():.1%}" for i in range(3)], data.palette[:3], image.shape[1]
    )
    for name, draw in (("overlay", overlay), ("contour", contour)):
        with Image.open(files[f"x.1_{name}.png"]) as drawn:
            expected = np.concatenate([draw(image, mask, data.palette), shown])
            assert np.array_equal(np.asarray(drawn), expected)
    segments = json.loads(files["x.1_rle.json"].read_text())
    for segment in segments["annotations"]:
        assert np.array_equal(decode_mask(segment["segmentation"]), mask == segment["category_id"])
    if probability == "npz":
        with np.load(files["x.1_probability.npz"]) as saved:
            assert np.array_equal(saved["probability"], chances)
            assert saved["class_names"].tolist() == data.class_names
    elif probability == "tif":
        with Image.open(files["x.1_probability.tif"]) as pages:
            for index in range(4):
                pages.seek(index)
                assert np.array_equal(np.asarray(pages), chances[index])
    else:
        for index in range(4):
            with Image.open(files[f"x.1_probability_{index:02d}.png"]) as page:
                assert np.array_equal(np.asarray(page), np.round(chances[index] * 65535))
    assert seen.counts == [(mask == index).sum() for index in range(4)]
    assert seen.confidence == pytest.approx(chances.max(axis=0).mean(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("probability", ["npz", "tif"])
def test_probabilities_are_in_memory_once(tmp_path, data, probability):
    chances = np.tile(np.random.default_rng(0).random(1000, dtype=np.float32), (4, 4000, 1))  # 64 MB, quick to compress
    mask = np.zeros((4000, 1000), dtype=np.uint8)
    outputs = Outputs(tmp_path, ("probability",), probability, data)
    cuts = range(100, 4000, 100)
    fresh = (replace(strip, probabilities=strip.probabilities.copy()) for strip in _strips(mask, chances, cuts))
    image = np.zeros((4000, 1000, 3), dtype=np.uint8)
    tracemalloc.start()
    outputs.write(Source(tmp_path / "x.jpg", tmp_path / "x"), image, fresh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.7 * chances.nbytes  # NumPy packs 16 MB at a time


def test_a_strip_is_let_go_before_the_next_is_made(tmp_path, data):
    def strips():
        for top in range(3):
            chances = np.full((4, 1, 50), 0.25, dtype=np.float32)
            strip = Strip(top, np.zeros((1, 50), dtype=np.uint8), chances[0], chances)
            seen = weakref.ref(chances)
            del chances
            yield strip
            del strip
            assert seen() is None

    outputs = Outputs(tmp_path, ("mask", "overlay", "contour", "probability", "rle"), "png", data)
    outputs.write(Source(tmp_path / "x.jpg", tmp_path / "x"), np.zeros((3, 50, 3), dtype=np.uint8), strips())


@pytest.mark.parametrize(
    ("kinds", "probability", "whole", "tiled"),
    [
        (("mask",), "npz", 3 + 5, 3),
        (("mask", "probability"), "npz", 3 + 5 + 16, 3 + 16),
        (("probability",), "png", 3 + 5 + 16, 3),
    ],
)
def test_bytes_held_per_pixel(tmp_path, data, kinds, probability, whole, tiled):
    outputs = Outputs(tmp_path, kinds, probability, data)
    assert outputs.bytes_held(10, 20, tiled=False) == 200 * whole
    assert outputs.bytes_held(10, 20, tiled=True) == 200 * tiled


@pytest.mark.parametrize(
    ("tiled", "hint"), [(True, "take --probability png"), (False, "take --tile 1024 --probability png")]
)
def test_probabilities_too_large_to_be_held(tmp_path, data, tiled, hint):
    source = Source(tmp_path / "x.jpg", tmp_path / "x")
    outputs = Outputs(tmp_path, ("probability",), "npz", data)
    outputs.check_size(source, 1 << 13, 1 << 13, tiled)
    with pytest.raises(InputError, match=rf"x\.jpg: probabilities of 8193x8192 .* 1\.0 GiB of memory: {hint}, which"):
        outputs.check_size(source, (1 << 13) + 1, 1 << 13, tiled)
    for kinds, probability in ((("mask",), "npz"), (("probability",), "png")):
        Outputs(tmp_path, kinds, probability, data).check_size(source, 1 << 15, 1 << 15, tiled)


def test_contour_and_legend():
    mask = np.array([[0, 0, 1], [0, 2, 1]], dtype=np.uint8)
    image = np.full((2, 3, 3), 50, dtype=np.uint8)
    palette = [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert contour(image, mask, palette)[..., 0].tolist() == [[50, 50, 2], [50, 3, 2]]
    assert contour(image[:1], mask[:1], palette, above=np.array([1, 0, 1]))[..., 0].tolist() == [[1, 50, 2]]
    narrow, wide = (legend(["sky 10.0%", "road 90.0%"], [[10, 20, 30], [40, 50, 60]], width) for width in (60, 400))
    assert narrow.shape[0] > wide.shape[0]
    for drawn in (narrow, wide):
        assert {(10, 20, 30), (40, 50, 60)} <= {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
