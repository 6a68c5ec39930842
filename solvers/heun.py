"""Heun's method on the probability-flow ODE (Karras et al., 2022, algorithm 1, without churn)."""

from dataclasses import dataclass

from torch import Tensor

from solvers.sampler import GridSampler, Step


@dataclass(frozen=True)
class Heun(GridSampler):
    """Trapezoidal rule for d(x / alpha) = eps d(sigma / alpha): order 2, two calls a step."""

    grid: str = "karras"
    calls_per_step = 2

    def step(self, x: Tensor, step: Step) -> Tensor:
        ratio_t, ratio_s = step.sigma_t / step.alpha_t, step.sigma_s / step.alpha_s
        y, slope = x / step.alpha_t, step.predict(x).eps
        euler = y + (ratio_s - ratio_t) * slope
        slope = 0.5 * (slope + step.model(step.alpha_s * euler, step.s).eps)
        return step.alpha_s * (y + (ratio_s - ratio_t) * slope)
