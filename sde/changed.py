r"""One process as another: another clock, another scale of x.

All Gaussian processes of one range of log-SNR are one process seen through a clock and a scale: with x' = c(t) x the
kernel N(alpha x_0, sigma^2 I) becomes N(c alpha x_0, c^2 sigma^2 I), so that VP divided by its alpha is
variance-exploding and VE divided by sqrt(1 + sigma^2) variance-preserving (Kingma et al., 2021, section 5; Karras et
al., 2022, eq. 8). Marginals, probability-flow paths and likelihoods go over into each other: ``ScoreModel.under``
samples and evaluates a model that was trained under the one under the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sde.base import GaussianSDE

Curve = Callable[[Tensor], Tensor]


def _name(curve: Curve) -> str:
    return getattr(curve, "__name__", str(curve))


class _Changed(GaussianSDE):
    """A process around another one, ``sde``, whose parameters it does not own."""

    sde: GaussianSDE

    @property
    def cures(self) -> tuple[str, ...]:
        """Those of the inner process, which say where the parameter is."""
        return tuple(c if " of its " in c else f"{c} of its {type(self.sde).__name__}" for c in self.sde.cures)

    def _require_fixed(self) -> None:
        if not isinstance(self.sde, GaussianSDE):
            raise TypeError(f"expected a GaussianSDE such as VP(), found {type(self.sde).__name__}")
        if self.sde.learned:
            raise ValueError(
                f"{type(self).__name__} of a schedule that learns would hide its parameters from the optimizer; "
                "call sde.requires_grad_(False) on it first"
            )


@dataclass(frozen=True, repr=False)
class TimeChanged(_Changed):
    """``sde`` at the time ``clock(t)``: alpha(clock(t)), sigma(clock(t)).

    ``clock`` is a smooth, strictly increasing function of tensors, from the new time to that of ``sde``. The new ends
    are where it shows ``sde.t_min`` and ``sde.t_max``; they must lie in [0, 10^6]. Raises ``ValueError`` otherwise.

    >>> from sde import VP
    >>> TimeChanged(VP(), clock=torch.square).t_min
    0.00316...
    """

    sde: GaussianSDE
    clock: Curve

    def __post_init__(self):
        self._require_fixed()
        times = torch.linspace(self.t_min, self.t_max, 1025, dtype=torch.float64)
        if not bool((self.clock(times).diff() > 0).all()):
            raise ValueError(f"TimeChanged: clock must increase strictly from t={self.t_min:g} to t={self.t_max:g}")

    def __repr__(self) -> str:
        return f"TimeChanged({self.sde}, clock={_name(self.clock)})"

    def alpha(self, t: Tensor) -> Tensor:
        return self.sde.alpha(self.clock(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sde.sigma(self.clock(t))

    @cached_property
    def t_min(self) -> float:
        return self._when(self.sde.t_min)

    @cached_property
    def t_max(self) -> float:
        return self._when(self.sde.t_max)

    @property
    def prior_std(self) -> float:
        return self.sde.prior_std

    def _when(self, shown: float) -> float:
        """The time at which the clock shows ``shown``, by bisection."""
        low, high = 0.0, 1.0
        while self._shows(high) < shown and high < 1e6:
            high *= 2
        if not self._shows(low) <= shown <= self._shows(high):
            found = f"{self._shows(low):g} at 0 and {self._shows(high):g} at {high:g}"
            raise ValueError(f"TimeChanged: clock must show {shown:g} at some time in [0, 10^6]; it shows {found}")
        while low < (middle := 0.5 * (low + high)) < high:
            low, high = (middle, high) if self._shows(middle) < shown else (low, middle)
        return next((t for t in (low, high) if self._shows(t) == shown), low)  # else never beyond the end of sde

    def _shows(self, t: float) -> float:
        return float(self.clock(torch.tensor(t, dtype=torch.float64)))


@dataclass(frozen=True, repr=False)
class Rescaled(_Changed):
    """The process of x' = ``scale(t)`` x for x of ``sde``: scale alpha, scale sigma.

    ``scale`` is a smooth, positive function of tensors of times.

    >>> from sde import VP
    >>> float(exploding(VP()).alpha(torch.tensor(0.7)))
    1.0
    """

    sde: GaussianSDE
    scale: Curve

    def __post_init__(self):
        self._require_fixed()
        for t in (self.t_min, self.t_max):
            value = float(self.scale(torch.tensor(t, dtype=torch.float64)))
            if not 0 < value < math.inf:
                raise ValueError(f"Rescaled: scale must be positive and finite; at t={t:g} it is {value:g}")

    def __repr__(self) -> str:
        return f"Rescaled({self.sde}, scale={_name(self.scale)})"

    def alpha(self, t: Tensor) -> Tensor:
        return self.scale(t) * self.sde.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale(t) * self.sde.sigma(t)

    @property
    def t_min(self) -> float:
        return self.sde.t_min

    @property
    def t_max(self) -> float:
        return self.sde.t_max

    @property
    def prior_std(self) -> float:
        return float(self.scale(torch.tensor(self.t_max, dtype=torch.float64))) * self.sde.prior_std


def exploding(sde: GaussianSDE) -> Rescaled:
    """``sde`` in the units of the data, x / alpha: variance-exploding, with sigma / alpha as its noise level."""

    def over_alpha(t: Tensor) -> Tensor:
        return 1 / sde.alpha(t)

    return Rescaled(sde, over_alpha)


def preserving(sde: GaussianSDE) -> Rescaled:
    """``sde`` over sqrt(alpha^2 + sigma^2): variance-preserving."""

    def over_length(t: Tensor) -> Tensor:
        return 1 / torch.hypot(sde.alpha(t), sde.sigma(t))

    return Rescaled(sde, over_length)
