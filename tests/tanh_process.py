"""A process that is not affine, and yet has its marginals, scores and densities in closed form.

The Benes process dx = g^2 tanh(x) dt + g dw (Benes, 1981), in every coordinate. With tau the integral of g^2, its
kernel is N(x; x_0, tau) cosh(x) / cosh(x_0) exp(-tau / 2). Data of density proportional to cosh(x) N(x; m, v) keep that
form with V = v + tau for v: two Gaussians N(m +- V, V) of weights exp(+-m) / (2 cosh m).
"""

import math
from dataclasses import dataclass

import torch

from sde import SDE, Noise, ScoreFunction
from sde.base import expand

M, V = 0.3, 0.05


@dataclass(frozen=True)
class Humps:
    """The density proportional to cosh(x) N(x; m, variance), independently in every value."""

    shape: tuple
    variance: float

    def sample(self, seed=0, device=None, dtype=torch.float32):
        uniform = (Noise(seed).words(self.shape, 1, device) + 0.5) * 2.0**-32
        sign = torch.where(uniform < math.exp(M) / (2 * math.cosh(M)), 1.0, -1.0).to(dtype)
        return M + sign * self.variance + math.sqrt(self.variance) * Noise(seed).normal(self.shape, 0, device, dtype)

    def log_prob(self, x):
        normal = -0.5 * (x - M) ** 2 / self.variance - 0.5 * math.log(2 * math.pi * self.variance)
        log_cosh = x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)
        return (log_cosh - self.variance / 2 - math.log(math.cosh(M)) + normal).flatten(1).sum(1)

    def moments(self):
        """Mean, variance, and the share of positive values."""
        mean = M + self.variance * math.tanh(M)
        share = math.exp(M) / (2 * math.cosh(M))
        positive = [0.5 * math.erfc(-(M + s * self.variance) / math.sqrt(2 * self.variance)) for s in (1, -1)]
        variance = self.variance + self.variance**2 / math.cosh(M) ** 2
        return mean, variance, share * positive[0] + (1 - share) * positive[1]


@dataclass(frozen=True)
class Benes(SDE):
    """g(t)^2 = 1 + t: the diffusion depends on time, so that a forgotten factor shows."""

    t_min: float = 1e-3
    t_max: float = 1.5

    def drift(self, x, t):
        return expand(1 + t, x) * torch.tanh(x)

    def diffusion(self, t):
        return (1 + t).sqrt()

    def variance(self, t):
        """V at the float or tensor t."""
        return V + t + t**2 / 2

    def prior(self, shape):
        return Humps(tuple(shape), self.variance(self.t_max))

    def data(self, shape, t=0.0):
        """The distribution at t."""
        return Humps(tuple(shape), self.variance(t))


def exact_model(sde):
    """The closed-form score of p_t."""
    return ScoreFunction(sde, lambda x, t: torch.tanh(x) - (x - M) / expand(sde.variance(t), x))
