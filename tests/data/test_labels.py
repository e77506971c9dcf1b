from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from seg_attn.data.images import voc_palette, write_mask
from seg_attn.data.labels import LabelReader
from seg_attn.errors import InputError

FILE = Path("mask.png")


@given(
    stored=hnp.arrays(np.uint8, (6, 7)),
    num_classes=st.integers(1, 254),
    ignore=st.sets(st.integers(0, 255), max_size=3),
)
def test_against_a_loop(stored, num_classes, ignore):
    reader = LabelReader(num_classes, ignore=sorted(ignore))
    expected, bad = stored.copy(), set()
    for at in np.ndindex(stored.shape):
        value = int(stored[at])
        if value in ignore or value == 255:
            expected[at] = 255
        elif value >= num_classes:
            bad.add(value)
    if bad:
        with pytest.raises(InputError, match=rf"mask\.png: labels {min(bad)}\b") as caught:
            reader.convert(stored, FILE)
        assert "\n" not in str(caught.value)
    else:
        np.testing.assert_array_equal(reader.convert(stored, FILE), expected)


def test_the_message_says_what_and_how_to_mend():
    stored = np.array([[0, 3, 21, 34]], np.uint8)
    with pytest.raises(InputError) as caught:
        LabelReader(3).convert(stored, FILE)
    assert str(caught.value) == (
        "mask.png: labels 3, 21, 34 are neither one of the 3 classes (0..2) nor ignored (255); "
        "mend the mask, name more classes, or map or ignore these values"
    )


def test_many_bad_labels_are_cut_short():
    with pytest.raises(InputError, match=r"labels 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. are neither"):
        LabelReader(1).convert(np.arange(20, dtype=np.uint8)[None], FILE)


def test_label_map():
    reader = LabelReader(2, ignore=[9], label_map={7: 1, 8: 0, 3: 255, 255: 1})
    stored = np.array([[0, 1, 7, 8, 3, 9, 255]], np.uint8)
    assert reader.convert(stored, FILE).tolist() == [[0, 1, 1, 0, 255, 255, 1]]


def test_colours(tmp_path):
    colors = [[0, 0, 0], [128, 64, 0], [0, 128, 64]]
    reader = LabelReader(3, colors=colors, ignore_colors=[[255, 255, 255]])
    table = np.array([*colors, [255, 255, 255]], np.uint8)
    stored = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    Image.fromarray(table[stored]).save(tmp_path / "rgb.png")
    assert reader(tmp_path / "rgb.png").tolist() == [[0, 1, 2, 255], [255, 2, 1, 0]]
    write_mask(tmp_path / "index.png", np.array([[2, 0], [255, 1]]), voc_palette())  # read by index all the same
    assert reader(tmp_path / "index.png").tolist() == [[2, 0], [255, 1]]
    strange = table[stored]
    strange[1, 2] = [1, 2, 3]
    Image.fromarray(strange).save(tmp_path / "strange.png")
    with pytest.raises(InputError, match=r"strange\.png: the colour \[1, 2, 3\] \(at row 1, column 2\)"):
        reader(tmp_path / "strange.png")
    with pytest.raises(InputError, match=r"rgb\.png: the mask holds colours"):
        LabelReader(3)(tmp_path / "rgb.png")


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=30, unique=True), st.integers(0, 99))
def test_colours_round_trip(colors, seed):
    reader = LabelReader(len(colors), colors=colors)
    labels = np.random.default_rng(seed).integers(0, len(colors), (5, 6))
    image = np.array(colors, np.uint8)[labels]
    np.testing.assert_array_equal(reader._from_colors(image, FILE, *reader._colors), labels)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_classes": 0}, r"num_classes must lie in \[1, 254\], got 0"),
        ({"num_classes": 255}, r"num_classes must lie in \[1, 254\], got 255"),
        ({"num_classes": 2, "ignore": [300]}, r"ignore_index must hold values in \[0, 255\], got \[300\]"),
        ({"num_classes": 2, "label_map": {-1: 0}}, r"label_map must hold values in \[0, 255\]"),
        ({"num_classes": 2, "label_map": {5: 2}}, r"label_map must map to classes in \[0, 1\] or to 255, got \[2\]"),
        ({"num_classes": 2, "label_map": {5: 1}, "ignore": [5]}, r"must not share values, got \[5\]"),
        ({"num_classes": 2, "colors": [[0, 0, 0]]}, "colors must hold one RGB triple per class, got 1 for 2"),
        ({"num_classes": 2, "colors": [[0, 0, 0], [0, 0, 0]]}, "must all differ"),
        ({"num_classes": 2, "colors": [[0, 0, 0], [0, 0, 256]]}, r"RGB triples in \[0, 255\]"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        LabelReader(**arguments)
