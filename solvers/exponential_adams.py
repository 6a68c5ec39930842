r"""Exponential Adams methods for the probability-flow ODE, of an order that follows the smoothness of the score.

In y = x / alpha and s = sigma / alpha the flow is dy/ds = eps = (y - x_0) / s. For Gaussian data of standard deviation
c its solution is a constant times Q = sqrt(c^2 + s^2), so that only what data and Gaussian differ by is left to
integrate (Hochbruck and Ostermann, "Exponential integrators", 2010):

    d(y / Q) = -(s x_0 - c^2 eps) / Q  *  s / Q^2  d ln s.

c = 0 is exponential Adams-Bashforth in the predictions of x_0, c = infinity in those of eps, and c = 1, for data of
unit variance, in those of v: y / Q is then the state of a variance-preserving process, and the clock the angle atan s.

**Interpolation.** F = psi (s x_0 - c^2 eps) / Q, with psi = (1 + (s / knee)^2)^(-1/4), is interpolated in z = ln s
through the last nodes, in modified divided differences phi_j (``solvers.adams``). Deep in the noise an exact x_0 is
constant in s, and that of a network that predicts eps errs in proportion to s. psi, between the two, halves the errors
of such networks at the end, and costs exact scores next to nothing.

**Prediction and correction.** With u = y / Q a step from node n adds d_j r_j phi_j(n), j < order, the integral of what
has been interpolated so far (Adams and Bashforth). Once F is known at its end, the polynomial through n + 1 is better,
and the next step starts from a u that was carried from n to n + 1 by that (Adams and Moulton), a sum over the
phi_j(n + 1) that are computed anyway. F at n + 1 remains that of the predicted state, so that no call is spent on it:
UniPC's idea (Zhao et al., 2023). Fewer than 5 steps are too long for that: the error would be up to three times larger.

**Order.** phi_j is F less its extrapolation from the j nodes before: the error that order j has just made. The terms
fall with j as long as the score is smooth on the scale of the steps, and rise where it is not, as a network's is sooner
than an exact one. So from the third on they enter a prediction with the weights

    d_j = d_(j-1) / (1 + (a^2 S_j / S_(j-1))^2),      S_j = mean square of the j-th term, summed over the nodes so far,
                                                      each counting 0.9 of the next;  a = 1.25 min(1, 50 / N),

for each sample by itself: no call, no look at the host, and no sample depends on its batch. The memory matters: an
order that changes from step to step breaks the cancellation between the errors of steps, and is worse than any fixed.
The terms of a correction are small (at j = 5 and equal steps 3/160, where a prediction has 95/288): they enter in full.

On a smooth score the error falls as N^-K down to what the first steps leave, which have fewer terms than K: it is of
third order, of second without corrections, and the smaller the noisier the start.

**The end.** Near the data g = eps / s = -score alpha^2 is a smooth function of tau = s^2. From the last node, where the
method stops interpolating, y(end) = y - 1/2 integral of g dtau, with g linear in tau through the last two nodes. Where
plain denoising errs by s^2 / (2 std^2), this errs by s^6: for Gaussian data of variance v and an end without noise, by
3/16 v^-3 s^4 (s^2 / 3 + (tau_1 - s^2) / 2) of y, with tau_1 the square of the node before. So the last node may lie far
from the data ("balanced" in ``solvers.grids``), and no call is spent there. Data much narrower than s are another
matter: on a point g is in proportion to 1 / s, and of the noise s eps a part 1/2 - 1 / (4 k (k + 1)) is left, about
0.4, where k is the ratio of the last two nodes. There more steps, or a grid that goes to t_min, do better.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.base import require_count
from solvers.adams import adams_table
from solvers.path import Path
from solvers.sampler import GridSampler, Step

_MEMORY, _STRICT, _MANY, _TINY = 0.9, 1.25, 50, 1e-30
_FAR, _NEAR, _FEWEST = 2.0, 0.25, 5


class Table(NamedTuple):
    """x_s = linear (u + sum_j d_j ahead_j phi_j) + eps eps_n + before eps_(n-1) for all N steps, in float64."""

    start: Tensor
    """u = start x, where it is not carried."""
    close: Tensor
    """What the eps at a node adds to the u that was carried there; then phi_j adds back_j."""
    linear: Tensor
    eps: Tensor
    before: Tensor
    kept: tuple[Tensor, Tensor]
    """What x_0 and eps are multiplied by in F."""
    ahead: Tensor
    """Of j = 0, 1, ..., K - 1, ``(N, K, 1, 1)``."""
    back: Tensor
    beta: Tensor
    """Of j = 0, 1, ..., K - 2, ``(N, K - 1, 1, 1)``."""


class Memory(NamedTuple):
    """What a step leaves for the next."""

    u: Tensor
    """Corrected, ``(B, D)``, where D is the number of values of a sample."""
    phi: Tensor
    """Of j = 0, 1, ..., K - 2, ``(K - 1, B, D)``."""
    energy: Tensor
    """D S_j of j = 1, 2, ..., K - 1, ``(K - 1, B, 1)``."""
    eps: Tensor


@dataclass(frozen=True)
class ExponentialAdams(GridSampler):
    """Exponential Adams-Bashforth-Moulton whose order adapts to each sample; one call a step.

    Parameters
    ----------
    order: K, the number of terms, and the order of convergence where the score is smooth, until the error of the first
        steps, of a lower order, is all that is left (module's docstring).
    adaptive: whether the terms from the third on enter by the weights of the module's docstring, or in full.
    corrected: whether each step corrects the one before it, if there are at least 5. A step starts from earlier states
        then, and none may be moved in between (``PredictorCorrector``). Without, this is exponential Adams-Bashforth.
    data_std: c. 0: data prediction; infinity: noise prediction.
    knee: sigma / alpha above which the interpolated function is damped; infinity: nowhere. Noise prediction needs that,
        and no corrections: y itself is carried on then, of the size of the noise at the start.
    strictness: a, in place of 1.25 min(1, 50 / N). More is safer for single samples and less accurate for most.

    ``encode`` begins, where its first step is long, with one of DDIM, which errs by s^2 / (2 std^2) of the data; the
    correction, y + s eps / 2 with eps at its end, leaves 3 s^4 / (8 std^4). A mixture comes back to 0.17 at 20 steps,
    5e-5 at 80, 3e-6 at 320.

    >>> ExponentialAdams(steps=10).calls
    10
    """

    stochastic: ClassVar[bool] = False
    calls_per_step: ClassVar[int] = 1
    steps: int = 20
    grid: str = "balanced"
    order: int = 6
    adaptive: bool = True
    corrected: bool = True
    data_std: float = 1.0
    knee: float = 12.0
    strictness: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_count(self.order, "ExponentialAdams: order")
        for name in ("adaptive", "corrected"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ExponentialAdams: {name} must be True or False, found {getattr(self, name)!r}")
        if not self.data_std >= 0:
            raise ValueError(f"ExponentialAdams: data_std must be a number of at least 0, found {self.data_std!r}")
        if self.strictness is not None and not self.strictness >= 0:
            raise ValueError(f"ExponentialAdams: strictness must be a number of at least 0, found {self.strictness!r}")
        if not self.knee > 0:
            raise ValueError(f"ExponentialAdams: knee must be a positive number, found {self.knee!r}")
        if math.isinf(self.data_std) and (self.corrected or not math.isinf(self.knee)):
            raise ValueError(
                "ExponentialAdams: data_std=inf (noise prediction) leaves nothing for the knee to damp, and what a "
                "correction carries on is all noise; give knee=inf and corrected=False, "
                f"found knee={self.knee!r}, corrected={self.corrected!r}"
            )

    @property
    def looks_back(self) -> bool:
        return self.corrected

    def plan(self, path: Path) -> Table:
        s, alpha, forward = path.ratio, path.alpha, bool(path.times[0] > path.times[-1])
        adams, size = _by_adams(s, forward), self._size(s)
        first = int(not forward and not adams[0])  # where encode begins by DDIM, F may be infinite at its first node
        if first:
            size[0] = size[1]  # u is y over any constant there, and Q may be 0
        kept = tuple(torch.where(torch.arange(len(adams)) < first, 0.0, part) for part in self._kept(s[:-1]))
        table = adams_table(s.log(), first, max(2, self.order), self._kernel)
        used = torch.arange(table.ahead.shape[1]) < self.order
        ahead, back = torch.where(adams[:, None] & used, table.ahead, 0.0), torch.where(used, table.back, 0.0)
        eps = torch.where(adams, 0.0, s[1:] - s[:-1])  # of DDIM
        before, close = torch.zeros_like(eps), torch.zeros_like(eps)
        if first and len(eps) > 1:
            close[1] = (s[1].square() - s[0].square()) / (2 * s[1] * size[1])
        if forward and not adams[-1] and len(eps) > 1 and s[-2] < _NEAR:
            eps[-1], before[-1] = _ending(*s[-3:])
        linear = alpha[1:] * torch.where(adams, size[1:], size[:-1])
        start, eps, before = 1 / (alpha * size)[:-1], alpha[1:] * eps, alpha[1:] * before
        ahead, back, beta = (part[..., None, None] for part in (ahead, back, table.beta))
        return Table(start, close, linear, eps, before, kept, ahead, back, beta)

    def step(self, x: Tensor, step: Step, carry: Memory | None) -> tuple[Tensor, Memory]:
        own, (x0, eps) = step.own, step.predict(x)
        now = torch.addcmul(own.kept[0] * x0, own.kept[1], eps).flatten(1)  # F, which is phi_0
        u, phi, energy, before = carry or (None, now.new_zeros(len(own.beta), *now.shape), now.new_zeros(()), eps)
        phi = torch.cat((now[None], now - (own.beta * phi).cumsum(0)))
        if carry and self.corrected and self.steps >= _FEWEST:
            u = torch.addcmul(u + (own.back * phi).sum(0), own.close, eps.flatten(1))
        else:
            u = own.start * x.flatten(1)
        weights = own.ahead
        if self.adaptive:
            energy = torch.add(_energy(own.ahead[1:], phi[1:]), energy, alpha=_MEMORY)
            weights = weights * self._gates(energy)
        x = (own.linear * (u + (weights * phi).sum(0))).view_as(x)
        x = torch.addcmul(torch.addcmul(x, own.eps, eps), own.before, before)
        return x, Memory(u, phi[:-1], energy, eps)

    def _gates(self, energy: Tensor) -> Tensor:
        """d_0 = d_1 = 1, d_2, d_3, ... from S_1, S_2, S_3, ...; of shapes ``(K, B, 1)`` and ``(K - 1, B, 1)``."""
        rise = energy[1:] / energy[:-1].clamp(min=_TINY)
        strict = _STRICT * min(1.0, _MANY / self.steps) if self.strictness is None else self.strictness
        factors = torch.reciprocal(1 + strict**4 * rise.square())
        return torch.nn.functional.pad(factors, (0, 0, 0, 0, 2, 0), value=1.0).cumprod(0)

    def _kept(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """What F multiplies x_0 and eps by, over the larger of 1 and c^2."""
        psi, near, far = self._psi(s) / self._size(s), min(1.0, self.data_std), max(1.0, self.data_std)
        return psi * s / far**2, -psi * near**2

    def _size(self, s: Tensor) -> Tensor:
        """Q, over the larger of 1 and c."""
        return torch.hypot(s.new_tensor(min(1.0, self.data_std)), s / max(1.0, self.data_std))

    def _psi(self, s: Tensor) -> Tensor:
        return (1 + (s / self.knee).square()) ** -0.25

    def _kernel(self, z: Tensor) -> Tensor:
        """What F is integrated against; going down in z, where the flow's sign is that of dz."""
        s = z.exp()
        return -s / (self._size(s).square() * self._psi(s))


def _by_adams(s: Tensor, forward: bool) -> Tensor:
    """Which of the N steps are, ``(N,)``: all but that which touches t_min, if it is a long one in ln s."""
    adams, end = torch.ones(len(s) - 1, dtype=torch.bool), len(s) - 2 if forward else 0
    adams[end] = (s[end] / s[end + 1]).log().abs() < math.log(_FAR)
    return adams


def _energy(r: Tensor, phi: Tensor) -> Tensor:
    """The sum of the squares of the values of each term, ``(K - 1, B, 1)``."""
    return (r * torch.linalg.vector_norm(phi, dim=2, keepdim=True)).square()


def _ending(before: Tensor, s: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What eps at the last node s and at the one before are multiplied by in y(end) = y + ..., g linear in s^2."""
    d = s.square() - end.square()
    bend = d.square() / (4 * (before.square() - s.square()))
    return -(0.5 * d + bend) / s, bend / before
