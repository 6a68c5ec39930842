r"""Euler-Maruyama on the reverse-time SDE (Anderson, 1982; Song et al., 2021, eq. 6), with any amount of noise.

For every eta >= 0 the reverse-time equation

    dx = [f - (1 + eta^2) / 2 g^2 score] dt + eta g dw

has the marginals p_t of the forward process (Song et al., 2021, appendix D; Karras et al., 2022, eq. 6): eta = 1 is the
reverse SDE, and eta = 0 the probability-flow ODE.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from solvers.path import Path
from solvers.sampler import GridSampler, Step


def require_stochasticity(value: float, title: str) -> None:
    """Refuse what is no finite number of at least 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{title}: stochasticity must be a number of at least 0, found {value!r}")


class Increments(NamedTuple):
    """What a step multiplies drift, score and noise by; ``rate`` is alpha'/alpha, or None for any drift."""

    time: Tensor
    score: Tensor
    noise: Tensor
    rate: Tensor | None


@dataclass(frozen=True)
class EulerMaruyama(GridSampler):
    """x_s = x_t - (t - s) [f - (1 + eta^2) / 2 g^2 score] + eta g sqrt(t - s) z: weak order 1; any process.

    Parameters
    ----------
    stochasticity: eta, 0 for the probability-flow ODE, 1 for the reverse SDE, or more.

    One call a step.

    >>> EulerMaruyama(steps=1000).steps
    1000
    """

    order: ClassVar[int] = 1
    calls_per_step: ClassVar[int] = 1
    stochasticity: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_stochasticity(self.stochasticity, "EulerMaruyama")

    @property
    def needs_pair(self) -> bool:
        return self.final == "denoise"

    @property
    def stochastic(self) -> bool:
        return self.stochasticity > 0

    def plan(self, path: Path) -> Increments:
        dt, g, eta = path.times.diff(), path.diffusion[:-1], self.stochasticity
        rate = None if path.rate is None else path.rate[:-1]
        return Increments(dt, -0.5 * (1 + eta**2) * dt * g.square(), eta * g * dt.abs().sqrt(), rate)

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        own, score = step.own, step.model.score(x, step.t, step.sigma_t)
        drift = step.model.sde.drift(x, step.t) if own.rate is None else own.rate * x
        x = x + own.time * drift + own.score * score
        return (torch.addcmul(x, own.noise, step.draw(x)) if self.stochastic else x), None
