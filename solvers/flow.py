r"""The coordinates in which the probability-flow ODE is integrated.

In t the velocity of a variance-preserving process grows without bound towards the data, and that of a
variance-exploding one towards the noise. With the angle u = atan(sigma / alpha) as time and the state
w = x / sqrt(alpha^2 + sigma^2), of unit variance for data of unit variance, the ODE of every Gaussian SDE is the same,

    dw/du = cos(u) eps - sin(u) x_0,

finite at both ends: adaptive methods need fewer evaluations, and the two predictions enter without a derivative.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sde import ScoreField, ScoreModel
from sde.base import expand


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


class AngleFlow(Flow):
    """State w and clock u of the module's docstring."""

    def reading(self, t: float) -> float:
        return math.atan2(*(float(c) for c in self._sigma_alpha(t)))

    def time(self, reading: Tensor) -> Tensor:
        cos = torch.cos(reading).clamp(min=0)  # a pi / 2 that was rounded up is past the end
        return self.sde.time(2 * (cos.log() - torch.sin(reading).log()))

    def scale(self, t: float) -> float:
        return math.hypot(*(float(c) for c in self._sigma_alpha(t)))

    def slope(self, state: Tensor, reading: Tensor) -> Tensor:
        u = reading.to(state)
        t = self.time(u)
        x0, eps = self.model(expand(torch.hypot(self.sde.alpha(t), self.sde.sigma(t)), state) * state, t)
        return torch.cos(u) * eps - torch.sin(u) * x0

    def _sigma_alpha(self, t: float) -> tuple[Tensor, Tensor]:
        t = torch.tensor(t, dtype=torch.float64)
        return self.sde.sigma(t), self.sde.alpha(t)


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


COORDINATES = {"auto": natural, "angle": AngleFlow, "time": TimeFlow}


def flow(coordinates: str, model: ScoreField) -> Flow:
    """The flow of ``model`` in the named coordinates."""
    return COORDINATES[coordinates](model)


def check_coordinates(coordinates: str):
    """Refuse unknown coordinates."""
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates must be one of {', '.join(COORDINATES)}, found {coordinates!r}")
