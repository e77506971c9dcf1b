import numpy as np
import pytest
import torch

from seg_attn import DeepLabV3
from seg_attn.checkpoint import DataInfo, save_model


@pytest.fixture(scope="session")
def data():
    return DataInfo(
        ["sky", "road", "tree", "car"], [[9, 9, 9], [200, 0, 0], [0, 200, 0], [0, 0, 200]], [0.4] * 3, [0.25] * 3
    )


@pytest.fixture(scope="session")
def model():
    """A small network whose masks hold every class."""
    torch.manual_seed(0)
    network = DeepLabV3("resnet18", num_classes=4, decoder_channels=16, atrous_rates=(2, 4, 6)).eval()
    rng = np.random.default_rng(1)
    noise = torch.from_numpy(rng.normal(size=(1, 3, 96, 96))).float()
    with torch.no_grad():
        network.classifier.weight *= 20
        logits = network(noise)
        network.classifier.bias -= logits.mean(dim=(0, 2, 3))
    return network


@pytest.fixture(scope="session")
def trained(model, data, tmp_path_factory):
    """A checkpoint of that network."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    save_model(path, model, data)
    return path


@pytest.fixture
def photograph():
    return np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
