"""Files whole or not at all, and whose unfinished files are removed."""

import os
import threading
import time

import pytest

from seg_attn.errors import InputError
from seg_attn.prediction.files import HOST, check_writable, only_one, remove_leftovers, whole_file


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / f"{'n' * 251}.png"  # 255 bytes, the longest that file systems take
    with whole_file(path) as file:
        file.write(b"content")
        assert not path.exists()
        assert all(len(name) < 40 for name in os.listdir(tmp_path))
    assert path.read_bytes() == b"content"
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"other" * (1 // file.tell()))
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"content"]


@pytest.mark.parametrize(("name", "error"), [("n" * 256, "File name too long"), ("folder", "Is a directory")])
def test_a_name_that_cannot_be_taken_is_known_before_the_work(tmp_path, name, error):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=error), whole_file(tmp_path / name):
        pytest.fail("the block was entered")
    assert os.listdir(tmp_path) == ["folder"]


def test_leftovers_are_those_of_processes_that_are_no_more(tmp_path):
    other = f"{int(HOST, 16) ^ 1:08x}"
    dead, day = 999_999_999, 24 * 60 * 60
    ages = {
        f".{HOST}.{dead}-0a1b.part": 0,
        f".{HOST}.{os.getpid()}-0a1b.part": 0,  # of an earlier process that had our number
        f".{other}.{dead}-0a1b.part": 2 * day,
        f".{HOST}.{os.getppid()}-0a1b.part": 2 * day,  # alive
        f".{other}.{dead}-2c3d.part": day // 2,  # of another machine, where it may be alive
        ".x.part": 2 * day,  # not ours
    }
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with whole_file(tmp_path / "a.png") as file:
        remove_leftovers([tmp_path, tmp_path / "nowhere"])
        file.write(b"content")
    assert set(os.listdir(tmp_path)) == {*list(ages)[3:], "a.png"}


def test_a_folder_is_tried_without_being_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "er", tmp_path / ".." / "x", type(tmp_path)("new")):
        check_writable(folder)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^--output n+: nothing can be written into n+ \(File name too long\); name"):
        check_writable(type(tmp_path)("n" * 256))


def test_one_at_a_time(tmp_path):
    (tmp_path / "lock").touch()  # of a process that was killed
    inside, most = [], []

    def work():
        for _ in range(50):
            with only_one(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 300
    assert not list(tmp_path.iterdir())
