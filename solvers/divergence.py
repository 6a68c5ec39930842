r"""The divergence of a vector field, exactly or by random probes, from the same forward pass as the field itself.

Reverse mode throughout: one graph, then one vector-Jacobian product per probe or per dimension. Hutchinson's estimate
E[z^T J z] = tr J (Hutchinson, 1990; Grathwohl et al., "FFJORD", 2019) has, for z of random signs and S the symmetric
part of J, the variance 2 (|S|^2 - sum of S_ii^2); for Gaussian z it is 2 |S|^2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import Noise
from sde.base import require_count

Field = Callable[[Tensor], Tensor]

_FIRST = 2**31  # probes are draws apart from those that made the samples, also under the same seed


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
    def estimates(self, products: Tensor) -> Tensor:
        """Estimates of the divergence, ``(B, E)``, from the products z^T J z, ``(P, B)``."""

    @abstractmethod
    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard error, ``(B,)`` each, of integrated estimates ``(B, E)``; None where it is unknown."""

    def along(self, field: Field, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The field at ``x`` and the estimates ``(B, E)`` of its divergence, from one forward pass."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = field(x)
        products, last = [], len(directions) - 1
        for i, z in enumerate(directions):
            (gradient,) = torch.autograd.grad(value, x, z, retain_graph=i < last, materialize_grads=True)
            products.append((gradient * z).flatten(1).sum(1))
        return value.detach(), self.estimates(torch.stack(products))


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace by one product per dimension: for small dimensions and for checks."""

    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        size = x[0].numel()
        basis = torch.eye(size, device=x.device, dtype=x.dtype)
        return basis.reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)

    def count(self, x: Tensor) -> int:
        return 1

    def estimates(self, products: Tensor) -> Tensor:
        return products.sum(0)[:, None]

    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor]:
        return estimates[:, 0], torch.zeros_like(estimates[:, 0])


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """The mean of z^T J z over random z; the probes of sample i depend on ``seed`` and i alone.

    Parameters
    ----------
    probes: how many; from two on, their spread gives the standard error.
    distribution: "rademacher" (random signs) or "gaussian".

    >>> Hutchinson(probes=4).directions(torch.zeros(2, 3)).shape
    torch.Size([4, 2, 3])
    """

    probes: int = 1
    distribution: str = "rademacher"
    seed: int = 0

    def __post_init__(self):
        require_count(self.probes, "Hutchinson: probes")
        if self.distribution not in _DISTRIBUTIONS:
            known = ", ".join(_DISTRIBUTIONS)
            raise ValueError(f"Hutchinson: distribution must be one of {known}, found {self.distribution!r}")

    def directions(self, x: Tensor, first: int = 0) -> Tensor:
        draw, noise = _DISTRIBUTIONS[self.distribution], Noise(self.seed, first)
        return torch.stack([draw(noise, tuple(x.shape), _FIRST + i, x.device, x.dtype) for i in range(self.probes)])

    def count(self, x: Tensor) -> int:
        return self.probes

    def estimates(self, products: Tensor) -> Tensor:
        return products.T

    def summary(self, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = estimates.mean(1)
        return mean, estimates.std(1) / self.probes**0.5 if self.probes > 1 else None


_DISTRIBUTIONS = {"rademacher": Noise.rademacher, "gaussian": Noise.normal}
