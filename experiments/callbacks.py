"""What happens before Hydra writes anything."""

import os
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments import sweep
from experiments.run import taken, unfinished


class RefuseTakenFolders(Callback):
    """End the program before anything is written, where the output folder holds a run already, or takes no files."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """A single run; with resume=auto it may go on where an unfinished one ended."""
        folder = Path(config.hydra.run.dir)
        _check(config)
        _try_to_write(folder, "hydra.run.dir")
        if config.get("resume") != "auto" or not unfinished(folder):
            _refuse(folder, "status.json", "a run", "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep, which may go on in its folder."""
        folder = Path(config.hydra.sweep.dir)
        if sweep.current() is None:
            _try_to_write(folder, "hydra.sweep.dir")
            _refuse(folder, "status.json", "a run", "hydra.sweep.dir")
            _keep(folder / "multirun.yaml")
        sweep.begin(config)


def _keep(file: Path) -> None:
    """Hydra writes the file anew: keep the former invocation's, as multirun.before.yaml, multirun.before-2.yaml, ..."""
    if not file.is_file():
        return
    names = (file.with_name(f"multirun.before{'' if i == 1 else f'-{i}'}.yaml") for i in count(1))
    os.replace(file, next(name for name in names if not name.exists()))


def _check(config: DictConfig) -> None:
    from experiments.preflight import preflight  # the first of what is heavy; whatever shows help needs none of it

    try:
        preflight(config, sys.argv[1:])
    except ValueError as error:
        _leave(str(error))


def _refuse(folder: Path, mark: str, what: str, key: str) -> None:
    if (folder / mark).exists():
        _leave(taken(folder, what, key))


def _try_to_write(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"nothing")
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)
        _leave(f"{key}={folder}: nothing can be written there ({reason}); choose another {key}, or mend this one")


def _leave(words: str) -> None:
    # Hydra turns an exception of a callback into a warning; leaving the program it can't.
    print(f"error: {words}", file=sys.stderr)
    raise SystemExit(2)
