"""What inputs name, and the names their masks will have."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from seg_attn.errors import InputError
from seg_attn.prediction.inputs import Source, count_frames, find_sources, pixels_of, size_of


@pytest.fixture
def tree(tmp_path):
    for name in ("a.png", "b.v2.jpg", "one/c.jpg", "one/two/d.tif", "one/.hidden/e.png", "one/note.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(path, format="PNG")
    return tmp_path / "in"


def names(sources):
    return [source.name.as_posix() for source in sources]


def test_folders(tree):
    assert names(find_sources([tree])) == ["a", "b.v2"]
    assert names(find_sources([tree], recursive=True)) == ["a", "b.v2", "one/c", "one/two/d"]
    assert names(find_sources([tree], recursive=True, outside=tree / "one" / "two")) == ["a", "b.v2", "one/c"]
    (tree / "x" / "y").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no image in folder .*x itself: try --recursive"):
        find_sources([tree / "x"])


def test_patterns_keep_the_folders_after_their_first_wildcard(tree):
    assert names(find_sources([f"{tree}/**/*.jpg"])) == ["b.v2", "one/c"]
    assert names(find_sources([f"{tree}/one/*/*.tif"])) == ["two/d"]
    assert names(find_sources([f"{tree}/one/c.*", tree / "one" / "c.jpg"])) == ["c"]


def test_lists(tree, monkeypatch):
    (tree / "list.txt").write_text(f"# photographs\na.png\n\none/c.jpg\n{tree / 'one/two/d.tif'}\nmissing.jpg\n")
    expected = ["a", "one/c", "d", "missing"]
    assert names(find_sources([f"@{tree / 'list.txt'}"])) == expected
    found = find_sources([], lists=[tree / "list.txt"])
    assert names(found) == expected
    assert [source.path.exists() for source in found] == [True, True, True, False]
    (tree / "empty.txt").write_text("# nothing\n")
    for name, message in (("empty.txt", "names no file"), ("none.txt", "no such list of files")):
        with pytest.raises(InputError, match=message):
            find_sources([], lists=[tree / name])
    with pytest.raises(InputError, match="cannot be read as a list of files"):
        find_sources(["@" + str(tree)])
    with pytest.raises(InputError, match=r"a\.png is no text and so no list of files"):
        find_sources([], lists=[tree / "a.png"])
    (tree / "bytes.txt").write_bytes(b"caf\xe9.jpg\n")
    assert os.fsencode(find_sources([], lists=[tree / "bytes.txt"])[0].path) == b"caf\xe9.jpg"


@pytest.mark.parametrize("entry", [".", "./", "..", "one/..", "/"])
def test_a_list_names_files(tree, entry):
    (tree / "list.txt").write_text(f"a.png\n{entry}\n")
    expected = f"{tree / 'list.txt'}: {entry!r} names no file; write the path of one per line"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        find_sources([f"@{tree / 'list.txt'}"])


def test_the_working_folder_is_a_folder(tree, monkeypatch):
    monkeypatch.chdir(tree / "one" / "two")
    assert names(find_sources(["."])) == ["d"]
    assert names(find_sources([".."])) == ["c"]
    assert names(find_sources([".."], recursive=True)) == ["c", "two/d"]


def test_videos(tree):
    path = tree / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (32, 24))
    for _ in range(3):
        writer.write(np.zeros((24, 32, 3), dtype=np.uint8))
    writer.release()
    assert count_frames(path) == 3
    found = find_sources([path], videos=True)
    assert found[2] == Source(path, Path("film/000002"), 2)
    assert size_of(found[2]) == (24, 32)
    assert names(find_sources([tree])) == ["a", "b.v2"]
    assert len(find_sources([tree], videos=True)) == 5
    with pytest.raises(InputError, match=r"film\.avi is a video: add --video"):
        find_sources([path])
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match="no frame can be read"):
        find_sources([path], videos=True)


def test_size_from_the_header(tree):
    assert pixels_of(tree / "a.png") == (4, 6)
    assert pixels_of(tree / "one" / "note.txt") == (4, 6)  # a PNG, whatever its name
    assert pixels_of(tree / "none") is None
