"""The figure of a league table: what quality costs, in calls of the network and in seconds, and where the front is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.canvas import FAINT, INK, PALETTE, canvas, checked, curve_look, log_if_wide, plain_log_ticks, readable
from experiments.labels import label_curves
from experiments.metrics import Floor
from experiments.table_cells import SCORES, pareto_front

_FLOOR = "real data: {0.mean:.3g} ± {0.std:.1g}"
COSTS = {"nfe": "network calls (NFE)", "seconds": "seconds"}


def pareto(
    rows: Sequence[dict[str, Any]],
    path: Path,
    title: str = "distance to held-out data",
    best: str = "low",
    floor: Floor | None = None,
) -> Path:
    """Quality against calls and against seconds, side by side; a step line is the Pareto front of each.

    rows: dicts with "sampler", "nfe", "seconds", "value", "stderr" (or None); rows of one sampler are joined by a line.
    title: of the value. best: "low", "high" or "zero", which shows absolute values. floor: what real data have, as mean
    +- standard deviation. Raises ``ValueError`` for no rows and for numbers that are not finite or costs below 0.
    """
    numbers = [[row["nfe"], row["seconds"], row["value"], row["stderr"] or 0.0] for row in rows]
    points = checked("rows", torch.tensor(numbers, dtype=torch.float64), "R, 4")
    if (points[:, :2] < 0).any():
        raise ValueError(f"rows: expected costs of at least 0, found {points[:, :2].min():g}; mend nfe and seconds.")
    if best == "zero":
        points[:, 2], title = points[:, 2].abs(), f"|{title}|"
    curves = {name: [i for i, row in enumerate(rows) if row["sampler"] == name] for name in _names(rows)}
    with canvas(path, 13, 5.0) as figure:
        for i, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), COSTS.values(), strict=True)):
            axes.set(xlabel=label, ylabel="" if i else title)
            _draw(axes, points[:, [i, 2, 3]], curves, best, floor)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return path


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["sampler"] for row in rows))


def _draw(axes, points: Tensor, curves: dict[str, list[int]], best: str, floor: Floor | None) -> None:
    """Points (R, 3) of cost, value, error as a curve for each sampler, under labels that cover nothing."""
    lines = {}
    for i, (name, index) in enumerate(curves.items()):
        line = points[index][points[index, 0].argsort(stable=True)]
        axes.errorbar(*line[:, :2].T, yerr=line[:, 2], markersize=6, elinewidth=1, linewidth=1.2, **curve_look(i))
        lines[readable(name)] = line[:, :2]
    _front(axes, points, best)
    seen = points[:, 1]
    if floor is not None:
        axes.axhspan(
            floor.mean - floor.std,
            floor.mean + floor.std,
            color=FAINT,
            alpha=0.3,
            linewidth=0,
            label=_FLOOR.format(floor),
        )
        axes.axhline(floor.mean, color=FAINT, linewidth=1)
        seen = torch.cat([seen, seen.new_tensor([floor.mean])])
    axes.margins(x=0.15, y=0.12)
    if points[:, 0].min() > 0:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    log_if_wide(axes, seen)
    label_curves(axes, lines, [PALETTE[i % len(PALETTE)] for i in range(len(lines))])


def _front(axes, points: Tensor, best: str) -> None:
    """What is reached at each cost, and stays so until something better is."""
    scores = [SCORES[best](value) for value in points[:, 1].tolist()]
    index = pareto_front(points[:, 0].tolist(), scores)
    line = points[index][points[index, 0].argsort(stable=True)]
    look = {"color": INK, "linewidth": 5, "alpha": 0.13, "zorder": 0.5, "solid_joinstyle": "round"}
    axes.step(*line[:, :2].T, where="post", label="Pareto front", **look)
