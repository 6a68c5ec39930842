"""What a comparison of samplers comes to: its Pareto fronts, and which sampler to take, in words.

The first metric decides. Values that differ by less than their standard errors are not told apart: the sampler that is
recommended is the cheapest of those as good as real data, within two deviations of what real data have in as many
draws as there are seeds; where none is, of those as good as the best, within two standard errors of their difference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.canvas import readable
from experiments.table_cells import SCORES, pareto_front

_WITHIN = 2.0  # standard errors
Row = Mapping[str, Any]


def calls(row: Row) -> float:
    """Passes through the network, forwards and backwards."""
    return row["nfe"] + row["backward"]


def seconds(row: Row) -> float:
    """Wall time."""
    return row["seconds"]


def fronts(rows: Sequence[Row], metric: str, best: str) -> dict[str, list[int]]:
    """The rows that are on the Pareto front of the metric against calls ("nfe"), and against "seconds"."""
    scores = [SCORES[best](row["metrics"][metric]["value"]) for row in rows]
    costs: dict[str, Callable[[Row], float]] = {"nfe": calls, "seconds": seconds}
    return {name: pareto_front([cost(row) for row in rows], scores) for name, cost in costs.items()}


def recommendation(rows: Sequence[Row], name: str, metric: Mapping[str, Any], seeds: int) -> str:
    """Which sampler to take, by the metric called ``name`` with its "title", "best" and "floor", over so many seeds."""
    good, why = _good(rows, name, metric, seeds)
    cheap, quick = min(good, key=lambda row: (calls(row), seconds(row))), min(good, key=seconds)
    words = f"{_called(cheap)} has the fewest calls of those {why} ({_value(cheap, name, metric)})"
    if quick["sampler"] != cheap["sampler"]:
        words += f"; {_called(quick)} is the quickest of them, in {seconds(quick):.3g} s"
    cheaper = [row for row in rows if calls(row) < calls(cheap)]
    if cheaper:
        least = min(cheaper, key=lambda row: _score(row, name, metric))
        words += f". With fewer calls the best is {_called(least)} ({_value(least, name, metric)})"
    return f"{words}. Judged by {metric['title']}; differences within the standard errors are not resolved."


def _good(rows: Sequence[Row], name: str, metric: Mapping[str, Any], seeds: int) -> tuple[list[Row], str]:
    """The rows as good as real data, or else as good as the best one, and the words for that."""
    floor = metric["floor"]
    if floor:
        limit = SCORES[metric["best"]](floor["mean"]) + _WITHIN * floor["std"] / seeds**0.5
        real = [row for row in rows if _score(row, name, metric) <= limit]
        if real:
            return real, "that can't be told from real data"
    best = min(rows, key=lambda row: _score(row, name, metric))

    def apart(row: Row) -> float:
        errors = (one["metrics"][name]["stderr"] for one in (row, best))
        return _WITHIN * sum(error**2 for error in errors) ** 0.5

    close = [row for row in rows if _score(row, name, metric) - _score(best, name, metric) <= apart(row)]
    missed = ", and none reaches real data" if floor else ""
    return close, f"within two standard errors of the best, {_called(best)}{missed}"


def _score(row: Row, name: str, metric: Mapping[str, Any]) -> float:
    return SCORES[metric["best"]](row["metrics"][name]["value"])


def _called(row: Row) -> str:
    return f"{readable(row['sampler'])} at {calls(row):.4g}"


def _value(row: Row, name: str, metric: Mapping[str, Any]) -> str:
    found, floor = row["metrics"][name], metric["floor"]
    beside = f", real data {floor['mean']:.3g}" if floor else ""
    return f"{found['value']:.3g} ± {found['stderr']:.1g}{beside}"
