"""`compare`: its rows against `test`, the files of `predict` and plain NumPy, and what it says to wrong input."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seg_attn.cli import main
from seg_attn.compare import _find_masks, describe, modes, printable, seed_lines, settings, short_names
from seg_attn.compare import compare as compare_settings
from seg_attn.data import VOCDataModule
from seg_attn.data.images import voc_palette
from seg_attn.errors import InputError
from seg_attn.memory import forget_high_water, high_water, peak_memory
from seg_attn.models import DeepLabV3
from seg_attn.prediction.settings import Settings
from seg_attn.summary import summarize

pytestmark = pytest.mark.filterwarnings("ignore:atrous rate", "ignore:.*does not have many workers")

STRIDES = (8, 16, 32)


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def val_files(devkit):
    folder = devkit / "VOCdevkit" / "VOC2012"
    names = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    return [folder / "JPEGImages" / f"{n}.jpg" for n in names], [
        folder / "SegmentationClass" / f"{n}.png" for n in names
    ]


def matrices(predictions, labels, num_classes):
    """One confusion matrix per file, pair of classes by pair of classes; 255 left out."""
    found = np.zeros((len(labels), num_classes, num_classes), dtype=np.int64)
    for index, path in enumerate(labels):
        target, prediction = np.array(Image.open(path)), np.array(Image.open(predictions / path.name))
        for true in range(num_classes):
            for guessed in range(num_classes):
                found[index, true, guessed] = ((target == true) & (prediction == guessed)).sum()
    return found


def mean_iou(confusion):
    diagonal, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float(np.mean(diagonal[union > 0] / union[union > 0]))


@pytest.fixture(scope="module")
def masks(checkpoint, devkit, tmp_path_factory):
    """Folders of the masks of `predict` at output stride 8, 16 and 32."""
    root = tmp_path_factory.mktemp("masks")
    for stride in STRIDES:
        arguments = ["predict", "--ckpt_path", checkpoint, "--output", root / str(stride), "--output_stride", stride]
        run(*arguments, "--input", *val_files(devkit)[0])
    return root


@pytest.fixture(scope="module")
def compared(checkpoint, config, masks, tmp_path_factory):
    """The folder of a comparison of 8, 16 and 32 with the masks of `predict` at 8."""
    output = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "--config", config, "--ckpt_path", checkpoint, "--output_stride", *STRIDES]
    run(*arguments, "--predictions", masks / "8", "--baseline", "16", "--output", output, "--seed", 5)
    return output


@pytest.fixture(scope="module")
def rows(compared):
    return json.loads((compared / "compare.json").read_text())


def test_rows_equal_test_at_that_output_stride(rows, checkpoint, config, tmp_path):
    for version, (row, stride) in enumerate(zip(rows, STRIDES, strict=False)):
        base = ["--config", config, "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path]
        # 16 is what the checkpoint was trained at and needs not be typed.
        run("test", *base, *(["--model.output_stride", stride] if stride != 16 else []))
        report = json.loads((tmp_path / "test" / f"version_{version}" / "test_metrics.json").read_text())
        assert row["output_stride"] == report["output_stride"] == stride
        assert row["confusion"] == report["confusion"]
        assert row["miou"] == pytest.approx(report["miou"], abs=1e-12)
        assert row["per_class"] == pytest.approx(report["per_class"], abs=1e-12)
    assert len({str(row["confusion"]) for row in rows[:3]}) == 3


def test_rows_equal_numpy_on_the_files_of_predict(rows, masks, devkit):
    labels = val_files(devkit)[1]
    for row, stride in zip(rows, STRIDES, strict=False):
        counted = matrices(masks / str(stride), labels, 9).sum(0)
        assert row["confusion"] == counted.tolist()
        assert row["miou"] == pytest.approx(mean_iou(counted), abs=1e-12)


def test_masks_on_disk_make_the_same_row(rows):
    masks, predicted = rows[3], rows[0]
    assert masks["name"] == "masks in 8"
    for key in ("confusion", "miou", "per_class", "boundary_miou", "difference", "ci95", "per_class_ci95"):
        assert masks[key] == predicted[key], key
    for key in ("checkpoint", "output_stride", "images_per_s", "peak_memory_bytes", "gflops", "parameters"):
        assert masks[key] is None, key


def test_the_interval_is_numpys(rows, masks, devkit):
    labels = val_files(devkit)[1]
    row, baseline = (matrices(masks / name, labels, 9) for name in ("8", "16"))
    counts = np.random.default_rng(5).multinomial(3, [1 / 3] * 3, size=10_000)
    unique, inverse = np.unique(counts, axis=0, return_inverse=True)  # three images: ten different draws
    values = []
    for count in unique:
        drawn = [np.tensordot(count, m, 1) for m in (row, baseline)]
        union = [m.sum(0) + m.sum(1) - np.diag(m) for m in drawn]
        full = [(m.sum(0).sum(0) + m.sum(0).sum(1)) > 0 for m in (row, baseline)]
        kept = (union[0] > 0) & (union[1] > 0)
        sums = [(np.diag(m)[kept] / u[kept]).sum() for m, u in zip(drawn, union, strict=True)]
        alone = [(full[0] & ~full[1]).sum(), (full[1] & ~full[0]).sum()]
        values.append(sums[0] / (kept.sum() + alone[0]) - sums[1] / (kept.sum() + alone[1]))
    expected = np.quantile(np.array(values)[inverse.ravel()], [0.025, 0.975])
    assert rows[0]["ci95"] == pytest.approx(expected.tolist(), abs=1e-12)
    assert rows[0]["difference"] == pytest.approx(rows[0]["miou"] - rows[1]["miou"], abs=1e-12)
    assert rows[1]["baseline"]
    assert (rows[1]["difference"], rows[1]["ci95"]) == (0.0, [0.0, 0.0])


def test_cost_is_that_of_the_network(rows, checkpoint):
    arguments = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    for row in rows[:3]:
        plain = {"backbone": "resnet18", "num_classes": 9, "decoder_channels": 16, "atrous_rates": [2, 4, 6]}
        assert {name: arguments[name] for name in plain} == plain
        summary = summarize(DeepLabV3(**plain, output_stride=row["output_stride"]), *row["gflops_size"])
        assert row["gflops_size"] == [48, 64]
        assert row["gflops"] == pytest.approx(summary.total.flops / 1e9, rel=1e-12)
        assert row["parameters"] == summary.total.parameters
        assert row["images_per_s"] > 0
        assert row["latency_ms"] > 0
        # Python with PyTorch takes more than 100 MB, this network on these images not 4 GB.
        assert 1e8 < row["peak_memory_bytes"] < 4e9
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]


def test_csv_holds_the_same_figures(compared, rows):
    lines = list(csv.DictReader((compared / "compare.csv").read_text(encoding="utf-8").splitlines()))
    for line, row in zip(lines, rows, strict=True):
        assert line["name"] == row["name"]
        assert float(line["miou"]) == row["miou"]
        assert [float(line["ci95_low"]), float(line["ci95_high"])] == row["ci95"]
        for name, iou in row["per_class"].items():
            assert line[f"per_class/{name}"] == ("" if iou is None else repr(iou))


def test_what_is_printed(checkpoint, config, masks, tmp_path, capsys):
    run("compare", "--config", config, "--predictions", masks / "16", masks / "8", "--output", tmp_path)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "compare.json").read_text())
    for row in rows:
        assert row["name"] in printed
        assert f"{100 * row['miou']:.2f}" in printed
    assert rows[1]["verdict"] in " ".join(printed.split())
    assert rows[1]["verdict"].startswith("for these predictions, on these 3 images: ")
    assert f"written: {tmp_path / 'compare.html'}" in printed


def test_modes_each_add_a_row_and_only_scales_and_flip_combine():
    found = modes(scales=[0.5, 1.0], flip=True, tile=64, overlap=16, precisions=["bfloat16"])
    assert [describe(mode) for mode in found] == [
        "",
        "scales 0.5 1",
        "flip",
        "scales 0.5 1 + flip",
        "tile 64 overlap 16",
        "bfloat16",
    ]
    assert found[4] == Settings(tile=64, overlap=16)
    assert modes() == modes(scales=[1]) == modes(precisions=["32", "float32"]) == [Settings()]
    assert modes(precisions=["32", "bf16", "bfloat16"]) == [Settings(), Settings(precision="bfloat16")]


def test_every_mode_is_run(checkpoint, config, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    options = ["--scales", 0.5, 1, "--flip", "--tile", 32, "--overlap", 8, "--precision", "bfloat16"]
    run("compare", "--config", config, "--ckpt_path", checkpoint, "--output", tmp_path, *options)
    rows = {row["name"]: row for row in json.loads((tmp_path / "compare.json").read_text())}
    assert list(rows) == [
        "16",
        "16, scales 0.5 1",
        "16, flip",
        "16, scales 0.5 1 + flip",
        "16, tile 32 overlap 8",
        "16, bfloat16",
    ]
    flops = {name: row["gflops"] for name, row in rows.items()}
    assert flops["16, flip"] == pytest.approx(2 * flops["16"])
    assert flops["16, scales 0.5 1 + flip"] == pytest.approx(2 * flops["16, scales 0.5 1"])
    assert flops["16, tile 32 overlap 8"] > flops["16"]
    assert flops["16, bfloat16"] == flops["16"]
    assert rows["16, flip"]["confusion"] != rows["16"]["confusion"]
    assert rows["16, bfloat16"]["precision"] == "bfloat16"


def seeds_of_one_recipe(checkpoint, folder, count):
    """Checkpoints with the same hyper-parameters, of runs of their own, whose weights differ a little."""
    paths = []
    for seed in range(count):
        content = torch.load(checkpoint, weights_only=True)
        generator = torch.Generator().manual_seed(seed)
        for key, value in content["state_dict"].items():
            if key.startswith("model.classifier"):
                content["state_dict"][key] = value + 0.05 * torch.randn(value.shape, generator=generator)
        content["run"]["id"] = f"seed_{seed}"
        paths.append(folder / f"seed_{seed}" / "best.ckpt")
        paths[-1].parent.mkdir(parents=True)
        torch.save(content, paths[-1])
    return paths


def test_several_seeds_have_mean_and_deviation(checkpoint, devkit, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    paths = seeds_of_one_recipe(checkpoint, tmp_path, 3)
    data = VOCDataModule(root=str(devkit), num_workers=0)
    found = compare_settings(data, settings(paths, [16, 8]), device="cpu").records()
    assert [row["name"] for row in found[:3]] == ["seed_0 at 16", "seed_0 at 8", "seed_1 at 16"]
    at16, at8 = ([row["miou"] for row in found if row["output_stride"] == stride] for stride in (16, 8))
    seeds = found[1]["seeds"]
    assert seeds["checkpoints"] == 3
    assert seeds["miou_mean"] == pytest.approx(np.mean(at8), abs=1e-15)
    assert seeds["miou_std"] == pytest.approx(np.std(at8, ddof=1), abs=1e-15)
    assert seeds["difference_mean"] == pytest.approx(np.mean(np.subtract(at8, at16)), abs=1e-15)
    assert seeds["difference_std"] == pytest.approx(np.std(np.subtract(at8, at16), ddof=1), abs=1e-15)
    assert found[0]["seeds"]["difference_mean"] is None  # the baseline's own setting
    assert all(" training runs at " in line for line in seed_lines(found))


def test_runs_of_several_recipes_are_named(checkpoint, devkit, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    paths = seeds_of_one_recipe(checkpoint, tmp_path, 5)
    for path in paths[2:]:  # of which the last one was to run ten times as long
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"]["lr"] = 0.1
        if path == paths[4]:
            schedule = content["lr_schedulers"][0]
            schedule["_last_lr"] = [rate * (1 - 6 / 60) ** 0.9 for rate in schedule["base_lrs"]]
        torch.save(content, path)
    data = VOCDataModule(root=str(devkit), num_workers=0)
    found = compare_settings(data, settings(paths), device="cpu").records()
    assert [row["seeds"] and row["seeds"]["names"] for row in found] == [
        *[["seed_0", "seed_1"]] * 2,
        *[["seed_2", "seed_3"]] * 2,
        None,
    ]
    one, other = seed_lines(found)
    assert one.startswith("over 2 training runs (seed_0, seed_1) at 16: mIoU ")
    assert other.startswith("over 2 training runs (seed_2, seed_3) at 16: mIoU ")


def test_best_and_last_of_one_run_are_no_seeds(run_folder, devkit, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    paths = [run_folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    data = VOCDataModule(root=str(devkit), num_workers=0)
    found = compare_settings(data, settings(paths), device="cpu").records()
    assert [row["name"] for row in found] == ["best at 16", "last at 16"]
    assert [row["seeds"] for row in found] == [None, None]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/best.ckpt"], ["best"]),
        (["a/version_0/c/best.ckpt", "a/version_1/c/best.ckpt"], ["version_0", "version_1"]),
        (["a/best.ckpt", "a/last.ckpt"], ["best", "last"]),
        (["one/masks", "two/masks"], ["one", "two"]),
        (["masks", "deep/masks"], ["masks", "deep/masks"]),
        (["a/best.ckpt", "a/best"], ["best.ckpt", "best"]),
    ],
)
def test_rows_are_named_by_what_sets_them_apart(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_names_that_differ_in_their_suffix_are_rows_of_their_own(checkpoint, devkit, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    (path,) = seeds_of_one_recipe(checkpoint, tmp_path, 1)
    paths = [path, path.with_suffix(".pt")]
    paths[1].write_bytes(checkpoint.read_bytes())
    data = VOCDataModule(root=str(devkit), num_workers=0)
    both = compare_settings(data, settings(paths), device="cpu").records()
    alone = [compare_settings(data, settings([path]), device="cpu").records()[0] for path in paths]
    assert [row["name"] for row in both] == ["best.ckpt at 16", "best.pt at 16"]
    assert [row["confusion"] for row in both] == [row["confusion"] for row in alone]
    assert alone[0]["confusion"] != alone[1]["confusion"]


def saved(folder, files):
    folder.mkdir(parents=True)
    for name, mask in files.items():
        Image.fromarray(mask).save(folder / name)
    return folder


def test_wrong_masks_are_named(devkit, config, capsys, tmp_path):
    labels = val_files(devkit)[1]
    good = {path.name: np.zeros((48, 64), dtype=np.uint8) for path in labels}
    command = ["compare", "--config", config, "--output", tmp_path / "out", "--predictions"]
    some = saved(tmp_path / "some", {labels[0].name: good[labels[0].name]})
    line = fails(capsys, *command, some)
    assert f"no mask {labels[1].name} for " in line
    assert "1 more of 3" in line
    small = saved(tmp_path / "small", good | {labels[1].name: np.zeros((24, 32), dtype=np.uint8)})
    assert "the mask is 32x24, its label 64x48" in fails(capsys, *command, small)
    beyond = saved(tmp_path / "beyond", good | {labels[2].name: np.full((48, 64), 9, dtype=np.uint8)})
    line = fails(capsys, *command, beyond)
    assert labels[2].name in line
    assert "labels 9" in line
    void = saved(tmp_path / "void", good | {labels[0].name: np.full((48, 64), 255, dtype=np.uint8)})
    assert "which is no class" in fails(capsys, *command, void)
    assert "no such folder" in fails(capsys, *command, tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_masks_in_folders_and_in_colours_are_read(devkit, config, masks, tmp_path, rows):
    names = [path.name for path in val_files(devkit)[1]]
    palette = voc_palette(256)
    indices = {name: np.array(Image.open(masks / "8" / name)) for name in names}
    saved(tmp_path / "in" / "deep", {name: palette[mask] for name, mask in indices.items()})
    saved(tmp_path / "in" / "other", {"unrelated.png": np.zeros((4, 4), dtype=np.uint8)})
    run("compare", "--config", config, "--predictions", tmp_path / "in", "--output", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert row["confusion"] == rows[0]["confusion"]


def test_masks_of_one_name_are_told_apart_by_their_folders(tmp_path):
    images = [Path("images/cityA/0001.jpg"), Path("images/cityB/0001.jpg")]
    mask = np.zeros((2, 2), dtype=np.uint8)
    for city in ("cityA", "cityB"):
        saved(tmp_path / "masks" / city, {"0001.png": mask})
    found = _find_masks(tmp_path / "masks", images)
    assert [path.parent.name for path in found] == ["cityA", "cityB"]
    saved(tmp_path / "half" / "cityA", {"0001.png": mask})
    with pytest.raises(InputError, match=r"cityA/0001.png could be the mask of .*cityA/0001.jpg and of .*cityB/0001"):
        _find_masks(tmp_path / "half", images)


def test_files_are_there_though_nobody_reads_what_is_printed(config, masks, tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("seg_attn.commands.compare.show", closed)
    arguments = ["compare", "--config", config, "--predictions", masks / "8", "--output", tmp_path / "out"]
    main([str(argument) for argument in arguments])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.html", "compare.json"]


def test_bad_arguments_are_one_line(checkpoint, config, devkit, capsys, tmp_path):
    out = ["--output", tmp_path / "out"]
    base = ["compare", "--config", config, *out]
    assert "nothing to compare" in fails(capsys, *base)
    assert "no data to compare on" in fails(capsys, "compare", "--ckpt_path", checkpoint, *out)
    assert "none.yaml: cannot be read" in fails(capsys, "compare", "--config", tmp_path / "none.yaml", *out)
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "it must hold `data:`" in fails(capsys, "compare", "--config", tmp_path / "list.yaml", *out)
    assert "--output is missing" in fails(capsys, "compare", "--config", config, "--ckpt_path", checkpoint)
    given = [*base, "--ckpt_path", checkpoint]
    assert "--baseline '8' is no row; the rows are: 16" in fails(capsys, *given, "--baseline", "8")
    assert "takes 8, 16 and 32, got 4" in fails(capsys, *given, "--output_stride", 4)
    assert "names" in fails(capsys, *given, checkpoint)
    assert "overlap 8 needs tiles" in fails(capsys, *given, "--overlap", 8)
    assert "no such file" in fails(capsys, *base, "--ckpt_path", tmp_path / "none.ckpt")
    assert "nonsense" in fails(capsys, *given, "--nonsense", 1)
    line = fails(capsys, *given, "--data.class_names", "[background, thing]")
    assert "has 9 classes and the data 2" in line
    assert not (tmp_path / "out").exists()


def test_a_resumed_runs_own_config_will_do(config, masks, tmp_path, rows):
    saved_config = tmp_path / "config.yaml"
    saved_config.write_text(config.read_text() + "ckpt_path: interrupted.ckpt\nweights_only: null\n")
    for number, given in enumerate((["--config", saved_config], [f"--config={saved_config}"])):
        run("compare", *given, "--predictions", masks / "8", "--output", tmp_path / str(number))
        (row,) = json.loads((tmp_path / str(number) / "compare.json").read_text())
        assert row["confusion"] == rows[0]["confusion"]


def test_data_overrides_win(checkpoint, config, devkit, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    run("compare", "--config", config, "--data.test_split", "train", "--ckpt_path", checkpoint, "--output", tmp_path)
    (row,) = json.loads((tmp_path / "compare.json").read_text())
    assert row["images"] == 6


def test_the_peak_sees_what_was_taken_and_forgets():
    forget_high_water()
    before = high_water()
    taken = np.ones(40_000_000)
    assert high_water() >= before + 100e6
    del taken
    forget_high_water()
    assert high_water() < before + 200e6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "fp16"], "precision must be float32 or bfloat16, got 'fp16'"),
        (["--scales", 0], "scales must be one or more positive numbers"),
        (["--tile", 8], "tile must be at least 32 pixels, got 8"),
        (["--tile", 64, "--overlap", 64], "below the tile's 64 pixels, got 64"),
        (["--ckpt_path", "odd.ckpt"], "the weights of odd.ckpt do not fit the model: 1 missing"),
        (["--predictions", "some"], "no mask"),
        (["--predictions", "beyond"], "labels 9"),
        (["--device", "nonsense"], "device 'nonsense' is not on this machine"),
        (["--output", "/proc/none"], "--output /proc/none: nothing can be written into /proc"),
        (["--output", "config.yaml/out"], "nothing can be written into config.yaml (Not a directory)"),
    ],
)
def test_no_network_runs_before_all_input_is_checked(
    arguments, said, checkpoint, config, devkit, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(config.read_text())
    names = [path.name for path in val_files(devkit)[1]]
    saved(tmp_path / "some", {names[0]: np.zeros((48, 64), dtype=np.uint8)})
    saved(tmp_path / "beyond", {name: np.full((48, 64), 9, dtype=np.uint8) for name in names})
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"][next(key for key in content["state_dict"] if key.startswith("model."))]
    torch.save(content, "odd.ckpt")
    monkeypatch.setattr("seg_attn.compare._predict", lambda *_: pytest.fail("a network ran"))
    if "--device" in arguments:
        monkeypatch.setattr("seg_attn.compare._sizes", lambda *_: pytest.fail("images were read"))
    base = ["--config", "config.yaml", "--ckpt_path", checkpoint, "--output", "out"]
    assert said in fails(capsys, "compare", *base, *arguments)
    assert not Path("out").exists()


def test_rows_are_of_the_weights_that_were_loaded(rows, checkpoint, config, devkit, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint.read_bytes())
    data = VOCDataModule(root=str(devkit), num_workers=0)
    chosen = settings([path], STRIDES[:2])
    path.unlink()
    found = compare_settings(data, chosen, device="cpu").records()
    assert [row["confusion"] for row in found] == [row["confusion"] for row in rows[:2]]
    assert all(row["peak_memory_bytes"] > 1e8 for row in found)
    assert not path.exists()


def test_masks_come_first_and_rows_stay_in_order(checkpoint, devkit, masks, monkeypatch):
    from seg_attn import compare as module

    monkeypatch.setattr(module, "peak_memory", lambda *_: None)
    evaluated = []
    for name in ("_read_masks", "_predict"):
        evaluate = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, e=evaluate: evaluated.append(args[0].name) or e(*args))
    data = VOCDataModule(root=str(devkit), num_workers=0)
    found = compare_settings(data, settings([checkpoint], [16], predictions=[masks / "8"]), device="cpu")
    assert evaluated == ["masks in 8", "16"]
    assert [row.setting.name for row in found.rows] == ["16", "masks in 8"]


def test_batches_are_those_of_test(checkpoint, devkit, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    seen = []
    forward = DeepLabV3.forward
    monkeypatch.setattr(DeepLabV3, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    data = VOCDataModule(root=str(devkit), num_workers=0, test_split="trainval", eval_batch_size=9)
    compare_settings(data, settings([checkpoint]), device="cpu")
    assert 9 in seen
    assert set(seen) == {1, 9}  # the first image alone warms up, and one is counted


def test_other_class_names_are_said(checkpoint, devkit, tmp_path, monkeypatch):
    monkeypatch.setattr("seg_attn.compare.peak_memory", lambda *_: None)
    data = VOCDataModule(root=str(devkit), num_workers=0)
    names = list(data.class_names)
    content = torch.load(checkpoint, weights_only=True)
    said = {}
    for label, own in (
        ("same", names),
        ("swapped", [*names[:2], names[3], names[2], *names[4:]]),
        ("placeholders", [f"class {index}" for index in range(9)]),
    ):
        content["data"]["class_names"] = own
        torch.save(content, tmp_path / f"{label}.ckpt")
        lines = []
        compare_settings(data, settings([tmp_path / f"{label}.ckpt"], [16, 32]), device="cpu", warn=lines.append)
        said[label] = [line for line in lines if "class" in line]
    assert said["same"] == said["placeholders"] == []
    (line,) = said["swapped"]  # once for both rows
    assert f"class 2 is {names[3]!r} to the checkpoint and {names[2]!r} in the data (and 1 more)" in line


def test_names_that_are_no_utf8_are_escaped(checkpoint, devkit, config, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == "caf\\xe9"
    folder = saved(tmp_path / name, {path.name: np.array(Image.open(path)) % 255 for path in val_files(devkit)[1]})
    run("compare", "--config", config, "--predictions", folder, "--output", tmp_path / name / "out")
    printed = capsys.readouterr().out
    assert "masks in caf\\xe9" in printed
    assert f"written: {tmp_path}/caf\\xe9/out/compare.html" in printed
    (row,) = json.loads((folder / "out" / "compare.json").read_text(encoding="utf-8"))
    assert row["name"] == "masks in caf\\xe9"
    assert row["predictions"] == str(folder)  # reads back as it was


@pytest.mark.exhaustive
def test_a_larger_image_takes_more_memory(checkpoint, tmp_path):
    peaks = []
    for side in (64, 1536):
        path = tmp_path / f"{side}.png"
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(path)
        peaks.append(peak_memory(checkpoint, path, {"output_stride": 8}, 1))
    # Nine classes of float32 logits at the image's size alone.
    assert peaks[1] - peaks[0] > 4 * 9 * 1536**2
    assert peak_memory(tmp_path / "none.ckpt", path, {}, 1) is None
