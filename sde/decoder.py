r"""The last step of a chain for data of K known levels: a Gaussian whose mass is that of each level's bin.

    P(j) = Phi((b_j - mean) / std) - Phi((a_j - mean) / std)

over bins of equal width w that fill [low, high], the outermost open to infinity (Ho et al., 2020, eq. 13). Level j is
the bin's centre x = low + (j + 1/2) w. The paper's 256 levels at -1 + 2 j / 255 are low = -1 - 1/255,
high = 1 + 1/255; the uniform dequantizer of the same low, high and levels fills the same bins.

Variational diffusion (Kingma et al., 2021, section 3) has instead the posterior of the level given x_t alone, under
equal odds for all levels: P(j | x_t) is proportional to q(x_t | x_0 = x_j), whatever the model.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.special import erfcx

_TOLERANCE = 0.01


@dataclass(frozen=True)
class Decoder(ABC):
    """Probabilities of ``levels`` bins over [low, high], from a Gaussian about each value."""

    levels: int
    low: float = -1.0
    high: float = 1.0

    needs_prediction: ClassVar[bool] = True
    """Whether ``centre`` reads the predicted x_0."""

    def __post_init__(self):
        title = type(self).__name__
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"{title}: levels must be an integer of at least 2, found {self.levels!r}")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"{title}: expected finite low < high, found {self.low} and {self.high}")

    @property
    def width(self) -> float:
        """The width of a bin in units of x."""
        return (self.high - self.low) / self.levels

    def centres(self, k: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x of the integer levels ``k``, of any shape; what ``log_prob`` takes."""
        return (self.low + (k.double() + 0.5) * self.width).to(dtype)

    def index(self, x0: Tensor, check: bool = True) -> Tensor:
        """The levels of bin centres ``x0``, of any shape. Raises ``ValueError`` for what is no bin's centre.

        Without ``check``, for what was looked at before, no GPU has to wait.
        """
        place = (x0.double() - self.low) / self.width - 0.5
        k = place.round()
        if not check:
            return k.long()
        wrong = ~((place - k).abs() < _TOLERANCE) | (k < 0) | (k > self.levels - 1)
        if bool(wrong.any()):
            ends = [float(self.centres(torch.tensor(k), torch.float64)) for k in (0, self.levels - 1)]
            raise ValueError(
                f"x0: expected the centres of {self.levels} bins over [{self.low:g}, {self.high:g}], {ends[0]:.6g} to "
                f"{ends[1]:.6g} in steps of {self.width:.6g}; {int(wrong.sum())} values are none, such as "
                f"{float(x0[wrong][0]):.6g}; take {type(self).__name__}.centres of the integer levels, not dequantized"
            )
        return k.long()

    @abstractmethod
    def centre(self, scaled: Tensor, x0_hat: Tensor) -> Tensor:
        """Where the Gaussian is: of x_t / alpha and the predicted x_0, the one that the levels are told from."""

    @abstractmethod
    def log_prob(self, x0: Tensor, mean: Tensor, std: Tensor, check: bool = True) -> Tensor:
        """Log-probability of each value's level, nats, of the shape of ``x0`` and in float64; ``std`` broadcasts.

        ``check`` as for ``index``.
        """


@dataclass(frozen=True)
class LevelPosterior(Decoder):
    """P(j | x_t) of each value alone, for ``continuous_elbo``; it tells levels much wider than sigma / alpha at t_min.

    Its tables hold ``levels`` numbers for each value.
    """

    needs_prediction: ClassVar[bool] = False

    def centre(self, scaled: Tensor, x0_hat: Tensor | None) -> Tensor:
        return scaled

    def log_prob(self, x0: Tensor, mean: Tensor, std: Tensor, check: bool = True) -> Tensor:
        own = self.centres(self.index(x0, check), torch.float64)
        every = self.centres(torch.arange(self.levels, device=x0.device), torch.float64)
        mean, std = mean.double(), std.double()
        total = torch.logsumexp(-0.5 * ((mean[..., None] - every) / std[..., None]).square(), -1)
        return -0.5 * ((mean - own) / std).square() - total


@dataclass(frozen=True)
class DiscretizedGaussian(Decoder):
    """Probabilities of ``levels`` bins over [low, high] under a Gaussian about the predicted x_0.

    >>> decoder = DiscretizedGaussian(levels=4)
    >>> decoder.centres(torch.arange(4))
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """

    def centre(self, scaled: Tensor, x0_hat: Tensor) -> Tensor:
        return x0_hat

    def log_prob(self, x0: Tensor, mean: Tensor, std: Tensor, check: bool = True) -> Tensor:
        """Log-probability of each value's level, nats, of the shape of ``x0`` and in float64; ``std`` broadcasts.

        Values and gradients are finite however far ``mean`` lies from ``x0``.
        """
        k, mean, std = self.index(x0, check), mean.double(), std.double()
        edge = self.low + k.double() * self.width  # of an integer tensor it would be in float32
        lower, upper = (edge - mean) / std, (edge + self.width - mean) / std
        inner = _log_mass(lower, upper)
        return torch.where(k == 0, _log_phi(upper), torch.where(k == self.levels - 1, _log_phi(-lower), inner))


def _log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) for finite lower < upper."""
    # In the left tail, where log Phi keeps its digits; the normal is symmetric.
    mirrored = lower + upper > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    most = _log_phi(upper)
    return most + _log1mexp(_log_phi(lower) - most)


def _log_phi(x: Tensor) -> Tensor:
    """log Phi(x). The gradient of torch's log_ndtr loses all digits, and becomes infinite, far in the left tail."""
    left = x < -1
    far, near = torch.where(left, x, -1.0), torch.where(left, 0.0, x)
    tail = torch.log(0.5 * erfcx(-far * math.sqrt(0.5))) - 0.5 * far.square()
    return torch.where(left, tail, torch.log1p(-0.5 * torch.erfc(near * math.sqrt(0.5))))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the form that does not cancel (and a gradient without the other's NaN)."""
    small = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(small, x, -1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(torch.where(small, -1.0, x))))
