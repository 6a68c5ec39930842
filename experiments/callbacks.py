"""What happens before Hydra writes anything."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.run import taken, unfinished


class RefuseTakenFolders(Callback):
    """End the program when the output folder holds a run already, before its configuration is overwritten."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """A single run; with resume=auto it may go on where an unfinished one ended."""
        folder = Path(config.hydra.run.dir)
        if config.get("resume") != "auto" or not unfinished(folder):
            _refuse(folder, "status.json", "a run", "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep."""
        _refuse(Path(config.hydra.sweep.dir), "multirun.yaml", "a sweep", "hydra.sweep.dir")


def _refuse(folder: Path, mark: str, what: str, key: str) -> None:
    if (folder / mark).exists():
        # Hydra turns an exception of a callback into a warning; leaving the program it can't.
        print(f"error: {taken(folder, what, key)}", file=sys.stderr)
        sys.exit(2)
