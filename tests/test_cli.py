"""The command line, in-process: the whole way from data to masks, and what a user sees when something is wrong."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18

from seg_attn.attention import ATTENTION, SqueezeExcite
from seg_attn.callbacks import PlainProgress
from seg_attn.cli import main
from seg_attn.data import MaskFolderDataModule, SampleDataModule, VOCDataModule, progress
from seg_attn.data.images import read_mask
from seg_attn.data.sample import write_sample
from seg_attn.models import DeepLabV3
from seg_attn.task import SegmentationTask

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
    beside = ["--model.output_stride", "8", "--model.backbone_weights", "imagenet", "--model.dropout", "0.1"]
    line = _error(capsys, [*arguments, *beside, "--trainer.default_root_dir", tmp_path])
    assert "holds another network: model.fusion is 'iaff' here and 'aff' in the checkpoint; leave out" in line
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


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--data.batch_size 0", "batch_size must be at least 1, got 0"),
        ("--data.std [1,1]", "mean and std must hold three numbers each, std positive, got [0.485, 0.456, 0.406] and"),
        ("--data.scale [2,1]", "scale must be (smallest, largest) with 0 < smallest <= largest, got (2.0, 1.0)"),
        ("--data.batch_size x", "data.batch_size: expected int, got x"),
        ("--data.crop_size [a]", "data.crop_size: expected int, got a"),
        (
            "--data.nope 3",
            "data: Problem with given class_path 'seg_attn.VOCDataModule': Option 'nope' is not accepted",
        ),
        ("--data Nope", "data: expected known class, got Nope"),
        ("--model.lr x", "model.lr: expected float, got x"),
        ("--model.optimizer nope", "model.optimizer: expected 'sgd', 'adamw', got nope"),
        ("--seed_everything x", "seed_everything: expected bool or int, got x"),
        ("--trainer.precision nope", "trainer.precision: expected int or 'transformer-engine', "),
        ("--trainer.accelerator nonsense", "trainer.accelerator nonsense: You selected an invalid accelerator name"),
        ("--trainer.strategy nope", "trainer.strategy nope: You selected an invalid strategy name"),
        ("--trainer.limit_val_batches 7.5", "trainer.limit_val_batches 7.5: You have passed invalid value 7.5"),
    ],
)
def test_a_bad_value_names_its_argument(config, capsys, tmp_path, typed, line):
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path / "runs", *typed.split(" ")]
    said = _error(capsys, arguments)
    assert said.startswith(f"error: {line}")
    assert "Union" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(config, capsys, tmp_path):
    arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "gpu"]
    line = "error: trainer.accelerator gpu: No supported gpu backend found; give another value, or leave it out"
    assert _error(capsys, arguments) == line


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_no_data(capsys, command):
    line = f"error: no data: give --config FILE, or --data and --data.root DIR (see `seg-attn {command} --help`)"
    assert _error(capsys, [command]) == line


@pytest.mark.parametrize("command", ["validate", "test"])
def test_random_weights_are_not_scored(config, checkpoint, capsys, tmp_path, command):
    base = [command, "--config", config, "--trainer.default_root_dir", tmp_path / "runs"]
    line = _error(capsys, [*base, "--data.root", tmp_path / "nowhere"])
    assert f"--ckpt_path is missing: name the checkpoint to {command}" in line
    assert not (tmp_path / "runs").exists()
    for number, weights in enumerate((["--ckpt_path", checkpoint], ["--model.init_from", checkpoint])):
        assert main([str(argument) for argument in [*base, *weights]]) == 0
        assert (tmp_path / "runs" / command / f"version_{number}" / f"{command}_metrics.json").is_file()
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").rglob("*_metrics.json"))]
    assert written[0]["confusion"] == written[1]["confusion"]


def test_images_are_normalised_as_in_training(config, devkit, tmp_path, capsys):
    base = ["--config", config, "--trainer.default_root_dir", tmp_path]
    typed = ["--data.mean", "[0.1, 0.8, 0.3]", "--data.std", "[0.3, 0.2, 0.6]"]
    assert main([str(argument) for argument in ["fit", *base, *typed, "--trainer.max_epochs", "1"]]) == 0
    last = tmp_path / "fit" / "version_0" / "checkpoints" / "last.ckpt"
    images, labels = _val_files(devkit)
    predict = ["predict", "--ckpt_path", last, "--output", tmp_path / "masks", "--input", *images]
    assert main([str(argument) for argument in predict]) == 0
    capsys.readouterr()

    def tested(number, *more):
        assert main([str(argument) for argument in ["test", *base, *more]]) == 0
        return json.loads((tmp_path / "test" / f"version_{number}" / "test_metrics.json").read_text())

    report = tested(0, "--ckpt_path", last)
    assert report["miou"] == pytest.approx(_miou_of_files(tmp_path / "masks", labels, 9), abs=1e-12)
    assert tested(1, "--model.init_from", last)["confusion"] == report["confusion"]
    assert tested(2, "--ckpt_path", last, *typed)["confusion"] == report["confusion"]
    assert "warning: images" not in capsys.readouterr().err
    assert tested(3, "--ckpt_path", last, "--data.mean", "[0.5, 0.5, 0.5]")["confusion"] != report["confusion"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: images")]
    assert said == [
        "warning: images are normalised as given (data.mean [0.5, 0.5, 0.5]), "
        f"not as in the training of {last} (mean [0.1, 0.8, 0.3])"
    ]

    assert main([str(argument) for argument in ["fit", *base, "--ckpt_path", last]]) == 0
    resumed = torch.load(tmp_path / "fit" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["data"]["mean"] == [0.1, 0.8, 0.3]
    assert resumed["data"]["std"] == [0.3, 0.2, 0.6]


def test_data_of_ones_own_need_no_mean(checkpoint, config, devkit, tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        f"""
from pytorch_lightning import LightningDataModule
from seg_attn.data import VOCDataModule

class OwnData(LightningDataModule):
    def test_dataloader(self):
        return VOCDataModule({str(devkit)!r}, num_workers=0).test_dataloader()
"""
    )
    (tmp_path / "own.yaml").write_text("data: own_data.OwnData\n")
    monkeypatch.syspath_prepend(tmp_path)
    base = ["--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path]
    for chosen in (config, tmp_path / "own.yaml"):
        assert main([str(argument) for argument in ["test", "--config", chosen, *base]]) == 0
    reports = [json.loads((tmp_path / "test" / f"version_{i}" / "test_metrics.json").read_text()) for i in (0, 1)]
    assert reports[0]["confusion"] == reports[1]["confusion"]


@pytest.mark.parametrize("owner", [DeepLabV3, SegmentationTask, VOCDataModule, MaskFolderDataModule, SampleDataModule])
def test_null_on_the_command_line_is_none(owner):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, "it", skip={"model", "root"})
    signature = inspect.signature(owner).parameters.values()
    names = [argument.name for argument in signature if "None" in str(argument.annotation)]
    assert names
    for name in names:
        parsed = parser.parse_args([f"--it.{name}", "null"])
        assert parsed[f"it.{name}"] is None, name


def test_no_backbone_weights_on_the_command_line(config, capsys, tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlay = tmp_path / "imagenet.yaml"
    overlay.write_text("model:\n  backbone_weights: imagenet\ntrainer:\n  fast_dev_run: true\n")
    arguments = ["fit", "--config", config, "--config", overlay, "--model.backbone_weights", "null"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "backbone_weights" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "summary"])
def test_help_names_the_registered_blocks(command, capsys, monkeypatch):
    monkeypatch.setitem(ATTENTION, "brand_new", SqueezeExcite)
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Names: {', '.join(ATTENTION)}." in shown
    assert "brand_new" in shown


def test_long_work_says_how_far_it_is(config, checkpoint, capsys, tmp_path, monkeypatch):
    base = ["--config", config, "--trainer.default_root_dir", tmp_path]

    def lines(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if " of " in line and "warning" not in line]

    evaluate = [*base, "--ckpt_path", checkpoint]
    assert lines("test", *evaluate) == [], "short work says nothing extra"
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert lines("test", *evaluate) == [f"test: {done} of 3" for done in (1, 2, 3)]
    assert lines("validate", *evaluate) == [f"validation: {done} of 3" for done in (1, 2, 3)]
    assert lines("fit", *base, "--trainer.max_epochs", "1") == [
        *(f"epoch 1/1: {done} of 3" for done in (1, 2, 3)),
        *(f"validation: {done} of 3" for done in (1, 2, 3)),
    ]


def test_one_process_of_many_says_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    for first in (False, True):
        trainer = SimpleNamespace(is_global_zero=first, num_test_batches=[2])
        plain = PlainProgress()
        plain.on_test_start(trainer, None)
        plain.on_test_batch_end(trainer, None, None, None, 0)
    assert capsys.readouterr().err == "test: 1 of 2\n"


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


def test_debug_shows_the_traceback_and_changes_nothing_else(tmp_path, capsys, monkeypatch):
    predict = ["predict", "--ckpt_path", str(tmp_path / "x"), "--input", __file__, "--output", str(tmp_path)]
    for arguments in (predict, ["fit", "--nonsense", "3"]):
        line = _error(capsys, arguments)
        assert main(["--debug", *arguments]) == 2
        shown = capsys.readouterr().err.splitlines()
        assert any(text.startswith("Traceback") for text in shown)
        assert shown[-1] == line

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("seg_attn.commands.prices.run", broken)
    assert _error(capsys, ["prices"], code=1) == "error: RuntimeError: a bug (--debug shows where)"
    assert main(["prices", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


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
