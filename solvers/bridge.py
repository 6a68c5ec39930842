r"""Samplers that step through the predicted clean image: DDIM and the exact ancestral transition.

Given x_0, the forward process from s to t has a Gaussian posterior; with the pair (x_0, eps) of the model in it,

    x_s = alpha_s x_0 + sigma_s sqrt(1 - eta^2 rho) eps + eta sigma_s sqrt(rho) z,      rho = 1 - SNR_t / SNR_s

(Song et al., "Denoising diffusion implicit models", 2021, eqs. 12 and 16, for any alpha and sigma). eta = 1 is the
posterior q(x_s | x_t, x_0) itself: DDPM's ancestral step under VP, NCSN's under VE. eta = 0 is the exponential Euler
method for the probability-flow ODE.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.linear import LinearSampler, Weights
from solvers.path import Path


def bridge(path: Path, eta: float) -> Weights:
    """The family above."""
    alpha, sigma = path.alpha[1:], path.sigma[1:]
    if not eta:
        return Weights(alpha, sigma)
    change = path.log_snr.diff()
    kept = torch.sqrt(1 - eta**2 + eta**2 * torch.exp(-change))  # 1 - eta^2 rho without its cancellation
    return Weights(alpha, sigma * kept, eta * sigma * torch.sqrt(-torch.expm1(-change)))


@dataclass(frozen=True)
class DDIM(LinearSampler):
    """Deterministic for ``eta`` = 0, order 1; ancestral for ``eta`` = 1. One call a step."""

    order: ClassVar[int] = 1
    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM: eta must lie in [0, 1], found {self.eta!r}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, path: Path) -> Weights:
        return bridge(path, self.eta)


@dataclass(frozen=True)
class Ancestral(LinearSampler):
    """Draws from the exact transition q(x_s | x_t, x_0) at the predicted x_0; weak order 1, one call a step."""

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def plan(self, path: Path) -> Weights:
        return bridge(path, eta=1.0)
