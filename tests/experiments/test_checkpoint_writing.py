"""Whatever happens while a checkpoint is written, the file is the one before or the new one."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save

from experiments import checkpoint, run


@pytest.fixture
def file(tmp_path):
    """A checkpoint of step 1."""
    save(tmp_path / "last.pt", step=1)
    return tmp_path / "last.pt"


def failing(monkeypatch, name, at):
    """The ``at``-th call of ``os.name`` fails."""
    real, calls = getattr(os, name), []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.EIO, "the disk says no")
        return real(*arguments)

    monkeypatch.setattr(run.os, name, call)


@pytest.mark.parametrize(("name", "at"), [("fsync", 1), ("replace", 1)])
def test_a_failure_before_all_is_written_leaves_the_old_file_alone(file, monkeypatch, name, at):
    before = file.read_bytes()
    failing(monkeypatch, name, at)
    with pytest.raises(OSError, match="could not be written; what is there already is whole"):
        save(file, step=2)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_failure_after_that_leaves_the_new_file(file, monkeypatch):
    failing(monkeypatch, "fsync", 2)  # of the folder
    with pytest.raises(OSError, match=r"disk says no|Input/output error"):
        save(file, step=2)
    assert checkpoint.read(file)["step"] == 2 and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("at", [1, 2, 5, 20, 40])
def test_a_write_that_fails_leaves_the_old_file_alone(file, monkeypatch, at):
    calls, real = [], checkpoint.archive._Hashing.write

    def write(self, data):
        calls.append(data)
        if len(calls) == at:
            self.error = OSError(errno.EIO, "the disk says no")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(checkpoint.archive._Hashing, "write", write)
    before = file.read_bytes()
    with pytest.raises(OSError, match=r"bytes and could not be written.*last\.pt"):
        save(file, step=2)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file] and len(calls) >= at


def test_an_interrupt_leaves_the_old_file_alone(file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(run.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(file, step=2)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_the_file_is_on_the_disk_before_it_is_renamed_and_its_name_after(file, monkeypatch):
    """A rename that reaches the disk before its file leaves an empty one after a loss of power."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{number}"), os.fstat(number).st_size))
        fsync(number)

    def replaced(old, new):
        events.append(("replace", str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(run.os, "fsync", synced)
    monkeypatch.setattr(run.os, "replace", replaced)
    save(file, step=2)
    temporary, size = f"{file}.tmp", file.stat().st_size
    assert events[:2] == [("fsync", temporary, size), ("replace", temporary, str(file))]
    assert events[2][:2] == ("fsync", str(file.parent)) and len(events) == 3


def test_a_folder_that_can_not_be_synced_is_no_failure(file, monkeypatch):
    """As on some network file systems."""
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "not here")
        real(number)

    monkeypatch.setattr(run.os, "fsync", fsync)
    save(file, step=2)
    assert checkpoint.read(file)["step"] == 2 and len(calls) == 2


def test_what_a_crash_left_is_written_over(file):
    file.with_name("last.pt.tmp").write_bytes(b"half of a file")
    save(file, step=2)
    assert checkpoint.read(file)["step"] == 2 and list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_said_with_what_was_needed(file):
    """``/dev/full`` takes the place of the temporary file."""
    before = file.read_bytes()
    file.with_name("last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: the checkpoint needs [\d,]+ bytes") as caught:
        save(file, step=2)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
    assert "make room there, or choose another hydra.run.dir" in str(caught.value)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("limit", [10, 3000, 9000])
def test_a_limit_of_the_size_is_found_at_any_place(file, limit):
    before, old = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match="File too large: the checkpoint needs"):
            save(file, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_folder_that_is_not_there_or_is_a_file_is_said(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder, words in (("nowhere", "No such file or directory"), ("taken", "Not a directory")):
        with pytest.raises(OSError, match=f"{words}: the checkpoint needs.*choose another path"):
            checkpoint.archive.write(tmp_path / folder / "last.pt", {"step": 2})


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """Ten out of ten; without the temporary file most are harmed, so that the kills fall where they should."""
    program = Path(__file__).parents[1] / "killed_while_saving.py"
    places = os.pathsep.join(map(str, (program.parents[1], program.parent)))
    found = {}
    for how in ("sealed", "plain"):
        (tmp_path / how).mkdir()
        command = [sys.executable, "-W", "ignore", program, tmp_path / how, "10", "0", how]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": places})
        assert ran.returncode == 0, ran.stderr
        found[how] = json.loads(ran.stdout)
    assert found["sealed"]["read"] == 10 and found["sealed"]["again"] == 10 and found["sealed"]["left"] == 0
    assert found["plain"]["read"] < 10
