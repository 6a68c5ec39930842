r"""Euler's method on the probability-flow ODE, dx/dt = alpha' x_0 + sigma' eps (Song et al., 2021, eq. 13).

With the invariant x_t = alpha x_0 + sigma eps, a step of Delta = s - t is

    x_s = (alpha + Delta alpha') x_0 + (sigma + Delta sigma') eps,

the step of Euler-Maruyama without noise, x_t + Delta [(alpha'/alpha) x_t - g^2 / 2 score], in the pair: no division by
sigma and none by alpha, so that it is finite where sigma is 0, and accurate in float32 at both ends of time.
"""

from dataclasses import dataclass
from typing import ClassVar

from solvers.linear import LinearSampler, Weights
from solvers.path import Path


@dataclass(frozen=True)
class Euler(LinearSampler):
    """Euler steps in time: order 1, one call a step; for any process there is EulerMaruyama(stochasticity=0).

    In sigma / alpha as time, with x / alpha as state, Euler's method is DDIM.

    >>> Euler(steps=50).calls
    50
    """

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def plan(self, path: Path) -> Weights:
        dt, (alpha, sigma, d_alpha, d_sigma) = path.times.diff(), (c[:-1] for c in path.coefficients)
        return Weights(alpha + dt * d_alpha, sigma + dt * d_sigma)
