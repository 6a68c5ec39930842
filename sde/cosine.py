"""The cosine schedule (Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde.base import GaussianSDE


@dataclass(frozen=True)
class Cosine(GaussianSDE):
    """alpha = cos((u + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2), u = t / t_max, s the offset; sigma^2 = 1 - alpha^2.

    alpha falls to 0 at t_max, where drift and diffusion are infinite (the paper clips beta there): solvers that need
    them start just before it (``sde.base.last_time``).
    """

    offset: float = 0.008
    t_min: float = 1e-5
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        # sin of the angle that is left: cos of nearly pi/2 would lose all digits.
        return torch.sin(self._quarter * ((self.t_max - t) / self.t_max)) / math.cos(self.offset * self._quarter)

    def sigma(self, t: Tensor) -> Tensor:
        # cos^2 a - cos^2 (a + b) = sin b sin(2 a + b): free of cancellation at both ends.
        a, b = self.offset * self._quarter, self._quarter * (t / self.t_max)
        return torch.sqrt(torch.sin(b) * torch.sin(2 * a + b)) / math.cos(a)

    @property
    def prior_std(self) -> float:
        return 1.0

    @property
    def _quarter(self) -> float:
        return math.pi / 2 / (1 + self.offset)
