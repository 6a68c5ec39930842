r"""The coordinates in which the probability-flow ODE is integrated.

In t the velocity of a variance-preserving process grows without bound towards the data, and that of a
variance-exploding one towards the noise. The state w = x / sqrt(alpha^2 + sigma^2) has unit variance for data of unit
variance, and with s = sigma / alpha the ODE of every Gaussian SDE is the same (Karras et al., 2022, eq. 4),

    dw/ds = (eps - s x_0) / Q^3,        Q = sqrt(1 + s^2).

As the clock, the angle u = atan(s) gives dw/du = cos(u) eps - sin(u) x_0, and v = s / (s + 1/2), with h = Q (1 - v),
gives dw/dv = ((1 - v) eps - v x_0 / 2) / (2 h^3): both are finite at both ends, for s from 0 to infinity, and the two
predictions enter without a derivative. v spends more of its steps where s is about 1/2. The third clock is ln s: many
steps near the data and few elsewhere, for fixed steps where a network is rough near the data.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sde import Prediction, ScoreField, ScoreModel
from sde.base import expand

_HALF = 0.5  # the s at the middle of the clock v


class Flow(ABC):
    """The probability-flow ODE of a model, in a state proportional to x and a clock of its own."""

    def __init__(self, model: ScoreField):
        self.model, self.sde = model, model.sde

    @abstractmethod
    def reading(self, t: float) -> float:
        """What the clock shows at time ``t``."""

    @abstractmethod
    def time(self, reading: Tensor) -> Tensor:
        """The time at which the clock shows ``reading``."""

    @abstractmethod
    def scale(self, t: float) -> float:
        """x / state at time ``t``."""

    @abstractmethod
    def slope(self, state: Tensor, reading: Tensor) -> Tensor:
        """Derivative of the state with respect to the clock."""


class UnitFlow(Flow):
    """The state w of the module's docstring; a subclass states the clock."""

    def reading(self, t: float) -> float:
        t = torch.tensor(t, dtype=torch.float64)
        return self.clock(float(self.sde.sigma(t)), float(self.sde.alpha(t)))

    def time(self, reading: Tensor) -> Tensor:
        return self.sde.time(self.log_snr(reading))

    def scale(self, t: float) -> float:
        t = torch.tensor(t, dtype=torch.float64)
        return math.hypot(float(self.sde.alpha(t)), float(self.sde.sigma(t)))

    def slope(self, state: Tensor, reading: Tensor) -> Tensor:
        t = self.time(reading.to(state))
        length = torch.hypot(self.sde.alpha(t), self.sde.sigma(t))
        return self.of_pair(self.model(expand(length, state) * state, t), reading.to(state))

    def of_pair(self, pair: Prediction, reading: Tensor) -> Tensor:
        """The slope, read off the pair."""
        of_eps, of_x0 = self.weights(reading)
        return of_eps * pair.eps - of_x0 * pair.x0

    @abstractmethod
    def clock(self, sigma: float, alpha: float) -> float:
        """What it shows at the noise level sigma / alpha."""

    @abstractmethod
    def log_snr(self, reading: Tensor) -> Tensor:
        """The log-SNR at ``reading``."""

    @abstractmethod
    def weights(self, reading: Tensor) -> tuple[Tensor, Tensor]:
        """What eps, and less what x_0 is multiplied by in the slope."""


class AngleFlow(UnitFlow):
    """The clock u = atan(s)."""

    def clock(self, sigma: float, alpha: float) -> float:
        return math.atan2(sigma, alpha)

    def log_snr(self, reading: Tensor) -> Tensor:
        cos = torch.cos(reading).clamp(min=0)  # a pi / 2 that was rounded up is past the end
        return 2 * (cos.log() - torch.sin(reading).log())

    def weights(self, reading: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(reading), torch.sin(reading)


class RatioFlow(UnitFlow):
    """The clock v = s / (s + 1/2)."""

    def clock(self, sigma: float, alpha: float) -> float:
        return sigma / (sigma + _HALF * alpha)

    def log_snr(self, reading: Tensor) -> Tensor:
        return 2 * ((1 - reading).log() - (_HALF * reading).log())

    def weights(self, reading: Tensor) -> tuple[Tensor, Tensor]:
        far, near = _HALF * reading, 1 - reading
        common = _HALF / torch.hypot(far, near) ** 3
        return common * near, common * far


class LogFlow(UnitFlow):
    """The clock ln(s); the ends must be finite."""

    def clock(self, sigma: float, alpha: float) -> float:
        if not (alpha > 0 and sigma > 0):
            raise ValueError(
                f"coordinates='log_snr' need a finite log-SNR at both ends of time, and under {self.sde} one is "
                "infinite; take coordinates='angle' or 'ratio'"
            )
        return math.log(sigma / alpha)

    def log_snr(self, reading: Tensor) -> Tensor:
        return -2 * reading

    def weights(self, reading: Tensor) -> tuple[Tensor, Tensor]:
        s = reading.exp()
        of_eps = s / torch.hypot(torch.ones_like(s), s) ** 3
        return of_eps, s * of_eps


class TimeFlow(Flow):
    """The state x and the time t themselves: dx/dt = f - (g^2 / 2) score."""

    def reading(self, t: float) -> float:
        return t

    def time(self, reading: Tensor) -> Tensor:
        return reading

    def scale(self, t: float) -> float:
        return 1.0

    def slope(self, state: Tensor, reading: Tensor) -> Tensor:
        return self.model.velocity(state, reading.to(state))


def natural(model: ScoreField) -> Flow:
    """In the angle where the process is Gaussian, and in time otherwise."""
    return (AngleFlow if isinstance(model, ScoreModel) else TimeFlow)(model)


COORDINATES = {"auto": natural, "angle": AngleFlow, "ratio": RatioFlow, "log_snr": LogFlow, "time": TimeFlow}
ANY_PROCESS = ("auto", "time")
"""Coordinates that need no pair (x_0, eps)."""


def flow(coordinates: str, model: ScoreField) -> Flow:
    """The flow of ``model`` in the named coordinates."""
    return COORDINATES[coordinates](model)


def check_coordinates(coordinates: str):
    """Refuse unknown coordinates."""
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates must be one of {', '.join(COORDINATES)}, found {coordinates!r}")
