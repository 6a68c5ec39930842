"""The sub-VP SDE (Song et al., 2021, eqs. 12 and 29, appendix B): the VP kernel's mean with its variance squared."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE
from sde.vp import integrated_beta


@dataclass(frozen=True)
class SubVP(GaussianSDE):
    """alpha^2 = exp(-B), sigma = 1 - exp(-B), B the integral of beta; g^2 = beta (1 - exp(-2 B))."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0
    ordered: ClassVar = (("beta_min", "beta_max"),)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * integrated_beta(t / self.t_max, self.beta_min, self.beta_max))

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-integrated_beta(t / self.t_max, self.beta_min, self.beta_max))

    @property
    def prior_std(self) -> float:
        return 1.0
