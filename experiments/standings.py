"""Samplers over many runs: rows over seeds of comparisons that were measured alike, their order and their front."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from experiments import league
from experiments.canvas import readable
from experiments.collection import Collected, StoredRun, hidden
from experiments.grouping import Group, apart, by, groups, measured, over_seeds, shown, without
from experiments.table_cells import SCORES, natural, pareto_front

BEST_SHOWN = 3  # runs whose samples stand in a report
_LINE = ("sampler", "solver", "budget", "steps", "final")  # what tells rows of one run apart
_SHORT = 20  # characters of a setting in the name of a curve


@dataclass(frozen=True)
class Standings:
    """Rows over seeds of comparisons that were measured alike. ``of``: the group of each row."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    of: list[Group]
    title: str

    @property
    def first(self) -> tuple[str, dict[str, Any]]:
        """The metric that decides."""
        return next(iter(self.metrics.items()))

    def score(self, i: int) -> float | None:
        """Of a row in the first metric, the lower the better; None without a value."""
        name, metric = self.first
        value = self.rows[i]["metrics"][name]["value"]
        return None if value is None else SCORES[metric["best"]](value)


def standings(collected: Collected) -> list[Standings]:
    """The samplers of all comparisons, one for each way of measuring."""
    compared = [run for run in collected.cells if run.summary.get("comparison", {}).get("metrics")]
    return [_standing(runs) for runs in apart(compared, measured)]


def _standing(runs: Sequence[StoredRun]) -> Standings:
    comparisons = [run.summary["comparison"] for run in runs]
    metrics = {
        name: metric | {"floor": _mean_floor([one["metrics"][name].get("floor") for one in comparisons])}
        for name, metric in comparisons[0]["metrics"].items()
    }
    rows, of = [], []
    described = all(row.get("solver") for one in comparisons for row in one["rows"])
    for group in groups(runs, without(described)):
        for same in by([line for run in group.runs for line in _lines(run)], lambda line: line[0]).values():
            rows.append(_row([line[1:] for line in same], metrics))
            of.append(group)
    settings = {name: value for name, value in comparisons[0]["settings"].items() if name != "seeds"}
    return Standings(metrics, rows, of, hidden(league.caption(settings)))


def _lines(run: StoredRun) -> list[tuple[Hashable, StoredRun, dict[str, Any]]]:
    """The rows of a run, each with what is equal in the same row of other seeds; no two rows of a run are the same."""
    seen: Counter[Hashable] = Counter()
    found = []
    for row in run.summary["comparison"]["rows"]:
        key = tuple(row.get(name) for name in _LINE)
        found.append(((key, seen[key]), run, row))
        seen[key] += 1
    return found


def _mean_floor(floors: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """The floor of some runs: the mean of theirs."""
    known = [floor for floor in floors if floor]
    return {name: mean(floor[name] for floor in known) for name in ("mean", "std")} if known else None


def _row(same: Sequence[tuple[StoredRun, dict[str, Any]]], metrics: dict[str, Any]) -> dict[str, Any]:
    """One sampler at one budget over the seeds of a group."""
    row = {name: same[0][1].get(name) for name in _LINE}
    for name in ("nfe", "backward", "seconds", "peak_memory_bytes"):
        row[name] = over_seeds([(run.seed, line.get(name), None) for run, line in same])[0]
    row["seeds"], row["metrics"] = len({str(run.seed) for run, _ in same}), {}
    for name in metrics:
        found = [(run, line["metrics"].get(name) or {}) for run, line in same]
        value, stderr = over_seeds([(run.seed, one.get("value"), one.get("stderr")) for run, one in found])
        ratio, _ = over_seeds([(run.seed, _ratio(run, name, one.get("value")), None) for run, one in found])
        row["metrics"][name] = {"value": value, "stderr": stderr, "of_floor": ratio}
    return row


def _ratio(run: StoredRun, name: str, value: float | None) -> float | None:
    """A value beside the floor of its own run."""
    floor = run.summary["comparison"]["metrics"][name].get("floor")
    return value / floor["mean"] if value is not None and floor and floor["mean"] > 0 else None


def front(standing: Standings, cost: str) -> list[int]:
    """The rows that nothing beats in the first metric at this cost, "nfe" or "seconds", or below."""
    scores = [(i, standing.score(i)) for i, row in enumerate(standing.rows) if row[cost] is not None]
    known = [(i, score) for i, score in scores if score is not None]
    best = pareto_front([standing.rows[i][cost] for i, _ in known], [score for _, score in known])
    return [known[i][0] for i in best]


def ranked(standing: Standings) -> list[int]:
    """The rows by the first metric, best first."""
    known = [(standing.score(i), i) for i in range(len(standing.rows))]
    return [i for score, i in sorted((score, i) for score, i in known if score is not None)]


def curve_names(standing: Standings) -> list[str]:
    """For each row its curve, by its sampler and the settings of its group; no two are called alike."""
    kinds = [(i, league.kind(row)) for i, row in zip(map(standing.of.index, standing.of), standing.rows, strict=True)]
    names: dict[Hashable, str] = {}
    for kind, group in zip(kinds, standing.of, strict=True):
        words = [_short(hidden(shown(key, value))) for key, value in group.settings.items()]
        name = ", ".join([readable(kind[1][0]), *words])
        alike = sum(name in (other, other.rpartition(" (")[0]) for other in names.values())
        names.setdefault(kind, f"{name} ({alike + 1})" if alike else name)
    return [names[kind] for kind in kinds]


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def best_samples(standing: Standings) -> list[tuple[Path, str]]:
    """The samples of the runs with the best rows, each once."""
    found: dict[Path, str] = {}
    names = curve_names(standing)
    for i in ranked(standing):
        run = min(standing.of[i].runs, key=lambda run: (natural(str(run.seed)), run.name))
        path = run.folder / "figures" / "samples.png"
        if path.is_file() and path not in found and len(found) < BEST_SHOWN:
            value = standing.rows[i]["metrics"][standing.first[0]]["value"]
            found[path] = f"{run.name}: {names[i]}, {standing.first[1]['title']} {value:.4g}"
    return list(found.items())
