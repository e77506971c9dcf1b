"""Settings of every test: one thread per test process, no network, real data where it is."""

import os
import socket
from pathlib import Path

import pytest
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every connection but to this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"network is blocked in this test: {address}")
        return connect(self, address)

    def resolve(host, *args, **kwargs):
        raise socket.gaierror(f"network is blocked in this test: {host}")

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs and labels, which is not part of the project."""
    folder = Path(os.environ.get("SEG_ATTN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set SEG_ATTN_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def devkit(tmp_path_factory) -> Path:
    """A root with a small sample devkit: 6 training and 3 validation scenes of 64 x 48."""
    from seg_attn.data.sample import write_sample

    root = tmp_path_factory.mktemp("sample")
    write_sample(root, train=6, val=3, size=(64, 48))
    return root


@pytest.fixture(scope="session")
def config(devkit, tmp_path_factory) -> Path:
    """A config that fits a very small network on `devkit` for two epochs."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(
        f"""
seed_everything: 1
model:
  backbone: resnet18
  num_classes: 9
  decoder_channels: 16
  atrous_rates: [2, 4, 6]
  lr: 0.05
data:
  class_path: VOCDataModule
  init_args:
    root: {devkit}
    batch_size: 2
    num_workers: 0
    crop_size: 32
trainer:
  max_epochs: 2
"""
    )
    return path


@pytest.fixture(scope="session")
def run_folder(config, tmp_path_factory) -> Path:
    """The folder of a run of `config`."""
    from seg_attn.cli import main

    root = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(root)]) == 0
    return root / "fit" / "version_0"


@pytest.fixture(scope="session")
def checkpoint(run_folder) -> Path:
    """The best checkpoint of that run."""
    return run_folder / "checkpoints" / "best.ckpt"
