"""Many files: order, broken ones, stops at any moment, and what must never be written over."""

import contextlib
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from seg_attn import DeepLabV3, Predictor, sharding
from seg_attn.checkpoint import save_model
from seg_attn.cli import main
from seg_attn.data.images import read_image, read_mask
from seg_attn.data.sample import write_sample
from seg_attn.errors import InputError
from seg_attn.predict import predict_files
from seg_attn.prediction import files, stream
from seg_attn.prediction.files import HOST
from seg_attn.prediction.inference import Inference
from seg_attn.prediction.inputs import find_sources
from seg_attn.prediction.outputs import Outputs, Seen
from seg_attn.prediction.summary import Summary

pytestmark = pytest.mark.filterwarnings("ignore:atrous rate")


def break_file(path, way):
    """Break an image in one of twelve ways."""
    content = path.read_bytes()
    if way == 0:
        path.write_bytes(b"")
    elif way == 1:
        path.write_bytes(content[: len(content) // 2])
    elif way == 2:
        path.write_bytes(b"this is no image")
    elif way == 3:
        path.write_bytes(content[:10])
    elif way == 4:
        path.unlink()
        path.symlink_to(path.parent / "nowhere.jpg")
    elif way == 5:
        path.write_bytes(b"\0" * 2000)
    elif way == 6:
        Image.new("RGB", (6, 6)).save(path, "PNG")
        damaged = bytearray(path.read_bytes())
        damaged[45] ^= 255
        path.write_bytes(damaged)
    elif way == 7:
        path.write_bytes(b"\xff\xd8\xff" + content[200:])
    elif way == 8:
        Image.fromarray(np.ones((5, 5), dtype=np.float32)).save(path, "TIFF")
    elif way == 9:
        Image.fromarray(np.full((5, 5), 100_000, dtype=np.int32)).save(path, "TIFF")
    elif way == 10:
        path.write_bytes(b"GIF89a" + b"\xff" * 40)
    else:
        Image.new("RGB", (60, 60)).save(path, "BMP")
        path.write_bytes(path.read_bytes()[:700])


def photographs(folder, count, broken, seed=0):
    """Write `count` small JPEGs of three sizes into two folders, the first `broken` of a random order broken."""
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        path = folder / ("left" if index % 2 else "right") / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = [(24, 32), (32, 24), (40, 40)][index % 3]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, quality=90)
        paths.append(path)
    unlucky = sorted(rng.permutation(count)[:broken])
    for way, index in enumerate(unlucky):
        break_file(paths[index], way % 12)
    return paths, [paths[index] for index in unlucky]


def predict(*arguments):
    return main(["predict", *(str(argument) for argument in arguments), "--device", "cpu"])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_broken_file_is_named_and_the_others_are_written(trained, tmp_path, capsys):
    paths, broken = photographs(tmp_path / "in", 30, 12)
    arguments = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive", "--output", tmp_path / "out"]
    assert predict(*arguments) == 1
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 12
    assert all(str(path) in line for path, line in zip(sorted(broken), sorted(errors), strict=True))
    assert "18 of 30 images predicted" in said.out
    predictor = Predictor.from_checkpoint(trained, device="cpu")
    for path in set(paths) - set(broken):
        mask = (tmp_path / "out" / path.relative_to(tmp_path / "in")).with_suffix(".png")
        assert np.array_equal(read_mask(mask), predictor(path))
    written = [name for name in contents(tmp_path / "out") if name.endswith(".png")]
    assert len(written) == 18
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['file']}.png" for row in rows] == sorted(written)
    for row in rows:
        mask = read_mask(tmp_path / "out" / f"{row['file']}.png")
        assert (int(row["height"]), int(row["width"])) == mask.shape
        shares = [float(row[name]) for name in ("sky", "road", "tree", "car")]
        np.testing.assert_allclose(shares, [(mask == index).mean() for index in range(4)])
        image = next(path for path in paths if path.stem in row["file"])
        expected = predictor.probabilities(image).max(axis=0).mean(dtype=np.float64)
        assert float(row["mean_confidence"]) == pytest.approx(expected, rel=1e-5)


def _killed_and_restarted(trained, tmp_path, kills, window):
    """Predict `in/` once, and once more with as many stops, each after a number of PNGs more from that range."""
    arguments = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive", "--save", "mask,overlay"]
    assert predict(*arguments, "--output", tmp_path / "whole") == 1
    expected = contents(tmp_path / "whole")
    rng = random.Random(0)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "seg_attn", "predict", *arguments, "--output", out, "--skip_existing"]
    stopped = 0
    for _ in range(kills):
        with subprocess.Popen(
            [*map(str, command), "--device", "cpu"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            before = len(list(out.rglob("[!.]*.png")))
            target = before + rng.randrange(*window)
            while process.poll() is None and len(list(out.rglob("[!.]*.png"))) < target:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        stopped += process.returncode == -signal.SIGKILL
        for name, content in contents(out).items():
            if name == "summary.csv":  # grows with every restart
                assert set(content.splitlines()) <= set(expected[name].splitlines())
            elif not name.rpartition("/")[2].startswith("."):
                assert content == expected[name], name  # whole, or not there
    assert stopped == kills
    # What a killed process may leave behind: the half of a file, the half of a line, and a lock that is none.
    (next(path for path in out.iterdir() if path.is_dir()) / f".{HOST}.999999999-abcd.part").write_bytes(b"half")
    (left,) = out.glob(".summary.*.journal")
    with left.open("ab") as journal:
        journal.write(b'["left/00')
    (out / ".summary.lock").touch()
    assert predict(*arguments, "--output", out, "--skip_existing") == 1
    assert contents(out) == expected
    return expected


def test_killed_and_restarted_gives_the_same_folder(trained, tmp_path):
    photographs(tmp_path / "in", 88, 8)
    expected = _killed_and_restarted(trained, tmp_path, kills=2, window=(8, 24))
    assert len([name for name in expected if name.endswith("_overlay.png")]) == 80


@pytest.fixture
def pictures(tmp_path, request):
    """JPEGs of 16 sample scenes, and of 32 photographs of CamVid where they are, scaled down."""
    devkit = write_sample(tmp_path / "sample", train=15, val=1)
    paths = sorted((devkit / "JPEGImages").glob("*.jpg"))
    with contextlib.suppress(pytest.skip.Exception):
        for path in sorted((request.getfixturevalue("real_data") / "camvid" / "val").glob("*.jpg"))[::3][:32]:
            with Image.open(path) as photograph:
                photograph.thumbnail((160, 160))
                photograph.save(tmp_path / path.name, quality=90)
            paths.append(tmp_path / path.name)
    return paths


@pytest.mark.exhaustive
def test_a_thousand_images_killed_five_times(data, pictures, tmp_path, capsys):
    torch.manual_seed(0)
    network = DeepLabV3("resnet18", num_classes=4, output_stride=32, decoder_channels=16)
    network.classifier.weight.data *= 20
    save_model(tmp_path / "model.ckpt", network, data)
    paths = [tmp_path / "in" / str(index % 7) / f"{index:04d}.jpg" for index in range(1000)]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[index % len(pictures)], path)
    broken = random.Random(0).sample(paths, 12)
    for way, path in enumerate(broken):
        break_file(path, way)
    expected = _killed_and_restarted(tmp_path / "model.ckpt", tmp_path, kills=5, window=(150, 330))
    masks = {name for name in expected if name.endswith(".png") and "_overlay" not in name}
    good = [path.relative_to(tmp_path / "in").with_suffix(".png").as_posix() for path in paths if path not in broken]
    assert len(good) == 988
    assert masks == set(good)
    assert len({expected[name] for name in masks}) > len(pictures) / 2  # masks of their own
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 24  # 12 of the whole run, 12 of the last restart
    assert all(sum(f"{path}: " in line for line in errors) == 2 for path in broken)


def test_nothing_is_written_over_silently(trained, tmp_path, capsys):
    photographs(tmp_path / "in", 4, 0)
    arguments = ["--ckpt_path", trained, "--input", tmp_path / "in" / "left", "--output", tmp_path / "out"]
    assert predict(*arguments) == 0
    before = contents(tmp_path / "out")
    victim = tmp_path / "out" / "0003.png"
    victim.write_bytes(b"mine")
    assert predict(*arguments) == 2
    line = capsys.readouterr().err
    assert "0001.png exists" in line
    assert "--skip_existing" in line
    assert "--overwrite" in line
    assert victim.read_bytes() == b"mine"
    assert predict(*arguments, "--skip_existing") == 0
    assert "2 of 2 images predicted (2 were there)" in capsys.readouterr().out
    assert victim.read_bytes() == b"mine"
    assert predict(*arguments, "--overwrite") == 0
    assert contents(tmp_path / "out") == before
    # A photograph is never replaced by its mask, even when asked.
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    photo = ["--ckpt_path", trained, "--input", tmp_path / "photo.png", "--output", tmp_path, "--overwrite"]
    content = (tmp_path / "photo.png").read_bytes()
    assert predict(*photo) == 2
    assert "would be written over the input" in capsys.readouterr().err
    assert (tmp_path / "photo.png").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--save", "mask,colour"], "--save takes mask, overlay, contour, probability, rle"),
        (["--overlap", "3"], "give tile too"),
        (["--precision", "half"], "precision must be float32 or bfloat16"),
        (["--skip_existing", "--overwrite"], "not allowed with"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(trained, tmp_path, capsys, arguments, message):
    photographs(tmp_path / "in", 1, 0)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in" / "right", "--output", tmp_path / "out"]
    assert predict(*base, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_two_inputs_of_one_output(trained, tmp_path, capsys):
    photographs(tmp_path / "in", 2, 0)
    (tmp_path / "in" / "left" / "a.jpg").symlink_to("0001.jpg")
    (tmp_path / "in" / "left" / "a_overlay.jpg").symlink_to("0001.jpg")
    base = ["--ckpt_path", trained, "--input", tmp_path / "in" / "left", "--output", tmp_path / "out"]
    assert predict(*base, "--save", "mask,overlay") == 2
    assert "would both become a_overlay.png: rename one of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batches_are_of_one_size_and_in_order(model, data, tmp_path):
    photographs(tmp_path / "in", 13, 0)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    predictor = Predictor(model, data, device="cpu")
    sources = find_sources([tmp_path / "in"], recursive=True)
    counted = []
    outcomes = list(predict_files(predictor, sources, tmp_path / "out", batch_size=3, advance=counted.append))
    hook.remove()
    assert [outcome.source for outcome in outcomes] == [source.path for source in sources]
    assert sum(shape[0] for shape in seen) == sum(counted) == 13
    assert max(shape[0] for shape in seen) == 3
    for outcome in outcomes:
        assert (read_mask(outcome.written[0]) == predictor(outcome.source)).mean() > 0.999


def test_tiles_and_the_limit_of_pixels(trained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (130, 200, 3), dtype=np.uint8)).save(tmp_path / "big.png")
    base = ["--ckpt_path", trained, "--input", tmp_path / "big.png", "--output", tmp_path / "out"]
    assert predict(*base, "--max_pixels", "25999") == 2
    line = capsys.readouterr().err
    assert "big.png: 26,000 pixels, more than --max_pixels 25,999: raise it" in line
    limit = Image.MAX_IMAGE_PIXELS
    how = ["--tile", "64", "--overlap", "16", "--save", "mask,overlay,probability,rle", "--probability", "png"]
    assert predict(*base, *how, "--max_pixels", "26000", "--skip_existing") == 0
    assert limit == Image.MAX_IMAGE_PIXELS
    predictor = Predictor.from_checkpoint(trained, device="cpu", tile=64, overlap=16)
    mask = predictor(tmp_path / "big.png")
    assert np.array_equal(read_mask(tmp_path / "out" / "big.png"), mask)
    for index in range(4):
        with Image.open(tmp_path / "out" / f"big_probability_{index:02d}.png") as page:
            stored = np.asarray(page)
        expected = predictor.probabilities(tmp_path / "big.png")[index]
        np.testing.assert_allclose(stored / 65535, expected, atol=1e-5)


def test_video(trained, tmp_path, capsys):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (48, 32))
    rng = np.random.default_rng(0)
    for _ in range(4):
        writer.write(cv2.resize(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), (48, 32)))
    writer.release()
    arguments = ["--ckpt_path", trained, "--input", path, "--video", "--output", tmp_path / "out"]
    assert predict(*arguments) == 0
    predictor = Predictor.from_checkpoint(trained, device="cpu")
    video = cv2.VideoCapture(str(path))
    for index in range(4):
        frame = video.read()[1]
        expected = predictor(np.ascontiguousarray(frame[..., ::-1]))
        assert np.array_equal(read_mask(tmp_path / "out" / "film" / f"{index:06d}.png"), expected)
    assert predict(*arguments[:-1], tmp_path / "none", "--max_pixels", "1535") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if "1,536 pixels, more than --max_pixels 1,535: raise it" in line]) == 4
    assert os.listdir(tmp_path / "none") == ["summary.csv"]
    (tmp_path / "out" / "film" / "000002.png").unlink()
    before = contents(tmp_path / "out")
    assert predict(*arguments, "--skip_existing") == 0
    assert set(contents(tmp_path / "out")) == {*before, "film/000002.png"}


def test_two_processes_write_what_one_does(trained, tmp_path):
    photographs(tmp_path / "in", 7, 1)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive"]
    assert predict(*base, "--output", tmp_path / "one") == 1
    command = [sys.executable, "-m", "seg_attn", "predict", *base, "--output", tmp_path / "two", "--devices", "2"]
    done = subprocess.run(
        [*map(str, command), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "6 of 7 images predicted" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read_image(tmp_path / "in" / "left" / "0001.jpg").shape == (32, 24, 3)


def test_a_summary_of_other_classes_is_not_mixed_in(trained, tmp_path, capsys):
    photographs(tmp_path / "in", 1, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text("file,height,width,mean_confidence,cat\n")
    base = ["--ckpt_path", trained, "--input", tmp_path / "in" / "right", "--output", tmp_path / "out"]
    assert predict(*base) == 2
    assert "summary.csv is of other classes" in capsys.readouterr().err
    predictor = Predictor.from_checkpoint(trained, device="cpu")
    sources = find_sources([tmp_path / "in" / "right"])
    with pytest.raises(InputError, match=r"summary\.csv is of other classes"):
        predict_files(predictor, sources, tmp_path / "out", summary=True)
    # A run that was killed before its first table leaves a journal alone.
    with contextlib.closing(Summary(tmp_path / "out", ["cat", "dog", "cow", "horse"])) as table:
        table.add("a", Seen(1, 1, [0, 0, 0, 1], 0.5))
    (tmp_path / "out" / "summary.csv").unlink()
    left = contents(tmp_path / "out")
    assert predict(*base) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"error: .*\.summary\.\w+\.journal is of other classes: name another --output folder, or remove it\n", line
    )
    with pytest.raises(InputError, match=r"journal is of other classes"):
        predict_files(predictor, sources, tmp_path / "out", summary=True)
    assert contents(tmp_path / "out") == left


def test_a_batch_that_does_not_fit_into_memory_is_split(model, data, tmp_path):
    """The allocator of the processor refuses batches, and images of 40 x 40 even alone."""
    paths, _ = photographs(tmp_path / "in", 6, 0)
    shutil.copy(paths[0], paths[3])  # a third one of its size
    seen = []

    def hook(_, arguments):
        seen.append(tuple(arguments[0].shape))
        if len(arguments[0]) > 1 or arguments[0].shape[-2:] == (40, 40):
            torch.empty(1 << 47)

    handle = model.register_forward_pre_hook(hook)
    predictor = Predictor(model, data, device="cpu")
    counted = []
    outcomes = list(predict_files(predictor, paths, tmp_path / "out", batch_size=3, advance=counted.append))
    handle.remove()
    assert max(shape[0] for shape in seen) > 1
    assert sum(counted) == 6
    for path, outcome in zip(paths, outcomes, strict=True):
        if read_image(path).shape[0] == 40:
            assert outcome.error == f"{path}: at once it needs more memory than there is: try --tile 1024"
        else:
            assert np.array_equal(read_mask(outcome.written[0]), predictor(path))


def test_tiles_that_do_not_fit_into_memory(model, data, tmp_path):
    Image.new("RGB", (100, 90)).save(tmp_path / "a.png")
    handle = model.register_forward_pre_hook(lambda *_: torch.empty(1 << 47))
    counted = []
    predictor = Predictor(model, data, device="cpu", tile=64)
    outcome = next(predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out", advance=counted.append))
    handle.remove()
    assert "its tiles need more memory than there is: try a smaller --tile" in outcome.error
    assert sum(counted) == 4
    assert not list((tmp_path / "out").iterdir())


def test_another_error_of_the_network_is_not_hidden(model, data, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    handle = model.register_forward_pre_hook(lambda *_: torch.zeros(2) + torch.zeros(3))
    predictor = Predictor(model, data, device="cpu")
    with pytest.raises(RuntimeError, match="must match the size"):
        list(predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out"))
    handle.remove()


def test_what_waits_to_be_written_is_bounded_by_its_bytes(model, data, tmp_path, monkeypatch):
    """Writing takes longer than predicting: the network waits as soon as two predictions do."""
    for index in range(8):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{index}.png")
    paths = sorted(tmp_path.glob("*.png"))
    outputs = Outputs(tmp_path / "out", ("probability",), "npz", data)
    monkeypatch.setattr(stream, "_BYTES_BEHIND", 2 * outputs.bytes_held(20, 30, tiled=False))
    counts = {"predicted": 0, "written": 0}
    waiting = []
    whole, write = Inference.whole, Outputs.write

    def slow(*arguments):
        time.sleep(0.05)
        write(*arguments)
        counts["written"] += 1

    def watched(*arguments):
        waiting.append(counts["predicted"] - counts["written"])
        counts["predicted"] += 1
        return whole(*arguments)

    monkeypatch.setattr(Outputs, "write", slow)
    monkeypatch.setattr(Inference, "whole", watched)
    predictor = Predictor(model, data, device="cpu")
    assert all(outcome.error is None for outcome in predict_files(predictor, paths, tmp_path / "out", ("probability",)))
    assert len(waiting) == 8
    assert max(waiting) == 1


def test_names_that_are_not_utf8(trained, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"photos\xff")
    folder.mkdir()
    for name in (b"caf\xe9.jpg", b"b.jpg"):
        Image.new("RGB", (20, 20)).save(folder / os.fsdecode(name), "JPEG")
    out = tmp_path / os.fsdecode(b"masks\xff")
    base = ["--ckpt_path", trained, "--input", folder, "--output", out, "--save", "mask,rle"]
    assert predict(*base) == 0
    assert "masks\\xff" in capsys.readouterr().out
    assert b"\ncaf\xe9," in (out / "summary.csv").read_bytes()
    described = json.loads((out / os.fsdecode(b"caf\xe9_rle.json")).read_text())
    assert os.fsencode(described["file"]) == b"caf\xe9.jpg"
    before = contents(out)
    assert not [name for name in before if name.startswith(".")]
    (out / "b.png").unlink()
    assert predict(*base, "--skip_existing") == 0  # the table is read back, and written again
    assert contents(out) == before


def test_long_names(trained, tmp_path, capsys):
    for stem in ("a" * 250, "b" * 200):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{stem}.jpg")
    base = ["--ckpt_path", trained, "--input", f"{tmp_path}/*.jpg"]
    assert predict(*base, "--output", tmp_path / "one") == 0
    assert {len(name) for name in contents(tmp_path / "one")} == {254, 204, len("summary.csv")}
    capsys.readouterr()
    assert predict(*base, "--output", tmp_path / "two", "--save", "mask,overlay") == 1
    said = capsys.readouterr()
    assert "1 of 2 images predicted" in said.out
    assert said.err.count("File name too long") == 1
    assert set(contents(tmp_path / "two")) == {f"{'b' * 200}.png", f"{'b' * 200}_overlay.png", "summary.csv"}
    assert (tmp_path / "two" / "summary.csv").read_text().count("\n") == 2
    assert predict(*base, "--output", tmp_path / "two", "--save", "mask,overlay", "--skip_existing") == 1


def test_one_that_cannot_be_written_does_not_stop_the_others(trained, tmp_path, capsys):
    photographs(tmp_path / "in", 6, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left").touch()  # a file where a folder must be
    base = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive", "--output", tmp_path / "out"]
    assert predict(*base) == 1
    said = capsys.readouterr()
    assert said.err.count("left/0001.jpg: cannot be written to") == 1
    assert "3 of 6 images predicted" in said.out


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tile", [[], ["--tile", "32"]], ids=["whole", "tiles"])
def test_a_full_disk_ends_the_run_in_one_line(trained, tmp_path, capsys, monkeypatch, devices, tile):
    photographs(tmp_path / "in", 6, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    monkeypatch.setattr(sharding, "Fabric", _FabricOfOneProcess)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in" / "left", "--output", tmp_path / "out"]
    assert predict(*base, *tile, "--devices", devices) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {tmp_path / 'out'}: No space left on device: make room, then go on with --skip_existing"]
    assert all(name.startswith(".summary.") for name in contents(tmp_path / "out"))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("output", ["file", "file/deep/er", "link", "locked/new"])
def test_an_output_folder_that_cannot_be_is_known_before_the_work(
    trained, tmp_path, capsys, monkeypatch, output, devices
):
    photographs(tmp_path / "in", 2, 0)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    if output == "locked/new":  # whoever runs the tests may be allowed everything

        def refused(dir):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

        monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(Inference, "whole", lambda *_: pytest.fail("the network ran"))
    monkeypatch.setattr(sharding, "Fabric", _FabricOfOneProcess)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in" / "left", "--output", tmp_path / output]
    assert predict(*base, "--devices", devices) == 2
    existing = tmp_path / output.partition("/")[0]
    reason = {"link": "No such file or directory", "locked": "Permission denied"}.get(existing.name, "Not a directory")
    expected = f"--output {tmp_path / output}: nothing can be written into {existing} ({reason}); name another folder"
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert not list((tmp_path / "locked").iterdir())


@pytest.mark.parametrize(
    "how", [[], ["--tile", "32", "--overlap", "8"], ["--flip"], ["--batch_size", "2"]], ids=lambda how: "".join(how)
)
def test_what_is_not_finite_is_no_mask(trained, tmp_path, capsys, how):
    content = torch.load(trained, weights_only=True)
    content["state_dict"]["model.classifier.bias"][2] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    paths, _ = photographs(tmp_path / "in", 6, 0)  # of three sizes, one larger than a tile
    base = ["--ckpt_path", tmp_path / "nan.ckpt", "--input", tmp_path / "in" / "right", "--output", tmp_path / "out"]
    assert predict(*base, *how, "--save", "mask,probability,rle") == 1
    said = capsys.readouterr()
    for path in paths[::2]:
        assert f"error: the network's output for {path} is not finite: " in said.err
    assert "0 of 3 images predicted" in said.out
    assert os.listdir(tmp_path / "out") == ["summary.csv"]
    assert (tmp_path / "out" / "summary.csv").read_text().count("\n") == 1


def test_one_that_is_not_finite_does_not_stop_the_others(model, data, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for value, path in enumerate(paths):
        Image.new("RGB", (30, 20), (value, value, value)).save(path)

    def hook(_, arguments, logits):
        # The darkest of the batch.
        logits[arguments[0].sum(dim=(1, 2, 3)).argmin(), 0, 0, 0] = float("inf")

    handle = model.register_forward_hook(hook)
    outcomes = list(predict_files(Predictor(model, data, device="cpu"), paths, tmp_path / "out", batch_size=3))
    handle.remove()
    assert [outcome.error is None for outcome in outcomes] == [False, True, True]
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "2.png"]


def test_a_run_that_nobody_draws_from_to_the_end_keeps_its_rows(model, data, tmp_path, monkeypatch):
    paths, _ = photographs(tmp_path / "in", 6, 0)
    events = []
    write, close = Outputs.write, Summary.close

    def slow(*arguments):
        time.sleep(0.1)
        write(*arguments)
        events.append("written")

    def closed(table):
        close(table)
        events.append("closed")

    monkeypatch.setattr(Outputs, "write", slow)
    monkeypatch.setattr(Summary, "close", closed)
    predictor = Predictor(model, data, device="cpu")
    running = predict_files(predictor, paths, tmp_path / "out", summary=True)
    next(running)
    running.close()
    assert events.count("written") > 1
    assert events.index("closed") == len(events) - 1  # after all that was under way
    assert not (tmp_path / "out" / "summary.csv").exists()
    outcomes = list(predict_files(predictor, paths, tmp_path / "out", existing="skip", summary=True))
    assert outcomes[0].skipped
    list(predict_files(predictor, paths, tmp_path / "fresh", summary=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


class _FabricOfOneProcess:
    """Lightning's Fabric, but rank after rank in this process."""

    def __init__(self, accelerator, devices, strategy):
        self.device, self.world_size, self.global_rank = torch.device(accelerator), devices, 0

    def launch(self, function):
        for rank in range(self.world_size):
            self.global_rank = rank
            function(self)


@pytest.mark.parametrize("how", [["--output_stride", "7"], ["--ckpt_path", "less.ckpt"]])
def test_several_processes_are_not_started_in_vain(trained, tmp_path, capsys, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    content = torch.load(trained, weights_only=True)
    del content["state_dict"]["model.classifier.weight"]
    torch.save(content, tmp_path / "less.ckpt")
    photographs(tmp_path / "in", 2, 0)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive", "--output", tmp_path / "out"]
    assert predict(*base, "--devices", "2", *how) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Traceback" not in line
    assert not (tmp_path / "out").exists()


def test_rows_of_a_stopped_run_are_older_than_those_of_the_next(trained, tmp_path):
    """A run of four processes that was killed leaves four journals; the next run has one."""
    photographs(tmp_path / "in", 6, 0)
    base = ["--ckpt_path", trained, "--input", tmp_path / "in", "--recursive"]
    assert predict(*base, "--output", tmp_path / "fresh") == 0
    out = tmp_path / "out"
    out.mkdir()
    for rank in range(4):
        with contextlib.closing(Summary(out, ["sky", "road", "tree", "car"])) as table:
            table.add(f"left/{2 * rank + 1:04d}", Seen(1, 1, [0, 0, 0, 1], 0.5))
    assert predict(*base, "--output", out, "--overwrite") == 0
    rows = (out / "summary.csv").read_text().splitlines()
    stopped = "left/0007,1,1,0.5,0.0,0.0,0.0,1.0"
    assert stopped in rows  # of an image that this run did not have
    rows.remove(stopped)
    assert rows == (tmp_path / "fresh" / "summary.csv").read_text().splitlines()
    assert not list(out.glob(".*"))


def test_input_may_be_given_more_than_once(trained, tmp_path):
    photographs(tmp_path / "in", 6, 0)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{tmp_path}/{name}.png\n")
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    base = ["--ckpt_path", trained, "--output", tmp_path / "out", "--skip_existing"]
    for _ in range(2):  # nothing is kept from call to call
        inputs = ["--input", tmp_path / "in" / "left", "--input", tmp_path / "in" / "right"]
        assert predict(*base, *inputs, "--list", tmp_path / "a.txt", "--list", tmp_path / "b.txt") == 0
        assert len(list((tmp_path / "out").glob("*.png"))) == 8
    assert predict(*base, "--input", tmp_path / "a.png", "--output", tmp_path / "other") == 0
    assert [path.name for path in (tmp_path / "other").glob("*.png")] == ["a.png"]
