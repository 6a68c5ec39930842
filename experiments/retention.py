"""Which checkpoints of a training are kept: the last, the one before it, the best, and every k-th.

A checkpoint is written once; its other names are hard links to it. The names of before keep their files until the new
file is whole and on the disk, so that there is a good checkpoint at every moment: last.pt, or failing it previous.pt.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import checkpoint
from experiments.processes import Processes
from experiments.run import CHECKPOINTS

log = logging.getLogger(__name__)
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class Kept:
    """The checkpoints in a run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder / CHECKPOINTS
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, write: Callable[[Path], None], step: int, best: bool = False, keep: bool = False) -> Path:
        """The checkpoint that ``write(path)`` writes is last.pt now, what was is previous.pt; returns its path.

        ``best``: it is best.pt too. ``keep``: it stays as step_N.pt.
        """
        last = self.folder / LAST
        if last.is_file():
            self._link(last, PREVIOUS)
        write(last)
        if best:
            self._link(last, BEST)
        if keep:
            self._link(last, f"step_{step:08d}.pt")
        return last

    def find(self, resume: str | None, group: Processes) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint that ``resume`` names, and its content: a file, the newest of a run, or of this run ("auto").

        None where there is none of this run yet. Raises ``CheckpointError``, for another run also where it has none.
        """
        if resume is None:
            return None, None
        path, content = (self.folder.parent if resume == "auto" else Path(resume).expanduser()), None
        file = None if path.is_dir() else checkpoint.find(path)
        if path.is_dir() and group.is_first:
            _reap(self.folder)
            file, content = newest(path / CHECKPOINTS)
        file = group.broadcast(file and str(file))
        if file is None and resume != "auto":
            reason = "there is no checkpoint in it"
            raise checkpoint.CheckpointError(path, reason, "give resume=RUN_FOLDER of a training, or a .pt file")
        if file is None:
            log.info("nothing to go on from in %s: a new training", path)
            return None, None
        return Path(file), content or checkpoint.read(Path(file))

    def adopt(self, file: Path) -> None:
        """Take the best checkpoint of the run that ``file`` is of, where that is another."""
        best = file.with_name(BEST)
        if file.parent != self.folder and best.is_file():
            self._link(best, BEST)

    def _link(self, file: Path, name: str) -> None:
        """Give the file another name, in place of the file that had it."""
        other = self.folder / f"{name}.tmp"
        other.unlink(missing_ok=True)
        try:
            os.link(file, other)
        except OSError:  # a file system without links
            shutil.copyfile(file, other)
        os.replace(other, self.folder / name)


def _reap(folder: Path) -> None:
    """Remove what a run that died while it was saving left behind."""
    for file in sorted(folder.glob("*.tmp")):
        log.warning("%s was never finished, and is removed", file)
        file.unlink()


def newest(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint of a folder that can be read, and its content; None where there is none at all.

    Damaged ones are passed over with a warning. Raises ``CheckpointError`` where all are damaged.
    """
    steps = sorted(folder.glob("step_*.pt"), reverse=True)
    errors = []
    for file in (folder / LAST, folder / PREVIOUS, *steps, folder / BEST):
        try:
            if file.is_file():
                return file, checkpoint.read(file)
        except checkpoint.CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            errors.append(error)
    if errors:
        raise errors[0]
    return None, None
