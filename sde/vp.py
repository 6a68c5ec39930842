"""The variance-preserving SDE, the continuous limit of DDPM (Song et al., 2021, eqs. 11, 29 and 33)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE


def integrated_beta(u: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Integral over [0, u] of the linear schedule beta_min + u (beta_max - beta_min)."""
    return u * (beta_min + 0.5 * u * (beta_max - beta_min))


@dataclass(frozen=True)
class VP(GaussianSDE):
    """alpha^2 = exp(-B), sigma^2 = 1 - exp(-B), B the integral of beta; dx = -(beta/2) x dt + sqrt(beta) dw.

    >>> float(VP().sigma(torch.tensor(1.0)))
    0.999978...
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0
    ordered: ClassVar = (("beta_min", "beta_max"),)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * integrated_beta(t / self.t_max, self.beta_min, self.beta_max))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-integrated_beta(t / self.t_max, self.beta_min, self.beta_max)))

    @property
    def prior_std(self) -> float:
        return 1.0
