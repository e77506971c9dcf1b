"""The command line, in-process: the whole way from data to masks, and what a user sees when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18

from seg_attn.cli import main
from seg_attn.data.images import read_mask
from seg_attn.data.sample import write_sample

pytestmark = pytest.mark.filterwarnings("ignore:atrous rate")


def _error(capsys, arguments, code=2):
    """Run a command that must fail; return its one line."""
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def _miou_of_files(predictions, labels, num_classes):
    """Plain NumPy: one count per pair of classes over all files, 255 left out, mean over classes that occur."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for path in labels:
        with Image.open(path) as label, Image.open(predictions / path.name) as predicted:
            target, prediction = np.array(label), np.array(predicted)
        assert prediction.shape == target.shape
        for true in range(num_classes):
            for guessed in range(num_classes):
                confusion[true, guessed] += ((target == true) & (prediction == guessed)).sum()
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return np.mean((np.diag(confusion) / np.maximum(union, 1))[union > 0])


def _val_files(devkit):
    folder = devkit / "VOCdevkit" / "VOC2012"
    names = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    return images, [folder / "SegmentationClass" / f"{name}.png" for name in names]


def test_fit_leaves_everything_a_run_needs(run_folder):
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (run_folder / "checkpoints").iterdir()}
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert saved["model"]["backbone"] == "resnet18"
    assert list(run_folder.glob("events.out.tfevents.*"))
    assert "val/miou" in (run_folder / "metrics.csv").read_text().splitlines()[0]
    with Image.open(run_folder / "panels" / "epoch_0000.png") as panel:
        assert panel.size == (3 * 64, 3 * (48 + 4))  # photograph, label, prediction; three images


def test_only_an_epoch_with_a_validation_shows_one(config, tmp_path, capsys):
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", "3"]
    assert main([str(argument) for argument in [*arguments, "--trainer.check_val_every_n_epoch", "2"]]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val/miou" in line for line in lines] == [False, True, False]


def test_the_figure_is_true(checkpoint, config, devkit, tmp_path, capsys):
    images, labels = _val_files(devkit)
    arguments = ["test", "--config", config, "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "test" / "version_0" / "test_metrics.json").read_text())
    assert f"written: {tmp_path / 'test' / 'version_0' / 'test_metrics.json'}" in printed
    assert re.search(rf"mean IoU +{100 * written['miou']:.2f}", printed)
    assert all(name in printed for name in written["per_class"])

    predicted = ["predict", "--ckpt_path", checkpoint, "--output", tmp_path / "masks", "--input", *images]
    assert main([str(argument) for argument in predicted]) == 0
    counted = _miou_of_files(tmp_path / "masks", labels, 9)
    assert written["miou"] == pytest.approx(counted, abs=1e-12)
    rows = (tmp_path / "test" / "version_0" / "test_metrics.csv").read_text().splitlines()
    assert rows[-1] == f"mean,{written['miou']!r}"


def test_what_is_typed_wins_over_the_checkpoint(checkpoint, config, tmp_path, capsys):
    base = ["--config", config, "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path]
    reports = []
    for version, typed in enumerate(([], ["--model.output_stride", "8"])):
        assert main([str(argument) for argument in ["test", *base, *typed]]) == 0
        path = tmp_path / "test" / f"version_{version}" / "test_metrics.json"
        reports.append(json.loads(path.read_text()))
    assert [report["output_stride"] for report in reports] == [16, 8]
    assert reports[0]["confusion"] != reports[1]["confusion"]
    assert "model.output_stride: 8 as given, instead of the checkpoint's 16" in capsys.readouterr().err


def test_a_second_config_wins_over_the_checkpoint(checkpoint, config, tmp_path, capsys):
    overlay = tmp_path / "os8.yaml"
    overlay.write_text("model:\n  output_stride: 8\n")
    arguments = ["validate", "--config", config, "--config", overlay, "--ckpt_path", checkpoint]
    assert main([str(a) for a in [*arguments, "--trainer.default_root_dir", tmp_path]]) == 0
    report = json.loads((tmp_path / "validate" / "version_0" / "validate_metrics.json").read_text())
    assert report["output_stride"] == 8


def test_another_network_than_the_checkpoints_is_said(checkpoint, config, tmp_path, capsys):
    arguments = ["test", "--config", config, "--ckpt_path", checkpoint, "--model.fusion", "iaff"]
    line = _error(capsys, [*arguments, "--trainer.default_root_dir", tmp_path])
    assert "model.fusion is 'iaff' here and 'aff' in the checkpoint" in line
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("fit", "validate", "test", "predict", "data"))
    assert main(["--version"]) == 0
    assert re.fullmatch(r"seg-attn \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_unknown_command_names_the_closest(capsys):
    assert "unknown command 'pedict'. Did you mean 'predict'?" in _error(capsys, ["pedict"])


def test_missing_config(capsys):
    assert "nowhere.yaml" in _error(capsys, ["fit", "--config", "nowhere.yaml"])


def test_missing_checkpoint(config, capsys, tmp_path):
    for command in (["test", "--config", config], ["predict", "--input", config, "--output", tmp_path / "out"]):
        line = _error(capsys, [*command, "--ckpt_path", tmp_path / "none.ckpt"])
        assert line.startswith("error: no such file: ")
        assert "none.ckpt" in line
    assert not (tmp_path / "out").exists()


def test_a_renamed_picture_is_not_a_checkpoint(config, devkit, capsys, tmp_path):
    fake = tmp_path / "best.ckpt"
    fake.write_bytes(_val_files(devkit)[1][0].read_bytes())
    for command in (["test", "--config", config], ["predict", "--input", fake, "--output", tmp_path / "out"]):
        assert "is not a file of weights" in _error(capsys, [*command, "--ckpt_path", fake])
    assert not (tmp_path / "out").exists()


def test_class_count_of_model_and_data(config, capsys, tmp_path):
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path / "runs"]
    line = _error(capsys, [*arguments, "--model.num_classes", "5"])
    assert "the model has 5 classes and the data 9" in line
    assert "set model.num_classes to 9" in line
    assert not (tmp_path / "runs").exists()


def test_empty_input_folder(checkpoint, capsys, tmp_path):
    (tmp_path / "in").mkdir()
    arguments = ["predict", "--ckpt_path", checkpoint, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert "no image in folder" in _error(capsys, arguments)
    assert not (tmp_path / "out").exists()


def test_root_that_is_no_devkit(config, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path / "runs"]
    line = _error(capsys, [*arguments, "--data.root", tmp_path / "data"])
    assert "VOCdevkit/VOC2012" in line
    assert not (tmp_path / "runs").exists()


def _broken_devkit(tmp_path, change):
    root = tmp_path / "data"
    write_sample(root, train=2, val=1, size=(64, 48))
    folder = root / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    path = sorted(folder.glob("*train*"))[0]
    with Image.open(path) as image:
        palette, mask = image.getpalette(), np.array(image)
    changed = Image.fromarray(change(mask))
    changed.putpalette(palette)
    changed.save(path)
    return root, path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: np.where(mask == 0, 77, mask).astype(np.uint8), "77"),
        (lambda mask: mask[:-3], "45"),
    ],
    ids=["labels beyond num_classes", "mask of another size"],
)
def test_broken_labels_name_their_file(config, capsys, tmp_path, change, message):
    root, path = _broken_devkit(tmp_path, change)
    arguments = ["fit", "--config", config, "--data.root", root, "--trainer.default_root_dir", tmp_path / "runs"]
    line = _error(capsys, arguments)
    assert path.name in line
    assert message in line


def test_unknown_backbone_names_the_closest(config, capsys, tmp_path):
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path / "runs"]
    line = _error(capsys, [*arguments, "--model.backbone", "resnet51"])
    assert "unknown backbone 'resnet51': did you mean 'resnet50'?" in line
    assert not (tmp_path / "runs").exists()


def test_unknown_argument(config, capsys):
    assert "outputstride" in _error(capsys, ["fit", "--config", config, "--model.outputstride", "8"])
    assert "--nonsense" in _error(
        capsys, ["predict", "--ckpt_path", "x", "--input", "y", "--output", "z", "--nonsense"]
    )


def test_a_corrupt_image_among_ten(checkpoint, devkit, capsys, tmp_path):
    source = _val_files(devkit)[0][0].read_bytes()
    for index in range(10):
        (tmp_path / f"{index}.jpg").write_bytes(source if index != 4 else source[: len(source) // 3])
    arguments = ["predict", "--ckpt_path", checkpoint, "--input", tmp_path, "--output", tmp_path / "out"]
    line = _error(capsys, arguments, code=1)
    assert "4.jpg" in line
    masks = [f"{i}.png" for i in range(10) if i != 4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*masks, "summary.csv"]
    assert read_mask(tmp_path / "out" / "0.png").shape == (48, 64)


def test_debug_shows_the_traceback(tmp_path):
    from seg_attn.errors import InputError

    with pytest.raises(InputError):
        main(["--debug", "predict", "--ckpt_path", str(tmp_path / "x"), "--input", __file__, "--output", str(tmp_path)])


def test_imagenet_weights_offline_are_one_line(config, capsys, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    line = _error(capsys, ["fit", "--config", config, "--model.backbone_weights", "imagenet"])
    assert "set backbone_weights to null" in line


def test_what_was_loaded_is_said(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.pth"
    torch.save(resnet18(weights=None).state_dict(), path)
    arguments = ["fit", "--config", config, "--model.backbone_weights", path, "--trainer.fast_dev_run", "true"]
    assert main([str(argument) for argument in arguments]) == 0
    assert f"backbone_weights: 120 tensors of resnet18 from {path}" in capsys.readouterr().err.splitlines()
    assert list(tmp_path.iterdir()) == [path], "a dry run leaves nothing behind"


def test_a_checkpoint_from_imagenet_weights_needs_no_network(
    checkpoint, config, devkit, tmp_path, monkeypatch, no_network
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["backbone_weights"] = "imagenet"
    torch.save(content, tmp_path / "imagenet.ckpt")
    image = _val_files(devkit)[0][0]
    predict = ["predict", "--ckpt_path", tmp_path / "imagenet.ckpt", "--input", image, "--output", tmp_path / "out"]
    test = ["test", "--config", config, "--ckpt_path", tmp_path / "imagenet.ckpt"]
    for arguments in (predict, [*test, "--trainer.default_root_dir", tmp_path]):
        assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_resumed(config, tmp_path, signum):
    root = tmp_path / "runs"
    arguments = ["--config", config, "--trainer.default_root_dir", root, "--data.num_workers", "1"]
    command = [sys.executable, "-m", "seg_attn", "fit", *arguments, "--trainer.max_epochs", "500"]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("epoch 2/"):
                break
        started = time.monotonic()
        os.killpg(process.pid, signum)  # as a terminal and a scheduler do: every process of the job
        seen.append(process.stdout.read())
    said = "".join(seen)
    assert process.returncode == 128 + signum, said
    assert time.monotonic() - started < 25
    saved = root / "fit" / "version_0" / "checkpoints" / "interrupted.ckpt"
    assert f"--ckpt_path {saved}" in said
    assert "Traceback" not in said
    content = torch.load(saved, weights_only=True)
    stopped_at, epochs = content["global_step"], content["epoch"] + 2
    assert stopped_at >= 6
    resumed = ["fit", *arguments, "--ckpt_path", saved, "--trainer.max_epochs", epochs]
    assert main([str(argument) for argument in resumed]) == 0
    last = torch.load(root / "fit" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3 * epochs


def test_data_sample(tmp_path, capsys, monkeypatch):
    from seg_attn.commands import data

    monkeypatch.setattr(data, "write_sample", lambda root, seed: write_sample(root, seed=seed, train=2, val=1))
    assert main(["data", "sample", str(tmp_path), "--seed", "3"]) == 0
    assert str(tmp_path / "VOCdevkit" / "VOC2012") in capsys.readouterr().out
    assert Path(tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").is_file()
