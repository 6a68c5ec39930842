"""At which times the network is trained."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import GaussianSDE
from sde.base import last_time


class TimeSampler(ABC):
    """Draws the training times of a batch.

    The draws are stratified: sample i falls into the i-th of n equal parts of the distribution, with one offset for
    all (Kingma et al., 2021, appendix I.1). Each time alone has the stated density, and the loss varies less.
    """

    def sample(self, n: int, sde: GaussianSDE, generator: torch.Generator | None = None, device=None, dtype=None):
        """Times of shape ``(n,)``."""
        offset = torch.rand((), generator=generator, device=device, dtype=dtype)
        return self.quantile((torch.arange(n, device=device) + offset) / n, sde)

    @abstractmethod
    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        """The inverse of the cumulative distribution, at ``u`` in [0, 1)."""

    @abstractmethod
    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        """The density with respect to time."""


@dataclass(frozen=True)
class UniformTime(TimeSampler):
    """Uniform between t_min and t_max, or ``sde.base.last_time``."""

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        return sde.t_min + (last_time(sde) - sde.t_min) * u

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return torch.full_like(t, 1 / (last_time(sde) - sde.t_min))


@dataclass(frozen=True)
class UniformLogSNR(TimeSampler):
    """Uniform in the log signal-to-noise ratio between its ends: the importance sampling of the likelihood weighting.

    There g^2 / sigma^2 = -dlambda/dt, so that the weighted loss has a constant weight (Kingma et al., 2021, eq. 18).
    """

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return sde.time(high + (low - high) * u)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        at = sde.coefficients(t)
        return at.diffusion_squared / at.sigma.square() / (high - low)
