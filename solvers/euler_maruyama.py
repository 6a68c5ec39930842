"""Euler-Maruyama on the reverse-time SDE (Anderson, 1982; Song et al., 2021, eq. 6)."""

from dataclasses import dataclass

from torch import Tensor

from solvers.sampler import GridSampler, Step


@dataclass(frozen=True)
class EulerMaruyama(GridSampler):
    """x_s = x_t - (t - s) [f - g^2 score] + g sqrt(t - s) z: weak order 1, one call a step; any process.

    >>> EulerMaruyama(steps=1000).steps
    1000
    """

    calls_per_step = 1

    @property
    def needs_pair(self) -> bool:
        return self.final == "denoise"

    def step(self, x: Tensor, step: Step) -> Tensor:
        sde, dt = step.model.sde, step.t - step.s
        g = sde.diffusion(step.t)
        reverse_drift = sde.drift(x, step.t) - g.square() * step.model.score(x, step.t)
        return x - dt * reverse_drift + g * dt.sqrt() * step.draw(x)
