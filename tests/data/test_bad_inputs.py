"""Whole data sets of odd and broken files: each ends in the right sample or in one line that names the file."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from seg_attn.data import MaskFolderDataModule
from seg_attn.data.images import voc_palette
from seg_attn.errors import InputError

CLASSES = ["a", "b", "c"]
TABLE = [[0, 0, 0], [200, 0, 0], [0, 200, 0]]


@dataclass
class Case:
    """An image, a mask and a list; `wrong` names the file that must be complained of, or is None."""

    name: str
    image: bytes
    image_suffix: str
    mask: bytes
    mask_suffix: str
    split: bytes
    colors: bool
    expected_image: np.ndarray | None
    expected_mask: np.ndarray | None
    wrong: str | None


def encode(array, kind, **options):
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = [
    "jpeg",
    "grey jpeg",
    "cmyk",
    "png",
    "palette",
    "sixteen",
    "rgba",
    "gif",
    "webp",
    "rotated",
    "cut",
    "float",
    "none",
]
MASKS = [
    "index",
    "palette",
    "two bits",
    "tiff",
    "rgb",
    "rgb table",
    "float",
    "whole float",
    "shifted",
    "label",
    "cut",
    "jpeg",
    "none",
]
LISTS = ["plain", "bom", "crlf", "spaces", "extension", "empty", "missing", "latin"]


@st.composite
def cases(draw):
    height, width = draw(st.sampled_from([(1, 1), (1, 300), (7, 5), (24, 33)]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kind, mask_kind, list_kind = (
        draw(st.sampled_from(IMAGES)),
        draw(st.sampled_from(MASKS)),
        draw(st.sampled_from(LISTS)),
    )
    name = draw(st.sampled_from(["plain", "two words", "ünï", "日本", "a.b.c", "it's", "#1", "CON x"]))
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected, suffix, wrong_image = rgb, "png", kind in ("cut", "float", "none")
    if kind in ("jpeg", "grey jpeg", "cmyk"):
        source = Image.fromarray(rgb).convert({"jpeg": "RGB", "grey jpeg": "L", "cmyk": "CMYK"}[kind])
        data, suffix = encode(source, "JPEG"), "JPG"
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    elif kind == "palette":
        image = Image.fromarray(rgb).quantize(16)
        data, expected = encode(image, "PNG"), np.asarray(image.convert("RGB"))
    elif kind == "sixteen":
        values = rng.integers(0, 65536, (height, width), dtype=np.uint16)
        data, expected = encode(values, "PNG"), np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    elif kind == "rgba":
        data = encode(np.dstack([rgb, rgb[..., 0]]), "PNG")
    elif kind == "gif":
        frames = [Image.fromarray(np.roll(rgb, n, axis=1)).quantize(8) for n in range(3)]
        data, suffix = encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif"
        expected = np.asarray(frames[0].convert("RGB"))
    elif kind == "webp":
        data, suffix = encode(rgb, "WEBP", lossless=True), "webp"
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(np.ascontiguousarray(np.rot90(rgb)), "PNG", exif=exif)
    elif kind == "cut":
        data = encode(rgb, "JPEG")[:-30]
        suffix = "jpg"
    elif kind == "float":
        data, suffix = encode(rgb[..., 0].astype(np.float32), "TIFF"), "tiff"
    else:
        data = encode(rgb, "PNG")

    labels = rng.integers(0, 3, (height, width)).astype(np.uint8)
    labels[0, 0] = draw(st.sampled_from([0, 255]))
    colors, mask_suffix = False, "png"
    wrong_mask = mask_kind in ("rgb", "float", "shifted", "label", "cut", "jpeg", "none")
    if mask_kind == "palette":
        image = Image.fromarray(labels)
        image.putpalette(voc_palette().tobytes())
        mask = encode(image, "PNG")
    elif mask_kind == "two bits":
        labels[0, 0] = 2
        image = Image.fromarray(labels)
        image.putpalette(voc_palette(4).tobytes())
        mask = encode(image, "PNG", bits=2)
    elif mask_kind == "tiff":
        mask, mask_suffix = encode(labels, "TIFF"), "tif"
    elif mask_kind in ("rgb", "rgb table"):
        labels[0, 0], colors = 1, mask_kind == "rgb table"
        mask = encode(np.array(TABLE, np.uint8)[labels], "PNG")
    elif mask_kind in ("float", "whole float"):
        mask = encode(labels.astype(np.float32) + (0.5 if mask_kind == "float" else 0), "TIFF")
        mask_suffix = "tiff"
    elif mask_kind == "shifted":
        mask = encode(np.pad(labels, ((0, 1), (0, 0))), "PNG")
    elif mask_kind == "label":
        labels[-1, -1] = draw(st.integers(3, 254))
        mask = encode(labels, "PNG")
    elif mask_kind == "cut":
        mask = encode(labels, "PNG")[:-20]
    elif mask_kind == "jpeg":
        mask, mask_suffix = encode(labels, "JPEG"), "jpg"
    else:
        mask = encode(labels, "PNG")

    entry = f"{name}.{suffix}" if list_kind == "extension" else name
    split = {
        "plain": f"{entry}\n".encode(),
        "extension": f"{entry}\n".encode(),
        "bom": f"\ufeff{entry}".encode(),
        "crlf": f"{entry}\r\n\r\n".encode(),
        "spaces": f"\n  {entry}\t \n".encode(),
        "empty": b" \n",
        "missing": f"{entry}\nanother one\n".encode(),
        "latin": "\xff\n".encode("latin1"),
    }[list_kind]
    wrong = {"empty": "train.txt", "latin": "train.txt", "missing": "another one"}.get(list_kind)
    if kind == "none" or mask_kind == "none":  # an empty folder is seen before the list
        wrong = "images" if kind == "none" else "masks"
    if wrong is None and (wrong_image or wrong_mask):
        wrong = f"{name}.{suffix}" if wrong_image else f"{name}.{mask_suffix}"
    return Case(
        name,
        b"" if kind == "none" else data,
        suffix,
        b"" if mask_kind == "none" else mask,
        mask_suffix,
        split,
        colors,
        expected,
        labels,
        wrong,
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_right_sample_or_one_line(case, tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    if case.image:
        (root / "images" / f"{case.name}.{case.image_suffix}").write_bytes(case.image)
    if case.mask:
        (root / "masks" / f"{case.name}.{case.mask_suffix}").write_bytes(case.mask)
    (root / "train.txt").write_bytes(case.split)
    data = MaskFolderDataModule(str(root), CLASSES, colors=TABLE if case.colors else None, num_workers=0)
    if case.wrong is None:
        image, mask = data.dataset("train").load(0)
        np.testing.assert_array_equal(image, case.expected_image)
        np.testing.assert_array_equal(mask, case.expected_mask)
        assert len(data.dataset("train")) == 1
    else:
        with pytest.raises(InputError) as caught:
            data.dataset("train").load(0)
        assert case.wrong in str(caught.value)
        assert str(root) in str(caught.value)
        assert "\n" not in str(caught.value)
