"""A sweep from its beginning to its end: which cells there are, what became of each, and whether all are done.

What became of a cell stands in its own folder (``experiments.cells``), whichever process worked on it; the sweep looks
there at its end, however it ends: after jobs that failed or were killed, a broken pool of processes, or Ctrl-C. Where a
pool broke and cells were not begun, the launcher is called again for those; what was killed is left to the next
invocation.
"""

import csv
import io
import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments import signals
from experiments.cells import AXES, INVOCATION, cell_hash, state_of
from experiments.run import read_json, replacing

log = logging.getLogger(__name__)
COMMAND = "SCORE_SDE_COMMAND"
"""The variable that tells a sweep's jobs the command line, which the processes of a launcher have not."""
DONE, SKIPPED, NOT_BEGUN = "done", "skipped", "not begun"
_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_COLUMNS = ("job", "status", "seconds", "folder", "reason", "overrides")
_PATIENCE = 20.0  # seconds that an interrupted sweep gives its jobs to save what they have


class Planned(NamedTuple):
    """A cell that the command line asks for: its overrides, the name of its folder, and its hash."""

    overrides: tuple[str, ...]
    name: str
    hash: str


class Row(NamedTuple):
    """What became of a cell. seconds: of its last attempt. reason: why it failed, in one line."""

    job: int
    status: str
    seconds: float | None
    folder: str
    reason: str
    overrides: str


class Sweep:
    """One invocation of a sweep in a folder. ``cells`` is None where a search finds them out as it goes."""

    def __init__(self, folder: Path, cells: list[Planned] | None):
        self.folder, self.cells, self.started = folder.absolute(), cells, time.time()
        self.id, self._signals = uuid.uuid4().hex[:12], ExitStack()
        os.environ |= {INVOCATION: self.id, COMMAND: json.dumps(sys.argv[1:])}
        self._signals.enter_context(signals.handled())

    def rows(self) -> list[Row]:
        """What became of each cell, by now."""
        cells = self._found() if self.cells is None else self.cells
        return [self._row(number, cell) for number, cell in enumerate(cells)]

    def wait(self, seconds: float | None = None) -> None:
        """For this invocation's cells that are still worked on, as by a launcher that gave up before its jobs."""
        end = None if seconds is None else time.monotonic() + seconds
        while self._working() and (end is None or time.monotonic() < end):
            time.sleep(0.2)

    def end(self, code: int) -> int:
        """Print the table, write it, and return the exit code: 0 where all is done, 1, or that of an interrupt."""
        self.wait(_PATIENCE if code > 2 else None)
        self.close()
        rows = self.rows()
        print(f"\n{as_text(rows)}\n\nThe sweep: {self.folder}", flush=True)
        for row in rows:
            if row.status in ("failed", "killed"):
                print(f"error: job {row.job} {row.status}: {row.reason}", file=sys.stderr)
        fine = all(row.status in (DONE, SKIPPED) for row in rows)
        if not fine:
            print(f"the same command line with hydra.sweep.dir={self.folder} does what is left", file=sys.stderr)
        code = code if code > 2 else int(not fine or bool(code))
        if self.folder.is_dir():
            self._write(rows, code)
            self._report()
        return code

    def _report(self) -> None:
        """One table of all runs in the folder, by this invocation and earlier ones."""
        from experiments.build import ConfigError
        from experiments.collection import collect
        from experiments.report_task import write_report

        try:
            write_report(collect([self.folder]), self.folder)
        except (ConfigError, OSError) as error:  # as where no job began
            log.warning("no report.html: %s", error)
        else:
            print(f"Its report: {self.folder / 'report.html'}", flush=True)

    def close(self) -> None:
        """From here on a signal does what it did before."""
        self._signals.close()

    def _row(self, number: int, cell: Planned) -> Row:
        folder = self.folder / cell.name
        status, state = read_json(folder / "status.json"), state_of(folder)
        own, reason = self._is(status), status.get("error", "")
        if status and status.get("cell") != cell.hash:
            state, own, reason = "failed", True, "the folder holds a run with other settings"
        if not own and state != "running":
            state, reason = (SKIPPED, "done before") if state == DONE else (NOT_BEGUN, "")
        elif not own:
            reason = "by another sweep"
        elif state == "killed":
            reason = "its process was ended by force"
        reason = " ".join(reason.split())
        return Row(number, state or NOT_BEGUN, status.get("seconds"), cell.name, reason, " ".join(cell.overrides))

    def _found(self) -> list[Planned]:
        """The cells that this invocation began, in the order of their beginning, of a search."""
        found = [(read_json(path), path.parent) for path in self.folder.glob("*/status.json")]
        own = [(status["started"], folder.name, status["cell"]) for status, folder in found if self._is(status)]
        return [Planned((), name, cell) for _, name, cell in sorted(own)]

    def _working(self) -> bool:
        cells = self._found() if self.cells is None else self.cells
        folders = [self.folder / cell.name for cell in cells]
        return any(self._is(read_json(one / "status.json")) and state_of(one) == "running" for one in folders)

    def _is(self, status: dict[str, Any]) -> bool:
        """Whether the status is that of a run of this invocation."""
        return status.get("sweep") == self.id

    def _write(self, rows: list[Row], code: int) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerows([_COLUMNS, *rows])
        about = {"command": shlex.join(["score-sde", *sys.argv[1:]]), "sweep": self.id, "exit_code": code}
        content = about | {"seconds": round(time.time() - self.started, 2), "cells": [row._asdict() for row in rows]}
        files = {"sweep.csv": text.getvalue(), "sweep.md": as_markdown(rows)}
        for name, words in (files | {"sweep.json": json.dumps(content, indent=2) + "\n"}).items():
            with replacing(self.folder / name) as file:
                file.write(words.encode())


_now: Sweep | None = None


def current() -> Sweep | None:
    """The sweep that this process is in the midst of."""
    return _now


def begin(config: DictConfig) -> Sweep:
    """A sweep of this process; one that goes round again stays the same."""
    global _now
    _now = _now or Sweep(Path(config.hydra.sweep.dir), planned(config))
    return _now


def finish(code: int) -> int:
    """The end of this process's sweep; see ``Sweep.end``."""
    try:
        return _now.end(code)
    finally:
        drop()


def drop() -> None:
    """No sweep any more, as where Hydra refused it."""
    global _now
    sweep, _now = _now, None
    sweep.close()
    for name in (INVOCATION, COMMAND, AXES):
        os.environ.pop(name, None)


def command_line() -> list[str]:
    """What a person wrote after ``score-sde``, in any process of a sweep."""
    return json.loads(os.environ[COMMAND]) if COMMAND in os.environ else sys.argv[1:]


def planned(config: DictConfig) -> list[Planned] | None:
    """The cells of a sweep over a grid; None of a search, and of settings that Hydra itself will refuse."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader, params = GlobalHydra.instance().config_loader(), config.hydra.sweeper.get("params") or {}
    given = [*(f"{name}={value}" for name, value in params.items()), *config.hydra.overrides.task]
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
        axes = [override.get_key_element() for override in parsed if override.is_sweep_override()]
        os.environ[AXES] = json.dumps(axes)
        if config.hydra.sweeper._target_ != _BASIC:
            return None
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        return [_planned(job, loader.load_sweep_config(config, job), i) for i, job in enumerate(jobs)]
    except (HydraException, OmegaConfBaseException):
        return None


def _planned(overrides: list[str], config: DictConfig, number: int) -> Planned:
    OmegaConf.set_readonly(config.hydra, False)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return Planned(tuple(overrides), str(OmegaConf.select(config, "hydra.sweep.subdir")), cell_hash(config))


def as_text(rows: list[Row]) -> str:
    """The table for a terminal, and how many cells came to what."""
    shown = [(str(row.job), row.status, _seconds(row), row.folder, row.reason) for row in rows]
    table = [_COLUMNS[:5], *shown]
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    lines = [
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in table
    ]
    counts = Counter(row.status for row in rows)
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items()) or "no cells"])


def as_markdown(rows: list[Row]) -> str:
    """The table for a page."""
    lines = [_COLUMNS[:5], ["---"] * 5]
    lines += [(row.job, row.status, _seconds(row), row.folder, row.reason) for row in rows]
    return "".join(f"| {' | '.join(str(word).replace('|', chr(92) + '|') for word in line)} |\n" for line in lines)


def _seconds(row: Row) -> str:
    return "" if row.seconds is None else f"{row.seconds:.1f}"


def again(code: int, left_before: int) -> int | None:
    """How many cells were not begun although the launcher came to an end; None where another round has no use."""
    sweep = _now
    if sweep is None or code in (0, 2) or code > 2:
        return None
    sweep.wait()
    left = sum(row.status == NOT_BEGUN for row in sweep.rows())
    return left if 0 < left < left_before else None


def objective(summary: dict[str, Any], path: str) -> float:
    """The number at a dotted path of a run's summary. Raises ``ValueError`` where there is none."""
    value: Any = summary
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        there = ", ".join(_numbers(summary)) or "no number"
        raise ValueError(f"optimize={path}: the run's summary has no such number; it has {there}")
    return float(value)


def _numbers(tree: dict[str, Any], above: str = "") -> list[str]:
    inner = [
        path for name, child in tree.items() if isinstance(child, dict) for path in _numbers(child, f"{above}{name}.")
    ]
    return [f"{above}{name}" for name, value in tree.items() if type(value) in (int, float)] + inner
