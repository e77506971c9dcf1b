import csv
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from seg_attn.attention import ATTENTION
from seg_attn.classification import (
    ClassificationData,
    ClassificationTask,
    Learned,
    SmallCNN,
    accuracy_table,
    compare_channel_attention,
    read_epochs,
)
from seg_attn.errors import InputError
from seg_attn.norm import BatchNorm2d


def test_se_stands_after_each_relu_and_before_the_pooling():
    with_se = SmallCNN(1, attention="se")
    kinds = [type(module) for module in with_se]
    unit = [nn.Conv2d, BatchNorm2d, nn.ReLU, ATTENTION["se"], nn.MaxPool2d]
    assert kinds == [*unit, *unit, *unit, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    plain = SmallCNN(1)
    assert [type(module) for module in plain if not isinstance(module, nn.Identity)] == [
        kind for kind in kinds if kind is not ATTENTION["se"]
    ]
    # C²/16 · 2 for each of the three widths.
    extra = sum(p.numel() for p in with_se.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 2 * (16 * 1 + 32 * 2 + 64 * 4)


@pytest.mark.parametrize("attention", [None, *ATTENTION])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 32, 32), (2, 3, 9, 13)])
def test_logits_for_images_of_any_size(attention, shape):
    network = SmallCNN(shape[1], attention, widths=(4, 6, 8), num_classes=5)
    logits = network(torch.randn(shape))
    assert logits.shape == (shape[0], 5)
    assert torch.isfinite(logits).all()


def test_wrong_networks():
    with pytest.raises(ValueError, match="in_channels must be an integer of at least 1, got 0"):
        SmallCNN(0)
    with pytest.raises(ValueError, match="unknown attention block 'sse': did you mean 'se'"):
        SmallCNN(1, "sse")


def test_the_digits_are_split_by_class_without_overlap():
    data = ClassificationData("digits")
    (train, train_labels), (val, val_labels) = data.train.tensors, data.val.tensors
    assert (data.channels, len(train) + len(val)) == (1, 1797)
    assert train.shape[1:] == (1, 8, 8)
    assert (train.min(), train.max()) == (0, 1)
    for label in range(10):
        share = (val_labels == label).sum() / ((val_labels == label).sum() + (train_labels == label).sum())
        assert float(share) == pytest.approx(0.25, abs=0.003)
    held_out = {image.numpy().tobytes() for image in val}
    assert not any(image.numpy().tobytes() in held_out for image in train)
    again = ClassificationData("digits", seed=5)
    assert torch.equal(again.val.tensors[0], val)  # one split for all seeds


def test_the_order_depends_on_the_seed_alone():
    def labels(seed):
        return next(iter(ClassificationData("digits", seed=seed).train_dataloader()))[1]

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


def test_accuracy_and_loss_are_those_of_the_logits():
    task = ClassificationTask(nn.Identity())
    logged = {}
    task.log_dict = lambda values, **kwargs: logged.update(values) or logged.update(kwargs)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    loss = task.training_step((logits, torch.tensor([0, 1, 1])), 0)
    expected = np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(3))])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert logged["train/accuracy"].item() == pytest.approx(2 / 3)
    assert logged["batch_size"] == 3
    assert logged["on_epoch"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return compare_channel_attention(tmp_path_factory.mktemp("cnn"), epochs=2, seeds=(0,))


def test_each_network_learns_and_leaves_a_line_per_epoch(learned):
    assert [entry.attention for entry in learned] == ["none", "se"]
    for entry in learned:
        assert [line["epoch"] for line in entry.epochs] == [0, 1]
        assert set(entry.epochs[0]) == {"epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy"}
        assert entry.epochs[1]["train/loss"] < entry.epochs[0]["train/loss"]
        assert entry.accuracy == entry.epochs[1]["val/accuracy"] > 0.7
        assert entry.log.name == "metrics.csv"
        assert f"{entry.attention}_seed0" in str(entry.log)
        with entry.log.open(newline="") as file:
            assert sum(bool(row["val/accuracy"]) for row in csv.DictReader(file)) == 2
    assert learned[1].parameters - learned[0].parameters == 2 * (16 * 1 + 32 * 2 + 64 * 4)


@pytest.mark.exhaustive
def test_runs_repeat_to_the_bit_and_replace_their_log(learned, tmp_path):
    for _ in range(2):
        again = compare_channel_attention(tmp_path, epochs=2, seeds=(0,))
        assert [entry.epochs for entry in again] == [entry.epochs for entry in learned]


@pytest.mark.exhaustive
def test_every_block_learns(tmp_path):
    for entry in compare_channel_attention(tmp_path, attentions=("none", *ATTENTION), epochs=8, seeds=(0,)):
        assert entry.accuracy > 0.93, entry.attention


def test_the_table_has_mean_and_deviation(tmp_path):
    def entry(attention, seed, accuracy, parameters):
        return Learned(attention, seed, parameters, tmp_path, [{"val/accuracy": 0.1}, {"val/accuracy": accuracy}])

    entries = [entry("none", 0, 0.9, 1000), entry("se", 0, 0.95, 1100), entry("none", 1, 0.94, 1000)]
    assert accuracy_table(entries).splitlines()[2:] == [
        "| none | 92.00 ± 2.83 | 2 | 1,000 |",
        "| se | 95.00 | 1 | 1,100 |",
    ]


def test_lines_of_training_and_validation_are_joined(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/loss\n0,9,,0.5\n0,9,0.7,\n1,19,,0.25\n1,19,0.3,\n")
    assert read_epochs(log) == [
        {"epoch": 0, "train/loss": 0.7, "val/loss": 0.5},
        {"epoch": 1, "train/loss": 0.3, "val/loss": 0.25},
    ]


def test_cifar10_is_read_where_it_is(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        pixels = generator.integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8)
        pixels[0, :1024] = 255  # a red first image
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 7]}))
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(InputError, match="no intact CIFAR-10 there"):  # the checksums are not CIFAR-10's
        ClassificationData("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = ClassificationData("cifar10", tmp_path)
    images, labels = data.train.tensors
    assert images.shape == (10, 3, 32, 32)
    assert labels.tolist() == [3, 7] * 5
    assert data.val.tensors[0].shape == (2, 3, 32, 32)
    assert (images[0, 0] == 1).all()
    assert images[0, 1].std() > 0


def test_missing_data_is_said(tmp_path):
    with pytest.raises(InputError, match="cifar10 needs root"):
        ClassificationData("cifar10")
    with pytest.raises(InputError, match="no intact CIFAR-10 there; give the folder that holds cifar-10-batches-py"):
        ClassificationData("cifar10", tmp_path)
    with pytest.raises(ValueError, match="name must be 'digits' or 'cifar10', got 'mnist'"):
        ClassificationData("mnist")
