"""End to end: log p of clean data, with what both ends of time cost, and with both ends corrected.

The flow runs from t_min to t_max, and log p_0 differs from its answer at both ends: the data are taken as if they had
the noise of t_min, and the prior is not the density at t_max. The first is corrected by ``endpoint_correction``, the
second by ``matched_prior``, whose moments are those of the target or are fitted to samples.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import solvers
from density import SDES, SIGNS, Closed
from experiments.report import table
from sde import GaussianSDE
from solvers import log_likelihood
from targets import TARGETS, Target

TOLERANCE = 1e-7
FITTED = 20_000
_FIT_SEED = 1000  # apart from the points'
EXACT_BARS = {
    "VP": {"a": ("diagonal", 2e-5), "b": ("full", 2e-5), "c": ("diagonal", 2e-5)},
    "VE": {"a": ("diagonal", 3e-4), "b": ("full", 3e-4), "c": ("diagonal", 4e-4)},
}
"""The covariance that is matched, and the error that is allowed: exact moments."""
FITTED_BARS = {"VP": {"a": 5e-5, "b": 4e-4, "c": 6e-4}, "VE": {"a": 2e-4, "b": 1.2e-3, "c": 1.5e-3}}
"""Full covariances, fitted to ``FITTED`` samples."""

Prior = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Priors:
    """Densities at t_max: the SDE's, and matched to exact moments (diagonal, full) or to samples (full)."""

    standard: Prior
    diagonal: Prior
    full: Prior
    fitted: Prior


def moments(target: Target) -> tuple[Tensor, Tensor]:
    """The mean ``(D,)`` and covariance ``(D, D)`` of a target."""
    mean = target.weights @ target.means
    apart = target.means - mean
    return mean, torch.einsum("k,kij->ij", target.weights, target.covariances + apart[:, :, None] * apart[:, None])


def priors(target: Target, sde: GaussianSDE, seed: int) -> Priors:
    """The four densities at t_max."""
    mean, covariance = moments(target)
    samples = target.model(sde, torch.float64).sample(FITTED, _FIT_SEED + seed)
    return Priors(
        sde.prior((1, len(mean))).log_prob,
        solvers.matched_prior(None, sde, covariance=covariance.diagonal(), mean=mean),
        solvers.matched_prior(None, sde, covariance=covariance, mean=mean),
        solvers.matched_prior(samples, sde, covariance="full"),
    )


def floor(model: Closed, x: Tensor) -> Tensor:
    """log p_0 by the exact density at t_min and the correction to first order in s^2 alone: no flow, no prior."""
    t = torch.tensor(model.sde.t_min, dtype=x.dtype)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    eps, divergence = model.noise(alpha * x, t)
    beyond = 0.5 * (sigma * divergence - eps.square().sum(1))
    return model.mixture.log_prob(alpha * x, t) + x.shape[1] * alpha.log() + beyond


def errors(
    target: Target, sde: GaussianSDE, seed: int, n: int = 256, tolerance: float = TOLERANCE
) -> dict[tuple[str, bool | int], float]:
    """Mean absolute error against log p_0 by (prior, order of the correction at t_min).

    The prior does not touch the flow, so one integration serves all of them. ("nfe", True) holds its calls, and
    ("floor", True) what is left at t_min alone to first order.
    """
    mixture = target.model(sde, torch.float64)
    x, found = mixture.sample(n, seed), {}
    truth, of = mixture.log_prob(x), priors(target, sde, seed)
    for corrected in (False, True, 2):
        options = {"rtol": tolerance, "atol": tolerance, "endpoint_correction": corrected}
        ll = log_likelihood(Closed(mixture), x, SIGNS, **options)
        for name, prior in vars(of).items():
            log_prob = ll.log_prob - ll.prior + prior(ll.latent)
            found[name, corrected] = float((log_prob - truth).abs().mean())
        found["nfe", corrected] = ll.nfe
    found["floor", True] = float((floor(Closed(mixture), x) - truth).abs().mean())
    return found


def report(args: argparse.Namespace) -> str:
    """The floors and the corrected errors, medians over seeds, with their bars."""
    rows = []
    for process in args.sdes:
        for name in args.targets:
            runs = [errors(TARGETS[name](s), SDES[process], s, args.points) for s in args.seeds]
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append((TARGETS[name](0).name, process, *_cells(median, name, process)))
            print("  " + "  ".join(rows[-1]), flush=True)
    title = (
        f"Mean absolute error in nats against log p_0 of clean data, dopri5 at {TOLERANCE:g}, seeds {args.seeds};\n"
        f"matched: the prior's mean and covariance; corrected: at t_min; fitted: full covariance of {FITTED} samples;\n"
        "t_min alone: what the correction, of first order in s^2, leaves where flow and prior are exact;\n"
        "2nd: with the correction of second order, one more call"
    )
    header = ("as it comes", "corrected", "matched", "both", "covariance", "both, fitted", "t_min alone")
    header = ("target", "SDE", *header, "both, 2nd", "fitted, 2nd", "NFE")
    return title + "\n\n" + table(header, rows)


def _cells(median: dict[tuple[str, bool | int], float], name: str, process: str) -> list[str]:
    covariance, bar = EXACT_BARS[process][name]
    floors = (("standard", False), ("standard", True), (covariance, False))
    both = _held(median[covariance, True], bar)
    fitted = _held(median["fitted", True], FITTED_BARS[process][name])
    second = (_held(median[covariance, 2], bar), _held(median["fitted", 2], FITTED_BARS[process][name]))
    last = (f"{median['floor', True]:.1e}", *second, f"{median['nfe', True]:.0f}")
    return [*(f"{median[key]:.1e}" for key in floors), both, covariance, fitted, *last]


def _held(error: float, bar: float) -> str:
    return f"{error:.1e} {'met' if error <= bar else 'missed'} (bar {bar:g})"
