r"""Heun's method on the probability-flow ODE, with and without churn (Karras et al., 2022, algorithms 1 and 2).

In y = x / alpha and s = sigma / alpha the flow of every Gaussian SDE is dy = eps ds, which the trapezoidal rule takes
from node to node. Churn first raises the noise from s to s' = (1 + gamma) s,

    y' = y + sqrt(s'^2 - s^2) S_noise z,      gamma = min(S_churn / N, sqrt(2) - 1)  for S_tmin <= s <= S_tmax, else 0,

a step forward in time that needs no call, and the trapezoidal rule starts there: fresh noise in place of old, whose
errors go with it. The noise is never raised above that of the first time, beyond which a model has seen nothing.

The algorithms end at s = 0 by a step of Euler's method from the last node, x_0 as the model predicts it there: here
that is ``final="denoise"``, 2 N + 1 calls. So is the last step under a process that has no noise at t_min; the slope at
s = 0 is then called for, that all steps may be alike, and left out.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from solvers.path import Path
from solvers.sampler import GridSampler, Step


class Raised(NamedTuple):
    """The node from which a step sets out; ``noise`` is that added to y, None without churn."""

    time: Tensor
    alpha: Tensor
    change: Tensor
    """s at the end of the step less s at its start."""
    noise: Tensor | None


@dataclass(frozen=True)
class Heun(GridSampler):
    """Trapezoidal rule for d(x / alpha) = eps d(sigma / alpha): order 2, two calls a step.

    At 10 calls it is behind Euler's method and DDIM, and below 50 behind multistep methods: its steps are long.

    Parameters
    ----------
    churn: S_churn, 0 for the ODE; EDM's on ImageNet is 40. With N steps all above 0.41 N are alike.
    churn_min, churn_max: S_tmin and S_tmax, the sigma / alpha between which noise is added.
    churn_noise: S_noise, the standard deviation of that noise; EDM's 1.003 makes up for lost detail.

    >>> Heun(steps=18, final="denoise").calls  # a step more in the count of the paper, which includes the last
    37
    """

    order: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 2
    grid: str = "karras"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"Heun: churn must be a number of at least 0, found {self.churn!r}")
        if not 0 <= self.churn_min < self.churn_max:
            found = f"churn_min={self.churn_min!r}, churn_max={self.churn_max!r}"
            raise ValueError(f"Heun: 0 <= churn_min < churn_max is needed, found {found}")
        if not 0 < self.churn_noise < math.inf:
            raise ValueError(f"Heun: churn_noise must be a positive number, found {self.churn_noise!r}")

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def plan(self, path: Path) -> Raised:
        if not self.stochastic:
            return Raised(path.times[:-1], path.alpha[:-1], path.ratio.diff(), None)
        ratio, end = path.ratio[:-1], path.ratio[1:]
        within = (ratio >= self.churn_min) & (ratio <= self.churn_max)
        gamma = within.to(ratio) * min(self.churn / len(ratio), math.sqrt(2) - 1)
        raised = torch.minimum((1 + gamma) * ratio, path.ratio[0])
        moved = raised > ratio
        times = torch.where(moved, path.sde.time(-2 * raised.log()).detach(), path.times[:-1])
        node = Path(path.sde, times)
        raised = torch.where(moved, node.ratio, ratio)  # of that very time, as rounded
        return Raised(times, node.alpha, end - raised, self.churn_noise * (raised**2 - ratio**2).clamp(min=0).sqrt())

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        time, alpha, change, noise = step.own
        y = x / step.alpha_t
        if noise is not None:
            y = torch.addcmul(y, noise, step.fresh(y))
        slope = step.model(alpha * y, time).eps
        euler = torch.addcmul(y, change, slope)
        bend = step.model(step.alpha_s * euler, step.s).eps - slope
        heun = torch.addcmul(euler, change, bend, value=0.5)
        return step.alpha_s * torch.where(step.sigma_s > 0, heun, euler), None
