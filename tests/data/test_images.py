import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from seg_attn.data.images import (
    image_size,
    normalize,
    read_image,
    read_mask,
    read_stored_mask,
    voc_palette,
    write_bytes,
    write_mask,
)
from seg_attn.errors import InputError


def photo(height=48, width=64, seed=0):
    """A smooth colour picture with some noise: survives JPEG, is not symmetric under any rotation."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    base = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(6 * x + 3 * y)], axis=-1)
    return np.clip(base + np.random.default_rng(seed).normal(0, 4, base.shape), 0, 255).astype(np.uint8)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def grey_png(rows, bits):
    """A grey PNG of 1, 2, 4, 8 or 16 bits per pixel, written by hand."""
    rows = np.asarray(rows)
    height, width = rows.shape
    lines = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class TestReadImage:
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize(
        "options", [{}, {"quality": 60}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}]
    )
    def test_jpeg_equals_pillow_to_the_pixel(self, tmp_path, mode, options):
        path = tmp_path / "a.jpg"
        Image.fromarray(photo(61, 83)).convert(mode).save(path, **options)
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_image(path), np.asarray(image.convert("RGB")))
            np.testing.assert_array_equal(read_image(path), read_image(image))
        assert read_image(path).shape == (61, 83, 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
    def test_exif_orientation(self, tmp_path, orientation, suffix):
        upright = photo(40, 56)
        # What each stored orientation must be turned by (EXIF 2.32, tag 0x0112), inverted to store the picture.
        store = {
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, 1),
            7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
            8: lambda a: np.rot90(a, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
        Image.fromarray(np.ascontiguousarray(store(upright))).save(path, exif=exif, **options)
        got = read_image(path)
        assert got.shape == upright.shape
        assert image_size(path) == (40, 56)
        limit = 30 if suffix == "jpg" else 0
        assert np.abs(got.astype(int) - upright).max() <= limit
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_image(image), got)

    def test_sixteen_bits_keep_their_upper_byte(self, tmp_path):
        values = np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30) * np.uint16(1)
        values[0, 0], values[0, 1] = 65535, 255
        path = tmp_path / "a.png"
        Image.fromarray(values).save(path)
        expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
        np.testing.assert_array_equal(read_image(path), expected)
        tiff = tmp_path / "a.tiff"
        Image.fromarray(values.astype(np.int32)).save(tiff)
        np.testing.assert_array_equal(read_image(tiff), expected)

    def test_cmyk_jpeg(self, tmp_path):
        path = tmp_path / "a.jpg"
        Image.fromarray(photo()).convert("CMYK").save(path, quality=100, subsampling=0)
        assert np.abs(read_image(path).astype(int) - photo()).max() <= 12

    def test_palette_alpha_and_bilevel(self, tmp_path):
        rgb = photo()
        for name, image in {
            "p.png": Image.fromarray(rgb).quantize(64),
            "p.gif": Image.fromarray(rgb).quantize(64),
            "rgba.png": Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 77, np.uint8)])),
            "la.png": Image.fromarray(rgb).convert("LA"),
            "one.png": Image.fromarray(rgb).convert("1"),
        }.items():
            image.save(tmp_path / name)
            expected = rgb if name == "rgba.png" else np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(read_image(tmp_path / name), expected)

    def test_palette_with_transparency_does_not_warn(self, tmp_path):
        image = Image.fromarray(photo()).quantize(16)
        image.save(tmp_path / "a.png", transparency=bytes([0, 128] + [255] * 14))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
    def test_first_frame_of_an_animation(self, tmp_path, suffix):
        frames = [Image.fromarray(photo(seed=seed)).quantize(32).convert("RGB") for seed in range(3)]
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), np.asarray(frames[0]))

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_extreme_shapes(self, tmp_path, shape, suffix):
        Image.fromarray(photo(*shape)).save(tmp_path / f"a.{suffix}")
        assert read_image(tmp_path / f"a.{suffix}").shape == (*shape, 3)

    def test_an_array_passes_through(self):
        image = photo()
        assert read_image(image) is image

    @pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 0, 3), np.uint8)])
    def test_a_wrong_array(self, array):
        with pytest.raises(InputError, match=r"uint8 of shape \(H, W, 3\), got"):
            read_image(array)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(keep=st.floats(0, 0.99), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    def test_a_truncated_file_is_named(self, tmp_path, keep, kind):
        buffer = io.BytesIO()
        Image.fromarray(photo()).save(buffer, kind)
        path = tmp_path / "holiday photo ü.jpg"
        path.write_bytes(buffer.getvalue()[: int(keep * len(buffer.getvalue()))])
        try:
            read_image(path)
        except InputError as error:
            message = str(error)
            assert str(path) in message
            assert "\n" not in message
        else:
            # A GIF's and a TIFF's last bytes may carry no pixels.
            assert kind in ("GIF", "TIFF", "BMP")
            assert keep > 0.5

    def test_a_jpeg_cut_short_but_with_an_end_marker_inside(self, tmp_path):
        thumbnail = io.BytesIO()
        Image.fromarray(photo(8, 8)).save(thumbnail, "JPEG")
        exif = Image.Exif()
        exif[0x010E] = "x" + thumbnail.getvalue().decode("latin1")
        buffer = io.BytesIO()
        Image.fromarray(photo(200, 200)).save(buffer, "JPEG", quality=95)
        path = tmp_path / "cut.jpg"
        path.write_bytes(buffer.getvalue()[:-500])
        with pytest.raises(InputError, match=r"cut\.jpg: not a readable image"):
            read_image(path)
        path.write_bytes(buffer.getvalue() + b"trailing bytes")  # which is no damage
        assert read_image(path).shape == (200, 200, 3)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        data=st.binary(max_size=400),
        head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]),
    )
    def test_garbage_is_named(self, tmp_path, data, head):
        path = tmp_path / "garbage.png"
        path.write_bytes(head + data)
        for read in (read_image, read_mask, image_size):
            with pytest.raises(InputError, match=r"garbage\.png"):
                read(path)

    def test_missing_empty_folder_and_text(self, tmp_path):
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "text.jpg").write_text("no image")
        for name, match in {
            "absent.jpg": "no such file",
            "empty.jpg": "the file is empty",
            ".": "cannot be read",
            "text.jpg": "not an image format",
        }.items():
            with pytest.raises(InputError, match=match):
                read_image(tmp_path / name)

    def test_float_and_wide_integer_images(self, tmp_path):
        Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(tmp_path / "f.tiff")
        Image.fromarray(np.full((3, 4), 70000, np.int32)).save(tmp_path / "i.tiff")
        with pytest.raises(InputError, match=r"f\.tiff: floating-point values of unknown range"):
            read_image(tmp_path / "f.tiff")
        with pytest.raises(InputError, match=r"i\.tiff: 32-bit values of unknown range"):
            read_image(tmp_path / "i.tiff")


class TestMasks:
    def test_palette_indices_not_colours(self, tmp_path):
        labels = np.array([[0, 1, 20], [15, 255, 3]], np.uint8)
        write_mask(tmp_path / "m.png", labels, voc_palette(21))
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), labels)
        with Image.open(tmp_path / "m.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), voc_palette()[labels])

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        mask=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)),
        colors=st.integers(0, 256),
    )
    def test_round_trip_whatever_the_palette(self, tmp_path, mask, colors):
        write_mask(tmp_path / "m.png", mask, voc_palette(colors)[::-1])
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 999), at=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
    def test_damage_never_changes_labels_quietly(self, tmp_path, seed, at, change, cut):
        labels = np.random.default_rng(seed).integers(0, 21, (30, 40))
        write_mask(tmp_path / "m.png", labels, voc_palette())
        data = bytearray((tmp_path / "m.png").read_bytes())
        position = int(at * (len(data) - 1))
        if cut:
            del data[position:]
        else:
            data[position] ^= change
        (tmp_path / "m.png").write_bytes(data)
        try:
            got = read_mask(tmp_path / "m.png")
        except InputError:
            return
        np.testing.assert_array_equal(got, labels)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_grey_masks_of_few_bits_are_not_stretched(self, tmp_path, bits):
        labels = np.random.default_rng(bits).integers(0, min(2**bits, 256), (5, 13))
        (tmp_path / "m.png").write_bytes(grey_png(labels, bits))
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), labels)

    def test_float_masks(self, tmp_path):
        labels = np.array([[0, 1], [7, 255]], np.float32)
        Image.fromarray(labels).save(tmp_path / "m.tiff")
        np.testing.assert_array_equal(read_mask(tmp_path / "m.tiff"), labels)
        for value in (0.5, np.nan, np.inf):
            Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "m.tiff")
            with pytest.raises(InputError, match=r"m\.tiff: the mask holds fractions"):
                read_mask(tmp_path / "m.tiff")

    def test_labels_beyond_a_byte(self, tmp_path):
        Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "m.png")
        with pytest.raises(InputError, match=r"m\.png: the mask holds values from 0 to 300"):
            read_mask(tmp_path / "m.png")

    def test_colours_and_jpeg_are_refused(self, tmp_path):
        Image.fromarray(photo()).save(tmp_path / "m.png")
        with pytest.raises(InputError, match=r"m\.png: the mask holds colours"):
            read_mask(tmp_path / "m.png")
        np.testing.assert_array_equal(read_stored_mask(tmp_path / "m.png"), photo())
        Image.fromarray(photo()).convert("L").save(tmp_path / "m.jpg")
        with pytest.raises(InputError, match=r"m\.jpg: a JPEG has changed the labels"):
            read_mask(tmp_path / "m.jpg")

    def test_exif_rotation_of_a_mask(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
        image = Image.fromarray(np.ascontiguousarray(np.rot90(labels, 1)))
        image.putpalette(voc_palette().tobytes())
        image.save(tmp_path / "m.png", exif=exif)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), labels)

    @pytest.mark.parametrize(
        ("mask", "palette", "match"),
        [
            (np.zeros((2, 2)), voc_palette(), "mask must be an integer array"),
            (np.zeros((2, 2, 1), np.uint8), voc_palette(), "mask must be an integer array"),
            (np.full((2, 2), 256), voc_palette(), r"mask must lie in \[0, 255\], got \[256, 256\]"),
            (np.full((2, 2), -1), voc_palette(), r"got \[-1, -1\]"),
            (np.zeros((2, 2), int), [[0, 0, 300]], "palette must be at most 256 RGB triples"),
        ],
    )
    def test_wrong_arguments(self, tmp_path, mask, palette, match):
        with pytest.raises(ValueError, match=match):
            write_mask(tmp_path / "m.png", mask, palette)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "m.png"
        path.write_bytes(b"old")

        def full(self, data):
            with open(self, "wb") as file:
                file.write(data[:3])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_bytes(path, b"new content")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["m.png"]

    def test_real_voc_masks(self, real_data, tmp_path):
        """Decoded as Pillow's indices, and written back equal in pixels and palette."""
        paths = sorted((real_data / "voc_masks" / "SegmentationClass").glob("*.png"))
        assert len(paths) == 632
        for path in paths:
            with Image.open(path) as image:
                assert image.mode == "P"
                indices, palette = np.asarray(image), image.getpalette()
            got = read_mask(path)
            np.testing.assert_array_equal(got, indices)
            write_mask(tmp_path / "m.png", got, np.reshape(palette, (-1, 3)))
            with Image.open(tmp_path / "m.png") as image:
                assert image.mode == "P"
                assert image.getpalette() == palette
                np.testing.assert_array_equal(np.asarray(image), indices)
            np.testing.assert_array_equal(np.reshape(palette, (-1, 3)), voc_palette())


class TestPalette:
    def test_known_entries(self):
        palette = voc_palette()
        assert palette.shape == (256, 3)
        assert palette.dtype == np.uint8
        # aeroplane, person, tvmonitor, void, as printed in the VOC 2012 development kit.
        assert palette[[1, 15, 20, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
        assert len(np.unique(palette, axis=0)) == 256

    @pytest.mark.parametrize("n", [-1, 257])
    def test_range(self, n):
        with pytest.raises(ValueError, match=r"n must lie in \[0, 256\]"):
            voc_palette(n)


class TestNormalize:
    @settings(max_examples=40, deadline=None)
    @given(
        image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
        mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
        std=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    )
    def test_the_formula(self, image, mean, std):
        got = normalize(image, mean, std)
        assert got.dtype == torch.float32
        assert got.shape == (3, *image.shape[:2])
        expected = ((image / 255 - mean) / std).astype(np.float32)
        np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), expected)

    def test_views_and_layout(self):
        image = photo()
        whole = normalize(image, [0.5] * 3, [0.2] * 3)
        assert whole[None].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(normalize(image[5:20, ::-1], [0.5] * 3, [0.2] * 3), whole[:, 5:20].flip(2))

    @pytest.mark.parametrize(
        ("mean", "std", "match"),
        [([0.5], [0.2] * 3, "three numbers"), ([0.5] * 3, [0.2, 0.2, 0.0], "std must be positive")],
    )
    def test_wrong_arguments(self, mean, std, match):
        with pytest.raises(ValueError, match=match):
            normalize(photo(), mean, std)


def test_decoding_needs_no_torch():
    code = "import sys, seg_attn.data.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
