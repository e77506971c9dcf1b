import argparse
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from seg_attn.data import MaskFolderDataModule, VOCDataModule
from seg_attn.data import check as check_command
from seg_attn.data.check import check, check_module, check_sample, examine, table
from seg_attn.data.images import read_mask, voc_palette, write_mask
from seg_attn.data.labels import LabelReader
from seg_attn.data.voc import Pair
from seg_attn.errors import InputError

CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


def command(*arguments):
    parser = argparse.ArgumentParser()
    check_command.add_arguments(parser)
    return check_command.run(parser.parse_args([str(argument) for argument in arguments]))


def scene(folder, name, seed, split="train", size=(20, 24), classes=3):
    rng = np.random.default_rng(seed)
    for sub in (split, f"{split}annot"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / split / f"{name}.png")
    mask = rng.integers(0, classes, size)
    mask[0] = 255
    write_mask(folder / f"{split}annot" / f"{name}.png", mask, voc_palette())
    return Pair(folder / split / f"{name}.png", folder / f"{split}annot" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    """Two splits of four scenes each, all well."""
    for number in range(4):
        scene(tmp_path, f"t{number}", number)
        scene(tmp_path, f"v{number}", 10 + number, "val")
    (tmp_path / "class_names.txt").write_text("grass\nwater\nroof\n")
    return tmp_path


def module(folder, **kwargs):
    return MaskFolderDataModule(str(folder), num_workers=0, **kwargs)


def problems(folder):
    return check_module(module(folder), workers=1).problems


def test_nothing_is_wrong(folder):
    report = check_module(module(folder), workers=1)
    assert report.problems == []
    assert report.notes == []
    for split, first in (("train", 0), ("val", 10)):
        masks = [read_mask(folder / f"{split}annot" / f"{split[0]}{n}.png") for n in range(4)]
        counts = np.sum([np.bincount(mask.ravel(), minlength=256) for mask in masks], axis=0)
        found = report.splits[split]
        assert found.pixels == counts[:3].tolist()
        assert found.ignored == counts[255] == 4 * 24
        assert found.images == [4, 4, 4]
        assert found.pairs == 4
        assert found.sizes == {(20, 24): 4}
        assert first in (0, 10)


def test_every_fault_is_named(folder):
    (folder / "train" / "t0.png").write_bytes((folder / "train" / "t0.png").read_bytes()[:200])  # cut short
    write_mask(folder / "trainannot" / "t1.png", np.zeros((24, 20), int), voc_palette())  # turned
    write_mask(folder / "trainannot" / "t2.png", np.full((20, 24), 7), voc_palette())  # label out of range
    (folder / "trainannot" / "t3.png").unlink()  # pair missing
    (folder / "valannot" / "v9.png").write_bytes((folder / "valannot" / "v0.png").read_bytes())  # mask alone
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(folder / "valannot" / "v1.png")  # colours
    (folder / "val" / "v2.png").unlink()
    Image.open(folder / "train" / "t1.png").save(folder / "val" / "v2.bmp")  # train's picture, as another file
    report = check_module(module(folder), workers=1)
    found = {problem.partition(": ")[0].rpartition("/")[2]: problem for problem in report.problems}
    assert len(report.problems) == len(found) == 6
    assert "not a readable image" in found["t0.png"]
    assert "the mask is 20x24, its image" in found["t1.png"]
    assert "labels 7 are neither one of the 3 classes" in found["t2.png"]
    assert "no mask of that name" in found["t3.png"]
    assert "holds colours" in found["v1.png"]
    assert f"the same picture as {folder / 'train' / 't1.png'}, which is in 'train', this in 'val'" in found["v2.bmp"]
    assert [note.partition(": ")[0] for note in report.notes] == [str(folder / "valannot" / "v9.png")]
    assert all("\n" not in line for line in report.problems + report.notes)
    text = table(report)
    assert "6 problems" in text
    assert "problem: " + found["t2.png"] in text


def test_twice_in_one_split_is_a_note(folder):
    shutil.copy(folder / "train" / "t0.png", folder / "train" / "t9.png")
    shutil.copy(folder / "trainannot" / "t0.png", folder / "trainannot" / "t9.png")
    report = check_module(module(folder), workers=1)
    assert report.problems == []
    assert report.notes == [
        f"{folder / 'train' / 't9.png'}: the same picture as {folder / 'train' / 't0.png'}, both in 'train'"
    ]


def test_a_class_that_never_occurs(folder):
    (folder / "class_names.txt").write_text("grass\nwater\nroof\nroad\n")
    assert check_module(module(folder), workers=1).notes == ["class 'road' (3) occurs in no mask"]


def test_a_split_that_is_missing(folder):
    report = check_module(module(folder), ["train", "test"], workers=1)
    assert list(report.splits) == ["train"]
    assert len(report.problems) == 1
    assert "no folders of images and masks for split 'test'" in report.problems[0]


def test_workers_find_the_same(folder):
    pairs = [Pair(p, folder / "trainannot" / p.name) for p in sorted((folder / "train").iterdir())] * 40
    reader = LabelReader(3)
    one = check(["a", "b", "c"], {"train": pairs}, reader, workers=1)
    assert check(["a", "b", "c"], {"train": pairs}, reader, workers=2) == one
    assert one.splits["train"].pairs == 160


def test_images_without_masks(voc_root):
    report = check_module(VOCDataModule(str(voc_root)), ["test"], workers=1)
    assert report.problems == report.notes == []
    assert report.splits["test"].sizes == {(33, 44): 1}


def test_examine_goes_on_after_a_fault(folder):
    (folder / "train" / "t0.png").write_bytes(b"x")
    facts = examine(Pair(folder / "train" / "t0.png", folder / "trainannot" / "t0.png"), LabelReader(3))
    assert len(facts.problems) == 1
    assert facts.size is None
    assert facts.pixels.sum() == 20 * 24


class TestBeforeFit:
    def test_a_sample_is_read(self, folder):
        write_mask(folder / "valannot" / "v3.png", np.full((20, 24), 7), voc_palette())
        module(folder).setup("test")  # no sample is read here
        with pytest.raises(InputError, match=r"v3\.png: labels 7 are neither"):
            module(folder).setup("fit")

    def test_it_reads_from_all_over_and_not_much(self):
        read = []

        def reader(path):
            read.append(path)
            raise InputError(f"{path}: bad")

        pairs = [Pair("absent.png", number) for number in range(100)]
        with pytest.raises(InputError, match=r"absent\.png: no such file"):
            check_sample(pairs, reader, count=4)
        assert read == [0]


class TestCommand:
    def test_json_and_exit_code(self, folder, capsys):
        assert command(folder, "--json", "--workers", 1) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is True
        assert list(report["splits"]) == ["train", "val"]
        assert report["splits"]["val"]["sizes"] == {"24x20": 4}
        assert list(report["splits"]["train"]["pixels"]) == ["grass", "water", "roof"]
        (folder / "train" / "t0.png").unlink()
        (folder / "trainannot" / "t0.png").unlink()
        (folder / "valannot" / "v0.png").unlink()
        assert command(folder, "--json", "--workers", 1) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is False
        assert len(report["problems"]) == 1

    def test_table(self, folder, capsys):
        assert command("--data.root", folder, "--workers", 1) == 0
        out = capsys.readouterr().out
        assert "train: 4 images, 24x20 (4)" in out
        assert "nothing is wrong" in out
        assert [line.split()[:2] for line in out.splitlines() if line.startswith("  1")] == [["1", "water"]]

    def test_without_class_names(self, folder, capsys):
        (folder / "class_names.txt").unlink()
        assert command(folder, "--json", "--workers", 1) == 0
        report = json.loads(capsys.readouterr().out)
        assert list(report["splits"]["train"]["pixels"]) == ["class 0", "class 1", "class 2"]
        assert "no class names are known" in report["notes"][0]
        assert command(folder, "--class_names", "a", "b", "--workers", 1) == 1
        assert "labels 2 are neither one of the 2 classes" in capsys.readouterr().out

    def test_voc(self, voc_root, capsys):
        assert command(voc_root, "--split", "train", "--json", "--workers", 1) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["splits"]["train"]["pairs"] == 7
        assert list(report["splits"]["train"]["pixels"])[15] == "person"

    def test_config(self, folder, voc_root, tmp_path, capsys):
        config = tmp_path / "c.yaml"
        config.write_text(
            f"model: {{lr: 1}}\ndata:\n  class_path: MaskFolderDataModule\n  init_args:\n    root: {voc_root}\n"
        )
        assert command("--config", config, "--data.root", folder, "--json", "--workers", 1) == 0
        assert json.loads(capsys.readouterr().out)["splits"]["train"]["pairs"] == 4

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((), "nothing to check"),
            (("absent",), "absent: there is no such folder"),
            (("--config", "absent.yaml"), r"absent\.yaml: no YAML file with a `data:` section"),
        ],
    )
    def test_wrong_arguments(self, arguments, match):
        with pytest.raises(InputError, match=match):
            command(*arguments)

    def test_camvid_agrees_with_an_independent_count(self, real_data, capsys):
        root = real_data / "camvid"
        assert command(root, "--class_names", *CAMVID, "--ignore_index", 11, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        for split, number in (("train", 367), ("val", 101)):
            found = report["splits"][split]
            assert found["pairs"] == number
            assert found["sizes"] == {"480x360": number}
            counts = np.zeros(12, np.int64)
            for path in (root / f"{split}annot").glob("*.png"):
                with Image.open(path) as image:
                    values, numbers = np.unique(np.asarray(image), return_counts=True)
                counts[values] += numbers
            assert list(found["pixels"].values()) == counts[:11].tolist()
            assert found["ignored"] == counts[11]
            assert counts.sum() == number * 360 * 480
