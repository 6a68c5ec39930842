"""The variance-exploding SDE, the continuous limit of NCSN (Song et al., 2021, eqs. 9, 29 and 30)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE


@dataclass(frozen=True)
class VE(GaussianSDE):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    The kernel's variance is sigma(t)^2 and not sigma(t)^2 - sigma(0)^2: the process reaches t = 0 with sigma_min of
    noise already in it, and the data live at ``t_min`` up to that noise (as in the code of Song et al.).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0
    ordered: ClassVar = (("sigma_min", "sigma_max"),)
    cures: ClassVar = ("lower sigma_min", "raise sigma_max")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * (math.log(self.sigma_max / self.sigma_min) / self.t_max))

    def time(self, log_snr: Tensor) -> Tensor:
        share = (-0.5 * log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return (self.t_max * share).clamp(self.t_min, self.t_max)

    @property
    def prior_std(self) -> float:
        return self.sigma_max
