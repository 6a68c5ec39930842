"""The process of EDM (Karras et al., "Elucidating the design space of diffusion-based generative models", 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.base import GaussianSDE


@dataclass(frozen=True)
class EDM(GaussianSDE):
    """alpha = 1, sigma = t: time is the noise level itself; g^2 = 2 t. The data are in units of about 1.

    ``t_min`` and ``t_max`` are the paper's sigma_min and sigma_max; they bound the noise and do not rescale the clock.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    cures: ClassVar = ("lower t_min", "raise t_max")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr).clamp(self.t_min, self.t_max)

    @property
    def prior_std(self) -> float:
        return self.t_max
