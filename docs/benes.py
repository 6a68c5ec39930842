"""An SDE without a Gaussian kernel, whole: the Benes process dx = tanh(x) dt + dw (see docs/sde.md).

Data with a density proportional to cosh(x) N(x; 0, v) keep it, with v + t for v: the score is known at all times.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import SDE, Noise, ScoreFunction
from sde.base import expand


@dataclass(frozen=True)
class TwoHumps:
    """The density cosh(x) N(x; 0, v) exp(-v / 2), independently in every value: half N(v, v), half N(-v, v)."""

    shape: tuple[int, ...]
    v: float

    def sample(self, seed: int = 0, device=None, dtype=torch.float32) -> Tensor:
        noise = Noise(seed)
        signs = noise.rademacher(self.shape, 1, device, dtype)
        return self.v * signs + math.sqrt(self.v) * noise.normal(self.shape, 0, device, dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        log_cosh = torch.logaddexp(x, -x) - math.log(2)
        return (log_cosh - 0.5 * (self.v + x**2 / self.v + math.log(2 * math.pi * self.v))).flatten(1).sum(1)


@dataclass(frozen=True)
class Benes(SDE):
    """Everything that a solver needs: the interval, drift, diffusion, and the distribution at t_max."""

    t_min: float = 1e-3
    t_max: float = 2.0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def prior(self, shape: tuple[int, ...]) -> TwoHumps:
        return TwoHumps(tuple(shape), 0.05 + self.t_max)


def benes_model(sde: Benes) -> ScoreFunction:
    """The exact score for data of v = 0.05; a network trained by score matching would stand in its place."""
    return ScoreFunction(sde, lambda x, t: torch.tanh(x) - x / expand(0.05 + t, x))
