"""One question put to every sampler alike: from this noise, with this denoiser, where does the flow end?

Peers are given y = x / alpha and D(y, s) at the noise level s = sigma / alpha, ours the model under its own process;
both see the same network or exact score. What a sampler is charged are the calls that were counted.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sde import VE, VP, GaussianSDE, ScoreModel
from sde.base import last_time
from targets import Target, flow

STARTS = {"VE": VE(sigma_min=1e-4, sigma_max=50.0), "VP": VP(t_min=1e-8)}
"""Where the flow starts: s = 50, and beta .1 to 20. At their t_min there is next to no noise."""


class Node(NamedTuple):
    """One call: the state ``y``, the level ``s``, and D(y, s)."""

    y: Tensor
    s: float
    x0: Tensor


@dataclass
class Denoiser:
    """D(y, s), counted; it keeps its last two calls, for the endings."""

    function: Callable[[Tensor, Tensor], Tensor]
    calls: int = 0
    last: tuple[Node, ...] = ()

    def __call__(self, y: Tensor, s: Tensor) -> Tensor:
        x0 = self.function(y, s)
        self.calls += 1
        self.last = (*self.last[-1:], Node(y, float(s), x0))
        return x0


@dataclass(frozen=True)
class Problem:
    """A start ``y`` ``(B, ...)`` at level ``s``, the model, and the ``reference`` without noise, in float64."""

    name: str
    model: ScoreModel
    function: Callable[[Tensor, Tensor], Tensor]
    y: Tensor
    s: float
    reference: Tensor
    seed: int = 0

    def error(self, y: Tensor) -> float:
        """RMSE per dimension; infinite for values that are not finite."""
        rmse = float((y.double() - self.reference).square().mean().sqrt())
        return rmse if math.isfinite(rmse) else math.inf


@dataclass(frozen=True)
class Plan:
    """How a method is run: its steps, its grid, the last noise level (None: the method's own), and its ending."""

    steps: int
    grid: str = "own"
    end: float | None = None
    ending: str = "own"

    def __str__(self) -> str:
        parts = (self.grid, "" if self.end is None else f"{self.end:g}", self.ending)
        return " ".join(part for part in parts if part and part != "own")


@dataclass(frozen=True)
class Method:
    """A sampler of some library: ``run(problem, plan)`` gives the samples and the number of calls."""

    library: str
    name: str
    run: Callable[[Problem, Plan], tuple[Tensor, int]]
    grids: tuple[str, ...] = ("own",)
    calls: int = 1
    """Calls in a step, for the first guess at how many steps a budget allows."""
    endings: tuple[str, ...] = ("own",)
    own_end: bool = False
    """Whether it can also end where its process does."""


class Run(NamedTuple):
    """What one run gave: the samples, the calls, and the seconds of processor time."""

    y: Tensor
    nfe: int
    seconds: float


def within(method: Method, problem: Problem, plan: Plan, budget: int) -> Run | None:
    """The run with as many steps as ``budget`` calls allow; None where not one step fits, or where it fails."""
    for steps in range(-(-budget // method.calls), 0, -1):
        try:
            begin = time.process_time()
            y, nfe = method.run(problem, replace(plan, steps=steps))
        except (RuntimeError, ValueError, IndexError, AssertionError):  # too few steps for it, or it diverged
            return None
        if nfe <= budget:
            return Run(y, nfe, time.process_time() - begin)
    return None


def ending(kind: str, nodes: tuple[Node, ...]) -> Tensor:
    """The state without noise from the last call, or the last two: y - int g dtau / 2 over tau = s^2 from 0.

    g = (y - D) / s^2 is smooth in tau near 0: constant it gives (y + D) / 2 ("half"), and linear through both calls
    ("two") a correction of that.
    """
    y, s, x0 = nodes[-1]
    half = 0.5 * (y + x0)
    if kind == "half":
        return half
    before, tau, earlier = nodes[0], s**2, nodes[0].s ** 2
    slope = ((before.y - before.x0) / earlier - (y - x0) / tau) / (earlier - tau)
    return half + 0.25 * slope * tau**2


def with_end(model: ScoreModel, s: float | None) -> ScoreModel:
    """The same model, its process ended at the noise level ``s`` (None: as it is)."""
    if s is None:
        return model
    t = model.sde.time(torch.tensor(-2 * math.log(s), dtype=torch.float64))
    other = copy.copy(model)
    other.sde = replace(model.sde, t_min=float(t))
    return other


def exact_problem(target: Target, start: str, seed: int, n: int = 256) -> Problem:
    """``n`` draws of the prior of a start, the exact score in float32, and the exact flow."""
    model = target.model(STARTS[start])
    x = model.sde.prior((n, target.means.shape[1])).sample(seed, dtype=torch.float64)
    y, s = unscaled(model.sde, x)
    return Problem(f"{target.name}, {start}", model, target.denoise(), y.float(), s, flow(target, y.float(), s), seed)


def unscaled(sde: GaussianSDE, x: Tensor) -> tuple[Tensor, float]:
    """x at the last time as y = x / alpha, and s = sigma / alpha there."""
    t = torch.tensor(last_time(sde), dtype=torch.float64)
    return x / sde.alpha(t).to(x), float(sde.sigma(t) / sde.alpha(t))


def scaled(sde: GaussianSDE, y: Tensor) -> Tensor:
    """The x at the last time for y."""
    return y * sde.alpha(torch.tensor(last_time(sde), dtype=torch.float64)).to(y)


def landed(sde: GaussianSDE, x: Tensor) -> Tensor:
    """The y of an x at t_min."""
    return x / sde.alpha(torch.tensor(sde.t_min, dtype=torch.float64)).to(x)


@dataclass
class Levels:
    """D(y, s) of a model under any process; the time of a level is looked up at its first use alone."""

    model: ScoreModel
    times: dict[float, Tensor] = field(default_factory=dict)

    def __call__(self, y: Tensor, s: Tensor) -> Tensor:
        s = torch.as_tensor(s).to(y)
        return self.model.at_level(y, torch.ones_like(s), s, t=self.time(s)).x0

    def time(self, s: Tensor) -> Tensor:
        """The model's time of the noise level ``s``."""
        if (level := float(s)) not in self.times:
            self.times[level] = self.model.sde.time(-2 * s.double().log()).to(s)
        return self.times[level]
