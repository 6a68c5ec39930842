"""The chapters of a report on runs: words, tables and pictures, for every way in which it is written."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiments import league
from experiments.canvas import readable
from experiments.collection import Collected, StoredRun, hidden
from experiments.grouping import (
    OF_LIKELIHOOD,
    OF_TRAINING,
    Group,
    apart,
    differences,
    evaluated,
    groups,
    heading,
    measured,
    over_seeds,
    shown,
    trained,
    varying,
)
from experiments.league import Lane
from experiments.standings import Standings, front
from experiments.table_cells import Cell, Column, Table, mark_best, number, transpose, uncertain

_OVER = "Values are means over seeds ± standard deviation / sqrt(seeds); of one seed, ± its own standard error."


@dataclass
class Chapter:
    """A heading, and below it sentences, tables and pictures (path, caption). ``lines``: its numbers, for a CSV."""

    title: str
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[Path, str]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


def summary_words(collected: Collected) -> str:
    """How many runs there are, and how they ended."""
    states = Counter(run.state for run in collected.runs)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    networks = len(collected.runs) - len(collected.cells)
    shared = f", {networks} of them trainings of networks that others use" if networks else ""
    return f"{len(collected.runs)} runs{shared}: {ended}."


def failures(collected: Collected, folder: Path) -> Chapter:
    """Runs that did not end well."""
    rows = [(_link(run, folder), Cell(run.task), Cell(run.state), Cell(run.reason)) for run in collected.unfinished]
    chapter = Chapter("Not done")
    if rows:
        chapter.tables.append(Table(tuple(map(Column, ("run", "task", "state", "reason"))), tuple(rows)))
    return chapter


def samplers(found: Sequence[Standings], runs: Sequence[StoredRun]) -> Chapter:
    """The league table: one for each way of measuring."""
    chapter = Chapter("Samplers")
    if found:
        chapter.words = [_OVER, *_apart(runs, len(found), measured), league.READING]
    for i, standing in enumerate(found):
        lead, beside = _settings(standing.of), [_seeds([row["seeds"] for row in standing.rows])]
        title = standing.title if len(found) == 1 else f"{i + 1}. {standing.title}"
        rows, fronts = standing.rows, {name: front(standing, name) for name in ("nfe", "seconds")}
        chapter.tables.append(league.samplers_table(rows, standing.metrics, fronts, title, lead, beside))
        place = {"table": f"samplers {i + 1}", "measured": standing.title}
        for row, group in zip(rows, standing.of, strict=True):
            flat = league.flat_row(row, standing.metrics)
            chapter.lines.append(place | plain(group.settings) | {"seeds": row["seeds"]} | flat)
    return chapter


def likelihoods(collected: Collected) -> Chapter:
    """Values over seeds, a table for each way of evaluating."""
    runs = [run for run in collected.cells if (run.summary.get("likelihood") or {}).get("value") is not None]
    chapter, parted = Chapter("Likelihood"), apart(runs, evaluated)
    if runs:
        chapter.words = [_OVER, *_apart(runs, len(parted), evaluated)]
    for i, some in enumerate(parted):
        about, found = some[0].summary["likelihood"], groups(some, OF_LIKELIHOOD)
        values = [_over(group, "likelihood", "value", "stderr") for group in found]
        bits = about.get("unit") == "bits/dim"
        cells = mark_best(
            [uncertain(*one) for one in values], [stderr for _, stderr in values], "low" if bits else "high"
        )
        name = "bits/dim" if bits else f"log p, {about.get('unit', 'nats')}"
        calls = [number(_over(group, "likelihood", "nfe")[0]) for group in found]
        words = "lower is better" if bits else "higher is better"
        lanes = [*_settings(found), _seeds([group.seeds for group in found])]
        lanes += [Lane(Column("NFE", "calls that give drift and divergence"), calls), Lane(Column(name, words), cells)]
        title = f"{about.get('n')} examples of the {about.get('split')} split; {_protocol(some[0])}"
        chapter.tables.append(_table(lanes, title if len(parted) == 1 else f"{i + 1}. {title}"))
        for group, (value, stderr) in zip(found, values, strict=True):
            line = {"seeds": group.seeds, "likelihood": value, "likelihood_stderr": stderr, "unit": about.get("unit")}
            place = {"table": f"likelihood {i + 1}", "measured": title}
            chapter.lines.append(place | plain(group.settings) | line)
    return chapter


def _protocol(run: StoredRun) -> str:
    """What was evaluated, in one line."""
    data = (run.summary.get("data") or {}).get("name")
    protocol = (run.summary["likelihood"].get("protocol") or {}).items()
    words = [f"data {data}"] if data else []
    return hidden(", ".join(words + [f"{readable(name)} {value}" for name, value in protocol if name != "seed"]))


def trainings(collected: Collected) -> Chapter:
    """Losses over seeds, of networks that cells share too; a table for each objective and data."""
    runs = [run for run in collected.runs if run.summary.get("training")]
    chapter, parted = Chapter("Training"), apart(runs, trained)
    if runs:
        warning = "Losses compare only under the same parametrization and SDE as well, so that none is marked as best."
        chapter.words = [_OVER, *_apart(runs, len(parted), trained), warning]
    for i, some in enumerate(parted):
        found = groups(some, OF_TRAINING)
        lanes = [*_settings(found), _seeds([group.seeds for group in found])]
        lanes += [
            Lane(Column(name), [number(_over(group, "training", name)[0], form) for group in found])
            for name, form in (("steps", ",.0f"), ("parameters", ",.0f"), ("seconds", ",.1f"))
        ]
        losses = [_over(group, "training", "loss") for group in found]
        lanes.append(Lane(Column("loss", "of the last steps"), [uncertain(*one) for one in losses]))
        checked = [over_seeds([(run.seed, _validation(run), None) for run in group.runs]) for group in found]
        lanes.append(Lane(Column("validation loss", "the lowest one"), [uncertain(*one) for one in checked]))
        title = _objective(some[0])
        chapter.tables.append(_table(lanes, title if len(parted) == 1 else f"{i + 1}. {title}"))
        for group, (loss, stderr) in zip(found, losses, strict=True):
            place = {"table": f"training {i + 1}", "measured": title} | plain(group.settings)
            chapter.lines.append(place | {"seeds": group.seeds, "training_loss": loss, "training_loss_stderr": stderr})
    return chapter


def _objective(run: StoredRun) -> str:
    name = (run.summary.get("data") or {}).get("name")
    words = [shown("objective._target_", run.settings.get("objective._target_", "")), f"on {name}" if name else ""]
    return " ".join(filter(None, words))


def _validation(run: StoredRun) -> float | None:
    best = run.summary["training"].get("best")
    value = best.get("validation_loss") if isinstance(best, dict) else None
    return value if isinstance(value, int | float) and isfinite(value) else None


def all_runs(collected: Collected, folder: Path) -> Chapter:
    """Every run, its settings that others have otherwise, and the way to its files."""
    runs = collected.runs
    lanes = [Lane(Column("run"), [_link(run, folder) for run in runs])]
    lanes.append(Lane(Column("task"), [Cell(run.task) for run in runs]))
    lanes += _lanes(varying([run.settings for run in collected.cells]), [run.settings for run in runs])
    lanes.append(Lane(Column("state"), [Cell(run.state) for run in runs]))
    lanes.append(Lane(Column("seconds"), [number(run.seconds, ".1f") for run in runs]))
    lanes.append(Lane(Column("pictures"), [_pictures(run, folder) for run in runs]))
    return Chapter("All runs", tables=[_table(lanes, "")])


def relative(path: Path, folder: Path) -> str:
    """The address of a path on a page in a folder."""
    return quote(Path(os.path.relpath(path, folder.resolve())).as_posix())


def common(collected: Collected) -> str:
    """The settings that all runs share, a line each; without those of solvers that a comparison could have used."""
    settings = [run.settings for run in collected.cells] or [run.settings for run in collected.runs]
    differing = varying(settings)
    shared = {key: settings[0][key] for key in settings[0] if all(key in one for one in settings)}
    keys = [key for key in shared if key not in differing and not key.startswith("compare.solvers.")]
    return "\n".join(f"{key}: {hidden(str(shared[key]))}" for key in keys)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the columns of a CSV file."""
    return {heading(key): hidden(shown(key, value)) for key, value in settings.items()}


def _link(run: StoredRun, folder: Path) -> Cell:
    return Cell(run.name, links=((run.name, relative(run.folder, folder) + "/"),))


def _pictures(run: StoredRun, folder: Path) -> Cell:
    return Cell(links=tuple((readable(path.stem), relative(path, folder)) for path in run.pictures))


def _settings(of: Sequence[Group]) -> list[Lane]:
    keys = dict.fromkeys(key for group in of for key in group.settings)
    return _lanes(list(keys), [group.settings for group in of])


def _lanes(keys: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[Lane]:
    return [Lane(Column(heading(key), key), [_setting(key, one) for one in settings], Cell("")) for key in keys]


def _setting(key: str, settings: dict[str, Any]) -> Cell:
    if key not in settings:
        return Cell()
    value = settings[key]
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(hidden(shown(key, value)), float(value) if numeric else None)


def _seeds(counts: Sequence[int]) -> Lane:
    return Lane(Column("seeds"), [number(count, "d") for count in counts])


def _over(group: Group, part: str, name: str, stderr: str = "") -> tuple[float | None, float | None]:
    """A number of the summaries over the seeds of a group."""
    return over_seeds([(run.seed, run.summary[part].get(name), run.summary[part].get(stderr)) for run in group.runs])


def _apart(runs: Sequence[StoredRun], tables: int, measure: Callable[[StoredRun], dict[str, Any]]) -> list[str]:
    """That there is more than one table, and why."""
    if tables < 2:
        return []
    return [
        f"These runs were measured in {tables} ways ({differences(runs, measure)}). Their numbers don't compare and "
        "stand in separate tables."
    ]


def _table(lanes: Sequence[Lane], title: str) -> Table:
    columns, rows = tuple(lane.column for lane in lanes), transpose(lane.cells for lane in lanes)
    return Table(columns, rows, caption=title, legend=league.LEGEND)
