"""Export: a file that computes what the network computes, at sizes it has not seen, or no file at all."""

import json

import numpy as np
import pytest
import torch

from seg_attn import DeepLabV3, export
from seg_attn.checkpoint import DataInfo, save_model
from seg_attn.cli import main
from seg_attn.data.images import normalize
from seg_attn.errors import InputError
from seg_attn.export import export_model

SIZE = (65, 97)
SHAPES = [(1, 130, 71), (3, 66, 98)]
DATA = DataInfo(["sky", "sea", "sand"], [[0, 0, 0], [1, 2, 3], [9, 9, 9]], [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepLabV3("resnet18", num_classes=3, decoder_channels=16, output_stride=8, image_pooling="attention").eval()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    exported = export_model(model, DATA, path, size=SIZE)
    assert exported.error <= 1e-4
    assert exported.equal_pixels > 0.999
    assert exported.checked_size != SIZE
    return path


def test_onnx_gives_the_networks_logits_at_other_sizes(model, onnx_file):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for batch, height, width in SHAPES:
        images = torch.randn(batch, 3, height, width)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            expected = model(images).numpy()
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    about = json.loads(session.get_modelmeta().custom_metadata_map["seg_attn"])
    assert about == {**DATA.as_dict(), "output_stride": 8, "output": "logits"}
    assert [path.name for path in onnx_file.parent.iterdir()] == ["model.onnx"]


def test_pt2_takes_bytes_and_gives_classes(model, tmp_path):
    path = tmp_path / "new" / "model.pt2"
    exported = export_model(model, DATA, path, size=SIZE, normalize=True, output="classes")
    assert exported.error is None
    assert exported.equal_pixels > 0.999
    extra = {"seg_attn.json": ""}
    network = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["seg_attn.json"])["class_names"] == ["sky", "sea", "sand"]
    for batch, height, width in SHAPES:
        pictures = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        classes = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        assert classes.dtype == torch.uint8
        with torch.no_grad():
            expected = model(torch.stack([normalize(picture, DATA.mean, DATA.std) for picture in pictures])).argmax(1)
        assert (classes == expected).float().mean() > 0.999
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda images, logits: 1.01 * logits, "relative error 1.0e-02"),
        (lambda images, logits: logits[..., :-1], "in place of"),
        (lambda images, logits: logits.flatten().item(), "does not run at 97x97"),
    ],
)
def test_a_file_that_computes_something_else_is_not_left(model, tmp_path, monkeypatch, wrong, message):
    def write(program, path, about):
        path.write_text("wrong")
        return lambda images: wrong(images, model(images))

    monkeypatch.setattr(export, "_write_pt2", write)
    with pytest.raises(InputError, match=message):
        export_model(model, DATA, tmp_path / "model.pt2", size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("model.pth", {}, InputError, "name a .onnx or a .pt2 file"),
        ("model.pt2", {"output": "mask"}, ValueError, "output must be 'logits' or 'classes', got 'mask'"),
        ("model.pt2", {"size": (20, 97)}, ValueError, "at least 32 each"),
    ],
)
def test_wrong_arguments(model, tmp_path, name, options, kind, message):
    with pytest.raises(kind, match=message):
        export_model(model, DATA, tmp_path / name, **{"size": SIZE, **options})
    assert not list(tmp_path.iterdir())


def test_normalising_is_for_rgb(tmp_path):
    network = DeepLabV3("resnet18", num_classes=3, in_channels=4, decoder_channels=16)
    with pytest.raises(InputError, match="takes 4 channels"):
        export_model(network, DATA, tmp_path / "model.pt2", size=SIZE, normalize=True)


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx, onnxscript, onnxruntime: pip install 'seg_attn\[export\]'"):
        export_model(model, DATA, tmp_path / "model.onnx", size=SIZE)


def test_the_command(model, tmp_path, capsys):
    save_model(tmp_path / "c.ckpt", model, DATA)
    arguments = ["export", "--ckpt_path", str(tmp_path / "c.ckpt"), "--output", str(tmp_path / "m.pt2")]
    assert main([*arguments, "--output_stride", "16", "--size", "97", "65"]) == 0
    assert "(output stride 16, traced at 97x65); run at 97x97: logits differ by" in capsys.readouterr().out
    images = torch.randn(1, 3, 80, 100)
    at_16 = DeepLabV3(**{**model.config, "output_stride": 16}).eval()
    at_16.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = at_16(images)
        logits = torch.export.load(tmp_path / "m.pt2").module()(images)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (model(images) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert main(["export", "--ckpt_path", str(tmp_path / "no.ckpt"), "--output", str(tmp_path / "m.onnx")]) == 2
    assert main([*arguments[:-1], str(tmp_path)]) == 2
