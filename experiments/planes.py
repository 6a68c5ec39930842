"""Densities in the plane, from generators of their own: all have, nearly or exactly, zero mean and unit variance.

The constants that standardize them are the distributions' own moments, and not those of a draw: a point does not
depend on how many others there are.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from experiments.dataset import Data, DataError

# Narrow, tilted and of unequal weight: isotropic or balanced components would hide errors. Close to zero mean and
# unit variance as a whole.
WEIGHTS = [0.25, 0.2, 0.2, 0.15, 0.12, 0.08]
MEANS = [[-1.2, 0.6], [1.1, 0.9], [0.2, -1.3], [-0.9, -0.9], [1.2, -0.5], [0.1, 1.6]]
DEVIATIONS = [[0.35, 0.15], [0.2, 0.4], [0.45, 0.2], [0.15, 0.3], [0.25, 0.25], [0.3, 0.1]]
CORRELATIONS = [0.8, -0.7, 0.5, 0.6, -0.85, -0.4]


def mixture2d(train: int = 20000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Data:
    """Draws from a fixed mixture of six correlated Gaussians in the plane: (2,), float32, with its exact density.

    The test split depends on `seed` and `test` alone, so that runs with more training data are compared on it.
    """
    density = _density()
    return replace(_drawn("mixture2d", partial(_draw, density), train, validation, test, seed), density=density)


def moons(train: int = 20000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Data:
    """Two interleaved half circles of radius 1 with Gaussian noise of deviation 0.1, standardized: (2,), float32."""

    def draw(size: int, generator: torch.Generator) -> Tensor:
        angle, lower = math.pi * _uniform(size, generator), _uniform(size, generator) < 0.5
        outer = torch.stack((angle.cos(), angle.sin()), dim=1)
        inner = torch.stack((1 - angle.cos(), 0.5 - angle.sin()), dim=1)
        noisy = torch.where(lower[:, None], inner, outer) + 0.1 * _normal(size, generator)
        return _standardized(noisy, (0.5, 0.25), (0.75 + 0.01, 0.5625 - 1 / math.pi + 0.01))

    return _drawn("moons", draw, train, validation, test, seed)


def checkerboard(train: int = 20000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Data:
    """Uniform on the 8 dark squares of a 4x4 board of side 2 sqrt 3, which has unit variance: (2,), float32.

    Each square has the area 3/4, so that log p = -log 6 = -1.7918 nats on them: no model can have a higher mean.
    """

    def draw(size: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(4, (size,), generator=generator)
        column = 2 * torch.randint(2, (size,), generator=generator) + row % 2
        corner = torch.stack((column, row), dim=1) - 2.0
        x = corner + torch.rand(size, 2, generator=generator, dtype=torch.float64)
        return _standardized(x, (0.0, 0.0), (4 / 3, 4 / 3))

    return _drawn("checkerboard", draw, train, validation, test, seed)


def swiss_roll(train: int = 20000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Data:
    """The spiral a (cos a, sin a) of 1.5 turns, Gaussian noise of deviation 0.5, standardized: (2,), float32.

    a is uniform on [1.5 pi, 4.5 pi], where the integrals of a cos a, a sin a and their squares are closed.
    """
    cubes = (4.5**3 - 1.5**3) * math.pi**2 / 18
    mean = (2.0, 2 / (3 * math.pi))
    variance = (cubes - 0.25 - mean[0] ** 2 + 0.25, cubes + 0.25 - mean[1] ** 2 + 0.25)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        a = math.pi * (1.5 + 3 * _uniform(size, generator))
        spiral = a[:, None] * torch.stack((a.cos(), a.sin()), dim=1)
        return _standardized(spiral + 0.5 * _normal(size, generator), mean, variance)

    return _drawn("swiss_roll", draw, train, validation, test, seed)


def _drawn(
    name: str, draw: Callable[[int, torch.Generator], Tensor], train: int, validation: int, test: int, seed: int
) -> Data:
    """Splits drawn in an order that lets the test split depend on its own size and the seed alone."""
    wanted, generator = {"test": test, "validation": validation, "train": train}, torch.Generator().manual_seed(seed)
    for split, size in wanted.items():
        if size < 1:
            raise DataError(f"data.{split}: expected at least 1 point, found {size}.")
    return Data(name, **{split: draw(size, generator) for split, size in wanted.items()})


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, 2, generator=generator, dtype=torch.float64)


def _standardized(x: Tensor, mean: tuple[float, float], variance: tuple[float, float]) -> Tensor:
    """Float32 points of mean 0 and variance 1, from the moments of their distribution."""
    return ((x - x.new_tensor(mean)) / x.new_tensor(variance).sqrt()).float()


def _density() -> dict[str, Tensor]:
    weights, means, deviations = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, MEANS, DEVIATIONS))
    correlations = torch.eye(2, dtype=torch.float64).repeat(len(weights), 1, 1)
    correlations[:, 0, 1] = correlations[:, 1, 0] = torch.tensor(CORRELATIONS, dtype=torch.float64)
    covariances = deviations[:, :, None] * correlations * deviations[:, None, :]
    return {"weights": weights, "means": means, "covariances": covariances}


def _draw(density: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    index = torch.multinomial(density["weights"], size, replacement=True, generator=generator)
    noise = torch.randn(size, 2, 1, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(density["covariances"])
    return (density["means"][index] + (factors[index] @ noise).squeeze(-1)).float()
