r"""Samplers that step through the predicted clean image: DDIM and the exact ancestral transition.

Given x_0, the forward process from s to t has a Gaussian posterior; with the pair (x_0, eps) of the model in it,

    x_s = alpha_s x_0 + sigma_s sqrt(1 - eta^2 rho) eps + eta sigma_s sqrt(rho) z,      rho = 1 - SNR_t / SNR_s

(Song et al., "Denoising diffusion implicit models", 2021, eqs. 12 and 16, for any alpha and sigma). eta = 1 is the
posterior q(x_s | x_t, x_0) itself: DDPM's ancestral step under VP, NCSN's under VE. eta = 0 is the exponential Euler
method for the probability-flow ODE.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.sampler import GridSampler, Step


def bridge(x: Tensor, step: Step, eta: float) -> Tensor:
    """One step of the family above."""
    x0, eps = step.predict(x)
    rho = -torch.expm1(step.log_snr_change)
    mean = step.alpha_s * x0 + step.sigma_s * torch.sqrt(1 - eta**2 * rho) * eps
    return mean + eta * step.sigma_s * rho.sqrt() * step.draw(x) if eta else mean


@dataclass(frozen=True)
class DDIM(GridSampler):
    """Deterministic for ``eta`` = 0, order 1; ancestral for ``eta`` = 1. One call a step."""

    eta: float = 0.0
    calls_per_step = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM: eta must lie in [0, 1], found {self.eta!r}")

    def step(self, x: Tensor, step: Step) -> Tensor:
        return bridge(x, step, self.eta)


@dataclass(frozen=True)
class Ancestral(GridSampler):
    """Draws from the exact transition q(x_s | x_t, x_0) at the predicted x_0; weak order 1, one call a step."""

    calls_per_step = 1

    def step(self, x: Tensor, step: Step) -> Tensor:
        return bridge(x, step, eta=1.0)
