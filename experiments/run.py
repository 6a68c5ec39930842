"""The folder of a run: who owns it, how it ended, and what it measured."""

import csv
import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ("likelihood", "partial.npz")
_PACKAGES = ("torch", "torchdiffeq", "numpy", "hydra-core", "scikit-learn", "matplotlib")


class RunFolderTaken(ValueError):
    """Another run wrote, or writes, into the folder."""


class Run:
    """One run's folder: ``status.json``, ``metrics.csv``, ``summary.json``, and folders of checkpoints and figures.

    Creating it claims the folder; a folder that holds a run already is refused, so that nothing is overwritten, but for
    an unfinished one that left a ``partial`` result, which is taken up again where ``resume`` says so.
    """

    def __init__(self, folder: str | Path, task: str, resume: bool = False):
        self.folder, self.started, self.summary = Path(folder), time.time(), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._status = {"task": task, "state": "running", "pid": os.getpid(), "started": _now()}
        status = self.folder / "status.json"
        if resume and unfinished(self.folder):
            self.summary = _read_json(self.folder / "summary.json")
            os.rename(status, status.with_suffix(".before.json"))  # of two that try, one succeeds
        try:
            with status.open("x") as file:
                json.dump(self._status, file, indent=2)
        except FileExistsError:
            raise RunFolderTaken(taken(self.folder, "a run", "hydra.run.dir")) from None

    @property
    def partial(self) -> Path:
        """Where a task keeps what it has so far, for another run to go on from."""
        return self.folder.joinpath(*PARTIAL)

    def path(self, *parts: str) -> Path:
        """A path inside the folder, whose parent exists."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def note(self, **values: Any) -> None:
        """Add values to the summary and write it, so that an aborted run keeps what it had measured."""
        self.summary.update(values)
        write_json(self.path("summary.json"), self.summary)

    def end(self, state: str, error: str | None = None) -> None:
        """Record how the run ended: "done", "failed" or "interrupted"."""
        self._status |= {"state": state, "ended": _now(), "seconds": round(time.time() - self.started, 2)}
        write_json(self.path("status.json"), self._status | ({"error": error} if error else {}))


class Metrics:
    """Rows of numbers in a CSV file, written through at once."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.file = path.open("x", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()

    def row(self, **values: Any) -> None:
        """One row; columns without a value stay empty."""
        self.writer.writerow(values)
        self.file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def provenance() -> dict[str, Any]:
    """Versions, platform and commit that a number belongs to."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "command": " ".join(sys.argv),
    }


def git_commit() -> str | None:
    """The commit of the source tree, with "-dirty" for local changes; None outside a repository."""
    source = Path(__file__).resolve().parent.parent
    try:
        inside = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=source, capture_output=True)
        if inside.returncode:
            return None
        return subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=source, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write plain values; a reader never sees half of them."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` once all of it is on the disk: a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can: else a loss of power may undo a renaming."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def unfinished(folder: Path) -> bool:
    """Whether the folder holds a run that ended, or died, before it was done, and a partial result to go on from."""
    status = _read_json(folder / "status.json")
    died = status.get("state") == "running" and not _alive(status["pid"])
    return (died or status.get("state") in ("interrupted", "failed")) and folder.joinpath(*PARTIAL).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # a crash may leave an empty status
        return {}


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def taken(folder: Path, what: str, key: str) -> str:
    """What to tell someone whose output folder is in use already."""
    return f"{folder} already holds {what}, and nothing is overwritten; choose another {key}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
