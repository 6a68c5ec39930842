"""Trained networks as cases: the density of the network's own flow with fixed probes, until two tolerances agree."""

import torch

from density import Case, own_density
from density_ways import TOLERANCES as ALL
from experiments import data
from experiments.checkpoint import load
from experiments.problem import Problem
from models import ScoreNetwork
from solvers import Exact, Hutchinson

TOLERANCES = ALL[:7]
"""To 1e-4: more calls than are compared."""
_REFERENCE = (1e-6, 1e-8)
_AGREE = 1e-3  # largest difference for one example, in nats


def case(path: str, seed: int, n: int = 64) -> tuple[Case, str]:
    """Held-out examples under a checkpoint's network in float64, and a line on how well the reference is converged.

    At most 24 where they are images. The divergence is exact in a few dimensions, one Rademacher probe otherwise. Data
    that need a path are not known here.
    """
    model, convention, _ = load(path, torch.device("cpu"))
    model = model.double().requires_grad_(False)
    problem = Problem.of(getattr(data, convention["name"])())
    few = problem.dimensions < 10
    x = problem.x(problem.data.test[: n if few else min(n, 24)], torch.Generator().manual_seed(seed)).double()
    name = f"{convention['name']}, {type(model.net).__name__}, {_target(model)}"
    divergence = Exact() if few else Hutchinson(probes=1, seed=seed)
    found = Case(name, model, x, model.sde.prior(x.shape).log_prob, x.new_zeros(len(x)), divergence, seed)
    truth, gap = own_density(found, _REFERENCE, _AGREE)
    line = (
        f"{name}: {len(x)} examples, mean log p {float(truth.mean()):.4f}; two references differ by at most {gap:.1g}"
    )
    return Case(name, model, x, found.terminal, truth, divergence, seed), line


def _target(model: ScoreNetwork) -> str:
    """What the network predicts."""
    return type(model.parametrization).__name__.removesuffix("Row")
