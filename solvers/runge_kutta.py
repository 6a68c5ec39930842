r"""The classical Runge-Kutta method on the probability-flow ODE in its regular coordinates.

With w = x / sqrt(alpha^2 + sigma^2) and u = atan(sigma / alpha) the flow is dw/du = cos(u) eps - sin(u) x_0 (see
``solvers.flow``), without a singularity at either end. A step from u to u + h calls the model at u, twice at
u + h / 2, and at u + h (Kutta, 1901):

    w + h / 6 (k_1 + 2 k_2 + 2 k_3 + k_4).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde import ScoreModel
from solvers.path import Path
from solvers.sampler import GridSampler, Step


class Node(NamedTuple):
    """A time, and alpha, sigma and sqrt(alpha^2 + sigma^2) there."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    radius: Tensor

    def slope(self, model: ScoreModel, w: Tensor) -> Tensor:
        """dw/du."""
        x0, eps = model(self.radius * w, self.time)
        return (self.alpha * eps - self.sigma * x0) / self.radius


class Nodes(NamedTuple):
    """The three nodes of a step and its length in u."""

    start: Node
    middle: Node
    end: Node
    length: Tensor


def node(path: Path) -> Node:
    """All times of a path."""
    return Node(path.times, path.alpha, path.sigma, torch.hypot(path.alpha, path.sigma))


@dataclass(frozen=True)
class RungeKutta4(GridSampler):
    """Classical Runge-Kutta steps in atan(sigma / alpha): order 4, four calls a step.

    >>> RungeKutta4(steps=10).calls
    40
    """

    order: ClassVar[int] = 4
    calls_per_step: ClassVar[int] = 4
    stochastic: ClassVar[bool] = False
    grid: str = "angle"

    def plan(self, path: Path) -> Nodes:
        angle = torch.atan2(path.sigma, path.alpha)
        middle = path.sde.time(-2 * torch.log(torch.tan(0.5 * (angle[1:] + angle[:-1])))).detach()
        start, end = (Node(*(c[part] for c in node(path))) for part in (slice(-1), slice(1, None)))
        return Nodes(start, node(Path(path.sde, middle)), end, angle.diff())

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        start, middle, end, h = step.own
        w = x / start.radius
        first = start.slope(step.model, w)
        second = middle.slope(step.model, w + 0.5 * h * first)
        third = middle.slope(step.model, w + 0.5 * h * second)
        last = end.slope(step.model, w + h * third)
        return end.radius * (w + h / 6 * (first + 2 * (second + third) + last)), None
