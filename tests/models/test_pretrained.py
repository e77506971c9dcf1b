"""Backbone weights: from files, from the caches, from servers on this machine; all or nothing, and one clear line."""

import argparse
import hashlib
import http.server
import logging
import socket
import threading
import time
import zipfile
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders import get_encoder
from torchvision.models import ResNet50_Weights, resnet18, resnet50

from seg_attn.errors import InputError
from seg_attn.models import DeepLabV3, pretrained
from seg_attn.models.backbone import AtrousBackbone
from seg_attn.models.pretrained import (
    check_keys,
    load_backbone_state,
    load_backbone_weights,
    read_state_dict,
    read_torch_file,
    weights_follow,
)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of torchvision and Hugging Face."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torchvision = tmp_path / "torch" / "hub" / "checkpoints"
    torchvision.mkdir(parents=True)
    return SimpleNamespace(torchvision=torchvision, hugging_face=tmp_path / "hub")


@pytest.fixture
def offline(monkeypatch):
    """No socket connects and no name resolves; counts who tried."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the network is off")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return resnet18(weights=None).state_dict()


def plain(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def same(backbone, state):
    own = backbone.state_dict()
    return all(torch.equal(own[key], value) for key, value in plain(state).items())


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- caches and network ----------------------------------------------------------------------------------------------


def test_resnet50_is_found_in_torchvisions_hub_cache(caches, offline, caplog):
    state = resnet50(weights=None).state_dict()
    path = caches.torchvision / "resnet50-0676ba61.pth"
    torch.save(state, path)
    assert ResNet50_Weights.IMAGENET1K_V1.url.endswith(path.name)
    with caplog.at_level(logging.INFO, "seg_attn"):
        model = DeepLabV3("resnet50", backbone_weights="imagenet")
    assert offline == []
    assert same(model.backbone, state)
    assert caplog.messages == [f"backbone_weights: 318 tensors of resnet50 from {path} (torchvision IMAGENET1K_V1)"]


def test_the_first_recipe_wins_over_the_second_in_the_cache(caches, offline):
    first, second = resnet50(weights=None).state_dict(), resnet50(weights=None).state_dict()
    torch.save(second, caches.torchvision / ResNet50_Weights.IMAGENET1K_V2.url.rsplit("/", 1)[-1])
    backbone = AtrousBackbone("resnet50")
    assert "IMAGENET1K_V2" in load_backbone_weights(backbone, "resnet50", "imagenet")
    assert same(backbone, second)
    torch.save(first, caches.torchvision / ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1])
    assert "IMAGENET1K_V1" in load_backbone_weights(backbone, "resnet50", "imagenet")
    assert same(backbone, first)


def hub_folder(root, settings):
    folder = root / f"models--{settings['repo_id'].replace('/', '--')}" / "snapshots" / settings["revision"]
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "se_resnet50"])
def test_smps_weights_are_found_in_the_hugging_face_cache(name, caches, offline):
    torch.manual_seed(0)
    state = dict(get_encoder(name).state_dict())
    folder = hub_folder(caches.hugging_face, smp_encoders[name]["pretrained_settings"]["imagenet"])
    save_file(state, folder / "model.safetensors")
    backbone = AtrousBackbone(name)
    said = load_backbone_weights(backbone, name, "imagenet")
    assert offline == []
    assert same(backbone, state)
    assert said.endswith(f"(SMP, smp-hub/{name}.imagenet)")


def test_without_cache_and_network_one_clear_line_at_once(caches, offline, capfd):
    start = time.perf_counter()
    with pytest.raises(InputError) as raised:
        DeepLabV3("resnet50", backbone_weights="imagenet")
    assert time.perf_counter() - start < 5
    said = one_line(raised)
    assert said.startswith("the ImageNet weights of resnet50 are neither cached nor reachable (")
    for part in ("resnet50-0676ba61.pth", "smp-hub/resnet50.imagenet", "huggingface.co: ", "download.pytorch.org: "):
        assert part in said
    assert said.endswith(
        "set backbone_weights to null to start at random, or to a state dict file (.pth, .safetensors)"
    )
    assert offline
    # The one line is the command line's to print: nothing else may reach the terminal.
    assert capfd.readouterr() == ("", "")


def test_a_backbone_that_has_no_imagenet_weights(caches, offline):
    with pytest.raises(InputError, match="there are no ImageNet weights of resnext101_32x48d: set backbone_weights to"):
        load_backbone_weights(AtrousBackbone("resnet18"), "resnext101_32x48d", "imagenet")
    assert offline == []


@pytest.fixture
def server(tmp_path):
    """A server on this machine: files by path, and the answers it was asked for."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path))
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", self.path.split("/")[-2])
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield SimpleNamespace(files=files, asked=asked, url=f"http://127.0.0.1:{httpd.server_port}")
        httpd.shutdown()
        thread.join()


@pytest.fixture
def released(server, caches, weights, tmp_path, monkeypatch):
    """Torchvision's file of ResNet-18, with random weights, on that server; Hugging Face's hub is that server too."""
    torch.save(weights, tmp_path / "file.pth")
    content = (tmp_path / "file.pth").read_bytes()
    path = f"/models/resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[path] = content
    released = SimpleNamespace(url=server.url + path, name="IMAGENET1K_V1")
    monkeypatch.setattr(pretrained, "get_model_weights", lambda name: [released] if name == "resnet18" else [])
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    local = template.replace(huggingface_hub.constants.ENDPOINT, server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", local)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    return released


def test_torchvisions_weights_are_downloaded_once_and_then_cached(released, server, caches, weights):
    backbone = AtrousBackbone("resnet18")
    assert load_backbone_weights(backbone, "resnet18", "imagenet") == (
        f"backbone_weights: 120 tensors of resnet18 from {released.url} (torchvision IMAGENET1K_V1)"
    )
    assert same(backbone, weights)
    # Hugging Face was asked first, and did not have them.
    assert any("smp-hub/resnet18.imagenet" in path for _, path in server.asked)
    server.files.clear()
    server.asked.clear()
    again = AtrousBackbone("resnet18")
    assert str(caches.torchvision) in load_backbone_weights(again, "resnet18", "imagenet")
    assert same(again, weights)
    assert server.asked == []


def test_a_damaged_download_is_refused(released, server, caches):
    (path,) = server.files
    server.files[path] = server.files[path][:-1000] + bytes(1000)
    with pytest.raises(InputError, match=r"neither cached nor reachable .*127.0.0.1:.*invalid hash") as raised:
        load_backbone_weights(AtrousBackbone("resnet18"), "resnet18", "imagenet")
    one_line(raised)
    assert list(caches.torchvision.iterdir()) == []


def test_smps_weights_are_downloaded(released, server, tmp_path, caches, weights):
    settings = smp_encoders["resnet18"]["pretrained_settings"]["imagenet"]
    save_file(plain(weights), tmp_path / "model.safetensors")
    path = f"/{settings['repo_id']}/resolve/{settings['revision']}/model.safetensors"
    server.files[path] = (tmp_path / "model.safetensors").read_bytes()
    backbone = AtrousBackbone("resnet18")
    assert load_backbone_weights(backbone, "resnet18", "imagenet").endswith(f"{server.url}{path} (SMP)")
    assert same(backbone, weights)
    server.files.clear()
    assert load_backbone_weights(backbone, "resnet18", "imagenet").endswith("(SMP, smp-hub/resnet18.imagenet)")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
def test_files_with_wrappers_and_prefixes(wrapper, prefix, weights, tmp_path):
    state = {prefix + key: value for key, value in weights.items()}
    torch.save(state if wrapper is None else {"epoch": 3, wrapper: state}, tmp_path / "w.pth")
    backbone = AtrousBackbone("resnet18")
    said = load_backbone_weights(backbone, "resnet18", tmp_path / "w.pth")
    assert said == f"backbone_weights: 120 tensors of resnet18 from {tmp_path / 'w.pth'}"
    assert same(backbone, weights)


def test_safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    backbone = AtrousBackbone("resnet18")
    load_backbone_weights(backbone, "resnet18", tmp_path / "w.safetensors")
    assert same(backbone, weights)


def test_old_files_without_batch_counters(weights):
    backbone = AtrousBackbone("resnet18")
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert load_backbone_state(backbone, old, "an old file") == 100
    assert same(backbone, old)


def test_one_image_channel_sums_the_kernels(weights, images):
    backbone = AtrousBackbone("resnet18", in_channels=1)
    load_backbone_state(backbone, weights, "w")
    grey = images(1, 1, 33, 33).float()
    expected = torch.nn.functional.conv2d(grey.expand(1, 3, 33, 33), weights["conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(backbone.conv1(grey), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_channels", [2, 4, 7])
def test_other_image_channels_repeat_the_kernels_as_smp_does(in_channels, weights):
    backbone = AtrousBackbone("resnet18", in_channels=in_channels)
    load_backbone_state(backbone, weights, "w")
    theirs = get_encoder("resnet18")
    theirs.load_state_dict(dict(weights))
    theirs.set_in_channels(in_channels, pretrained=True)
    assert torch.equal(backbone.conv1.weight, theirs.conv1.weight)
    assert same(backbone, {key: value for key, value in weights.items() if key != "conv1.weight"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.1.bn2.bias"), "1 missing: layer3.1.bn2.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (
            lambda s: s.update({"layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)}),
            r"1 of another shape: layer1.0.conv1.weight \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)",
        ),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("layer4")],
            r"25 missing: layer4.0.conv1.weight, .*, \.\.\. \(17 more\)",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(change, message, weights, tmp_path):
    state = dict(weights)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    torch.manual_seed(1)
    backbone = AtrousBackbone("resnet18")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(InputError, match=message) as raised:
        load_backbone_weights(backbone, "resnet18", tmp_path / "w.pth")
    assert one_line(raised).startswith(f"the weights of {tmp_path / 'w.pth'} do not fit the model: ")
    assert same(backbone, before)


def test_another_networks_weights_are_refused(weights):
    with pytest.raises(InputError, match=r"missing: .* unexpected: .* of another shape"):
        check_keys({"a": torch.ones(1), "c": torch.ones(2)}, {"b": torch.ones(1), "c": torch.ones(3)}, "w")
    with pytest.raises(InputError, match="do not fit the model: 165 missing"):
        load_backbone_state(AtrousBackbone("resnet50"), weights, "resnet18's")


def test_a_mistyped_name_and_a_missing_file():
    with pytest.raises(InputError, match=r"backbone_weights must be 'imagenet' or a state dict file: .* file imagnet"):
        DeepLabV3("resnet18", backbone_weights="imagnet")
    with pytest.raises(InputError, match=r"no such file: nowhere.pth"):
        read_torch_file("nowhere.pth")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_not_opened(weights, tmp_path):
    torch.save({"state_dict": weights, "extra": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"is not opened: it pickles \S*open, and a pickled object can run code"
    ) as raised:
        read_state_dict(tmp_path / "w.pth")
    one_line(raised)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_says_how_to_save(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"it pickles torch.nn.modules.linear.Linear.*torch.save\(model.state_dict\(\)"
    ):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".pth", b"", "is not a file of weights, or not whole"),
        (".pth", b"<!DOCTYPE html><html>404</html>", "is not a file of weights"),
        (".pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not a file of weights"),
        (".pth", bytes(range(256)) * 8, "is not a file of weights"),
        (".safetensors", b"\x10", "is not a file of weights"),
        (".safetensors", b"\xff" * 64, "is not a file of weights"),
    ],
)
def test_files_that_are_no_weights(suffix, content, message, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_state_dict(path)
    assert one_line(raised).startswith(str(path))


def test_truncated_and_tensorless_files(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("cut.pth", "is not a file of weights, or not whole"),
        ("none.pth", "holds no tensors: a state dict"),
        ("list.pth", "holds a list, not a dictionary of weights"),
    ):
        with pytest.raises(InputError, match=message):
            read_state_dict(tmp_path / name)


def rename_numpy(source, target):
    """Rewrite a checkpoint as one that an older NumPy has written."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            assert not entry.filename.endswith("data.pkl") or b"numpy._core.multiarray" in content
            new.writestr(entry, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def test_plain_values_beside_the_weights_are_read(weights, tmp_path):
    arguments = argparse.Namespace(lr=0.01, data="/data", epochs=[1, 2])
    beside = {"best_score": np.float64(0.77), "epoch": np.int64(3), "fine": np.bool_(True), "args": arguments}
    torch.save({"model_state": weights, **beside}, tmp_path / "new.pth")
    rename_numpy(tmp_path / "new.pth", tmp_path / "old.pth")
    for path in (tmp_path / "new.pth", tmp_path / "old.pth"):
        content = read_torch_file(path)
        assert {key: content[key] for key in beside} == beside
        assert read_state_dict(path).keys() == weights.keys()


def test_weights_follow_from_a_checkpoint_without_a_download(offline):
    with weights_follow():
        model = DeepLabV3("resnet18", backbone_weights="imagenet")
    assert offline == []
    assert model.config["backbone_weights"] == "imagenet"
    with pytest.raises(InputError):
        DeepLabV3("resnet18", backbone_weights="/nowhere.pth")
