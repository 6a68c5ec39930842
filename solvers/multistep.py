r"""Exponential multistep methods for the probability-flow ODE: DPM-Solver++ and UniPC.

With lambda = log(alpha / sigma), half the log-SNR, the flow from t to s in the predictions of x_0 is exactly

    x_s = (sigma_s / sigma_t) x_t + alpha_s h int_0^1 e^{-h (1 - r)} x_0(lambda_t + r h) dr,    h = lambda_s - lambda_t

(Lu et al., "DPM-Solver++", 2022, eq. 8), whose linear part is no source of error. x_0 held at its value at t, this is
DDIM, alpha_s x_0 + sigma_s eps. The methods add sum_j w_j (x_0(lambda_j) - x_0(lambda_t)) over nodes that have been
called before, at r_j = (lambda_j - lambda_t) / h. In general w makes the sum right for polynomials of r,

    sum_j w_j r_j^k = alpha_s h I_k,    k = 1, 2, ...,      I_k = int_0^1 e^{-h (1 - r)} r^k dr,

and for a single other node the simpler w_1 r_1 = alpha_s (1 - e^{-h}) / 2, right to the same order (algorithm 2 of the
paper; B_2(h) = e^h - 1 of Zhao et al., "UniPC", 2023, section 3.4).

The first step is DDIM's and the second has order 2. Towards the data that costs nothing: in pure noise x_0 hardly
moves. Encoding sets out where it may: there order 3 falls towards 2 with very many steps, and UniPC's 4 towards 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.linear import LinearSampler, Weights
from solvers.path import Path

_FEW = 15
_TERMS = 24


def moments(h: Tensor, count: int) -> Tensor:
    """I_1, ..., I_count of the module's docstring, ``(..., count)``, from I_0 by h I_k = 1 - k I_(k-1)."""
    upwards, value = [], -torch.expm1(-h) / h
    for k in range(1, count + 1):
        value = (1 - k * value) / h
        upwards.append(value)
    downwards, value = [], torch.full_like(h, 1 / (_TERMS + 1))  # upwards it cancels where h is small
    for k in range(_TERMS, 0, -1):
        downwards.append(value)
        value = (1 - h * value) / k
    return torch.where(h.abs()[..., None] > 1, torch.stack(upwards, -1), torch.stack(downwards[: -count - 1 : -1], -1))


def interpolating(alpha: Tensor, h: Tensor, nodes: Tensor) -> Tensor:
    """w_j for ``nodes`` r_j of shape ``(M, J)``, and ``alpha`` = alpha_s and ``h`` of shape ``(M,)``."""
    count = nodes.shape[1]
    if count == 1:
        return alpha[:, None] * -torch.expm1(-h)[:, None] / (2 * nodes)
    powers = nodes[:, None, :] ** torch.arange(1, count + 1)[:, None]
    return torch.linalg.solve(powers, (alpha * h)[:, None] * moments(h, count))


def orders(path: Path, order: int) -> Tensor:
    """Of each step, ``(N,)``: lower while there are few nodes of finite lambda, and in the last of few steps."""
    index, finite = torch.arange(len(path.times) - 1), bool(torch.isfinite(path.log_snr[0]))
    known = (index + finite).clamp(min=1, max=order)
    left = len(index) - index if len(index) < _FEW else order
    return torch.minimum(known, torch.as_tensor(left))


def corrections(path: Path, order: Tensor, width: int, ahead: bool = False) -> Tensor:
    """w_j of all steps, ``(N, width)``, over the nodes n - 1, n - 2, ... before each and, if ``ahead``, first n + 1.

    ``order`` counts the nodes up to n; where it has fewer, and in a step to or from sigma = 0, w_j is 0.
    """
    half = 0.5 * path.log_snr
    h, out = half.diff(), torch.zeros(len(order), width, dtype=half.dtype)
    for count in range(1 if ahead else 2, int(order.max()) + 1):
        (steps,) = torch.nonzero((order == count) & torch.isfinite(h), as_tuple=True)
        if len(steps):
            offsets = torch.tensor([1] * ahead + [-j for j in range(1, count)])
            nodes = (half[steps[:, None] + offsets] - half[steps, None]) / h[steps, None]
            out[steps, : len(offsets)] = interpolating(path.alpha[1:][steps], h[steps], nodes)
    return out


def check_order(sampler: "DPMSolver | UniPC"):
    """Refuse an order that is not 1, 2 or 3."""
    if isinstance(sampler.order, bool) or sampler.order not in (1, 2, 3):
        raise ValueError(f"{type(sampler).__name__}: order must be 1, 2 or 3, found {sampler.order!r}")


def tabled(path: Path, x0: Tensor, past: Tensor) -> Weights:
    """The table with coefficients ``x0`` of the prediction at each node and ``past`` of those before it."""
    if not past.shape[1]:
        return Weights(x0, path.sigma[1:])
    return Weights(x0, path.sigma[1:], past=past.unbind(1), kept=(torch.ones_like(x0), torch.zeros_like(x0)))


@dataclass(frozen=True)
class DPMSolver(LinearSampler):
    """DPM-Solver++ with the predictions of several steps (Lu et al., 2022): 1 is DDIM, 2M, 3M; one call a step.

    Parameters
    ----------
    order: of convergence, 1, 2 or 3. The first steps have less, and the last ones of fewer than 15.

    A grid with steps that differ much in the log-SNR, as "uniform" has at its ends, costs accuracy and order.

    >>> DPMSolver(steps=20, order=3).calls
    20
    """

    stochastic: ClassVar[bool] = False
    grid: str = "log_snr"
    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_order(self)

    def plan(self, path: Path) -> Weights:
        past = corrections(path, orders(path, self.order), self.order - 1)
        return tabled(path, path.alpha[1:] - past.sum(1), past)


@dataclass(frozen=True)
class UniPC(LinearSampler):
    """A multistep predictor, and a corrector from the call that the next step makes anyway (Zhao et al., 2023), B_2.

    Parameters
    ----------
    order: p = 1, 2 or 3, of the predictor. With the corrector the order of convergence is p + 1. The first steps have
        less, and the last ones of fewer than 15.

    A step starts from the state that the predictor reached in the step before, corrected by the prediction there; all
    that is linear in the predictions, so that one table holds both. The state at t_min is the predictor's.

    >>> UniPC(steps=20, order=3).calls
    20
    """

    stochastic: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True
    grid: str = "log_snr"
    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_order(self)

    def plan(self, path: Path) -> Weights:
        order = orders(path, self.order)
        predictor = corrections(path, order, self.order - 1)
        change = corrections(path, order, self.order, ahead=True)
        change[:, 1:] -= predictor  # corrected less predicted, over x_0 at n + 1, n - 1, ... less x_0 at n
        later = path.sigma[2:, None] / path.sigma[1:-1, None] * change[:-1]  # its image at the end of the next step
        later = torch.nn.functional.pad(later, (0, 0, 1, 0))
        past = torch.nn.functional.pad(predictor, (0, 1)) + torch.cat((-later.sum(1, keepdim=True), later[:, 1:]), 1)
        return tabled(path, path.alpha[1:] - predictor.sum(1) + later[:, 0], past)
