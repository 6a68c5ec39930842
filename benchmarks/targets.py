"""Targets with closed-form scores, and the exact flow from noise to data that samplers are measured against.

In y = x / alpha and s = sigma / alpha every Gaussian process has one probability-flow ODE (Karras et al., 2022, eq. 4),

    dy/ds = (y - D(y, s)) / s,        D(y, s) = E[x_0 | x_0 + s eps = y],

so that a variance-exploding and a variance-preserving start differ in the first s alone. Every target is a function of
a seed, has mean 0 and (on average over its coordinates) variance 1, and lives in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from models import GaussianMixture
from sde import EDM, GaussianSDE

_END = 3e-4  # the half step from here to no noise is wrong by s^4 / (8 std^4): 8e-11 for a standard deviation of .06


@dataclass(frozen=True)
class Target:
    """A Gaussian mixture: weights ``(K,)``, means ``(K, D)``, covariances ``(K, D, D)``; float64."""

    name: str
    weights: Tensor
    means: Tensor
    covariances: Tensor

    def model(self, sde: GaussianSDE, dtype: torch.dtype = torch.float32) -> GaussianMixture:
        """The exact score under ``sde``, in ``dtype``."""
        return GaussianMixture(self.weights, self.means, self.covariances, sde).to(dtype)

    def denoise(self, dtype: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], Tensor]:
        """D(y, s) for y ``(B, D)`` and s ``()``; under EDM time is s."""
        model = self.model(EDM(t_min=1e-9, t_max=1e9), dtype)
        return lambda y, s: model(y, s).x0


def circle(seed: int) -> Target:
    """2-D: eight components on a circle; the principal standard deviations of each lie in .06 to .17."""
    generator = _generator("circle", seed)
    angle = 2 * math.pi * (torch.arange(8) + _uniform(generator, 1)) / 8
    covariances = _covariances(generator, 8, 2, 0.06, 0.17)
    return _standardized("a: circle, 2-D", torch.stack((angle.cos(), angle.sin()), 1), covariances)


def correlated(seed: int) -> Target:
    """16-D: five components, full covariances; the principal standard deviations lie in .09 to .80."""
    generator = _generator("correlated", seed)
    covariances = _covariances(generator, 5, 16, 0.09, 0.80)
    return _standardized("b: correlated, 16-D", _normal(generator, 5, 16), covariances)


def diagonal(seed: int) -> Target:
    """64-D: one Gaussian, its covariance diagonal of condition number 1000 and of mean variance 1."""
    exponents = -3 * _uniform(_generator("diagonal", seed), 64)
    exponents[0], exponents[-1] = 0, -3
    variances = 10**exponents
    variances = variances / variances.mean()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.float64)
    return Target("c: diagonal, 64-D", one, zero, torch.diag(variances)[None])


TARGETS = {"a": circle, "b": correlated, "c": diagonal}


def flow(target: Target, y: Tensor, s: float) -> Tensor:
    """Where the exact flow takes ``y`` ``(B, D)`` at the noise level ``s`` without noise; float64.

    Closed form for one diagonal Gaussian; a mixture is integrated to two tolerances that agree, or ``RuntimeError``.
    """
    if len(target.weights) == 1:
        variances = target.covariances[0].diagonal()
        return y.double() * torch.sqrt(variances / (variances + s**2))
    return converged(lambda tolerance: integrate(target.denoise(torch.float64), y.double(), s, tolerance))[0]


def converged(solve: Callable[[float], Tensor], tolerances=(1e-9, 1e-11), agree: float = 1e-7) -> tuple[Tensor, float]:
    """The finer of two solutions and the largest difference between them, which must be below ``agree``."""
    coarse, fine = (solve(tolerance) for tolerance in tolerances)
    if not (gap := float((coarse - fine).abs().max())) < agree:
        raise RuntimeError(f"the reference is not converged: tolerances {tolerances} differ by {gap:.2g} > {agree:g}")
    return fine, gap


def integrate(
    denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, s: float, tolerance: float, end: float = _END
) -> Tensor:
    """The flow from level ``s`` to ``end`` by dopri8, over ln s and in y / sqrt(1 + s^2); a half step to no noise."""

    def slope(u: Tensor, z: Tensor) -> Tensor:
        level = u.exp()
        length = torch.sqrt(1 + level**2)
        return z / length**2 - denoise(z * length, level) / length

    ends = torch.tensor((math.log(s), math.log(end)), dtype=y.dtype)
    options = {"norm": lambda error: error.abs().max()}  # one sample at a border between components sets the step
    z = odeint(slope, y / math.sqrt(1 + s**2), ends, rtol=tolerance, atol=tolerance, method="dopri8", options=options)
    y = z[-1] * math.sqrt(1 + end**2)
    return 0.5 * (y + denoise(y, ends[-1].exp()))


def _standardized(name: str, places: Tensor, covariances: Tensor) -> Target:
    """Equal weights and means at ``places``, moved and stretched for mean 0 and variance 1 of every coordinate."""
    within = covariances.diagonal(dim1=1, dim2=2).mean(0)
    spread = places - places.mean(0)
    means = spread / spread.square().mean(0).sqrt() * (1 - within).sqrt()
    weights = torch.full((len(places),), 1 / len(places), dtype=torch.float64)
    return Target(name, weights, means, covariances)


def _covariances(generator: torch.Generator, k: int, d: int, low: float, high: float) -> Tensor:
    """Random axes, and standard deviations between ``low`` and ``high``, uniform in the logarithm; both occur."""
    axes = torch.linalg.qr(_normal(generator, k, d, d)).Q
    share = _uniform(generator, k * d)
    share[0], share[-1] = 0, 1
    stds = low * (high / low) ** share.reshape(k, 1, d)
    return (axes * stds**2) @ axes.mT


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + len(name))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)
