"""One cell of a sweep: the folder of one combination of settings, and whose turn it is there.

A cell is known by what determines its results: the first twelve digits of the SHA-256 of its whole resolved
configuration, without where things lie and what they are computed on (``FREE``). Its folder is named by its overrides
and ends with these digits, so that the same combination finds its folder again, from whatever command line it comes.

A cell that is done is left alone. One that failed, was killed or interrupted is done anew: an interrupted likelihood
goes on where it stopped; whatever else the former attempt left is moved to NAME.failed-1, -2, ... first.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.run import PARTIAL, Run, RunFolderTaken, is_free, locked, read_json

FREE = (
    "hydra",
    "networks",
    "device",
    "resume",
    "logger",
    "plugins",
    "optimize",
    "train.workers",
    "train.data_on_device",
)
"""Settings without an influence on a cell's results, and all that lies below them."""
LONGEST = 120
"""The most characters of a cell's name."""
INVOCATION = "SCORE_SDE_SWEEP"
"""The variable that tells a sweep's jobs, whatever process they run in, which invocation of it they belong to."""
AXES = "SCORE_SDE_AXES"
"""Likewise, which settings differ from cell to cell, for the names of folders."""
_DIGITS, _STAYS = 12, (".lock", ".hydra", "run.log")
_EXACT = 1 << 53  # up to here a float holds every integer


def canonical(values: Any) -> str:
    """JSON that is the same for equal values: sorted, and 20 is 20.0."""
    return json.dumps(_plain(values), sort_keys=True, separators=(",", ":"), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _EXACT
    return float(value) if number else value


def short_hash(values: Any) -> str:
    """The first digits of the SHA-256 of plain values."""
    return hashlib.sha256(canonical(values).encode()).hexdigest()[:_DIGITS]


def under(name: str, keys: Iterable[str]) -> bool:
    """Whether a dotted name is one of the keys or lies below one."""
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def cell_hash(config: DictConfig) -> str:
    """Of what determines a cell's results."""
    from experiments.checkpoint import resolved
    from experiments.training_state import flat

    tree = {name: child for name, child in OmegaConf.to_container(config).items() if name != "hydra"}
    values = flat(resolved(OmegaConf.create(tree)))
    return short_hash({name: value for name, value in values.items() if not under(name, FREE)})


def cell_name(config: DictConfig) -> str:
    """The name of the folder for a configuration with Hydra's part: that of the cell where it is there already."""
    found = cell_hash(config)
    there = sorted(path.name for path in Path(config.hydra.sweep.dir).glob(f"*-{found}") if path.is_dir())
    return there[0] if there else f"{title(_axes(config.hydra.overrides.task), LONGEST - _DIGITS - 1)}-{found}"


def _axes(overrides: list[str]) -> list[str]:
    """Those that differ from cell to cell, or all where none does."""
    axes = set(json.loads(os.environ.get(AXES, "[]")))
    return [one for one in overrides if one.partition("=")[0] in axes] or list(overrides)


def title(overrides: Iterable[str], longest: int) -> str:
    """Overrides as a name without signs: the longest of them are left out where they are too many.

    >>> title(["experiment=digits", "sde=vp", "solver.steps=20", "+sde.beta_max=5.5"], 40)
    'sde-vp_steps-20_beta_max-5.5'
    """
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        words = f"{key.partition('@')[0].rpartition('.')[2]}-{value}"
        parts.append(re.sub(r"[^A-Za-z0-9.+_-]+", "-", words).strip("-."))
    while parts and len("_".join(parts)) > longest:
        parts.remove(max(parts, key=len))
    return "_".join(filter(None, parts)) or "cell"


def invocation() -> str | None:
    """Which sweep this process works for; None where for none."""
    return os.environ.get(INVOCATION)


def register() -> None:
    """The resolvers of ``conf/config.yaml``."""
    OmegaConf.register_new_resolver("cell_name", lambda *, _root_: cell_name(_root_), replace=True)
    OmegaConf.register_new_resolver("hydra_folder", lambda *, _root_: _hydra_folder(_root_), replace=True)


def _hydra_folder(config: DictConfig) -> str | None:
    """Where Hydra writes a run's configuration: nowhere, for a cell that no one will work on."""
    folder = OmegaConf.select(config, "hydra.runtime.output_dir")
    sweeping = str(config.hydra.get("mode")).endswith("MULTIRUN")
    return None if sweeping and folder and state_of(Path(folder)) in ("done", "running") else ".hydra"


def state_of(folder: Path) -> str | None:
    """done, failed, interrupted, running, killed, or None of a folder without a run."""
    state = read_json(folder / "status.json").get("state")
    return "killed" if state == "running" and is_free(folder) else state


def claim(folder: Path, task: str, cell: str, invocation: str | None) -> Run | None:
    """The run of this cell, to be worked on here; None where nothing is to be done.

    That is where it is done, where another process works on it, and where this very invocation has tried already.

    Raises ``RunFolderTaken`` where the folder holds the run of another cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    if lock is None:
        return None
    try:
        status = read_json(folder / "status.json")
        if status and status.get("cell") != cell:
            raise RunFolderTaken(
                f"{folder} holds a run with other settings than this cell's; choose another hydra.sweep.dir, or leave "
                "hydra.sweep.subdir as it is"
            )
        if status.get("state") == "done" or (status and status.get("sweep") == invocation):
            return None
        goes_on = folder.joinpath(*PARTIAL).is_file() and status["state"] != "failed"
        if status and not goes_on:
            _set_aside(folder)
    finally:
        lock.close()
    try:
        return Run(folder, task, resume=goes_on, cell=cell, sweep=invocation)
    except RunFolderTaken:  # in this moment, by another process
        return None


def _set_aside(folder: Path) -> None:
    """Move what an attempt left to a folder beside; what the next one writes to already, as copies."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
        number += 1
    aside.mkdir()
    for path in sorted(
        folder.iterdir(), key=lambda path: path.name == "status.json"
    ):  # last: until then it is not done
        if path.name not in _STAYS:
            os.replace(path, aside / path.name)
        elif path.is_dir():
            shutil.copytree(path, aside / path.name)
        elif path.name != ".lock":
            shutil.copyfile(path, aside / path.name)
