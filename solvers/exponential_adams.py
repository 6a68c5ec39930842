r"""Exponential Adams methods for the probability-flow ODE, of an order that follows the smoothness of the score.

In y = x / alpha and s = sigma / alpha the flow is dy/ds = eps = (y - x_0) / s. For Gaussian data of standard deviation
c its solution is a constant times Q = sqrt(c^2 + s^2), so that only what data and Gaussian differ by is left to
integrate (Hochbruck and Ostermann, "Exponential integrators", 2010):

    d(y / Q) = -(s x_0 - c^2 eps) / Q  *  s / Q^2  d ln s.

c = 0 is exponential Adams-Bashforth in the predictions of x_0, c = infinity in those of eps, and c = 1, for data of
unit variance, in those of v: y / Q is then the state of a variance-preserving process, and the clock the angle atan s.

**Interpolation.** F = psi (s x_0 - c^2 eps) / Q, with psi = (1 + (s / knee)^2)^(-1/4), is interpolated in z = ln s
through the last nodes. psi takes from the first nodes, deep in the noise, a weight that a network's errors there do not
deserve; without it (knee = infinity) the errors of trained networks at the end are twice as large. In modified divided
differences (Krogh, 1969; Shampine and Gordon, 1975)

    phi_0 = F_n,      phi_j(n) = phi_(j-1)(n) - beta_(j-1)(n) phi_(j-1)(n-1):

phi_j is F_n less its extrapolation from the j nodes before, and a step adds sum_j r_j phi_j, j < order, where r_j and
beta_j depend on the grid alone. One call a step; no history but phi.

**Order.** The terms r_j phi_j fall with j as long as the score is smooth on the scale of the steps, and rise where it
is not, as a network's is sooner than an exact one. So the terms beyond the third enter with the weight

    prod_(3 <= i <= j)  1 / (1 + (1.5 e_i / e_(i-1))^4),      e_j^2 = mean square of the j-th term, over the past nodes,
                                                              each counting 0.9 of the next,

for each sample by itself: no call, no look at the host, and no sample depends on its batch.

**The end.** Near the data g = eps / s = -score alpha^2 is a smooth function of tau = s^2. From the last node, where the
method stops interpolating, y(end) = y - 1/2 integral of g dtau, with g linear in tau through the last two nodes. Where
plain denoising errs by s^2 / (2 std^2), this errs by s^6: the last node may lie far from the data ("balanced" in
``solvers.grids``), and no call is spent there.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.base import require_count
from solvers.adams import adams_table
from solvers.path import Path
from solvers.sampler import GridSampler, Step

_BASE, _GATE, _MEMORY = 3, 1.5, 0.9
_FAR, _NEAR = 2.0, 0.25


class Table(NamedTuple):
    """x_s = x0 x_0 + eps eps + before eps_(n-1) + scale sum_j r_j phi_j for all N steps, in float64."""

    x0: Tensor
    eps: Tensor
    before: Tensor
    scale: Tensor
    kept: tuple[Tensor, Tensor]
    """What x_0 and eps are multiplied by in F."""
    r: Tensor
    """``(N, K, 1, 1)``."""
    beta: Tensor
    """``(N, K - 1, 1, 1)``."""


@dataclass(frozen=True)
class ExponentialAdams(GridSampler):
    """Exponential Adams-Bashforth whose order adapts to each sample; one call a step.

    Parameters
    ----------
    order: number of terms, and the order of convergence where the score is smooth; the first steps have less.
    adaptive: whether terms beyond the third enter by the weights of the module's docstring, or in full.
    data_std: c. 0: data prediction; infinity: noise prediction.
    knee: sigma / alpha above which the interpolated function is damped; infinity: nowhere.

    ``encode`` begins with a step of DDIM, whose error is of second order in the noise at the end of it.

    >>> ExponentialAdams(steps=10).calls
    10
    """

    stochastic: ClassVar[bool] = False
    calls_per_step: ClassVar[int] = 1
    steps: int = 20
    grid: str = "balanced"
    order: int = 6
    adaptive: bool = True
    data_std: float = 1.0
    knee: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        require_count(self.order, "ExponentialAdams: order")
        if not self.data_std >= 0:
            raise ValueError(f"ExponentialAdams: data_std must be a number of at least 0, found {self.data_std!r}")
        if not self.knee > 0:
            raise ValueError(f"ExponentialAdams: knee must be a positive number, found {self.knee!r}")

    def plan(self, path: Path) -> Table:
        s, alpha, size = path.ratio, path.alpha[1:], self._size(path.ratio)
        forward = bool(path.times[0] > path.times[-1])
        end = len(s) - 2 if forward else 0  # the step that touches t_min
        adams = torch.ones_like(s[1:], dtype=torch.bool)
        adams[end] = (s[end] / s[end + 1]).log().abs() < math.log(_FAR)
        first = 0 if forward or adams[0] else 1
        r, beta = adams_table(s.log(), first, min(self.order, len(s) - 1), self._kernel)
        linear = size[1:] / size[:-1]
        x0, eps = torch.where(adams, linear, 1.0), torch.where(adams, linear * s[:-1], s[1:])  # elsewhere DDIM's
        before = torch.zeros_like(eps)
        if forward and not adams[end] and end and s[end] < _NEAR:
            eps[end], before[end] = _ending(*s[-3:])
        kept = torch.where(torch.arange(len(eps)) >= first, self._psi(s[:-1]) / size[:-1], 0.0)
        kept = s[:-1] / max(1.0, self.data_std) ** 2 * kept, -(min(1.0, self.data_std) ** 2) * kept
        return Table(alpha * x0, alpha * eps, alpha * before, alpha * size[1:], kept, torch.where(adams[:, None], r, 0.0)[..., None, None], beta[..., None, None])

    def step(self, x: Tensor, step: Step, carry: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        own = step.own
        x0, eps = step.predict(x)
        kept = torch.addcmul(own.kept[0] * x0, own.kept[1], eps).flatten(1)
        phi, energy, before = carry or (kept.new_zeros(len(own.r), *kept.shape), kept.new_zeros(()), eps)
        phi = torch.cat((kept[None], kept - (own.beta * phi[:-1]).cumsum(0)))
        weights = own.r
        if self.adaptive and len(phi) > _BASE:
            squares = (own.r * torch.linalg.vector_norm(phi, dim=2, keepdim=True)).square()
            energy = torch.add(squares, energy, alpha=_MEMORY)
            weights = torch.cat((weights.expand_as(energy)[:_BASE], weights[_BASE:] * _gates(energy)))
        x = torch.addcmul(own.x0 * x0, own.eps, eps)
        x = torch.addcmul(torch.addcmul(x, own.before, before), own.scale, (weights * phi).sum(0).view_as(x))
        return x, (phi, energy, eps)

    def _size(self, s: Tensor) -> Tensor:
        """Q, over the larger of 1 and c."""
        return torch.hypot(torch.as_tensor(min(1.0, self.data_std)), s / max(1.0, self.data_std))

    def _psi(self, s: Tensor) -> Tensor:
        return (1 + (s / self.knee).square()) ** -0.25

    def _kernel(self, z: Tensor) -> Tensor:
        """What F is integrated against; going down in z, where the flow's sign is that of dz."""
        s = z.exp()
        return -s / (self._size(s).square() * self._psi(s))


def _ending(before: Tensor, s: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What eps at the last node s and at the one before are multiplied by in y(end) = x_0 + ..., g linear in s^2."""
    d = s.square() - end.square()
    bend = d.square() / (4 * (before.square() - s.square()))
    return s - (0.5 * d + bend) / s, bend / before


def _gates(energy: Tensor) -> Tensor:
    """Weights of the terms beyond the third, ``(K - 3, ...)``, from the energies of all, ``(K, ...)``."""
    rise = energy[_BASE:] / energy[_BASE - 1 : -1].clamp(min=1e-30)
    return torch.reciprocal(1 + _GATE**4 * rise.square()).cumprod(0)
