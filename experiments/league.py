"""The league table of samplers: what a comparison measured, as text, Markdown, CSV and a page.

A comparison is the plain values under "comparison" in a run's ``summary.json``: its settings, what each metric is
called and what is best of it, and a row for each sampler at each budget. The metric of n perfect samples, its noise
floor, stands in a row of its own, and beside each value how many times the floor it is.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from experiments.canvas import readable
from experiments.page import Figure, Gallery, Page, Part, Section, Settings, Words
from experiments.table_cells import (
    BEST,
    FRONT,
    MISSING,
    SCORES,
    Cell,
    Column,
    Table,
    mark_best,
    number,
    plus_minus,
    transpose,
    uncertain,
)

LEGEND = (
    (BEST, "best of its column, or within the best's standard error of it"),
    (FRONT, "on the Pareto front: nothing at this cost or below is better"),
)
CAPTIONS = {
    "samples": "Samples of each sampler beside held-out data",
    "quality": "Quality against network calls",
    "pareto": "Quality against network calls and against seconds; the step line is the Pareto front",
    "trajectories": "Paths from noise to data",
    "noise_to_data": "Noise that turns into data",
}
_NUMBERS = ("nfe", "seconds")
_LEFT_OUT = ("steps", "final", "peak_memory_bytes")  # of the text; the page has them


class Lane(NamedTuple):
    """One column: its head, a cell for each row, and what stands in the row of the noise floor."""

    column: Column
    cells: Sequence[Cell]
    foot: Cell = Cell("")


def check(comparison: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what is no comparison: something missing, or of another kind."""
    try:
        settings, metrics, rows = (comparison[name] for name in ("settings", "metrics", "rows"))
        _ = settings["samples"], settings["reference"], sorted(settings)
        for metric in metrics.values():
            _ = metric["title"].lower(), SCORES[metric["best"]]
        floors = [metric["floor"] for metric in metrics.values() if metric.get("floor")]
        values = [value for row in rows for value in row["metrics"].values()]
        _ = [row["sampler"].lower() for row in rows]
        numbers = [floor[name] for floor in floors for name in ("mean", "std")]
        numbers += [row[name] for row in rows for name in _NUMBERS]
        numbers += [value[name] for value in values for name in ("value", "stderr")]
        if not all(one is None or isfinite(one) for one in numbers):
            raise ValueError("a number that is not finite")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its comparison makes no sense ({type(error).__name__}: {error})") from error


def league(comparison: Mapping[str, Any]) -> Table:
    """The table of one run's comparison."""
    rows, metrics = comparison["rows"], comparison["metrics"]
    fronts = comparison.get("pareto") or {}
    return samplers_table(rows, metrics, fronts, caption(comparison["settings"]))


def samplers_table(
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    fronts: Mapping[str, Sequence[int]],
    title: str = "",
    lead: Sequence[Lane] = (),
    beside: Sequence[Lane] = (),
) -> Table:
    """Rows of any comparisons on the same metrics, in one table.

    rows, metrics: as in a comparison. fronts: "nfe" and "seconds" -> numbers of the rows on that Pareto front. lead,
    beside: columns before and after the samplers'.
    """
    first, *costs = _costs(rows, fronts)
    lanes = [*lead, first._replace(foot=Cell("real data: noise floor")), *beside, *costs]
    for name, metric in metrics.items():
        lanes += _metric(name, metric, rows)
    floors = any(metric.get("floor") for metric in metrics.values())
    footer = (tuple(lane.foot for lane in lanes),) if floors else ()
    front = frozenset(i for numbers in fronts.values() for i in numbers)
    body = transpose(lane.cells for lane in lanes)
    return Table(tuple(lane.column for lane in lanes), body, footer, title, LEGEND, front)


def _costs(rows: Sequence[Mapping[str, Any]], fronts: Mapping[str, Sequence[int]]) -> list[Lane]:
    """What was run, and what it took; columns in which there is nothing are left out."""

    def lane(head: Column, of: Callable[[Mapping[str, Any]], Cell], front: str = "") -> Lane:
        on = fronts.get(front, ())
        cells = [replace(of(row), mark=FRONT) if i in on else of(row) for i, row in enumerate(rows)]
        return Lane(head, cells)

    lanes = [lane(Column("sampler"), lambda row: Cell(readable(row["sampler"]), title=row.get("solver") or ""))]
    if len({kind(row) for row in rows}) > len({row["sampler"] for row in rows}):
        lanes.append(lane(Column("solver"), lambda row: Cell(row.get("solver") or MISSING)))
    if any(row.get("steps") for row in rows):
        lanes.append(lane(Column("steps"), lambda row: number(row.get("steps"), "g")))
    if any(row.get("final") for row in rows):
        head = Column("final", "what the last step returns: a sample, or the mean given the state before it")
        lanes.append(lane(head, lambda row: Cell(row.get("final") or MISSING)))
    forward = Column("NFE", "calls of the network, forward, for a batch of samples")
    lanes.append(lane(forward, lambda row: number(row["nfe"], ",.6g"), "nfe"))
    if any(row.get("backward") for row in rows):
        lanes.append(lane(Column("backward", "calls backward"), lambda row: number(row.get("backward"), ",.6g")))
    lanes.append(lane(Column("seconds", "wall time of one seed's samples"), lambda row: _seconds(row), "seconds"))
    if any(row.get("peak_memory_bytes") for row in rows):
        lanes.append(lane(Column("peak MiB", "largest memory in use"), lambda row: _memory(row)))
    return lanes


def kind(row: Mapping[str, Any]) -> tuple[str, str]:
    """The sampler of a row and its settings, whatever the number of steps."""
    return row["sampler"], re.sub(r"\bsteps=\d+", "", row.get("solver") or "")


def _seconds(row: Mapping[str, Any]) -> Cell:
    return number(row["seconds"], ".3g", f"{row['seconds']:.6g} s" if row["seconds"] is not None else "")


def _memory(row: Mapping[str, Any]) -> Cell:
    size = row.get("peak_memory_bytes")
    return Cell() if size is None else number(size / 2**20, ".1f", f"{size:,.0f} bytes")


def _metric(name: str, metric: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Lane]:
    """A metric's values, and how many times its noise floor they are."""
    found = [row["metrics"].get(name) or {"value": None, "stderr": None} for row in rows]
    cells = [uncertain(one["value"], one["stderr"]) for one in found]
    words = {"low": "lower is better", "high": "higher is better", "zero": "nearer to 0 is better"}[metric["best"]]
    marked = mark_best(cells, [one["stderr"] for one in found], metric["best"])
    floor = metric.get("floor")
    foot = Cell()
    if floor:
        foot = Cell(plus_minus(floor["mean"], floor["std"]) if floor["std"] else f"{floor['mean']:.4g}", floor["mean"])
    lanes = [Lane(Column(metric["title"], words), marked, foot)]
    if floor and floor["mean"] > 0 and metric["best"] == "low":  # others are 0 or 1 of right samples, floor or not
        title = f"{metric['title']} divided by its noise floor, {floor['mean']:.4g}"
        ratios = [number(_of_floor(one, floor), ".2f") for one in found]
        lanes.append(Lane(Column("of floor", title), ratios, number(1.0, ".2f")))
    return lanes


def _of_floor(found: Mapping[str, Any], floor: Mapping[str, float]) -> float | None:
    """A row that was measured beside its own floor has the ratio with it."""
    if found["value"] is None:
        return None
    return found["of_floor"] if "of_floor" in found else found["value"] / floor["mean"]


def caption(settings: Mapping[str, Any]) -> str:
    """What the numbers were measured on, in one line."""
    words = [f"{settings['samples']} samples each", f"against {settings['reference']}"]
    if settings.get("seeds"):
        words.append(f"{settings['seeds']} seed{'s' * (settings['seeds'] > 1)}")
    words += [f"features: {settings['features']}"] if settings.get("features") else []
    return "; ".join(words)


def text(comparison: Mapping[str, Any]) -> str:
    """For a terminal, whose lines are short: without steps, memory, and what all rows share."""
    rows = [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in comparison["rows"]]
    return "\n".join([league(comparison | {"rows": rows}).text(), *left_out(comparison), *recommendation(comparison)])


def markdown(comparison: Mapping[str, Any]) -> str:
    """For Markdown."""
    return "\n\n".join([league(comparison).markdown(), *left_out(comparison), *recommendation(comparison)]) + "\n"


def as_csv(comparison: Mapping[str, Any]) -> str:
    """Every number of the rows in full, a line each."""
    return csv_text([flat_row(row, comparison["metrics"]) for row in comparison["rows"]])


def flat_row(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a comparison in columns."""
    names = ("sampler", "solver", "budget", "steps", "final", "nfe", "backward", "seconds", "peak_memory_bytes")
    flat = {name: row.get(name) for name in names}
    for name, metric in metrics.items():
        found, floor = row["metrics"].get(name) or {}, metric.get("floor") or {}
        flat |= {name: found.get("value"), f"{name}_stderr": found.get("stderr"), f"{name}_floor": floor.get("mean")}
    return flat


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the columns of all of them, in the order of their first appearance; what is missing stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return file.getvalue()


def recommendation(comparison: Mapping[str, Any]) -> list[str]:
    """What the comparison advises, if it does."""
    return [f"Recommendation: {comparison['recommendation']}"] if comparison.get("recommendation") else []


def left_out(comparison: Mapping[str, Any]) -> list[str]:
    """Which samplers could not be measured, and why."""
    return [f"Left out: {one['solver']} ({one['reason']})" for one in comparison.get("failed", ())]


def comparison_page(summary: Mapping[str, Any], config_text: str, figures: Sequence[Path]) -> str:
    """The page of a ``task=compare`` run, as HTML.

    summary: of the run, with "comparison". config_text: the run's configuration. figures: paths of pictures, which are
    put into the page. Raises ``ValueError`` for what is no comparison.
    """
    comparison = summary.get("comparison") or {}
    check(comparison)
    settings = comparison["settings"]
    described = [f"{settings['samples']} samples of each sampler against {settings['reference']}"]
    described += [f"{name}: {settings[name]}" for name in ("model", "sde") if settings.get(name)]
    parts: list[Part] = [Words(". ".join(described) + "."), *(Words(line) for line in recommendation(comparison))]
    if comparison.get("chosen"):
        parts.append(Words(f"solver= stands for {readable(comparison['chosen'])}."))
    sections = [
        Section("", tuple(parts)),
        Section("Samplers", (league(comparison), *map(Words, left_out(comparison)), Words(OVER), Words(READING))),
    ]
    if figures:
        sections.append(Section("Figures", (gallery(figures),)))
    sections.append(Section("Configuration", (Settings("The configuration of this run", config_text),)))
    return Page("Samplers compared", tuple(sections)).html()


OVER = "Values are means over the seeds of sampling ± one standard error."
READING = (
    "NFE counts calls of the network. A pointer on a value shows its 95 % interval. The noise floor is what as many "
    "real examples score in place of samples: nothing that is right is expected below it."
)


def gallery(figures: Sequence[Path]) -> Gallery:
    """Pictures under captions that are known by their names."""
    return Gallery(tuple(Figure(path, CAPTIONS.get(path.stem, readable(path.stem).capitalize())) for path in figures))
