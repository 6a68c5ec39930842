"""Stochastic samplers by the sliced W2 distance of 10 000 samples to 10 000 fresh draws of target a."""

import argparse
import math
import statistics
from functools import partial

import torch

import ours
from experiments.metrics import sliced_w2
from measure import cases, every_method, summary
from peers import available
from pictures import draw
from problem import Problem, unscaled
from sde import VE, VP
from store import Store
from targets import Target, circle

BUDGETS = (20, 50, 100, 250)
STARTS = {"VE": VE(), "VP": VP()}
_SAMPLES, _REPEATS, _PROJECTIONS = 10_000, 10, 128
_ENDS = (0.01, 0.03)


def _draw(target: Target, seed: int) -> torch.Tensor:
    return target.model(VP(), torch.float64).sample(_SAMPLES, seed)


def _distance(now: Problem, y: torch.Tensor) -> float:
    return sliced_w2(y, now.reference, _PROJECTIONS) if bool(torch.isfinite(y).all()) else math.inf


def floor(target: Target) -> tuple[float, float]:
    """Mean and standard deviation of the distance between two independent draws of the data."""
    pairs = [(_draw(target, 1000 + 2 * i), _draw(target, 1001 + 2 * i)) for i in range(_REPEATS)]
    values = [sliced_w2(*pair, _PROJECTIONS) for pair in pairs]
    return statistics.mean(values), statistics.stdev(values)


def problem(target: Target, start: str, seed: int) -> Problem:
    """Noise of a start's prior; the reference is a fresh draw of the data."""
    model = target.model(STARTS[start])
    x = model.sde.prior((_SAMPLES, 2)).sample(seed, dtype=torch.float64)
    y, s = unscaled(model.sde, x)
    return Problem(
        f"{target.name}, {start}, stochastic", model, target.denoise(), y.float(), s, _draw(target, seed), seed
    )


def report(args: argparse.Namespace, store: Store, name: str) -> str:
    """The tables: one target, and for each of the first three seeds new noise and new data."""
    methods, missing = available(stochastic=True)
    target, records, budgets, seeds = circle(0), [], args.budgets or BUDGETS, args.seeds[:3]
    mean, std = floor(target)
    for start in args.starts:
        for seed in seeds:
            now = problem(target, start, seed)
            torch.manual_seed(seed)  # peers draw from the global generator
            chosen = [*methods, *ours.methods(ours.SDE)]
            records += store.measure(now, chosen, budgets, error=partial(_distance, now), last=lambda n: _ENDS)
            print(f"  {now.name}, seed {seed}", flush=True)
    draw(records, budgets, args.out / f"{name}.png", "sliced W2")
    title = f"Stochastic samplers: sliced W2 to fresh data, {_SAMPLES} samples, medians over seeds {seeds}; "
    title += f"between two draws of the data it is {mean:.4f} ± {std:.4f}"
    parts = [title, summary(records, budgets)]
    return "\n\n".join(parts + [every_method(records, case, budgets, missing) for case in cases(records)])
