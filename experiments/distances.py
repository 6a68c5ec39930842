"""Distances between two sets of examples: sliced Wasserstein, energy, maximum mean discrepancy, Frechet, kernel.

For X, X' ~ P (the sampler) and Y, Y' ~ Q (the data), independent:

    sliced W2     (mean over directions theta of W2(theta.X, theta.Y)^2)^(1/2)         Bonneel et al. 2015
    energy        2 E|X - Y| - E|X - X'| - E|Y - Y'|                                   Szekely and Rizzo 2013
    MMD^2         E k(X, X') - 2 E k(X, Y) + E k(Y, Y')                                Gretton et al. 2012
    Frechet       |mu_P - mu_Q|^2 + tr(S_P + S_Q - 2 (S_P^(1/2) S_Q S_P^(1/2))^(1/2))   Heusel et al. 2017
    kernel        MMD^2 with k(x, y) = (x.y / D + 1)^3                                 Binkowski et al. 2018

The energy distance is an MMD^2 too, with k = -|x - y|. All three are computed as U-statistics, without the pairs of an
example with itself, and so have no bias: for P = Q they are 0 on average, and negative as often as not. From the sums
of k over pairs of groups follows the value without any of the groups.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.jackknife import Groups
from experiments.metrics import common_grid, directions
from experiments.quality import Column, Metric, Recomputed

_NUMBERS = 2**22  # of one piece of a matrix between two sets, 32 MiB
_MEDIAN_OF = 2000  # reference examples


def pieces(n: int, m: int) -> Iterator[slice]:
    """Rows of an (n, m) matrix, so many at a time that a piece of it fits into the memory."""
    size = max(1, _NUMBERS // m)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for (N, D) and (M, D), float64: (N, M), right to some 1e-15 (|a_i|^2 + |b_j|^2) around b's mean."""
    centre = b.mean(dim=0)
    a, b = a - centre, b - centre
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


@dataclass(frozen=True)
class SlicedW2(Metric):
    """``metrics.sliced_w2``, in units of x. projections, seed: the number of directions, and what draws them."""

    columns: ClassVar = (Column("sliced_w2", "sliced W2"),)
    projections: int = 256
    seed: int = 0

    @property
    def fewest(self) -> int:
        return 1

    def prepare(self, reference: Tensor, groups: Groups) -> list[Tensor]:
        return self._quantiles(reference, groups)

    def leave_out(self, x: Tensor, groups: Groups, prepared: list[Tensor]) -> Tensor:
        own = self._quantiles(x, groups)
        pairs = [(part, prepared[0]) for part in own] + [(own[0], part) for part in prepared[1:]]
        return torch.stack([_sliced(*pair) for pair in pairs])[:, None]

    def _quantiles(self, x: Tensor, groups: Groups) -> list[Tensor]:
        """The sorted projections (P, N) of all, and without each group: what is left stays sorted."""
        theta = directions(x.shape[1], self.projections, self.seed)
        ordered, index = (x @ theta).T.sort(dim=1)
        label = groups.label[index]
        return [ordered, *(ordered[label != g].view(len(ordered), -1) for g in groups.left_out)]


def _sliced(a: Tensor, b: Tensor) -> Tensor:
    """Sliced W2 from the quantile functions (P, N) and (P, M)."""
    if a.shape == b.shape:
        return (a - b).square().mean().sqrt()
    length, i, j = common_grid(a.shape[1], b.shape[1])
    return ((a[:, i] - b[:, j]).square() @ length).mean().sqrt()


class Pairs(NamedTuple):
    """A reference set, what its kernel needs to know, and the sums of the kernel over pairs of its groups (G, G)."""

    reference: Tensor
    groups: Groups
    scale: float
    sums: Tensor


class KernelMetric(Metric):
    """The unbiased MMD^2 of a kernel: mean over pairs of different x, minus twice that over (x, y), plus that of y."""

    def prepare(self, reference: Tensor, groups: Groups) -> Pairs:
        scale = self.scale(reference)
        return Pairs(reference, groups, scale, self._sums(reference, groups, reference, groups, scale, same=True))

    def leave_out(self, x: Tensor, groups: Groups, prepared: Pairs) -> Tensor:
        y, others, scale, sums = prepared
        own = _mean_of_pairs(self._sums(x, groups, x, groups, scale, same=True), groups)
        real = _mean_of_pairs(sums, others)
        across, counts = self._sums(x, groups, y, others, scale), groups.sizes[:, None] * others.sizes
        without_x = _left_out(across, groups) / _left_out(counts, groups)
        without_y = _left_out(across.T, others) / _left_out(counts.T, others)
        return torch.cat([own + real[0] - 2 * without_x, own[0] + real[1:] - 2 * without_y[1:]])[:, None]

    @abstractmethod
    def scale(self, reference: Tensor) -> float:
        """What the kernel takes from the reference set (M, D), so that all samplers have one kernel."""

    @abstractmethod
    def kernel(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """k(a_i, b_j) of (N, D) and (M, D), float64: (N, M)."""

    def _sums(self, a: Tensor, of_a: Groups, b: Tensor, of_b: Groups, scale: float, same: bool = False) -> Tensor:
        """The sum of the kernel over the pairs of each two groups; in one set, without pairs of one and the same."""
        found, left, right = 0.0, of_a.one_hot, of_b.one_hot
        for part in pieces(len(a), len(b)):
            block = self.kernel(a[part], b, scale)
            if same:
                block.diagonal(offset=part.start).zero_()
            found = found + left[part].T @ (block @ right)
        return found


def _left_out(table: Tensor, groups: Groups) -> Tensor:
    """The sum of a table (G, H), and that without each of the G groups: (1 + G,)."""
    each = table.sum(dim=1)
    return torch.cat([each.sum()[None], (each.sum() - each)[: len(groups.left_out)]])


def _mean_of_pairs(sums: Tensor, groups: Groups) -> Tensor:
    """The mean over pairs of two different examples, from their sums (G, G); and without each group: (1 + G,)."""
    n, used = groups.sizes.sum(), len(groups.left_out)
    left = torch.cat([n[None], (n - groups.sizes)[:used]])
    # A group stands in a row and a column, and where both cross.
    gone = (2 * sums.sum(dim=1) - sums.diagonal())[:used]
    return torch.cat([sums.sum()[None], sums.sum() - gone]) / (left * (left - 1))


@dataclass(frozen=True)
class Energy(KernelMetric):
    """The squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, in units of x; 0 for P = Q alone."""

    columns: ClassVar = (Column("energy", "squared energy distance", "zero"),)

    def scale(self, reference: Tensor) -> float:
        return 1.0

    def kernel(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return -squared_distances(a, b).sqrt_()


@dataclass(frozen=True)
class MMD(KernelMetric):
    """MMD^2 of the mean of Gaussian kernels exp(-|x - y|^2 / (2 h^2)), h = factor times bandwidth; it has no unit.

    bandwidth: in units of x; None for the median distance between two examples of the reference set (of 2000, evenly
    spaced, where it has more), or the mean where most of them are equal.
    factors: one kernel for each; small ones see fine structure, and large ones the means and variances.
    """

    columns: ClassVar = (Column("mmd", "squared MMD", "zero"),)
    bandwidth: float | None = None
    factors: Sequence[float] = (0.5, 1.0, 2.0)

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        given = [*self.factors, *([] if self.bandwidth is None else [self.bandwidth])]
        if not self.factors or not all(0 < value < math.inf for value in given):
            found = f"bandwidth={self.bandwidth}, factors={list(self.factors)}"
            raise ValueError(f"MMD: expected a positive bandwidth (or null) and positive factors, found {found}.")

    def scale(self, reference: Tensor) -> float:
        return self.bandwidth or typical_distance(reference)

    def kernel(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        exponent = squared_distances(a, b).div_(-2 * scale**2)
        return sum((exponent / factor**2).exp_() for factor in self.factors) / len(self.factors)


def typical_distance(x: Tensor) -> float:
    """The median distance of two different examples (N, D), of 2000 at most; the mean where that is 0."""
    few = x[torch.linspace(0, len(x) - 1, min(len(x), _MEDIAN_OF)).round().long()]
    found = torch.nn.functional.pdist(few)
    middle = found.median().item() or found.mean().item()
    if not middle:
        raise ValueError(f"reference: expected examples that differ, found {len(few)} equal ones; give a bandwidth.")
    return middle


@dataclass(frozen=True)
class KernelDistance(KernelMetric):
    """The kernel (Inception) distance: MMD^2 of the polynomial kernel (x.y / D + 1)^3 over features.

    It compares the first three moments. Papers print it times 1000.
    """

    columns: ClassVar = (Column("kernel_distance", "kernel distance", "zero"),)
    of_features: ClassVar = True

    def scale(self, reference: Tensor) -> float:
        return float(reference.shape[1])

    def kernel(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return (a @ b.T).div_(scale).add_(1).pow_(3)


@dataclass(frozen=True)
class Frechet(Recomputed):
    """The squared Frechet distance of two Gaussians with the sets' means and covariances; over features, FID.

    With S = A^T A for the centred set over sqrt(n - 1), the trace of the square root is the sum of the singular values
    of A_P A_Q^T. No square root of a matrix is taken, and none of a rounding error: the result is right to 1e-14 of the
    traces even where there are fewer examples than dimensions. Its bias is of the order D / n, so that the numbers of
    the papers need their 50,000 samples. Without features it is taken of x itself.
    limit: the most dimensions, for time grows with their cube.
    """

    columns: ClassVar = (Column("frechet", "Frechet distance"),)
    of_features: ClassVar = True
    limit: int = 4096

    def distance(self, x: Tensor, reference: Tensor) -> tuple[float]:
        if x.shape[1] > self.limit:
            cure = "use features (features@compare.features=trained), or another metric"
            raise ValueError(f"Frechet: expected at most {self.limit} dimensions, found {x.shape[1]}; {cure}.")
        means = x.mean(dim=0) - reference.mean(dim=0)
        a, b = _root(x), _root(reference)
        both = torch.linalg.svdvals(a @ b.T).sum()
        return ((means.square().sum() + a.square().sum() + b.square().sum() - 2 * both).clamp_min(0).item(),)


def _root(x: Tensor) -> Tensor:
    """A with A^T A the covariance of (N, D), float64: (min(N, D), D)."""
    centred = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    return centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R
