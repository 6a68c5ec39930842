r"""Samplers that are a table of numbers: each step is linear in what the model has predicted so far.

With the pair (x_0, eps) of the model at the current node, one tensor f kept from each of the K nodes before it, and
fresh noise z,

    x_s = a x_0 + b eps + sum_k w_k f_k + c z,         f = p x_0 + q eps,

where a, b, c, p, q and w_1..w_K depend on the grid alone. Since x_t = alpha x_0 + sigma eps, the state itself needs no
term; in the pair the formula keeps its accuracy at both ends of time.
"""

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.path import Path
from solvers.sampler import GridSampler, Step


class Weights(NamedTuple):
    """The numbers of the formula above for all N steps, each of shape ``(N,)``, in float64."""

    x0: Tensor
    eps: Tensor
    noise: Tensor | None = None
    """None: no noise is drawn."""
    past: tuple[Tensor, ...] = ()
    """w_1, w_2, ..., of the latest node first; zero where there is no such node yet."""
    kept: tuple[Tensor, Tensor] | None = None
    """p and q; None where nothing is kept."""


@dataclass(frozen=True)
class LinearSampler(GridSampler):
    """A sampler of one call a step that states its ``plan`` as ``Weights`` and nothing else."""

    @property
    def calls_per_step(self) -> int:
        return 1

    @abstractmethod
    def plan(self, path: Path) -> Weights:
        """The table for the steps of ``path``."""

    def step(self, x: Tensor, step: Step, carry: deque[Tensor] | None) -> tuple[Tensor, deque[Tensor]]:
        weights, past = step.own, deque(maxlen=len(step.own.past)) if carry is None else carry
        x0, eps = step.predict(x)
        x = torch.addcmul(weights.x0 * x0, weights.eps, eps)
        for weight, kept in zip(weights.past, past, strict=False):
            x = torch.addcmul(x, weight, kept)
        if weights.kept:
            past.appendleft(torch.addcmul(weights.kept[0] * x0, weights.kept[1], eps))
        return (x if weights.noise is None else torch.addcmul(x, weights.noise, step.draw(x))), past
