"""Rectified flow (Liu et al., 2023), the optimal-transport path of flow matching (Lipman et al., 2023), as an SDE."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE


@dataclass(frozen=True)
class RectifiedFlow(GaussianSDE):
    """alpha = 1 - u, sigma = u, u = t / t_max; given x_0 and eps the velocity is the constant (eps - x_0) / t_max.

    Pair, velocity and kernel are finite at both ends, and ``t_min`` may be 0. Drift and diffusion, f = -x / (1 - u) and
    g^2 = 2 u / (1 - u) in units of t_max, are infinite at t_max: solvers that need them start just before it
    (``sde.base.last_time``).
    """

    t_min: float = 1e-5
    t_max: float = 1.0
    may_be_zero: ClassVar = ("t_min",)

    def alpha(self, t: Tensor) -> Tensor:
        return (self.t_max - t) / self.t_max  # the difference is exact near t_max

    def sigma(self, t: Tensor) -> Tensor:
        return t / self.t_max

    def time(self, log_snr: Tensor) -> Tensor:
        return (self.t_max * torch.sigmoid(-0.5 * log_snr)).clamp(self.t_min, self.t_max)

    @property
    def prior_std(self) -> float:
        return 1.0
