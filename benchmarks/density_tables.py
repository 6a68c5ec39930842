"""Error against calls: curves of medians over seeds, what a target error needs, and whether that is within a bar."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from density_ways import DEFAULT, ONE_PASS
from experiments.report import table
from measure import OURS, Record, cases

Curve = list[tuple[float, float]]
"""(calls, error), by calls."""

NEEDED = {1e-2: 70, 1e-3: 100, 1e-5: 170}
"""Calls that an adaptive method may need for a mean absolute error."""
RK4 = {100: 3e-3, 200: 1.2e-4, 400: 6e-6}
DEFECT = {100: 1e-5}
DEFECT_PERTURBED = {50: 5e-3, 100: 2e-4}
"""Errors that are allowed at a number of calls."""
TIMES_BELOW = 10
"""How far the one-pass method is to be below the adaptive default at the same calls, for a perturbed score."""


def label(record: Record) -> str:
    """Ours by method, others by library."""
    return record.method if record.library == OURS else record.library


def curves(records: Iterable[Record], case: str) -> dict[str, Curve]:
    """By label; one point for every tolerance or budget."""
    runs = defaultdict(lambda: defaultdict(list))
    for r in (r for r in records if r.case == case):
        runs[label(r)][r.budget, r.plan].append((r.nfe, r.error))
    return {name: sorted(map(_median, points.values())) for name, points in runs.items()}


def _median(found: list[tuple[int, float]]) -> tuple[float, float]:
    nfe, error = (statistics.median(values) for values in zip(*found, strict=True))
    return nfe, error


def needed(curve: Curve, error: float) -> float | None:
    """The calls for ``error``, between two points in the logarithm of both; None where the curve does not get there."""
    before = None
    for point in curve:
        if point[1] <= error:
            return point[0] if before is None else _between(before[::-1], point[::-1], error)
        before = point
    return None


def at(curve: Curve, nfe: float) -> float | None:
    """The error at ``nfe`` calls, likewise; None outside of the curve."""
    for before, after in itertools.pairwise(curve):
        if before[0] <= nfe <= after[0]:
            return after[1] if nfe == after[0] else _between(before, after, nfe)
    return curve[0][1] if len(curve) == 1 and curve[0][0] == nfe else None


def within(curve: Curve, budget: int) -> float | None:
    """The error of the longest run of at most ``budget`` calls."""
    return next((error for nfe, error in reversed(curve) if nfe <= budget), None)


def _between(first: tuple[float, float], last: tuple[float, float], x: float) -> float:
    (x0, y0), (x1, y1) = ((math.log(a), math.log(max(b, 1e-300))) for a, b in (first, last))
    share = (math.log(x) - x0) / (x1 - x0) if x1 != x0 else 1.0
    return math.exp(y0 + share * (y1 - y0))


def verdict(value: float | None, bar: float | None) -> str:
    """The value, and whether it is within the bar, if there is one."""
    shown = "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1e}"
    return shown if bar is None else f"{shown} {'met' if value is not None and value <= bar else 'missed'}"


def adaptive(records: list[Record], labels: Iterable[str]) -> str:
    """Calls that are needed for each error, by case and way, held to the bars."""
    rows = []
    for case in cases(records):
        found = curves([r for r in records if r.method in labels], case)
        calls = {name: [needed(curve, error) for error in NEEDED] for name, curve in found.items()}
        best = [min(filter(None, column), default=None) for column in zip(*calls.values(), strict=True)]
        for name, of in calls.items():
            bars = NEEDED.values() if name == DEFAULT else (None,) * len(of)
            rows.append((case, name, *map(verdict, of, bars)))
        rows += [(case, "best of these", *map(verdict, best, NEEDED.values()))]
    header = (f"{error:g} (bar {bar})" for error, bar in NEEDED.items())
    return "Calls needed for a mean absolute error\n\n" + table(("case", "way", *header), rows)


def fixed(records: list[Record], bars: dict[str, dict[int, float]], budgets: Iterable[int]) -> str:
    """Error within budgets, by case and way; ``bars`` by way and budget."""
    budgets, rows = tuple(budgets), []
    for case in cases(records):
        for name, curve in curves(records, case).items():
            of = bars.get(name, {})
            rows.append((case, name, *(verdict(within(curve, n), of.get(n)) for n in budgets)))
    return "Mean absolute error within a number of calls\n\n" + table(("case", "way", *map(str, budgets)), rows)


def advantage(records: list[Record], budgets: Iterable[int]) -> str:
    """How many times below the adaptive default the one-pass method is at the same calls."""
    rows = []
    for case in cases(records):
        found = curves(records, case)
        pairs = {n: (at(found.get(DEFAULT, []), n), within(found.get(ONE_PASS, []), n)) for n in budgets}
        cells = [_times(*pair) for pair in pairs.values()]
        rows.append((case, *cells))
    title = f"How many times {ONE_PASS} is below {DEFAULT} at the same calls (bar {TIMES_BELOW})"
    return title + "\n\n" + table(("case", *map(str, budgets)), rows)


def _times(default: float | None, one_pass: float | None) -> str:
    if default is None or one_pass is None:
        return "-"
    ratio = default / one_pass
    return f"{ratio:.3g} {'met' if ratio >= TIMES_BELOW else 'missed'}"


def against_peers(records: list[Record], held_to: Iterable[str]) -> str:
    """Calls needed for each error: our default, our best, and others; held to those of the libraries ``held_to``.

    One that does not get to an error counts with its longest run, which is less than it needs.
    """
    ours = list(dict.fromkeys(r.method for r in records if r.library == OURS))
    peers, rows = list(dict.fromkeys(r.library for r in records if r.library != OURS)), []
    for case in cases(records):
        found = curves(records, case)
        for error in NEEDED:
            calls = {name: needed(curve, error) for name, curve in found.items()}
            best = min((name for name in ours if calls.get(name)), key=lambda name: calls[name], default=DEFAULT)
            bar = min((calls[name] or found[name][-1][0] for name in held_to if name in found), default=None)
            mine = (verdict(calls.get(name), bar) for name in (DEFAULT, best))
            rows.append((case, f"{error:g}", *mine, best, *(verdict(calls.get(name), None) for name in peers)))
    title = f"Calls needed for an error, ours held to those of {' and '.join(held_to)}; -: not at any tolerance tried"
    return title + "\n\n" + table(("case", "error", f"ours, {DEFAULT}", "our best", "which", *peers), rows)


def draw(records: list[Record], path: Path, columns: int = 2, least: float = 1e-9) -> None:
    """Error from ``least`` on against calls, a panel for every case; ours in colour, others in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, labels = cases(records), {label(r): r.library == OURS for r in records}
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axis, case in zip(axes.flat, names, strict=False):
        _panel(axis, curves(records, case), _styles(labels), least)
        axis.set_title(case, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("calls of the model")
    for axis in axes[:, 0]:
        axis.set_ylabel("error of log p (nats)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _styles(labels: dict[str, bool]) -> dict[str, dict]:
    """Lines by label; ``labels`` says which are ours."""
    ours, others = ([name for name, own in labels.items() if own is kind] for kind in (True, False))
    greys, marks = ("0.0", "0.35", "0.55", "0.7"), "sv^x"
    styles = {name: {"color": f"C{i % 10}", "marker": "o", "ms": 3, "lw": 1.6} for i, name in enumerate(ours)}
    for i, name in enumerate(others):
        styles[name] = {"color": greys[i % 4], "marker": marks[i % 4], "ms": 3.5, "lw": 1, "ls": "--"}
    return styles


def _panel(axis, found: dict[str, Curve], styles: dict[str, dict], least: float) -> None:
    for name, style in styles.items():
        best = dict(reversed(found.get(name, [])))  # of several runs with equal calls
        curve = sorted(point for point in best.items() if 20 <= point[0] <= 500)
        axis.plot(*zip(*curve, strict=True) if curve else ((), ()), label=name, **style)
    axis.set(xscale="log", yscale="log", xlim=(20, 500), ylim=(least, 10))
    ticks = (20, 50, 100, 200, 400)
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks((), minor=True)
    axis.grid(alpha=0.3)
