"""The folder of a run: one owner, tried before anything is written, and rows that go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from configurations import before_a_run

from experiments import run
from experiments.run import Metrics, Run, RunFolderTaken, unfinished

HOLD = """
import sys, time
from experiments.run import Run
Run(sys.argv[1], "train")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process, whose run is in the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_at_once_and_told_who_is_there(tmp_path, owner, capsys):
    before = (tmp_path / "status.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(RunFolderTaken, match=rf"is being written by another run \(process {owner.pid} on \S+\)"):
            Run(tmp_path, "train", resume)
    for resume in (None, "auto"):
        with pytest.raises(SystemExit) as caught:
            before_a_run(tmp_path, resume)
        assert caught.value.code == 2
    assert (tmp_path / "status.json").read_bytes() == before and not unfinished(tmp_path)


def test_without_locks_the_process_number_decides(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(run, "fcntl", None)
    with pytest.raises(RunFolderTaken, match="is being written by another run"):
        Run(tmp_path, "train", resume=True)
    owner.kill()
    owner.wait()
    Run(tmp_path, "train", resume=True).end("done")


def test_a_run_that_was_killed_leaves_nothing_to_clear_away(tmp_path, owner, caplog):
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert unfinished(tmp_path)
    with pytest.raises(RunFolderTaken, match="already holds a run"):
        Run(tmp_path, "train")
    before_a_run(tmp_path, "auto")
    again = Run(tmp_path, "train", resume=True)
    assert f"process {owner.pid}" in caplog.text and "died without an end" in caplog.text
    assert json.loads((tmp_path / "status.before.json").read_text())["pid"] == owner.pid
    again.end("done")


def test_a_child_does_not_keep_the_folder(tmp_path):
    """As the workers that prepare batches, which may outlive a killed training for some seconds."""
    first = Run(tmp_path, "train")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b".")
        time.sleep(20)
        os._exit(0)
    os.read(read, 1)
    first.end("failed")
    try:
        assert unfinished(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (read, write):
            os.close(end)


def test_a_damaged_status_is_no_obstacle(tmp_path):
    Run(tmp_path, "train").end("failed")
    (tmp_path / "status.json").write_text('{"state": ')
    assert unfinished(tmp_path)
    Run(tmp_path, "train", resume=True).end("done")


def test_where_nothing_can_be_written_the_program_ends_before_it_begins(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    folders = [tmp_path / "file", tmp_path / "file" / "inside", tmp_path / "loop" / "run", tmp_path / ("x" * 300)]
    folders += [] if os.geteuid() == 0 else [closed]  # root may write anywhere
    for folder in folders:
        with pytest.raises(SystemExit) as caught:
            before_a_run(folder)
        assert caught.value.code == 2
        assert f"error: hydra.run.dir={folder}: nothing can be written there (" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and sorted(closed.iterdir()) == []


@pytest.mark.parametrize("name", ["with a space", "größe", "日本", b"\xff\xfe".decode(errors="surrogateescape")])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    before_a_run(tmp_path / name)
    named = Run(tmp_path / name, "train")
    named.note(folder="here")
    named.end("done")
    assert json.loads((tmp_path / name / "status.json").read_text())["state"] == "done"


def test_rows_beyond_the_checkpoint_and_half_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    with Metrics(path, ("step", "loss", "old")) as rows:
        for step in (10, 20, 30):
            rows.row(step=step, loss=step / 7, old=1)
    path.write_text(path.read_text() + "4")  # a crash in the midst of a row
    with Metrics(path, ("step", "loss", "new"), keep=20) as rows:
        rows.row(step=30, loss=0.5, new=2)
    assert path.read_text().splitlines() == ["step,loss,new", f"10,{10 / 7},", f"20,{20 / 7},", "30,0.5,2"]
    with pytest.raises(FileExistsError):
        Metrics(path, ("step",))


def test_rows_of_another_run_are_taken_over_and_it_stays_as_it_is(tmp_path):
    with Metrics(tmp_path / "a.csv", ("step", "loss")) as rows:
        rows.row(step=10, loss=1.5)
        rows.row(step=20, loss=2.5)
    before = (tmp_path / "a.csv").read_bytes()
    with Metrics(tmp_path / "b.csv", ("step", "loss"), keep=10, source=tmp_path / "a.csv"):
        pass
    assert (tmp_path / "b.csv").read_text().splitlines() == ["step,loss", "10,1.5"]
    assert (tmp_path / "a.csv").read_bytes() == before
