"""What a long evaluation keeps on the disk after each batch, so that another run can go on from there.

The file holds the settings that the numbers belong to, the checkpoint's digest among them; results of other settings
are refused, and not mixed.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.build import ConfigError
from experiments.estimator import Examples
from experiments.run import PARTIAL, replacing


def digest(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Partial:
    """The examples done so far, in ``path``; begun from those in ``source``, which may be ``path``, if there is one.

    ``settings``: plain values that the results depend on. Raises ``ConfigError`` where those of ``source`` differ.
    """

    def __init__(self, path: Path, settings: dict[str, Any], source: Path | None = None):
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)
        self.found = self._read(source) if source else None
        self._write({name: value.numpy() for name, value in (self.found.arrays() if self.found else {}).items()})

    def load(self) -> Examples | None:
        """What there was to begin from."""
        return self.found

    def save(self, done: Examples) -> None:
        """Replace what is on the disk, at once and as a whole."""
        self._write({name: value.numpy() for name, value in done.arrays().items()})

    def remove(self) -> None:
        """When all is done and written elsewhere."""
        self.path.unlink()

    def _write(self, arrays: dict[str, np.ndarray]) -> None:
        with replacing(self.path) as file:
            np.savez(file, settings=np.array(self.settings), **arrays)

    def _read(self, source: Path) -> Examples | None:
        try:
            with source.open("rb") as file, np.load(file, allow_pickle=False) as content:
                arrays = dict(content)
            settings = str(arrays.pop("settings"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            cause = type(error).__name__
            raise ConfigError(f"resume: {source} is not readable ({cause}); leave resume out to begin anew") from error
        if settings != self.settings:
            raise ConfigError(f"resume: {source} {_difference(json.loads(settings), json.loads(self.settings))}")
        return Examples.of({name: torch.from_numpy(value) for name, value in arrays.items()}) if arrays else None


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in here if there.get(name) != here[name]] or sorted(there.keys() - here.keys())
    told = "; ".join(f"{name}={there.get(name)!r}, not {here.get(name)!r}" for name in names)
    return f"was made with {told}; take the same settings and checkpoint, or leave resume out to begin anew"


def source_of(resume: str | None, partial: Path) -> Path | None:
    """The file that ``resume`` says to go on from: None, "auto" for ``partial`` if it is there, or a run's folder."""
    if resume is None or (resume == "auto" and not partial.is_file()):
        return None
    if resume == "auto":
        return partial
    source = Path(resume).expanduser().joinpath(*PARTIAL)
    if not source.is_file():
        raise ConfigError(f"resume={resume}: there is no {source}; give the folder of an interrupted task=likelihood")
    return source
