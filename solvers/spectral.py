r"""Quadrature, interpolation and differentiation by the polynomial through given nodes, in float64.

Nodes that crowd towards the ends of the interval, as those of Gauss and Radau do, make all three well conditioned, and
the error falls faster than any power of their number where the function is analytic (Trefethen, "Spectral methods in
Matlab", 2000; Berrut and Trefethen, "Barycentric Lagrange interpolation", 2004).
"""

import torch
from torch import Tensor


def gauss_legendre(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] (Golub and Welsch, "Calculation of Gauss quadrature rules", 1969)."""
    return _golub_welsch(torch.zeros(order, dtype=torch.float64), _off_diagonal(order))


def gauss_radau(order: int) -> tuple[Tensor, Tensor]:
    """The same with -1 as the first node (Golub, "Some modified matrix eigenvalue problems", 1973).

    >>> gauss_radau(2)
    (tensor([-1.0000,  0.3333], dtype=torch.float64), tensor([0.5000, 1.5000], dtype=torch.float64))
    """
    diagonal, off = torch.zeros(order, dtype=torch.float64), _off_diagonal(order)
    if order > 1:
        shifted = (
            torch.diag(torch.ones(order - 1, dtype=torch.float64)) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
        )
        unit = torch.zeros(order - 1, dtype=torch.float64)
        unit[-1] = off[-1].square()
        diagonal[-1] = torch.linalg.solve(shifted, unit)[-1]
    diagonal[-1] -= 1
    nodes, weights = _golub_welsch(diagonal, off)
    nodes[0] = -1  # but for rounding
    return nodes, weights


def differentiation(nodes: Tensor) -> Tensor:
    """The matrix ``(N, N)`` that takes a polynomial's values at the ``nodes`` ``(N,)`` to those of its derivative."""
    share = _barycentric(nodes)
    gaps = _gaps(nodes)
    matrix = share / share[:, None] / gaps
    matrix.fill_diagonal_(0)
    return matrix - torch.diag(matrix.sum(1))  # of a constant the derivative is exactly 0


def interpolation(nodes: Tensor, points: Tensor) -> Tensor:
    """The matrix ``(M, N)`` that takes a polynomial's values at the ``nodes`` to those at the ``points`` ``(M,)``."""
    distances = points[:, None] - nodes
    hit = distances == 0
    parts = _barycentric(nodes) / torch.where(hit, 1.0, distances)
    matrix = parts / parts.sum(1, keepdim=True)
    return torch.where(hit.any(1, keepdim=True), hit.to(matrix), matrix)


def _off_diagonal(order: int) -> Tensor:
    """That of the Jacobi matrix of Legendre's polynomials, ``(order - 1,)``."""
    k = torch.arange(1, order, dtype=torch.float64)
    return k / torch.sqrt(4 * k.square() - 1)


def _golub_welsch(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    nodes, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0].square()


def _gaps(nodes: Tensor) -> Tensor:
    """x_i - x_j, and 1 on the diagonal."""
    return (nodes[:, None] - nodes).fill_diagonal_(1)


def _barycentric(nodes: Tensor) -> Tensor:
    """The reciprocals of prod_(j != i) (x_i - x_j), up to a common factor: alone they would under- or overflow."""
    gaps = _gaps(nodes)
    logs = -gaps.abs().log().sum(1)
    return gaps.sign().prod(1) * torch.exp(logs - logs.max())
