"""The runs below folders, as they were stored: how each ended, its settings, what it measured.

Nothing in a run's files is built, imported or resolved: status and summary are JSON, the configuration is YAML of plain
values whose interpolations stay as they are written. What can't be read is listed as that, and the others go on. Runs
come in the natural order of their names, whatever order the file system has.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import league
from experiments.build import ConfigError
from experiments.run import died
from experiments.table_cells import natural

LARGEST_SUMMARY, LARGEST_CONFIG = 64 << 20, 1 << 20  # bytes
REPORT = "report"  # the task whose runs are reports on others, and no results
NETWORKS = "networks"  # the folder of a sweep's trained networks
_INSIDE = {"checkpoints", "figures", "samples", "likelihood", "export", "__pycache__"}
_NO_SETTINGS = {"task", "hydra", "runs", "networks", "resume", "plugins", "logger"}
_ABSOLUTE = re.compile(r"(?<![\w./:\\])(?:/|[A-Za-z]:\\)[^\s'\":;,()]*[/\\]([^\s'\":;,()/\\]*)")


@dataclass(frozen=True)
class StoredRun:
    """One run. ``state``: done, failed, interrupted, running, died, or unreadable; ``reason``: of all but the first.

    settings: dotted key -> plain value, as configured; the device as it was found. network: whether it is the training
    of a network that cells of a sweep share.
    """

    name: str
    folder: Path
    task: str
    state: str
    reason: str = ""
    seconds: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    network: bool = False

    @property
    def seed(self) -> Any:
        """The seed as configured, else as noted."""
        return self.settings.get("seed", self.summary.get("seed"))

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The figures of the run, by name."""
        found = (path for path in (self.folder / "figures").glob("*.*") if path.suffix in (".png", ".gif"))
        return tuple(sorted(found, key=lambda path: natural(path.name)))


@dataclass(frozen=True)
class Collected:
    """All runs that were found, in the natural order of their names."""

    runs: tuple[StoredRun, ...]

    @property
    def cells(self) -> tuple[StoredRun, ...]:
        """Those with results of their own."""
        return tuple(run for run in self.runs if not run.network)

    @property
    def unfinished(self) -> tuple[StoredRun, ...]:
        """Those that did not end well, or have not ended."""
        return tuple(run for run in self.runs if run.state != "done")


def collect(folders: Sequence[str | Path], ignore: Path | None = None) -> Collected:
    """Every run at or below these folders, once. Runs of reports, and all below ``ignore``, are left out.

    Raises ``ConfigError`` for a folder that does not exist, and where there is no run.
    """
    roots = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    if absent := [str(root) for root in roots if not root.is_dir()]:
        raise ConfigError(f"runs: expected folders with runs, found no folder {', '.join(absent)}; mend runs=")
    left_out = ignore.resolve() if ignore else None
    folders_of = {folder: name for root, name in _named(roots).items() for folder, name in _runs(root, name, left_out)}
    found = [_stored(folder, name) for folder, name in folders_of.items()]
    runs = sorted((run for run in found if run.task != REPORT), key=lambda run: (natural(run.name), run.name))
    if not runs:
        where = ", ".join(map(str, roots))
        raise ConfigError(f"runs: expected folders with a status.json in or below {where}, found none; mend runs=")
    return Collected(tuple(runs))


def hidden(text: str) -> str:
    """Words without the folders of the machine: of each absolute path its last part stays."""
    return _ABSOLUTE.sub(lambda found: f"…/{found[1]}", text)


def _named(roots: Sequence[Path]) -> dict[Path, str]:
    """Folder -> the shortest end of its path that tells it from the others; none for a single one."""
    if len(roots) == 1:
        return {roots[0]: ""}
    depth = 1
    while len({root.parts[-depth:] for root in roots}) < len(roots):
        depth += 1
    return {root: "/".join(root.parts[-depth:]) for root in roots}


def _runs(root: Path, name: str, left_out: Path | None) -> Iterator[tuple[Path, str]]:
    """Folders with a status.json, and what they are called."""
    for place, folders, files in os.walk(root):
        folder = Path(place)
        if folder == left_out:
            folders.clear()
            continue
        folders[:] = [one for one in folders if not (one in _INSIDE or one.startswith(".") or _redone(folder / one))]
        if "status.json" in files:
            below = folder.relative_to(root).parts
            yield folder, "/".join([name, *below] if name else below) or root.name


def _redone(folder: Path) -> bool:
    """Whether it is what a failed attempt at a cell left, and the cell was begun again."""
    cell, found = re.subn(r"\.failed-\d+$", "", folder.name)
    return bool(found) and (folder.with_name(cell) / "status.json").exists()


def _stored(folder: Path, name: str) -> StoredRun:
    network = folder.parent.name == NETWORKS
    try:
        status = read_json(folder / "status.json")
    except ValueError as error:
        return StoredRun(name, folder, "", "unreadable", hidden(str(error)), network=network)
    task, state, reason = str(status.get("task", "")), str(status.get("state", "unknown")), status.get("error") or ""
    if task == REPORT:
        return StoredRun(name, folder, task, state)
    if state == "running" and died(folder):
        state, reason = "died", "its process ended without a word"
    settings, summary, wrong = {}, {}, []
    try:
        settings = read_settings(folder)
    except ValueError as error:
        wrong.append(str(error))
    try:
        summary = read_summary(folder, settings)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        state, reason = "unreadable", "; ".join([*wrong, reason] if reason else wrong)
    settings.pop("device", None)  # as configured, such as auto, it says nothing
    if "device" in summary:
        settings["device"] = summary["device"]
    seconds = status.get("seconds") if isinstance(status.get("seconds"), int | float) else None
    return StoredRun(name, folder, task, state, hidden(str(reason)), seconds, settings, summary, network)


def read_json(path: Path, largest: int = LARGEST_SUMMARY) -> dict[str, Any]:
    """A table of plain values. Raises ``ValueError`` for what is none."""
    return _table(path, json.loads, largest)


def _table(path: Path, parse: Any, largest: int) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > largest:
            raise ValueError(f"{size:,} bytes, at most {largest:,}")
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(f"{path.name} can't be read ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected names and values, found {type(content).__name__}")
    return content


def read_summary(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run noted; nothing where it noted nothing. Raises ``ValueError`` for what makes no sense."""
    if not (folder / "summary.json").exists():
        return {}
    summary = read_json(folder / "summary.json")
    for name in ("training", "likelihood", "comparison", "data"):
        if not isinstance(summary.get(name) or {}, dict):
            raise ValueError(f"summary.json: expected names and values under {name}")
    if comparison := summary.get("comparison"):
        summary["comparison"] = upgraded(comparison, summary, settings)
        league.check(summary["comparison"])
    for name, numbers in (("likelihood", ("value", "stderr", "nfe", "prior")), ("training", ("loss", "seconds"))):
        for key in numbers:
            if not isinstance((summary.get(name) or {}).get(key, 0.0), int | float):
                raise ValueError(f"summary.json: {name}.{key} is no number")
    return summary


def read_settings(folder: Path) -> dict[str, Any]:
    """Dotted key -> value, of ``.hydra/config.yaml`` or a network's ``network.json``; nothing without either."""
    written, record = folder / ".hydra" / "config.yaml", folder / "network.json"
    if written.exists():
        tree = _table(written, _yaml, LARGEST_CONFIG)
    elif record.exists():
        tree = read_json(record, LARGEST_CONFIG)
        inner = (tree.get(name) for name in ("config", "settings"))
        tree = next((one for one in inner if isinstance(one, dict)), tree)
    else:
        return {}
    return dict(_flat({name: value for name, value in tree.items() if name not in _NO_SETTINGS}))


def _yaml(text: str) -> Any:
    """Plain values by OmegaConf's safe reader; interpolations stay words."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def upgraded(comparison: dict[str, Any], summary: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as earlier versions noted it, of one distance, in the shape of today; others as they are."""
    if "metrics" in comparison or "noise_floor" not in comparison:
        return comparison
    seeds, data = settings.get("compare.seeds"), (summary.get("data") or {}).get("name", "data")
    root = seeds**0.5 if isinstance(seeds, int) and seeds > 1 else None
    try:
        rows = [
            {name: row.get(name) for name in ("sampler", "nfe", "seconds")}
            | {"metrics": {"sliced_w2": {"value": row["distance"], "stderr": root and row["distance_std"] / root}}}
            for row in comparison["rows"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its comparison makes no sense ({type(error).__name__}: {error})") from error
    described = {"samples": settings.get("compare.samples"), "seeds": seeds, "reference": f"{data}, test split"}
    metric = {"title": "sliced W2", "best": "low", "floor": comparison["noise_floor"]}
    return {"settings": described, "metrics": {"sliced_w2": metric}, "rows": rows}
