r"""What makes the bound of continuous time vary less: where its integral is sampled, and what is subtracted from it.

The integral over lambda = log-SNR of h(lambda) = |eps - eps_hat|^2 / 2 is estimated by draws of (lambda, eps).

* ``LogSNRDensity``: the density of lambda. Uniform, it is the importance sampling of the likelihood weighting
  (Song, Durkan, Murray and Ermon, 2021, section 5.1; Kingma et al., 2021, section 5). ``learned`` from a pilot it puts
  more draws where they vary more, Neyman's allocation over strata.
* ``GaussianReference``: a control variate. For the exact model of N(m, v) data, with u = v exp(lambda),

      eps - eps_ref = c eps - b (x_0 - m),      c = u / (1 + u),      b = exp(lambda / 2) / (1 + u),

  so that, over eps, E |eps - eps_ref|^2 = sum c^2 + b^2 (x_0 - m)^2, whose integral over lambda is elementary:

      int c^2 = log(1 + u) + 1 / (1 + u),       int b^2 = -1 / (v (1 + u)).

  What is left to estimate is the difference of the model from that Gaussian. Near the data, where eps can't be told
  from a density, the whole of |eps|^2 cancels: it is most of the variance for continuous data. For discrete data, whose
  eps is known there, it would add what is not there.

Any density with positive weights and any reference leave the estimate unbiased. ``times`` inverts lambda(t) for many
values at once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import GaussianSDE
from sde.base import expand, last_time, value_and_derivative

_TABLE, _NEWTON = 256, 3


@dataclass(frozen=True)
class LogSNRDensity:
    """A density over a range of log-SNR, constant in each of K equal parts, from the data's end to the prior's.

    ``weights``: K positive numbers, the relative density of each; one is uniform. See ``learned_density``.
    """

    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"LogSNRDensity: weights must be positive numbers, at least one, found {self.weights}; a part without "
                "any would be left out of the integral"
            )

    def quantile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The share in [0, 1] of the range that lies before the quantile ``u``, and the density there; shape of u."""
        weights = torch.tensor(self.weights, device=u.device, dtype=u.dtype)
        density = weights / weights.mean()
        ends = density.cumsum(0) / len(density)
        part = torch.searchsorted(ends, u.contiguous(), right=True).clamp(max=len(density) - 1)
        share = (part + 1).to(u) / len(density) - (ends[part] - u) / density[part]
        return share, density[part]


@dataclass(frozen=True, eq=False)
class GaussianReference:
    """N(mean, std^2) for each value: numbers, or tensors that broadcast over one sample. See ``of``."""

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def __post_init__(self):
        mean, std = (torch.as_tensor(part) for part in (self.mean, self.std))
        if not bool((torch.isfinite(mean)).all()) or not bool(((std > 0) & torch.isfinite(std)).all()):
            raise ValueError(
                f"GaussianReference: mean must be finite and std positive, found mean={self.mean}, std={self.std}"
            )

    @classmethod
    def of(cls, x: Tensor, least: float = 1e-3) -> "GaussianReference":
        """The moments of each value of data ``x`` ``(N, ...)``, N > 1; no std is less than ``least``."""
        if len(x) < 2:
            raise ValueError(f"GaussianReference.of: moments need at least 2 samples, found {len(x)}")
        return cls(x.mean(0), x.std(0).clamp(min=least))

    def errors(self, x0: Tensor, eps: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """|eps - eps_ref|^2 / 2 and its expectation over eps, ``(B,)`` each, at ``log_snr`` ``(B,)``."""
        shift, variance = self._moments(x0)
        at = expand(log_snr, x0) + variance.log()
        c, b = torch.sigmoid(at), torch.exp(0.5 * expand(log_snr, x0)) * torch.sigmoid(-at)
        return _half_sum((c * eps - b * shift).square()), _half_sum(c.square() + (b * shift).square())

    def integral(self, x0: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The integral of that expectation over log-SNR from ``low`` to ``high``, ``()``; ``(B,)``."""
        shift, variance = self._moments(x0)
        upper, lower = (end + variance.log() for end in (high.to(x0), low.to(x0)))
        rest = torch.sigmoid(-lower) - torch.sigmoid(-upper)
        of_noise = torch.logaddexp(upper, 0 * upper) - torch.logaddexp(lower, 0 * lower) - rest
        return _half_sum(of_noise + shift.square() / variance * rest)

    def _moments(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 - m and v, of the shape of ``x0``."""
        mean, std = (torch.as_tensor(part, dtype=x0.dtype, device=x0.device) for part in (self.mean, self.std))
        return x0 - mean, std.square().expand_as(x0)


def times(sde: GaussianSDE, log_snr: Tensor) -> Tensor:
    """The times of float64 ``log_snr`` within ``sde.log_snr_range``, of any shape, to 1e-9 in log-SNR.

    ``sde.time`` of a general process costs hundreds of evaluations for each value: it makes a table, from which
    Newton's method starts close enough to square its error in each of three steps.
    """
    low, high = sde.log_snr_range
    grid = torch.linspace(low, high, _TABLE, device=log_snr.device, dtype=torch.float64)
    table = sde.time(grid).clamp(max=last_time(sde))
    place = (log_snr - low) / (high - low) * (_TABLE - 1)
    cell = place.floor().clamp(0, _TABLE - 2).long()
    later, earlier = table[cell], table[cell + 1]
    t = later + (place - cell) * (earlier - later)
    for _ in range(_NEWTON):
        value, slope = value_and_derivative(sde.log_snr, t)
        t = torch.minimum(torch.maximum(t - (value - log_snr) / slope, earlier), later)
    return t


def referred(reference: GaussianReference | None, x0: Tensor, eps: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.errors`` at ``log_snr`` ``()`` or ``(B,)``, and zeros without any; what to subtract, what to add."""
    if reference is None:
        return x0.new_zeros(len(x0)), x0.new_zeros(len(x0))
    return reference.errors(x0, eps, log_snr.expand(len(x0)))


def _half_sum(squares: Tensor) -> Tensor:
    return 0.5 * squares.flatten(1).sum(1)
