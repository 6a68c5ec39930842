r"""Dequantizers for models that were trained on the centres c_k = low + (k + 1/2) w of the bins.

At t_min such a model's density is a mixture of Gaussians of standard deviation s = sigma(t_min) at m c_k,
m = alpha(t_min). Uniform noise does not look like that: under VP at t_min = 1e-5, for 256 levels in [-1, 1], it costs
2.0 bits for a value that is certain and an exact score. Two that do:

``TruncatedNormal``, for the density at t_min (Zheng et al., "Improved techniques for maximum likelihood estimation for
diffusion ODEs", 2023): x = m c_k + s z, z standard normal on (-tau, tau), tau = m w / (2 s), so that x fills the bin
of its level. q(x | k) is in closed form, and P(k | x) = 1. It costs -log2 erf(tau / sqrt(2)) bits in each dimension
that is certain: .0001 at t_min = 1e-5, but .36 at 1e-4 and 1.8 at 1e-3. A large sigma(t_min) it does not rescue: mass
that has left the bin is lost.

``DiscreteDecoder``, the reconstruction term of variational diffusion models (Kingma et al., 2021):
x ~ q(x | k) = N(m c_k, s^2), and P(k | x) is the posterior over the levels under equal prior probabilities,

    P(k | x) = q(x | k) / sum_j q(x | j).

No mass is lost, but neighbours are confused: a dimension that is certain costs .0004 bits at t_min = 1e-5, .75 at 1e-4
and 2.5 at 1e-3, less with importance weighting. (``solvers.DiscretizedGaussian`` is another decoder, of a chain's last
step, whose mean the network gives.)
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from experiments.dequantization import FIRST_DRAW, Dequantizer, Drawn, inside, per_sample, uniforms
from sde import GaussianSDE, Noise

# No normal number of 32 bits is beyond 6.8; terms that lie 9 further out are below the last bit of float64.
_REACH = 6.8 + 9.2
_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _AroundCentres(Dequantizer):
    """Gaussian noise of standard deviation ``std`` around ``alpha`` times the centres of the bins."""

    levels: int
    low: float
    high: float
    std: float
    alpha: float = 1.0
    trained_on: ClassVar[str] = "centres"

    def __post_init__(self) -> None:
        self._check_bins()
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a positive number, alpha(t_min) of the process, found {self.alpha!r}.")
        least = _EPSILON * self.alpha * max(abs(self.low), abs(self.high))
        if not least <= self.std < math.inf:
            expected = f"a number of at least {least:.2g}, what float32 resolves at the ends of the range"
            raise ValueError(f"std: expected {expected}, found {self.std!r}; raise t_min (sigma_min) of the process.")

    @classmethod
    def of(cls, sde: GaussianSDE, levels: int, low: float = -1.0, high: float = 1.0) -> Self:
        """The one for a model under ``sde``."""
        t = torch.tensor(sde.t_min, dtype=torch.float64)
        return cls(levels, low, high, float(sde.sigma(t).detach()), float(sde.alpha(t).detach()))

    @property
    def spacing(self) -> float:
        """The distance between neighbouring levels in units of the noise."""
        return self.alpha * self.bin_width / self.std

    def _mean(self, k: Tensor) -> Tensor:
        return self.alpha * self.centres(k, torch.float64)

    def _log_normal(self, z: Tensor) -> Tensor:
        """Log-density of x = mean + std z under the Gaussian, nats, of the shape of ``z``."""
        return -0.5 * z.square() - math.log(self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class TruncatedNormal(_AroundCentres):
    """x = alpha c_k + std z with z truncated so that x stays in the bin of its level.

    Parameters
    ----------
    levels, low, high: the bins, in units of clean x.
    std, alpha: sigma(t_min) and alpha(t_min) of the model's process; ``TruncatedNormal.of`` reads them from it.

    Raises ``ValueError`` for bins that float32 can't tell apart, and for a ``std`` that it can't resolve.
    """

    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        mean, bins = self._mean(k), self._bins(k, self.alpha)
        z = math.sqrt(2) * torch.erfinv((2 * uniforms(k, seed, number, first) - 1) * self.mass)
        x = inside(mean + self.std * z, bins)
        # The density of the x that the model sees, in which float32 has rounded z.
        log_q = self._log_normal((x.double() - mean) / self.std) - math.log(self.mass)
        return Drawn(x, -per_sample(log_q))

    @property
    def mass(self) -> float:
        """Probability of the bin under the Gaussian that is not truncated, in one dimension."""
        return math.erf(0.5 * self.spacing / math.sqrt(2))

    @property
    def entropy(self) -> float:
        """Entropy of x given k in one dimension, nats: D times it is the mean of the log-weight."""
        tau = 0.5 * self.spacing
        edge = tau * math.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi)
        return math.log(self.std * math.sqrt(2 * math.pi * math.e) * self.mass) - edge / self.mass


@dataclass(frozen=True)
class DiscreteDecoder(_AroundCentres):
    """x = alpha c_k + std z with Gaussian z, and P(k | x) the posterior over the levels.

    Parameters and errors are those of ``TruncatedNormal``; ``DiscreteDecoder.of`` reads std and alpha from a process.
    """

    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        mean = self._mean(k)
        noise = Noise(seed, first).normal(tuple(k.shape), FIRST_DRAW + number, k.device, torch.float64)
        x = (mean + self.std * noise).float()
        z = (x.double() - mean) / self.std
        return Drawn(x, per_sample(self._log_posterior(k.long(), z) - self._log_normal(z)))

    def _log_posterior(self, k: Tensor, z: Tensor) -> Tensor:
        """log P(k | mean_k + std z), nats, of the shape of ``k``.

        Level k + m has the share exp(m h z - (m h)^2 / 2) of level k's, h the spacing: it never exceeds exp(z^2 / 2),
        so that nothing overflows, and all shares but those of the nearest levels are below the last bit.
        """
        others = torch.zeros_like(z)
        for distance in range(1, min(self.levels - 1, math.ceil(_REACH / self.spacing)) + 1):
            for m in (-distance, distance):
                apart, exists = m * self.spacing, (k + m >= 0) & (k + m < self.levels)
                others += torch.where(exists, torch.exp(apart * z - 0.5 * apart**2), 0.0)
        return -torch.log1p(others)
