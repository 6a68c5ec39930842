r"""Samples of posteriors p(x_0 | y) of examples whose truth is known: what they must be, and what they are.

Draw x_0 from the data, y = A x_0 + s_y n, and k samples of the exact p(x_0 | y). Then the truth and the samples are
k + 1 draws of one distribution, of which follows, whatever that is:

    misfit     y - A x is, for a sample as for the truth, N(0, s_y^2): its root mean square is s_y
    error      of one sample has twice the mean square of that of the exact mean, the mean of k samples 1 + 1/k times:
               the ratio of their RMSEs is sqrt(2 k / (k + 1)). A larger one tells samples too wide, a smaller one too
               narrow or a mean that is off
    coverage   the truth lies between the least and the greatest of k samples with probability (k - 1) / (k + 1)

The pixels of one example hang together, so that standard errors are over the examples alone. Error and coverage are of
the values that no observation depends on, where there are some, as behind a mask; else of all.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.table_cells import table
from models import GaussianMixture, LinearOperator
from sde import VP


class Value(NamedTuple):
    """A mean over examples; ``stderr`` is None of one example alone. expected: of exact posteriors, where known."""

    value: float
    stderr: float | None = None
    expected: float | None = None


@dataclass(frozen=True, eq=False)
class Posteriors:
    """k samples for each of N examples.

    Parameters
    ----------
    operator, noise_std: A and s_y. truth: x_0, ``(N, *shape)``. observation: y, ``(N, *observed)``.
    samples: ``(N, k, *shape)``. average: the mean of training data, ``(*shape)``: what to guess without any y.
    density: of the data, where it is known (``Data.density``).
    """

    operator: LinearOperator
    noise_std: float
    truth: Tensor
    observation: Tensor
    samples: Tensor
    average: Tensor
    density: dict[str, Tensor] | None = None

    @cached_property
    def mean(self) -> Tensor:
        """Of the samples, ``(N, *shape)``."""
        return self.samples.mean(dim=1)

    @cached_property
    def std(self) -> Tensor:
        """Of the samples, ``(N, *shape)``."""
        return self.samples.std(dim=1)

    @cached_property
    def hidden(self) -> Tensor:
        """Values of x that no observation depends on, or all where there are none; bool ``(*shape)``."""
        unseen = (self.operator.adjoint(self._seen[None]) == 0)[0]
        return unseen if bool(unseen.any()) else torch.ones_like(unseen)

    @cached_property
    def _seen(self) -> Tensor:
        """Random numbers where an observation depends on x, 0 where none does; ``(*observed)``."""
        return self.operator.probe()

    @cached_property
    def misfit(self) -> Value:
        """Root mean square of y - A x of the samples."""
        k, seen = self.samples.shape[1], self._seen != 0
        found = self.operator(self.samples.flatten(0, 1).double()).unflatten(0, (-1, k))
        squares = (self.observation[:, None].double() - found).square()[:, :, seen]
        return _root(squares.flatten(1).mean(1), self.noise_std)

    @cached_property
    def errors(self) -> dict[str, Value]:
        """Root mean squares of the distance to the truth, by what is guessed."""
        k, truth = self.samples.shape[1], self.truth.double()
        guesses = {
            "mean of the samples": self.mean[:, None],
            "one sample": self.samples,
            "average of the data": self.average.expand_as(truth)[:, None],
        }
        found = {
            name: _root((guess.double() - truth[:, None]).square()[:, :, self.hidden].flatten(1).mean(1))
            for name, guess in guesses.items()
        }
        of_mean, expected = found["mean of the samples"].value, (2 * k / (k + 1)) ** 0.5
        return found | {"one sample": found["one sample"]._replace(expected=expected * of_mean)}

    @cached_property
    def coverage(self) -> Value:
        """The share of values of the truth between the least and the greatest of the samples'."""
        k, (low, high) = self.samples.shape[1], self.samples.aminmax(dim=1)
        inside = ((self.truth > low) & (self.truth < high))[:, self.hidden].double().mean(1)
        return _mean(inside, (k - 1) / (k + 1))

    @cached_property
    def exact(self) -> Value | None:
        """Of a known density: the RMS distance of the samples' mean to that of the exact posterior.

        Expected is what k samples of the exact posterior have.
        """
        if self.density is None:
            return None
        means, variances = zip(*(self._exact(y) for y in self.observation), strict=True)
        squares = (self.mean.flatten(1).double() - torch.stack(means)).square().mean(1)
        return _root(squares, (torch.stack(variances).mean().item() / self.samples.shape[1]) ** 0.5)

    def _exact(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and variances ``(D,)`` of the exact posterior."""
        seen, size = self._seen.flatten() != 0, self.truth[0].numel()
        columns = self.operator(torch.eye(size, dtype=torch.float64).reshape(size, *self.operator.shape))
        matrix = columns.flatten(1).mT[seen]
        found = GaussianMixture(**self.density, sde=VP()).given(matrix, y.flatten().double()[seen], self.noise_std)
        shares = found.log_weights.exp()
        mean = shares @ found.means
        within = (found.axes.square() * found.variances[:, None]).sum(-1)
        return mean, shares @ (within + (found.means - mean).square())

    def values(self) -> dict[str, Value]:
        """All numbers, by name."""
        found = {"misfit of the samples": self.misfit}
        found |= {f"error of the {name}".replace("the one", "one"): value for name, value in self.errors.items()}
        found |= {"truth within the samples": self.coverage}
        return found | ({"distance to the exact mean": self.exact} if self.exact else {})

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        found = {name.replace(" ", "_"): value._asdict() for name, value in self.values().items()}
        sizes = {"examples": len(self.truth), "samples_per_example": self.samples.shape[1]}
        return sizes | {"values_judged": int(self.hidden.sum()), "noise_std": self.noise_std} | found

    def __str__(self) -> str:
        cells = ((name, *map(_shown, value)) for name, value in self.values().items())
        return table(("RMS in units of x, and a share", "found", "standard error", "of exact posteriors"), [*cells])


def _mean(values: Tensor, expected: float | None = None) -> Value:
    """Of one number for each example, ``(N,)``."""
    n = len(values)
    return Value(values.mean().item(), values.std().item() / n**0.5 if n > 1 else None, expected)


def _root(squares: Tensor, expected: float | None = None) -> Value:
    """The root of a mean of squares ``(N,)``, its standard error by the delta method: d sqrt(m) = dm / (2 sqrt(m))."""
    mean = _mean(squares)
    root = mean.value**0.5
    return Value(root, mean.stderr / (2 * root) if mean.stderr is not None and root else mean.stderr, expected)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
