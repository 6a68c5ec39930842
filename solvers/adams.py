r"""Adams methods on any grid, in modified divided differences (Krogh, 1969; Shampine and Gordon, 1975).

Through the nodes z_n, z_(n-1), ... a function has Newton's polynomial sum_j F[n..n-j] prod_(i<j) (z - z_(n-i)). With

    phi_j(n) = F[n..n-j] P_j(n),      P_j(n) = prod_(1<=i<=j) (z_n - z_(n-i)),

which is F_n less its extrapolation to z_n from the j nodes before it, the next follow from the last by

    phi_0(n) = F_n,     phi_(j+1)(n) = phi_j(n) - beta_j(n) phi_j(n-1),     beta_j(n) = P_j(n) / P_j(n-1),

and the integral of F against a kernel is sum_j r_j phi_j, with r_j that of prod_(i<j) over P_j: over the step from z_n,
of Adams and Bashforth, or over the step to it, of Adams and Moulton.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.spectral import gauss_legendre

_PANELS, _POINTS = 4, 16


class AdamsTable(NamedTuple):
    """Of the N steps, in float64; terms that would need a node before the first are 0."""

    ahead: Tensor
    """r of the step from each node, ``(N, order)``."""
    back: Tensor
    """r of the step to it, ``(N, order)``; 0 at the first node."""
    beta: Tensor
    """``(N, order - 1)``."""


def adams_table(z: Tensor, first: int, order: int, kernel: Callable[[Tensor], Tensor]) -> AdamsTable:
    """The table of the N steps between the ``z``, whose nodes are ``z[first:]``; ``kernel`` is a function of z."""
    steps, terms = torch.arange(len(z) - 1), torch.arange(order)
    nodes = z[(steps[:, None] - terms).clamp(min=first)]
    known = terms <= steps[:, None] - first
    gaps = torch.where(known, nodes[:, :1] - nodes, 1.0)
    gaps[:, 0] = 1.0
    products = gaps.cumprod(1)  # P_j
    beta = products[:, :-1] / products[:, :-1].roll(1, 0)
    points, weights = _quadrature(z)
    weights = weights * kernel(points)

    def integrals(shift: int) -> Tensor:
        """Over the step from each node, or with ``shift`` 1 over the one to it."""
        distances = points.roll(shift, 0)[:, None] - nodes[:, :-1, None]
        basis = torch.cat((torch.ones_like(points)[:, None], distances), 1).cumprod(1)
        within = known & (steps[:, None] >= first + shift)
        return torch.where(within, (basis * weights.roll(shift, 0)[:, None]).sum(-1) / products, 0.0)

    return AdamsTable(integrals(0), integrals(1), torch.where(known[:, 1:], beta, 0.0))


def _quadrature(z: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights of a composite Gauss-Legendre rule for each step, ``(N, points)``."""
    nodes, weights = gauss_legendre(_POINTS)
    places = ((torch.arange(_PANELS)[:, None] + 0.5 * (1 + nodes)) / _PANELS).flatten()
    width = z.diff()[:, None]
    return z[:-1, None] + width * places, width * weights.repeat(_PANELS) / (2 * _PANELS)
