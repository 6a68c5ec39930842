r"""The change of log-density in one pass over fixed nodes, corrected for the error of the path.

In the state w and with the clock v of ``solvers.flow``, dw/dv = F, let S be the score of w's density. For any smooth
path w(v) from v_0 to v_1, since a density that moves with F obeys d log p = -div F - S.F + S.w' along it,

    log p_0(w(v_0)) = log p_1(w(v_1)) + integral over [v_0, v_1] of div F - S.R dv,        R = w' - F.

On the flow's own path the defect R vanishes, and this is the instantaneous change of variables. Off it the second term
undoes what the error of the path does to the first: with an exact score altogether; with a learned one to first order
in R, so that the number converges to the density of the model's flow, twice as fast in digits as the path to the flow.

Nothing has to be solved again, then. ``ExponentialAdams`` carries w through the N nodes of Gauss and Radau in v, with
one call at each, that gives F, S and div F; the path is the polynomial through the states at which the model was
called, its derivative is taken from that, and the integral is the rule's. A path of few steps is rough for a sample
that passes between two modes, and a polynomial of high order feels that everywhere: the gates of ``ExponentialAdams``
are strict here.

**Error.** Two numbers come free: the size of the defect's integral, which bounds what its second order leaves, and the
difference from the same formula on every other node, which sees what the nodes do not resolve. The larger of the two is
an estimate on the safe side: ten to a hundred times the error where both are small.

With probes for the divergence the mean over them is corrected, as above; the error of a single probe is of first
order in R, and of zero mean.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sde import Prediction, ScoreModel
from sde.base import expand, require_count
from solvers.divergence import Divergence
from solvers.exponential_adams import ExponentialAdams
from solvers.flow import RatioFlow
from solvers.path import Path
from solvers.spectral import differentiation, gauss_radau, interpolation

FEWEST = 8
_STRICT = 2.5


class Transport(NamedTuple):
    """log p_t_min(x) = log p_t_max(latent) + change, of which the mean over ``(B, E)`` is the estimate."""

    latent: Tensor
    change: Tensor


class OnePass(NamedTuple):
    """The result over all nodes, over every other one, and the integral of the defect's term, ``(B,)``."""

    whole: Transport
    half: Transport
    defect: Tensor


class Said(NamedTuple):
    """What one call says at a state w: F, S, ``(B, ...)``, estimates of div F, ``(B, E)``, and the pair."""

    slope: Tensor
    score: Tensor
    traces: Tensor
    pair: Prediction


def ask(flow: RatioFlow, w: Tensor, t: Tensor, reading: Tensor, divergence: Divergence, directions: Tensor) -> Said:
    """Call the model at ``w``, in the type of ``directions``, at time ``t`` where the clock shows ``reading``."""
    alpha, sigma, kept, graph = flow.sde.alpha(t), flow.sde.sigma(t), [], torch.is_grad_enabled()
    length = torch.hypot(alpha, sigma)

    def slope(w: Tensor) -> Tensor:
        kept.append(flow.model(expand(length, w) * w, t.to(w)))
        return flow.of_pair(kept[0], reading.to(w))

    value, traces = divergence.along(slope, w.to(directions), directions, graph)
    pair = Prediction(*(part.to(w) if graph else part.detach().to(w) for part in kept[0]))
    return Said(value, -(length / sigma) * pair.eps, traces, pair)


class Nodes(ScoreModel):
    """``model``, in double precision for the one who steps, keeping what each call says at each of the nodes."""

    def __init__(self, model: ScoreModel, readings: Tensor, divergence: Divergence, directions: Tensor):
        super().__init__(model.sde)
        self.flow, self.readings, self.divergence, self.directions = RatioFlow(model), readings, divergence, directions
        self.said: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        """The pair, in the type of ``x``."""
        w = x / torch.hypot(self.sde.alpha(t), self.sde.sigma(t))
        said = ask(self.flow, w, t, self.readings[len(self.said)], self.divergence, self.directions)
        self.said.append((w, said.slope, said.score, said.traces))
        return said.pair

    def stacked(self) -> Iterator[Tensor]:
        """States, F and S, ``(N, B, ...)``, and estimates of div F, ``(N, B, E)``, of the N calls; float64."""
        return (torch.stack(part).double() for part in zip(*self.said, strict=True))


@dataclass(frozen=True)
class Rule:
    """``steps`` nodes and weights of Gauss and Radau between two readings of the clock."""

    start: float
    end: float
    steps: int

    def nodes(self, every: int = 1) -> tuple[Tensor, Tensor]:
        """Every k-th node, and the weights of the rule through those, ``(M,)``, in float64."""
        nodes, weights = self._all
        return nodes[::every], weights @ interpolation(nodes[::every], nodes)

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        nodes, weights = gauss_radau(self.steps)
        half = 0.5 * (self.end - self.start)
        return self.start + half * (nodes + 1), half * weights


def one_pass(model: ScoreModel, x: Tensor, steps: int, divergence: Divergence, directions: Tensor) -> OnePass:
    """Carry data ``x`` ``(B, ...)`` from t_min to t_max in ``steps`` calls (module's docstring).

    It keeps three states of every sample for each step: for many samples at a time that is what bounds the memory.
    """
    flow, sde = RatioFlow(model), model.sde
    rule = Rule(flow.reading(sde.t_min), flow.reading(sde.t_max), steps)
    readings = rule.nodes()[0]
    times = flow.time(readings)
    times[0] = sde.t_min
    record = Nodes(model, readings.to(x.device), divergence, directions)
    stepper = ExponentialAdams(steps=steps - 1, strictness=_STRICT)
    last = stepper.follow(record, x.double(), Path(sde, times))
    record(last, times[-1].to(last))
    return _integrated(record, rule, *(flow.scale(t) for t in (sde.t_min, sde.t_max)))


def _integrated(record: Nodes, rule: Rule, first: float, last: float) -> OnePass:
    states, slopes, scores, traces = record.stacked()
    stretch = states[0, 0].numel() * math.log(last / first)  # the state's density is x's times scale^D

    def through(every: int) -> tuple[Transport, Tensor]:
        """By every k-th node."""
        nodes, weights = rule.nodes(every)
        end = interpolation(nodes, nodes.new_tensor([rule.end]))
        weights, end, derivative = (part.to(states) for part in (weights, end, differentiation(nodes)))
        path, kept = states[::every], slice(None, None, every)
        off = torch.tensordot(derivative, path, 1) - slopes[kept]
        defect = -torch.tensordot(weights, (scores[kept] * off).flatten(2).sum(2), 1)
        latent = last * torch.tensordot(end, path, 1)[0]
        change = torch.tensordot(weights, traces[kept], 1) + (defect + stretch)[:, None]
        return Transport(latent, change), defect

    (whole, defect), (half, _) = through(1), through(2)
    return OnePass(whole, half, defect)


def check_steps(steps: int | None) -> None:
    """Refuse too few steps."""
    require_count(steps, "method='one_pass': steps")
    if steps < FEWEST:
        raise ValueError(f"method='one_pass' needs steps >= {FEWEST}, found {steps}; 50 to 100 are usual")
