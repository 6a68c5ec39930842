"""The sub-VP SDE (Song et al., 2021, eqs. 12 and 29, appendix B): the VP kernel's mean with its variance squared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sde.vp import LinearBeta


@dataclass(frozen=True)
class SubVP(LinearBeta):
    """alpha^2 = exp(-B), sigma = 1 - exp(-B), B the integral of beta; g^2 = beta (1 - exp(-2 B))."""

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))  # sigma / alpha = 2 sinh(B / 2)
