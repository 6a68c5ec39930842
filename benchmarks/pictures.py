"""Quality against calls and against time: peers grey, the best of them black, ours in colour, fixed orders thin."""

import re
from collections.abc import Iterable
from pathlib import Path

from measure import OURS, Record, bests, cases, group

_NUMBERED = re.compile(r"-\d$")
"""Ends the names of fixed orders: many of a kind."""


def draw(records: list[Record], budgets: Iterable[int], path: Path, quality: str) -> None:
    """One column for every case; above against calls, below against processor time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = cases(records)
    own = sorted({r.method for r in records if r.library == OURS and not _NUMBERED.search(r.method)})
    colours = {f"{OURS}: {method}": f"C{i % 10}" for i, method in enumerate(own)}
    options = {"squeeze": False, "sharey": "col", "layout": "constrained"}
    figure, axes = pyplot.subplots(2, len(names), figsize=(3.6 * len(names), 6.6), **options)
    for column, case in zip(axes.T, names, strict=True):
        curves = _curves(records, case, tuple(budgets))
        _against(column[0], curves, "nfe", colours)
        _against(column[1], curves, "seconds", colours)
        column[0].set(title=case, xlabel="calls of the model")
        column[1].set(xlabel="processor time (s)")
    axes[0, 0].set_ylabel(quality)
    axes[1, 0].set_ylabel(quality)
    entries, wide = axes[0, 0].get_legend_handles_labels(), min(6, 3 * len(names) // 2)
    figure.legend(*entries, loc="outside lower center", ncols=wide, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _curves(records: list[Record], case: str, budgets: tuple[int, ...]) -> dict[str, list[tuple[int, float, float]]]:
    """(calls, seconds, error) within each budget of every method, in its best setting, and of the best peer."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for budget in budgets:
        found = bests(records, case, budget)
        for best in found:
            curves.setdefault(best.label, []).append((budget, best.seconds, best.error))
        for best in [b for b in found if group(b.label) == "peers"][:1]:
            curves.setdefault("best peer", []).append((budget, best.seconds, best.error))
    return curves


def _against(axis, curves: dict[str, list[tuple[int, float, float]]], what: str, colours: dict[str, str]) -> None:
    """``colours`` is by label: of ours, but for those that are many of a kind."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for label, points in curves.items():
        x, y = [p[what == "seconds"] for p in points], [p[2] for p in points]
        if label == "best peer":
            axis.plot(x, y, "k-", lw=2, label=label, zorder=3)
        elif label in colours:
            axis.plot(x, y, "o-", color=colours[label], lw=1.5, ms=3, label=label, zorder=4)
        elif group(label) == OURS:
            axis.plot(x, y, color="tab:blue", lw=0.5, zorder=2)
        else:
            axis.plot(x, y, color="0.8", lw=0.7, zorder=1)
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    axis.grid(alpha=0.3)
