"""Heun's method on the probability-flow ODE (Karras et al., 2022, algorithm 1, without churn)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from solvers.path import Path
from solvers.sampler import GridSampler, Step


@dataclass(frozen=True)
class Heun(GridSampler):
    """Trapezoidal rule for d(x / alpha) = eps d(sigma / alpha): order 2, two calls a step."""

    order: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False
    grid: str = "karras"

    def plan(self, path: Path) -> tuple[Tensor]:
        return (path.ratio.diff(),)

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        (change,) = step.own
        y, slope = x / step.alpha_t, step.predict(x).eps
        slope = 0.5 * (slope + step.model(step.alpha_s * (y + change * slope), step.s).eps)
        return step.alpha_s * (y + change * slope), None
