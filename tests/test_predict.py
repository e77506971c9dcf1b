"""Prediction: the same pixels as `test`, any image PIL reads, at its own size, and nothing half-written."""

import numpy as np
import pytest
import torch
from PIL import Image

from seg_attn import DeepLabV3, Predictor
from seg_attn.checkpoint import DataInfo, load_checkpoint, save_model
from seg_attn.data.images import normalize, read_image, read_mask
from seg_attn.errors import InputError
from seg_attn.predict import find_images, predict_files


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    model = DeepLabV3("resnet18", num_classes=4, decoder_channels=16, atrous_rates=(2, 4, 6))
    return Predictor(model, DataInfo.default(4), device="cpu")


@pytest.fixture
def photograph():
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def test_is_the_arg_max_of_the_network(predictor, photograph):
    images = normalize(photograph, predictor.data.mean, predictor.data.std)[None]
    with torch.inference_mode():
        logits = predictor.model(images)
    mask = predictor(photograph)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, logits.argmax(1)[0].numpy())
    np.testing.assert_allclose(predictor.probabilities(photograph), logits.softmax(1)[0].numpy(), atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(predictor, photograph, tmp_path, orientation):
    upright = Image.fromarray(photograph)
    inverse = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in inverse.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    assert np.array_equal(read_image(path), photograph)
    assert np.array_equal(predictor(path), predictor(photograph))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_any_mode_gives_a_mask_of_the_same_size(predictor, photograph, tmp_path, mode):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(photograph[..., 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(photograph).convert(mode).save(path)
    assert predictor(path).shape == photograph.shape[:2]


def test_files_hold_indices_and_palette(predictor, photograph, tmp_path):
    Image.fromarray(photograph).save(tmp_path / "one.png")
    outcomes = list(
        predict_files(predictor, [tmp_path / "one.png"], tmp_path / "out", ("mask", "overlay", "probability"))
    )
    assert [path.name for path in outcomes[0].written] == ["one.png", "one_overlay.png", "one_probability.npz"]
    mask = predictor(photograph)
    assert np.array_equal(read_mask(tmp_path / "out" / "one.png"), mask)
    with Image.open(tmp_path / "out" / "one.png") as stored:
        assert stored.mode == "P"
        assert np.array_equal(np.array(stored.getpalette()[: 3 * 4]).reshape(-1, 3), predictor.data.palette)
    with Image.open(tmp_path / "out" / "one_overlay.png") as drawn:
        assert drawn.width == 53
        assert drawn.height > 37  # the legend is below
    with np.load(tmp_path / "out" / "one_probability.npz") as saved:
        assert np.array_equal(saved["probability"].argmax(0), mask)
        assert saved["class_names"].tolist() == predictor.data.class_names


def test_one_broken_file_does_not_stop_the_others(predictor, photograph, tmp_path):
    for index in range(3):
        Image.fromarray(photograph).save(tmp_path / f"{index}.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:300])
    outcomes = list(predict_files(predictor, find_images([tmp_path]), tmp_path / "out"))
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "1.jpg" in outcomes[1].error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]


def test_two_inputs_that_would_become_one_file_are_refused(predictor, photograph, tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(photograph).save(tmp_path / name)
    with pytest.raises(InputError, match=r"would both become a\.png: rename one of them"):
        predict_files(predictor, find_images([tmp_path]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_are_files_folders_and_patterns(photograph, tmp_path):
    for name in ("b.jpg", "a.png", "note.txt", ".hidden.png"):
        Image.fromarray(photograph).save(tmp_path / name, format="PNG")
    assert find_images([tmp_path]) == [tmp_path / "a.png", tmp_path / "b.jpg"]
    assert find_images([str(tmp_path / "*.png"), tmp_path / "a.png"]) == [tmp_path / "a.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no image in folder .*empty"):
        find_images([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"no such file, folder or pattern: .*nothing"):
        find_images([tmp_path / "nothing*"])


def test_checkpoint_is_all_that_is_needed(predictor, photograph, tmp_path, no_network):
    data = DataInfo(["a", "b", "c", "d"], [[0, 0, 0], [9, 9, 9], [1, 2, 3], [3, 2, 1]], [0.4] * 3, [0.3] * 3)
    save_model(tmp_path / "model.ckpt", predictor.model, data)
    loaded = Predictor.from_checkpoint(tmp_path / "model.ckpt", device="cpu")
    assert loaded.data == data
    expected = Predictor(predictor.model, data, device="cpu")(photograph)
    assert np.array_equal(loaded(photograph), expected)
    at_8 = Predictor.from_checkpoint(tmp_path / "model.ckpt", output_stride=8, device="cpu")
    assert at_8.model.output_stride == 8


def test_what_is_not_a_checkpoint(tmp_path, photograph):
    with pytest.raises(InputError, match=r"no such file: .*missing.ckpt"):
        load_checkpoint(tmp_path / "missing.ckpt")
    Image.fromarray(photograph).save(tmp_path / "picture.ckpt", format="PNG")
    with pytest.raises(InputError, match=r"picture\.ckpt is not a file of weights"):
        load_checkpoint(tmp_path / "picture.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other\.ckpt is not a checkpoint of seg_attn: `seg-attn import"):
        load_checkpoint(tmp_path / "other.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(InputError, match=r"empty\.ckpt is not a file of weights"):
        load_checkpoint(tmp_path / "empty.ckpt")


def test_a_checkpoint_that_misses_weights_never_predicts(predictor, tmp_path):
    save_model(tmp_path / "model.ckpt", predictor.model, predictor.data)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    del content["state_dict"]["model.classifier.weight"]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(InputError, match=r"1 missing: classifier.weight"):
        Predictor.from_checkpoint(tmp_path / "less.ckpt")
    content["hyper_parameters"]["backbone"] = "resnet7"
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match="do not make a model: unknown backbone 'resnet7'"):
        Predictor.from_checkpoint(tmp_path / "odd.ckpt")
