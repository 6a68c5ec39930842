"""The folder of a run: who owns it, how it ended, and what it measured.

A run holds a lock on its folder that the system takes back when the process ends, however it ends: a second run in the
folder is refused at once, and one that died leaves nothing behind that must be cleared away.
"""

import csv
import errno
import io
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there the process number in status.json decides
    fcntl = None

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
PARTIAL = ("likelihood", "partial.npz")
_PACKAGES = ("torch", "torchdiffeq", "numpy", "hydra-core", "scikit-learn", "matplotlib")


class RunFolderTaken(ValueError):
    """Another run wrote, or writes, into the folder."""


class Run:
    """One run's folder: ``status.json``, ``metrics.csv``, ``summary.json``, and folders of checkpoints and figures.

    Creating it claims the folder. A folder that holds a run already is refused, so that nothing is overwritten, but for
    one that can be gone on with (``unfinished``), where ``resume`` says so. ``more`` is noted in ``status.json``.
    Raises ``RunFolderTaken``, or ``OSError`` where nothing can be written.
    """

    def __init__(self, folder: str | Path, task: str, resume: bool = False, **more: Any):
        self.folder, self.started, self.summary = Path(folder), time.time(), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        if self._lock is None:
            raise RunFolderTaken(being_written(self.folder))
        if hasattr(os, "register_at_fork"):  # a child that outlives this process must not keep the folder
            os.register_at_fork(after_in_child=self._lock.close)
        status = self.folder / "status.json"
        if status.exists():
            if not (resume and _open_end(self.folder)):
                self._lock.close()
                raise RunFolderTaken(taken(self.folder, "a run", "hydra.run.dir"))
            self._go_on(status)
        self._status = {"task": task, "state": "running", "pid": os.getpid(), "host": socket.gethostname()}
        self._status |= {"started": _now(), **more}
        write_json(status, self._status)

    def _go_on(self, status: Path) -> None:
        """Where a former run of this folder ended."""
        former = read_json(status)
        if former.get("state") == "running":
            log.warning("the run in %s (%s) died without an end; going on in its place", self.folder, owner_of(former))
        self.summary = read_json(self.folder / "summary.json")
        os.replace(status, status.with_suffix(".before.json"))

    @property
    def can_go_on(self) -> bool:
        """Whether there is something that another run can go on from."""
        return self.partial.is_file() or _trained(self.folder)

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
        self._lock.close()


class Metrics:
    """Rows of numbers in a CSV file, written through at once.

    With ``keep``, rows up to this step stay, of ``source`` if that is another file, and the file is gone on with.
    Raises ``FileExistsError`` for a file that is there, without.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], keep: int | None = None, source: Path | None = None):
        if keep is None:
            path.touch(exist_ok=False)
        lines = [] if keep is None else _rows_until(source or path, keep, columns)
        with replacing(path) as file:
            text = io.TextIOWrapper(file, newline="", write_through=True)
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(lines)
            text.detach()
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, columns)

    def row(self, **values: Any) -> None:
        """One row; columns without a value stay empty."""
        self.writer.writerow(values)
        self.file.flush()

    def close(self) -> None:
        """No more rows."""
        self.file.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_until(path: Path, step: int, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The whole rows of a file of metrics up to a step, under the columns that there are now; none of no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and None not in row.values()]
    return [{name: row.get(name, "") for name in columns} for row in rows if int(row["step"]) <= step]


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


def write_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns, tensors or arrays ``(N,)`` by their names, as a CSV file."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        csv.writer(text).writerows([list(columns), *rows])
        text.detach()


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can: else a loss of power may undo a renaming."""
    if os.name == "nt":  # there a folder can't be opened
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def unfinished(folder: Path) -> bool:
    """Whether the folder holds a run that no process works on any more, and that can be gone on with.

    A trained network can: with more steps, or with what comes after the training.
    """
    return (folder / "status.json").is_file() and is_free(folder) and _open_end(folder)


def died(folder: Path) -> bool:
    """Whether a run that calls itself running has no process any more. Nothing is made in its folder."""
    if fcntl is not None and (folder / ".lock").is_file() and os.access(folder / ".lock", os.W_OK):
        return is_free(folder)
    status = read_json(folder / "status.json")
    return status.get("host") == socket.gethostname() and not _alive(status.get("pid", 0))


def _open_end(folder: Path) -> bool:
    return _trained(folder) or read_json(folder / "status.json").get("state") != "done"


def _trained(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("*.pt"))


def being_written(folder: Path) -> str:
    """What to tell someone whose output folder another process writes into at this moment."""
    owner = owner_of(read_json(folder / "status.json"))
    return f"{folder} is being written by another run ({owner}); wait for its end, or choose another hydra.run.dir"


def owner_of(status: dict[str, Any]) -> str:
    """Who wrote a status."""
    return f"process {status.get('pid', 'unknown')} on {status.get('host', 'this machine')}"


def locked(folder: Path, name: str = ".lock") -> BinaryIO | None:
    """An open file that holds a lock of the folder until it is closed; None where another process holds it."""
    file = (folder / name).open("ab")
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    except OSError:  # a system, or a file system, without locks: the process number must do
        status = read_json(folder / "status.json")
        held = status.get("state") == "running" and status["pid"] != os.getpid() and _alive(status["pid"])
    if held:
        file.close()
    return None if held else file


def is_free(folder: Path) -> bool:
    """Whether no process works in the folder."""
    lock = locked(folder)
    if lock is None:
        return False
    lock.close()
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The table of names and values in a file; an empty one where there is none that can be read."""
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
