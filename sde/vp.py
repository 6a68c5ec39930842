"""The variance-preserving SDE, the continuous limit of DDPM (Song et al., 2021, eqs. 11, 29 and 33)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE


@dataclass(frozen=True)
class LinearBeta(GaussianSDE):
    """What VP and sub-VP share: alpha^2 = exp(-B), B the integral over [0, t / t_max] of a beta that rises linearly."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0
    ordered: ClassVar = (("beta_min", "beta_max"),)
    cures: ClassVar = ("lower t_min", "raise beta_max")

    def integrated_beta(self, t: Tensor) -> Tensor:
        """B(t); shape of ``t``."""
        u = t / self.t_max
        return u * (self.beta_min + 0.5 * u * (self.beta_max - self.beta_min))

    def _time(self, integrated_beta: Tensor) -> Tensor:
        """The inverse of B; the root of its quadratic that loses no digits at a small B."""
        b = integrated_beta.clamp(max=0.5 * (self.beta_min + self.beta_max))  # that at t_max
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return (self.t_max * 2 * b / (self.beta_min + root)).clamp(self.t_min, self.t_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True)
class VP(LinearBeta):
    """alpha^2 = exp(-B), sigma^2 = 1 - exp(-B), B the integral of beta; dx = -(beta/2) x dt + sqrt(beta) dw.

    >>> float(VP().sigma(torch.tensor(1.0)))
    0.999978...
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time(torch.logaddexp(torch.zeros_like(log_snr), -log_snr))
