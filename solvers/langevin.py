r"""Langevin dynamics at a fixed time, as a corrector (Song et al., 2021, algorithms 4 and 5).

    x <- x + epsilon score + sqrt(2 epsilon) z,      epsilon = 2 snr^2 (D + K) / (|score|^2 + K / sigma^2),      K = 32

with the norm of each sample alone, so that no sample depends on its batch. In high dimension D it is the step of the
paper, 2 (snr |z| / |score|)^2. In low dimension |score|^2 varies from place to place, and a step that follows it is
biased however small it is: at rest the density is p_t / epsilon, for a Gaussian 1 + 2 / D times too wide. K values of
the score of pure noise, -z / sigma, make that 1 + 2 / (D + K), and bound the step where the score vanishes. It is also
capped at sigma^2 / 4, for the curvature of -log p_t never exceeds 1 / sigma^2. The step is not corrected for its size:
on a Gaussian the stationary variance is too large by another 1 + snr^2 in high dimension.

The noise of a Langevin step is as large as the step, at t_min too: it is always added, whatever ``final`` says.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde import SDE
from sde.base import expand
from solvers.path import Path
from solvers.sampler import GridSampler, Sampler, Step

_PSEUDO_VALUES = 32


class Corrector(GridSampler):
    """A sampler whose step starts and ends at the time ``step.s``, and leaves the distribution there as it is."""

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    @abstractmethod
    def correct(self, x: Tensor, step: Step) -> Tensor:
        """The state moved at ``step.s``."""

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        return self.correct(x, step), None


@dataclass(frozen=True)
class Langevin(Corrector):
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
    def needs_pair(self) -> bool:
        return self.final == "denoise"

    @property
    def calls_per_step(self) -> int:
        return self.corrections

    def plan(self, path: Path) -> tuple[()]:
        return ()

    def correct(self, x: Tensor, step: Step) -> Tensor:
        """All corrections at ``step.s``."""
        for _ in range(self.corrections):
            score = step.model.score(x, step.s)
            size = expand(self._size(score, step.sigma_s.square()), x)
            moved = x + size * score + (2 * size).sqrt() * step.fresh(x)
            x = torch.where(step.sigma_s > 0, moved, x)  # without noise the step is 0, and -eps / sigma no number
        return x

    def _size(self, score: Tensor, variance: Tensor) -> Tensor:
        """epsilon of each sample, ``(B,)``."""
        squared = score.square().flatten(1).sum(1) + _PSEUDO_VALUES / variance
        return torch.minimum(2 * self.snr**2 * (score[0].numel() + _PSEUDO_VALUES) / squared, variance / 4)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Any sampler's step, then a corrector's at the time it reached (Song et al., 2021, algorithm 1).

    ``steps``, times and ``final`` are the predictor's.

    >>> from solvers import EulerMaruyama
    >>> PredictorCorrector(EulerMaruyama(steps=50), Langevin(snr=0.1)).steps
    50
    """

    predictor: Sampler
    corrector: Corrector

    def __post_init__(self):
        for role, kind in (("predictor", Sampler), ("corrector", Corrector)):
            if not isinstance(getattr(self, role), kind):
                found = getattr(self, role)
                raise TypeError(f"PredictorCorrector: {role} must be a {kind.__name__}, found {found!r}")
        if self.predictor.looks_back:
            raise ValueError(
                f"PredictorCorrector: a step of {type(self.predictor).__name__} starts from earlier states, which a "
                "corrector would have moved; take a predictor such as EulerMaruyama, Ancestral, DDIM or DPMSolver"
            )

    @property
    def steps(self) -> int:
        return self.predictor.steps

    @property
    def order(self) -> int:
        return self.predictor.order

    @property
    def stochastic(self) -> bool:
        return self.predictor.stochastic or self.corrector.stochastic

    @property
    def compile(self) -> bool:
        return self.predictor.compile

    @property
    def needs_pair(self) -> bool:
        return self.predictor.needs_pair or self.corrector.needs_pair

    @property
    def final(self) -> str:
        return self.predictor.final

    @property
    def calls_per_step(self) -> int:
        return self.predictor.calls_per_step + self.corrector.calls_per_step

    def times(self, sde: SDE) -> Tensor:
        return self.predictor.times(sde)

    def with_steps(self, steps: int) -> "PredictorCorrector":
        return PredictorCorrector(self.predictor.with_steps(steps), self.corrector)

    def plan(self, path: Path) -> tuple[Any, Any]:
        return self.predictor.plan(path), self.corrector.plan(path)

    def step(self, x: Tensor, step: Step, carry: Any) -> tuple[Tensor, Any]:
        mine, other = step.own
        x, carry = self.predictor.step(x, replace(step, own=mine), carry)
        return self.corrector.correct(x, replace(step, own=other)), carry
