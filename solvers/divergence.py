r"""The divergence of a vector field, exactly or by random probes, from the same forward pass as the field itself.

Reverse mode throughout: one graph, then one product J^T z per probe or per dimension; z is fixed along a path, so that
the right-hand side of an ODE stays a function. With S the symmetric part of J, S_0 = S - (tr J / D) I, and k probes:

    z of random signs     E z^T J z = tr J (Hutchinson, 1990; Grathwohl et al., "FFJORD", 2019), and the mean of k has
                          the variance 2 (|S|^2 - sum of S_ii^2) / k.
    Gaussian z            2 |S|^2 / k.
    orthogonal z          of length sqrt(D), z / sqrt(D) the columns of a Haar matrix: 2 D / (D + 2) |S_0|^2 / k times
                          (D - k) / (D - 1). D probes sum to the trace whatever the frame, so that any two have the
                          correlation -1 / (D - 1): it is sampling without replacement.
    Hutch++               tr J = tr Q^T J Q + tr (I - Q Q^T) J (I - Q Q^T), Q an orthonormal basis of J^T Omega for s
                          Gaussian columns Omega (Meyer, Musco, Musco and Woodruff, "Hutch++", 2021). The first trace
                          is taken exactly, the second by probes. Reverse mode has J^T alone, whose range serves as
                          well: a J of rank s has no second part.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde import Noise
from sde.base import require_count
from solvers.probes import DISTRIBUTIONS, columns, gaussian

Field = Callable[[Tensor], Tensor]

EXACT_UP_TO = 8
"""The number of dimensions up to which the trace is taken exactly by default."""


class Pullback(NamedTuple):
    """J^T z for the Jacobian J of ``value`` at ``x``, both ``(B, ...)``, sample by sample.

    ``graph``: the products have a graph themselves.
    """

    value: Tensor
    x: Tensor
    graph: bool

    def __call__(self, z: Tensor, keep: bool) -> Tensor:
        """Of the shape of ``z``, ``(B, ...)`` or C at a time ``(C, B, ...)``; ``keep`` the graph for others."""
        batched, keep = z.dim() > self.x.dim(), keep or self.graph
        options = dict(retain_graph=keep, create_graph=self.graph, is_grads_batched=batched, materialize_grads=True)
        # An expanded unit vector would slow the first multiplication down.
        return torch.autograd.grad(self.value, self.x, z.contiguous(), **options)[0]

    def each(self, z: Tensor, chunk: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """``chunk`` by ``chunk`` of ``z``, ``(P, B, ...)``, with its products; the last frees the graph."""
        parts = z.unbind() if chunk == 1 else z.split(chunk)
        return ((part, self(part, keep=i + 1 < len(parts))) for i, part in enumerate(parts))

    def quadratic(self, z: Tensor) -> Tensor:
        """z^T J z, ``(P, B)``."""
        return torch.stack([(part * product).flatten(1).sum(1) for part, product in self.each(z)])

    def trace(self, basis: Tensor, chunk: int) -> Tensor:
        """tr J, ``(B,)``, for ``basis`` the unit vectors in order: one entry of each product, no multiplication."""
        products = enumerate(product for _, product in self.each(basis, chunk))
        shape = (-1, len(self.x), self.x[0].numel())
        return torch.stack([product.reshape(shape).diagonal(i * chunk, 0, 2).sum(1) for i, product in products]).sum(0)


class Divergence(ABC):
    """How the trace of the Jacobian is taken."""

    @abstractmethod
    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        """Vectors of shape ``(P, B, ...)``, fixed along the whole path, for ``x`` of shape ``(B, ...)``.

        ``first`` is the number of the first sample, for data that come in parts.
        """

    @abstractmethod
    def count(self, x: Tensor) -> int:
        """E, the number of estimates."""

    @abstractmethod
    def estimates(self, pullback: Pullback, directions: Tensor) -> Tensor:
        """Estimates of the divergence, ``(B, E)``, from its own ``directions``; the last product frees the graph."""

    @abstractmethod
    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard error, ``(B,)`` each, of integrated estimates ``(B, E)``; None where it is unknown."""

    def along(self, field: Field, x: Tensor, directions: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """The field at ``x`` and the estimates ``(B, E)`` of its divergence, from one forward pass.

        With ``graph`` both have a graph, to ``x`` if it requires gradients and to whatever else the field does.
        """
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if graph else nullcontext():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            value = field(x)
        with torch.set_grad_enabled(graph):
            estimates = self.estimates(Pullback(value, x, graph), directions)
        return value if graph else value.detach(), estimates


class Estimated(Divergence):
    """Estimates whose mean is the divergence and whose spread over sqrt(E) is the standard error of the mean."""

    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        count = estimates.shape[1]
        return estimates.mean(1), estimates.std(1) / math.sqrt(count) if count > 1 else None


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace by one product per dimension: for small dimensions and for checks.

    ``chunk``: products taken at a time, by vectorization. It pays where one product leaves the device idle, as on a
    GPU with little data, and costs ``chunk`` times the memory; on a CPU one at a time is faster.
    """

    chunk: int = 1

    def __post_init__(self):
        require_count(self.chunk, "Exact: chunk")

    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        size = x[0].numel()
        basis = torch.eye(size, device=x.device, dtype=x.dtype)
        return basis.reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)

    def count(self, x: Tensor) -> int:
        return 1

    def estimates(self, pullback: Pullback, directions: Tensor) -> Tensor:
        return pullback.trace(directions, self.chunk)[:, None]

    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor]:
        return estimates[:, 0], torch.zeros_like(estimates[:, 0])


@dataclass(frozen=True)
class Hutchinson(Estimated):
    """The mean of z^T J z over random z; the probes of sample i depend on ``seed`` and i alone.

    Parameters
    ----------
    probes: how many; from two on, their spread gives the standard error.
    distribution: "rademacher" (random signs), "gaussian", or "orthogonal": the probes of one sample are orthogonal, at
        most D of them. Those depend on one another, and their spread alone would overstate the error; the estimates
        are drawn together by sqrt(1 - k / D), which makes the square of the standard error unbiased (the correction
        for a finite population; D probes are exact and say so).

    >>> Hutchinson(probes=4).directions(torch.zeros(2, 3)).shape
    torch.Size([4, 2, 3])
    """

    probes: int = 1
    distribution: str = "rademacher"
    seed: int = 0

    def __post_init__(self):
        require_count(self.probes, "Hutchinson: probes")
        if self.distribution not in DISTRIBUTIONS:
            known = ", ".join(DISTRIBUTIONS)
            raise ValueError(f"Hutchinson: distribution must be one of {known}, found {self.distribution!r}")

    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        return DISTRIBUTIONS[self.distribution].draw(Noise(self.seed, first), self.probes, x)

    def count(self, x: Tensor) -> int:
        return self.probes

    def estimates(self, pullback: Pullback, directions: Tensor) -> Tensor:
        found = pullback.quadratic(directions).T
        if not DISTRIBUTIONS[self.distribution].finite:
            return found
        share = 1 - self.probes / pullback.x[0].numel()
        return torch.lerp(found.mean(1, keepdim=True), found, math.sqrt(share))


@dataclass(frozen=True)
class HutchPlusPlus(Estimated):
    """The trace over the range of a sketch of J^T, and probes for what is left: for a Jacobian of nearly low rank.

    The residual's probes are Gaussian, projected and scaled to the length sqrt(D - s), which leaves the mean as it is
    and a multiple of the identity without error (Epperly, Tropp and Webber, "XTrace", 2024). Given the sketch they are
    independent, so that their spread gives the standard error, from two on. The sketch is a constant to gradients: the
    mean over the probes does not depend on it.

    Parameters
    ----------
    probes: products in all: s = probes // 3 for the sketch, s for the trace over its range, the others for the
        residual. At least 3, with a standard error from 4 on; s must be less than D.

    >>> HutchPlusPlus(probes=6).directions(torch.zeros(2, 5)).shape
    torch.Size([4, 2, 5])
    """

    probes: int = 6
    seed: int = 0

    def __post_init__(self):
        require_count(self.probes, "HutchPlusPlus: probes")
        if self.probes < 3:
            raise ValueError(f"HutchPlusPlus: probes must be at least 3, found {self.probes}; see Hutchinson for fewer")

    @property
    def rank(self) -> int:
        """s, the columns of the sketch."""
        return self.probes // 3

    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        if self.rank >= x[0].numel():
            raise ValueError(
                f"HutchPlusPlus: probes={self.probes} sketch {self.rank} directions, found data of {x[0].numel()} "
                f"dimensions, of which there must be more; take Exact(), which needs {x[0].numel()} products"
            )
        return gaussian(Noise(self.seed, first), self.probes - self.rank, x)

    def count(self, x: Tensor) -> int:
        return self.probes - 2 * self.rank

    def estimates(self, pullback: Pullback, directions: Tensor) -> Tensor:
        frame = self._frame(pullback, directions)
        found = pullback.quadratic(frame)
        return (found[: self.rank].sum(0) + found[self.rank :]).T

    @torch.no_grad()
    def _frame(self, pullback: Pullback, directions: Tensor) -> Tensor:
        """Q and the residual's probes, of the shape of ``directions``."""
        pull = pullback._replace(graph=False)
        sketch = torch.stack([pull(z, keep=True) for z in directions[: self.rank]])
        basis, probes = torch.linalg.qr(columns(sketch)).Q, columns(directions[self.rank :])
        left = probes - basis @ (basis.mT @ probes)
        left = left * (math.sqrt(left.shape[1] - self.rank) / torch.linalg.vector_norm(left, dim=1, keepdim=True))
        return torch.cat((basis, left), 2).permute(2, 0, 1).reshape(directions.shape)


def default_divergence(x: Tensor) -> Divergence:
    """Exact up to 8 dimensions; beyond, two random probes, the fewest that give a standard error."""
    return Exact() if x[0].numel() <= EXACT_UP_TO else Hutchinson(probes=2)
