"""Random directions for the trace of a matrix: each of them z with E z z^T = I.

The probes of a sample depend on the seed and on its number alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sde import Noise

_FIRST = 2**31  # probes are draws apart from those that made the samples, also under the same seed


def columns(z: Tensor) -> Tensor:
    """``(P, B, ...)`` as matrices ``(B, D, P)``."""
    return z.flatten(2).permute(1, 2, 0)


def rademacher(noise: Noise, count: int, x: Tensor) -> Tensor:
    """Random signs, ``(count, B, ...)``, for ``x`` of shape ``(B, ...)``."""
    return torch.stack([noise.rademacher(tuple(x.shape), _FIRST + i, x.device, x.dtype) for i in range(count)])


def gaussian(noise: Noise, count: int, x: Tensor) -> Tensor:
    """Standard normal numbers, ``(count, B, ...)``, for ``x`` of shape ``(B, ...)``."""
    return torch.stack([noise.normal(tuple(x.shape), _FIRST + i, x.device, x.dtype) for i in range(count)])


def orthogonal(noise: Noise, count: int, x: Tensor) -> Tensor:
    """Columns of a Haar matrix times sqrt(D), ``(count, B, ...)``; raises ``ValueError`` for more than D of them."""
    size = x[0].numel()
    if count > size:
        raise ValueError(
            f"there are at most D orthogonal probes, found probes={count} for data of D={size} dimensions; "
            f"take Exact(), which needs {size} products, or another distribution"
        )
    q, r = torch.linalg.qr(columns(gaussian(noise, count, x.double())))
    # Only with R's diagonal positive is Q unique, and so Haar (Mezzadri, 2007) and the same on every device.
    q = q * (math.sqrt(size) * r.diagonal(dim1=1, dim2=2).sign())[:, None]
    return q.permute(2, 0, 1).reshape(count, *x.shape).to(x.dtype)


class Distribution(NamedTuple):
    """``draw``: (noise, count, x) -> probes. ``finite``: whether D probes are all that there are."""

    draw: Callable[[Noise, int, Tensor], Tensor]
    finite: bool


DISTRIBUTIONS = {
    "rademacher": Distribution(rademacher, finite=False),
    "gaussian": Distribution(gaussian, finite=False),
    "orthogonal": Distribution(orthogonal, finite=True),
}
