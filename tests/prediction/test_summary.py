"""Several runs that write into one folder at the same time, live, stopped or killed: no row is lost."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest

from seg_attn.errors import InputError
from seg_attn.prediction import summary
from seg_attn.prediction.outputs import Seen
from seg_attn.prediction.summary import Summary

SEEN = Seen(2, 2, [1, 3], 0.5)
ADD_AND_WAIT = """
import sys, time
from pathlib import Path
from seg_attn.prediction.outputs import Seen
from seg_attn.prediction.summary import Summary
table = Summary(Path(sys.argv[1]), ["a", "b"])
table.add("other", Seen(2, 2, [1, 3], 0.5))
print("added", flush=True)
time.sleep(600)
"""


def summary_of(folder):
    return Summary(folder, ["a", "b"])


def rows(folder):
    header, *lines = (folder / "summary.csv").read_text().splitlines()
    assert header == "file,height,width,mean_confidence,a,b"
    assert {line.partition(",")[2] for line in lines} <= {"2,2,0.5,0.25,0.75"}
    return [line.partition(",")[0] for line in lines]


def test_rows_that_are_added_while_another_run_ends(tmp_path, monkeypatch):
    whole_file = summary.whole_file

    @contextlib.contextmanager
    def meanwhile(path):
        with whole_file(path) as file:
            yield file
        live.add("late", SEEN)

    with summary_of(tmp_path) as live:
        live.add("early", SEEN)
        with monkeypatch.context() as patch, summary_of(tmp_path) as other:
            other.add("other", SEEN)
            patch.setattr(summary, "whole_file", meanwhile)
            other.finish()
        assert rows(tmp_path) == ["other"]
    assert rows(tmp_path) == ["early", "late", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_many_runs_at_once(tmp_path, monkeypatch):
    failed = []
    lock = summary.lock

    def slowly(file):
        time.sleep(0.001)
        lock(file)

    monkeypatch.setattr(summary, "lock", slowly)

    def run(number):
        try:
            for turn in range(12):
                with summary_of(tmp_path) as table:
                    for image in range(3):
                        table.add(f"{number}-{turn:02d}-{image}", SEEN)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert rows(tmp_path) == [f"{n}-{turn:02d}-{image}" for n in range(6) for turn in range(12) for image in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_the_rows_of_a_killed_process_go_to_the_next(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ADD_AND_WAIT, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"added\n"
            with summary_of(tmp_path) as table:
                table.add("mine", SEEN)
            assert rows(tmp_path) == ["mine"]
            assert len(list(tmp_path.glob(".*"))) == 1
        finally:
            process.kill()
    with summary_of(tmp_path):
        assert rows(tmp_path) == ["mine", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_newer_rows_win(tmp_path):
    newer = Seen(1, 1, [1, 0], 1.0)
    for seen in (SEEN, newer):
        with contextlib.suppress(ZeroDivisionError), summary_of(tmp_path) as table:
            table.add("x", seen)
            table.add("x" if seen is newer else "y", seen)
            assert 1 / 0  # rows are left in the journal
    with summary_of(tmp_path) as table:
        table.add("z", SEEN)
    lines = (tmp_path / "summary.csv").read_text().splitlines()[1:]
    assert lines == ["x,1,1,1.0,1.0,0.0", "y,2,2,0.5,0.25,0.75", "z,2,2,0.5,0.25,0.75"]


def test_rows_of_a_live_run_win_over_those_of_runs_that_stop_meanwhile(tmp_path):
    with summary_of(tmp_path) as table:
        table.add("x", Seen(1, 1, [1, 0], 1.0))
        for _ in range(9):  # the names of journals are random
            with contextlib.closing(summary_of(tmp_path)) as stopped:
                stopped.add("x", SEEN)
    assert (tmp_path / "summary.csv").read_text().splitlines()[1:] == ["x,1,1,1.0,1.0,0.0"]


def test_other_classes(tmp_path):
    with contextlib.closing(Summary(tmp_path, ["a", "c"])) as other:
        other.add("x", SEEN)
        for path in tmp_path.iterdir():
            assert path.suffix == ".journal"
            with pytest.raises(
                InputError, match=r"\.journal is of other classes: name another --output folder, or rem"
            ):
                summary_of(tmp_path).check()
    with pytest.raises(InputError, match=r"\.journal is of other classes"):
        summary_of(tmp_path).finish()
    assert [path.suffix for path in tmp_path.iterdir()] == [".journal"]
    other.finish()
    with pytest.raises(InputError, match=r"summary\.csv is of other classes"):
        summary_of(tmp_path).check()


@pytest.mark.parametrize("content", ["", '["file", "hei', '["file"'])
def test_a_journal_whose_process_was_killed_at_its_first_line(tmp_path, content):
    (tmp_path / ".summary.0a1b.journal").write_text(content)
    table = summary_of(tmp_path)
    table.check()
    table.finish()
    assert rows(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
