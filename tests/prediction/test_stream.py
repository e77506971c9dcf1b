"""Many files: order, broken ones, stops at any moment, and what must never be written over."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from seg_attn import Predictor
from seg_attn.cli import main
from seg_attn.data.images import read_image, read_mask
from seg_attn.errors import InputError
from seg_attn.predict import predict_files
from seg_attn.prediction.inputs import find_sources

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


def _killed_and_restarted(trained, tmp_path, count, broken, kills, window):
    photographs(tmp_path / "in", count, broken)
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
            if not name.rpartition("/")[2].startswith("."):
                assert content == expected[name], name  # whole, or not there
    assert stopped
    # What a killed process may leave behind: the half of a file, and the half of a line.
    (out / "left" / ".x.png.999999999-abcd.part").write_bytes(b"half")
    with (out / ".summary.0.journal").open("ab") as journal:
        journal.write(b'["left/00')
    assert predict(*arguments, "--output", out, "--skip_existing") == 1
    assert contents(out) == expected
    return expected


def test_killed_and_restarted_gives_the_same_folder(trained, tmp_path):
    expected = _killed_and_restarted(trained, tmp_path, count=40, broken=8, kills=2, window=(8, 24))
    assert len([name for name in expected if name.endswith("_overlay.png")]) == 32


@pytest.mark.exhaustive
def test_a_thousand_images_killed_five_times(trained, tmp_path, capsys):
    expected = _killed_and_restarted(trained, tmp_path, count=1000, broken=12, kills=5, window=(100, 500))
    assert len([name for name in expected if name.endswith(".png") and "_overlay" not in name]) == 988
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 24  # 12 of the whole run, 12 of the last restart


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


def test_video(trained, tmp_path):
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
    with pytest.raises(InputError, match=r"summary\.csv is of other classes"):
        predict_files(predictor, find_sources([tmp_path / "in" / "right"]), tmp_path / "out", summary=True)
