r"""At which times the network is trained, and the numbers that choose them.

With lambda = log-SNR, g^2 / sigma^2 dt = -dlambda: times uniform in lambda are the importance sampling of the
likelihood weighting, in closed form for every process. (For VP -lambda = log(exp(B) - 1), B the integral of beta, is
the cumulative weight that Song et al., "Maximum likelihood training", 2021, section 5.1, give and invert by bisection.)

A batch's u in [0, 1) go through the inverse of the cumulative distribution. ``spread`` says how they are drawn:

    stratified     u_i = (i + offset) / n with one offset for all (Kingma et al., 2021, appendix I.1): each time alone
                   has the stated distribution, and the mean of the losses varies least.
    antithetic     u and 1 - u: what is odd in u cancels.
    independent    what standard errors over the batch suppose.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.share import Source, share_of
from sde import GaussianSDE
from sde.base import last_time

_LEAST_MASS = 1e-3


def _stratified(n: int, **how) -> Tensor:
    offset = torch.rand((), **how)
    return (torch.arange(n, device=how["device"]) + offset) / n


def _antithetic(n: int, **how) -> Tensor:
    half = torch.rand(n - n // 2, **how)
    return torch.cat((half, 1 - half[: n // 2]))


def _independent(n: int, **how) -> Tensor:
    return torch.rand(n, **how)


SPREADS = {"stratified": _stratified, "antithetic": _antithetic, "independent": _independent}
"""How the numbers of one batch lie in [0, 1]."""


class TimeSampler(ABC):
    """Draws the training times of a batch from a distribution, its cumulative function F and density p."""

    spread: str
    learns: ClassVar[bool] = True
    """Whether ``observe`` does anything."""

    def sample(self, n: int, sde: GaussianSDE, generator: Source = None, device=None, dtype=None):
        """Times of shape ``(n,)``."""
        make = SPREADS[self.spread]
        u = share_of(lambda shape, g: make(*shape, generator=g, device=device, dtype=dtype), (n,), generator)
        return self.quantile(u, sde)

    @abstractmethod
    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        """The inverse of F, at ``u`` in [0, 1]."""

    @abstractmethod
    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        """F(t), in [0, 1]."""

    @abstractmethod
    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        """p(t) = F'(t), with respect to time."""

    @abstractmethod
    def importance(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        """q(t) / p(t) for the q over which the mean of a loss is meant."""

    @abstractmethod
    def observe(self, t: Tensor, loss: Tensor, sde: GaussianSDE) -> None:
        """Learn from the losses ``(B,)`` of the mean over q at the times ``t``, for the batches to come."""


class FixedTimes(TimeSampler):
    """A distribution that stays what it is, and over which the mean is meant."""

    learns = False

    def __post_init__(self):
        if self.spread not in SPREADS:
            raise ValueError(
                f"{type(self).__name__}: spread must be one of {', '.join(SPREADS)}, found {self.spread!r}"
            )

    def importance(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return torch.ones_like(t)

    def observe(self, t: Tensor, loss: Tensor, sde: GaussianSDE) -> None:
        """Nothing to learn."""


def speed(t: Tensor, sde: GaussianSDE) -> Tensor:
    """-dlambda/dt = g^2 / sigma^2; shape of ``t``."""
    at = sde.coefficients(t)
    return at.diffusion_squared / at.sigma.square()


@dataclass(frozen=True)
class UniformTime(FixedTimes):
    """Uniform between t_min and t_max, or ``sde.base.last_time``."""

    spread: str = "stratified"

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        return sde.t_min + (last_time(sde) - sde.t_min) * u

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return (t - sde.t_min) / (last_time(sde) - sde.t_min)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return torch.full_like(t, 1 / (last_time(sde) - sde.t_min))


@dataclass(frozen=True)
class UniformLogSNR(FixedTimes):
    """Uniform in the log signal-to-noise ratio between its ends: the importance sampling of the likelihood weighting.

    There g^2 / sigma^2 = -dlambda/dt, so that the weighted loss has a constant weight (Kingma et al., 2021, eq. 18).
    """

    spread: str = "stratified"

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return sde.time(high + (low - high) * u)

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return (high - sde.log_snr(t)) / (high - low)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return speed(t, sde) / (high - low)


@dataclass(frozen=True)
class LogNormal(FixedTimes):
    """log(sigma / alpha) normal, truncated at the ends of the process (Karras et al., 2022, table 1: P_mean, P_std)."""

    mean: float = -1.2
    std: float = 1.2
    spread: str = "stratified"

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"LogNormal: expected a finite mean and a positive std, found {self.mean} and {self.std}")

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        start, mass = self._ends(sde)
        z = torch.special.ndtri(start + mass * u.double())  # single precision would end the upper tail at 5.2
        return sde.time((-2 * (self.mean + self.std * z)).clamp(*sde.log_snr_range).to(u))

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        start, mass = self._ends(sde)
        return ((torch.special.ndtr(self._standard(t, sde).double()) - start) / mass).to(t)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        normal = torch.exp(-0.5 * self._standard(t, sde).square()) / (self.std * math.sqrt(2 * math.pi))
        return normal * 0.5 * speed(t, sde) / self._ends(sde)[1]

    def _standard(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return (-0.5 * sde.log_snr(t) - self.mean) / self.std

    def _ends(self, sde: GaussianSDE) -> tuple[float, float]:
        """The probability below the least noise level of ``sde``, and that of its range."""
        low, high = (-0.5 * end for end in reversed(sde.log_snr_range))
        start, end = (0.5 * math.erfc((self.mean - y) / (self.std * math.sqrt(2))) for y in (low, high))
        if end - start < _LEAST_MASS:
            raise ValueError(
                f"{self} has only {end - start:.1g} of its probability in the range of log(sigma / alpha) of {sde}, "
                f"{low:.3g} to {high:.3g}; choose a mean within it"
            )
        return start, end - start


@dataclass(frozen=True)
class SingleTime(FixedTimes):
    """One time for all: by default t_min, where the data live. It has no density, as an integral over time needs."""

    t: float | None = None
    spread: str = "stratified"

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        t = sde.t_min if self.t is None else self.t
        if not sde.t_min <= t <= sde.t_max:
            raise ValueError(f"SingleTime: t must lie in [{sde.t_min}, {sde.t_max}] of {sde}, found {t}")
        return torch.full_like(u, t)

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return torch.ones_like(t)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        raise ValueError(f"{self} has no density, which an integral over time needs; choose another weighting or times")
