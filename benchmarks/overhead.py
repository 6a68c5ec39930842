"""What the loop of a sampler costs beside the model: microseconds of processor time per call.

The model is half of its argument: one multiplication, for ours two, since it gives the pair (x_0, eps).
"""

import statistics

import torch
from torch import Tensor

import ours
from experiments.report import table
from measure import ends
from peers import available
from problem import Method, Plan, Problem, within
from sde import VE, Prediction, ScoreModel

_DIMENSIONS, _BATCHES, _CALLS, _REPEATS = 64, (1, 256), 50, 15


class Half(ScoreModel):
    """x_0 = x / 2 and no noise: it costs two multiplications."""

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        return Prediction(0.5 * x, 0 * x)


def problem(batch: int) -> Problem:
    """A start at s = 50."""
    y = 50 * torch.randn(batch, _DIMENSIONS, generator=torch.Generator().manual_seed(0))
    return Problem("half", Half(VE()), lambda y, s: 0.5 * y, y, 50.0, y.double())


def _time(method: Method, now: Problem) -> float:
    end = None if method.own_end else ends(_CALLS)[0]
    run = within(method, now, Plan(1, method.grids[0], end), _CALLS)
    return float("nan") if run is None else 1e6 * run.seconds / run.nfe


def report() -> str:
    """The table: all methods take turns, so that a busy machine slows all alike."""
    (one, missing), (two, _) = available(), available(stochastic=True)
    methods = [*one, *two, *ours.methods(ours.ODE), *ours.methods(ours.SDE)]
    problems = [problem(batch) for batch in _BATCHES]
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(_REPEATS):
        for i, method in enumerate(methods):
            for j, now in enumerate(problems):
                times.setdefault((i, j), []).append(_time(method, now))
    rows = [
        (f"{m.library}: {m.name}", *(c for j in range(2) for c in _cells(times[i, j]))) for i, m in enumerate(methods)
    ]
    rows += [(line, "", "", "", "") for line in missing]
    title = f"Overhead: microseconds of processor time per call, {_CALLS} calls, {_DIMENSIONS} dimensions, {_REPEATS} "
    title += "interleaved repeats; a model of one multiplication (ours: two)"
    return f"{title}\n\n" + table(("batch", "1: least", "median", "256: least", "median"), rows)


def _cells(values: list[float]) -> tuple[str, str]:
    return f"{min(values):.0f}", f"{statistics.median(values):.0f}"
