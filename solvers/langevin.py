r"""Langevin dynamics at a fixed time, as a corrector (Song et al., 2021, algorithms 4 and 5).

    x <- x + epsilon score + sqrt(2 epsilon) z,      epsilon = 2 (snr |z| / |score|)^2

with the norms of each sample alone, so that no sample depends on its batch, and with |z| at its root mean square, the
root of the dimension. Where the score happens to vanish that step would be unbounded; it is capped at sigma^2 / 4,
for the curvature of -log p_t never exceeds 1 / sigma^2. The step is not corrected for its size: on a Gaussian the
stationary variance is too large by about 1 / (1 - snr^2) in high dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sde.base import expand
from solvers.base import GridSampler, Sampler, Step


@dataclass(frozen=True)
class Langevin(GridSampler):
    """Langevin steps at the earlier time of each interval: alone it is annealed Langevin dynamics over the grid.

    Parameters
    ----------
    snr: signal-to-noise ratio of a step. corrections: Langevin steps at each time, one call each.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not self.snr > 0:
            raise ValueError(f"Langevin: snr must be positive, found {self.snr!r}")
        if not isinstance(self.corrections, int) or self.corrections < 0:
            raise ValueError(f"Langevin: corrections must be an integer of at least 0, found {self.corrections!r}")

    @property
    def calls_per_step(self) -> int:
        return self.corrections

    def step(self, x: Tensor, step: Step) -> Tensor:
        for _ in range(self.corrections):
            score = step.model.score(x, step.s)
            mean_square = score.square().flatten(1).mean(1)
            size = torch.minimum(2 * self.snr**2 / mean_square, step.sigma_s.square() / 4)
            x = x + expand(size, x) * score + expand((2 * size).sqrt(), x) * step.draw(x)
        return x


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Any sampler's step, then another's at the time it reached (Song et al., 2021, algorithm 1).

    ``steps``, ``grid`` and ``final`` are the predictor's.

    >>> from solvers import EulerMaruyama
    >>> PredictorCorrector(EulerMaruyama(steps=50), Langevin(snr=0.1)).steps
    50
    """

    predictor: Sampler
    corrector: Sampler

    def __post_init__(self):
        for role in ("predictor", "corrector"):
            if not isinstance(getattr(self, role), Sampler):
                raise TypeError(f"PredictorCorrector: {role} must be a Sampler, found {getattr(self, role)!r}")

    @property
    def steps(self) -> int:
        return self.predictor.steps

    @property
    def grid(self) -> str:
        return self.predictor.grid

    @property
    def final(self) -> str:
        return self.predictor.final

    @property
    def calls_per_step(self) -> int:
        return self.predictor.calls_per_step + self.corrector.calls_per_step

    def with_steps(self, steps: int) -> "PredictorCorrector":
        return PredictorCorrector(self.predictor.with_steps(steps), self.corrector)

    def step(self, x: Tensor, step: Step) -> Tensor:
        return self.corrector.step(self.predictor.step(x, step), step)
