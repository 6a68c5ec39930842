r"""Densities of the times that are made of steps: tabulated from a function, or learned from the losses.

A mean over a density q is estimated without bias by draws from any other p, each with the weight q / p; it varies least
for p in proportion to q times the root mean square of what is averaged. ``LossAware`` learns that of the losses (Nichol
and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 18).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.time_sampling import FixedTimes, TimeSampler, UniformLogSNR, UniformTime, speed
from sde import GaussianSDE
from sde.base import require_count


@dataclass(frozen=True, eq=False)
class Steps:
    """A density on [0, 1] that is constant on each of K equal parts; ``shares``: their probabilities, ``(K,)``."""

    shares: Tensor

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse of the cumulative distribution; shape of ``u``."""
        ends = self.shares.cumsum(0)
        k = torch.searchsorted(ends, u.contiguous(), right=True).clamp(max=len(ends) - 1)
        inside = (u - (ends[k] - self.shares[k])) / self.shares[k]
        return ((k + inside.clamp(0, 1)) / len(ends)).to(u)

    def cumulative(self, v: Tensor) -> Tensor:
        """The probability below ``v``."""
        k = self.part(v)
        return ((self.shares.cumsum(0) - self.shares)[k] + (v * len(self.shares) - k) * self.shares[k]).to(v)

    def density(self, v: Tensor) -> Tensor:
        """The density at ``v``."""
        return (len(self.shares) * self.shares[self.part(v)]).to(v)

    def part(self, v: Tensor) -> Tensor:
        """The number of the part that holds ``v``; shape of ``v``."""
        return (v * len(self.shares)).long().clamp(0, len(self.shares) - 1)


@dataclass(frozen=True)
class Tabulated(FixedTimes):
    """A density proportional to any positive function of time, tabulated over parts of equal width in log-SNR.

    It is constant in log-SNR within each part, and that is the density which it states: exact, however few the parts.

    Parameters
    ----------
    weight: (t, sde) -> positive numbers of the shape of ``t``, with respect to time; a ``Weighting`` is one.
    parts: their number.
    """

    weight: Callable[[Tensor, GaussianSDE], Tensor]
    parts: int = 256
    spread: str = "stratified"

    def __post_init__(self):
        super().__post_init__()
        require_count(self.parts, "Tabulated: parts")

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return sde.time(high + (low - high) * self._steps(sde, u).quantile(u))

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return self._steps(sde, t).cumulative(self._place(t, sde))

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        low, high = sde.log_snr_range
        return self._steps(sde, t).density(self._place(t, sde)) * speed(t, sde) / (high - low)

    def _place(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return UniformLogSNR().cumulative(t, sde)

    def _steps(self, sde: GaussianSDE, like: Tensor) -> Steps:
        make = _table.__wrapped__ if isinstance(sde, nn.Module) else _table  # a module's parameters may change
        return make(self, sde, like.device, like.dtype)


@lru_cache(maxsize=16)
def _table(times: Tabulated, sde: GaussianSDE, device: torch.device, dtype: torch.dtype) -> Steps:
    """The shares of the parts, by the midpoint rule."""
    low, high = sde.log_snr_range
    middle = (torch.arange(times.parts, device=device, dtype=torch.float64) + 0.5) / times.parts
    with torch.no_grad():
        t = sde.time(high + (low - high) * middle)
        mass = times.weight(t, sde) / speed(t, sde)
    if not bool((torch.isfinite(mass) & (mass > 0)).all()):
        raise ValueError(
            f"Tabulated: weight must be positive and finite at all times of {sde}, found {float(mass.min()):.3g} to "
            f"{float(mass.max()):.3g}; a time of no weight would never be seen"
        )
    return Steps((mass / mass.sum()).to(dtype))


class LossAware(nn.Module, TimeSampler):
    """Times where the losses are large, learned as training goes; the mean is that over ``times``, without bias.

    The distribution of ``times`` is cut into bins of equal probability. A bin is drawn with a probability in proportion
    to the root mean square of its losses: all alike, until each bin has seen ``least`` of them. It is kept in buffers,
    and updated where they are, without a synchronization.

    Parameters
    ----------
    times: the distribution over which the mean is meant, ``UniformTime()`` by default.
    bins: their number.
    decay: a loss counts ``decay`` to the power of the number of those that its bin has seen since.
    floor: the share of the draws that goes to all bins alike, which bounds the weight of a loss by 1 / floor.
    least: losses that each bin sees before any of them count.
    """

    def __init__(
        self,
        times: TimeSampler | None = None,
        bins: int = 32,
        decay: float = 0.99,
        floor: float = 0.05,
        least: int = 10,
    ):
        super().__init__()
        require_count(bins, "LossAware: bins")
        require_count(least, "LossAware: least")
        for name, value in (("decay", decay), ("floor", floor)):
            if not 0 < value < 1:
                raise ValueError(f"LossAware: {name} must lie between 0 and 1, found {value!r}")
        self.times = times or UniformTime()
        self.spread, self.decay, self.floor, self.least = self.times.spread, decay, floor, least
        self.register_buffer("squares", torch.zeros(bins))
        self.register_buffer("counts", torch.zeros(bins))

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        return self.times.quantile(self.steps().quantile(u), sde)

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return self.steps().cumulative(self.times.cumulative(t, sde))

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return self.steps().density(self.times.cumulative(t, sde)) * self.times.density(t, sde)

    def importance(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        return self.times.importance(t, sde) / self.steps().density(self.times.cumulative(t, sde))

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor, sde: GaussianSDE) -> None:
        bins = torch.arange(len(self.counts), device=t.device)
        # A product of matrices, where adding by index would depend on the order of a GPU's threads.
        member = (self.steps().part(self.times.cumulative(t, sde)) == bins[:, None]).to(self.squares)
        found = member.sum(1)
        kept = self.decay**found
        mean = (member @ loss.to(self.squares).square()) / found.clamp(min=1)
        self.squares.lerp_(mean, 1 - kept)
        self.counts += found

    def steps(self) -> Steps:
        """The present distribution over the quantiles of ``times``."""
        tiny = torch.finfo(self.squares.dtype).tiny
        # Started from zero, an average of n losses lacks the share decay^n.
        size = (self.squares / (1 - self.decay**self.counts).clamp(min=tiny)).sqrt() + tiny
        learned = (1 - self.floor) * size / size.sum() + self.floor / len(size)
        ready = (self.counts >= self.least).all()
        return Steps(torch.where(ready, learned, torch.full_like(size, 1 / len(size))))
