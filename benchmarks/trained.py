"""Trained networks as problems: the flow of the network itself, solved until two tolerances agree."""

import copy
import math

import torch

from experiments.checkpoint import load
from models import ScoreNetwork
from problem import Levels, Problem, unscaled
from targets import converged, integrate

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
_TOLERANCES = (1e-5, 1e-6)
_AGREE = 1e-3  # largest difference of one coordinate; errors that are compared are RMSE


def problem(path: str, seed: int) -> tuple[Problem, str]:
    """A problem from a checkpoint, and a line on how well its reference is converged.

    64 images, or 1000 samples of a few coordinates, from the prior of the network's process.
    """
    model, convention, _ = load(path, torch.device("cpu"))
    model.requires_grad_(False)
    shape = tuple(convention["shape"])
    n = 1000 if math.prod(shape) < 10 else 64
    y, s = unscaled(model.sde, model.sde.prior((n, *shape)).sample(seed, dtype=torch.float64))
    y = y.float()
    with torch.no_grad():
        reference, gap = converged(lambda tolerance: _fine(model, y.double(), s, tolerance), _TOLERANCES, _AGREE)
    name = path.rstrip("/").split("/")[-1]
    line = f"{name}: {n} samples, start at s = {s:.4g}; two references differ by at most {gap:.1g}"
    return Problem(name, model, Levels(model), y, s, reference, seed), line


def _fine(model: ScoreNetwork, y: torch.Tensor, s: float, tolerance: float) -> torch.Tensor:
    exact = Levels(copy.deepcopy(model).double())
    end = math.exp(-0.5 * model.sde.log_snr_range[1])
    return integrate(exact, y, s, tolerance, end=max(end, 1e-3))
