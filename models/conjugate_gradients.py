"""Conjugate gradients for a batch of systems (Hestenes and Stiefel, 1952), through products alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from sde.base import expand

_GONE = 1e-24  # of the first residual's square
_SHARE = 0.999  # of the variance, less than which no rounding leaves


def conjugate_gradients(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, iterations: int, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """u with M u = ``target``, sample by sample, ``(B, ...)``, and W u, for ``apply(p)`` = (M p, W p).

    M is ``variance`` I and a positive semi-definite matrix. A sample whose residual is gone stays as it is; so does one
    where M shows a direction p with p^T M p below ``variance`` |p|^2, as that of a network may: a step there would be
    wrong, and the larger the smaller p^T M p is.
    """
    u, residual, direction, combined = torch.zeros_like(target), target, target, None
    squares = first = _dot(residual, residual)
    for _ in range(iterations):
        product, by_product = apply(direction)
        curvature = _dot(direction, product)
        least = _SHARE * _dot(direction, variance * direction)
        goes_on = (squares > _GONE * first) & (curvature > 0) & (curvature >= least)
        step = expand(torch.where(goes_on, squares / torch.where(goes_on, curvature, 1), 0), target)
        u, residual = u + step * direction, residual - step * product
        share = expand(step.reshape(-1), by_product) * by_product
        combined = share if combined is None else combined + share
        found = _dot(residual, residual)
        ratio = torch.where(goes_on, found / torch.where(goes_on, squares, 1), 0)
        direction, squares = residual + expand(ratio, target) * direction, torch.where(goes_on, found, 0)
    return u, combined


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
