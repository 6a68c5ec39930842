r"""Adams-Bashforth on any grid, in modified divided differences (Krogh, 1969; Shampine and Gordon, 1975).

Through the nodes z_n, z_(n-1), ... a function has Newton's polynomial sum_j F[n..n-j] prod_(i<j) (z - z_(n-i)). With

    phi_j(n) = F[n..n-j] P_j(n),      P_j(n) = prod_(1<=i<=j) (z_n - z_(n-i)),

which is F_n less its extrapolation to z_n from the j nodes before it, the next follow from the last by

    phi_0(n) = F_n,     phi_(j+1)(n) = phi_j(n) - beta_j(n) phi_j(n-1),     beta_j(n) = P_j(n) / P_j(n-1),

and the integral of F against a kernel over the next step is sum_j r_j phi_j, with r_j that of prod_(i<j) over P_j.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_PANELS, _POINTS = 4, 16


def adams_table(z: Tensor, first: int, order: int, kernel: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """r, ``(N, order)``, and beta, ``(N, order - 1)``, of the N steps between the ``z``, in float64.

    The nodes are ``z[first:]``; terms that would need others are 0. ``kernel`` is a function of z.
    """
    steps, terms = torch.arange(len(z) - 1), torch.arange(order)
    nodes = z[(steps[:, None] - terms).clamp(min=first)]
    known = terms <= steps[:, None] - first
    gaps = torch.where(known, nodes[:, :1] - nodes, 1.0)
    gaps[:, 0] = 1.0
    products = gaps.cumprod(1)  # P_j
    beta = products[:, :-1] / products[:, :-1].roll(1, 0)
    points, weights = _quadrature(z)
    basis = torch.cat((torch.ones_like(points)[:, None], points[:, None] - nodes[:, :-1, None]), 1).cumprod(1)
    r = (basis * (weights * kernel(points))[:, None]).sum(-1) / products
    return torch.where(known, r, 0.0), torch.where(known[:, 1:], beta, 0.0)


def _quadrature(z: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights of a composite Gauss-Legendre rule for each step, ``(N, points)``."""
    nodes, weights = gauss_legendre(_POINTS)
    places = ((torch.arange(_PANELS)[:, None] + 0.5 * (1 + nodes)) / _PANELS).flatten()
    width = z.diff()[:, None]
    return z[:-1, None] + width * places, width * weights.repeat(_PANELS) / (2 * _PANELS)


def gauss_legendre(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] (Golub and Welsch, "Calculation of Gauss quadrature rules", 1969)."""
    k = torch.arange(1, order, dtype=torch.float64)
    side = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return nodes, 2 * vectors[0].square()
