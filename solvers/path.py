"""All that depends on time alone, for the whole grid at once, in float64, before the loop over its steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sde import SDE, GaussianSDE
from sde.base import Coefficients


@dataclass(frozen=True)
class Path:
    """A process at the N + 1 ``times`` of N steps, towards the data or away from it.

    Every tensor has the shape ``(N + 1,)`` and is in float64 on the CPU. Under a process that is not Gaussian alpha is
    1, and sigma the noise that its diffusion has added since time 0.
    """

    sde: SDE
    times: Tensor

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        gaussian = isinstance(self.sde, GaussianSDE)
        alpha, sigma = (self.sde.alpha(self.times), self.sde.sigma(self.times)) if gaussian else self._added()
        return alpha.detach(), sigma.detach()

    def _added(self) -> tuple[Tensor, Tensor]:
        """1, and sqrt(integral of g^2 from 0)."""
        sde, times = self.sde, self.times
        fine = torch.linspace(sde.t_min, sde.t_max, 4097, dtype=times.dtype)
        rate = sde.diffusion(fine).square()
        added = torch.cat((rate[:1] * sde.t_min, 0.5 * (rate[1:] + rate[:-1]) * fine.diff())).cumsum(0)
        nearest = ((times - sde.t_min) / (sde.t_max - sde.t_min) * 4096).round().long()
        return torch.ones_like(times), added[nearest].sqrt()

    @property
    def alpha(self) -> Tensor:
        """Scale of the data."""
        return self._levels[0]

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise."""
        return self._levels[1]

    @cached_property
    def ratio(self) -> Tensor:
        """sigma / alpha: the standard deviation of the noise in y = x / alpha."""
        return self.sigma / self.alpha

    @cached_property
    def log_snr(self) -> Tensor:
        """lambda = 2 log(alpha / sigma)."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @cached_property
    def coefficients(self) -> Coefficients | None:
        """alpha, sigma, alpha', sigma'; None for a process that is not Gaussian."""
        if not isinstance(self.sde, GaussianSDE):
            return None
        return Coefficients(*(c.detach() for c in self.sde.coefficients(self.times)))

    @property
    def rate(self) -> Tensor | None:
        """alpha'/alpha, the linear coefficient of the drift; None for a process that is not Gaussian."""
        return self.coefficients and self.coefficients.rate

    @cached_property
    def diffusion(self) -> Tensor:
        """g."""
        gaussian = self.coefficients
        return gaussian.diffusion_squared.sqrt() if gaussian else self.sde.diffusion(self.times).detach()


def rows(plan: Any, like: Tensor) -> Iterable[Any]:
    """A plan - a tensor of N numbers, or a (named) tuple of plans, or None - as N plans of one number each.

    Numbers are tensors of shape ``()`` in the dtype and on the device of ``like``.
    """
    if isinstance(plan, Tensor):
        return plan.to(like).unbind()
    if not plan:
        return repeat(plan)
    return map(getattr(plan, "_make", tuple), zip(*(rows(part, like) for part in plan), strict=False))
