"""Precision, recall, density and coverage: how many samples are among the data, and how much of the data among them.

B_k(z) is the ball around an example z that reaches to its k-th nearest neighbour in its own set, without itself.

    precision   share of samples x in some B_k(y)         recall    share of examples y in some B_k(x)
    density     mean over x of #{y: x in B_k(y)} / k      coverage  share of examples y with some x in B_k(y)

Precision and recall: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020. A ball holds
its edge, so that equal examples, between which distances are 0, are in each other's balls.

For n samples and m examples of one distribution density is 1 on average, and coverage
1 - prod_(i<k) (m - 1 - i) / (m - 1 + n - i); precision and recall depend on the distribution, and their floor says
what they come to. One outlier has a large ball: it raises precision (or recall), and hardly density or coverage.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.distances import pieces, squared_distances
from experiments.jackknife import Groups
from experiments.quality import Column, Metric

_ROUNDING = 1e-12  # of a squared distance, in squares of what the examples themselves are from the centre


class Balls(NamedTuple):
    """A set (M, D) around ``centre``, its groups, and the squared radii of its balls.

    radii: (1 + G, M), in the whole set and in that without each group; -1 for the examples that are left out.
    """

    x: Tensor
    groups: Groups
    radii: Tensor
    centre: Tensor


@dataclass(frozen=True)
class Neighbours(Metric):
    """Precision, recall, density and coverage by the k nearest neighbours; of features where there are any."""

    columns: ClassVar = (
        Column("precision", "precision", "high"),
        Column("recall", "recall", "high"),
        Column("density", "density", "high"),
        Column("coverage", "coverage", "high"),
    )
    of_features: ClassVar = True
    k: int = 5

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k: expected at least 1 neighbour, found {self.k}.")

    @property
    def fewest(self) -> int:
        return self.k + 1

    def prepare(self, reference: Tensor, groups: Groups) -> Balls:
        return self._balls(reference, groups, reference.mean(dim=0))

    def leave_out(self, x: Tensor, groups: Groups, prepared: Balls) -> Tensor:
        ours, real = self._balls(x, groups, prepared.centre), prepared
        hits, reached, nearest = _meet(ours, real)
        inside = _shares((hits > 0).double(), groups, real.groups)
        density = _shares(hits / self.k, groups, real.groups)
        recall = _shares(reached.T.double(), real.groups, groups)
        covered = _covered(nearest, real)
        order = _transposed(len(real.groups.left_out), len(groups.left_out))
        return torch.stack([inside, recall[order], density, covered], dim=1)

    def _balls(self, x: Tensor, groups: Groups, centre: Tensor) -> Balls:
        x = x - centre  # the nearer to 0, the less the distances are rounded
        radii = torch.cat([self._radii(x, part, groups) for part in pieces(len(x), len(x))], dim=1)
        radii += _ROUNDING * x.square().sum(dim=1)
        for g in groups.left_out:
            radii[1 + g, groups.label == g] = -1
        return Balls(x, groups, radii, centre)

    def _radii(self, x: Tensor, part: slice, groups: Groups) -> Tensor:
        """(1 + G, rows of the part): the k-th smallest is among the k smallest of each group."""
        squares = squared_distances(x[part], x)
        squares.diagonal(offset=part.start).fill_(torch.inf)
        members = [squares[:, groups.label == g] for g in range(groups.count)]
        near = [each.topk(min(self.k, each.shape[1]), dim=1, largest=False).values for each in members]
        kept = [near, *(near[:g] + near[g + 1 :] for g in groups.left_out)]
        return torch.stack([torch.cat(each, dim=1).kthvalue(self.k, dim=1).values for each in kept])


def _meet(ours: Balls, real: Balls) -> tuple[Tensor, Tensor, Tensor]:
    """What the distances between samples (N) and examples (M), which divide into G and H groups, come to.

    Returns how many balls of examples hold each sample, (N, 1 + H); whether some sample's ball holds each example,
    (1 + G, M); and the squared distance from each group of samples to each example, (G, M).
    """
    n, m, groups = len(ours.x), len(real.x), ours.groups
    hits = torch.zeros(n, len(real.radii), dtype=torch.float64)
    reached = torch.zeros(len(ours.radii), m, dtype=torch.bool)
    nearest = torch.full((groups.count, m), torch.inf, dtype=torch.float64)
    for g in range(groups.count):
        members = (groups.label == g).nonzero().flatten()
        for part in pieces(len(members), m):
            index = members[part]
            squares = squared_distances(ours.x[index], real.x)
            hits[index] = torch.stack([(squares <= radii).sum(dim=1) for radii in real.radii], dim=1).double()
            reached |= torch.stack([(squares <= radii[index, None]).any(dim=0) for radii in ours.radii])
            nearest[g] = torch.minimum(nearest[g], squares.amin(dim=0))
    return hits, reached, nearest


def _shares(table: Tensor, own: Groups, others: Groups) -> Tensor:
    """Means over the rows of (N, 1 + H): of all, without each of the rows' groups, and in each of the H other cases."""
    without = [table[own.label != g, 0].mean() for g in own.left_out]
    return torch.stack([table[:, 0].mean(), *without, *(table[:, 1 + h].mean() for h in others.left_out)])


def _covered(nearest: Tensor, real: Balls) -> Tensor:
    """Coverage of all, without each group of samples, and without each group of the reference."""
    count, whole = len(nearest), nearest.amin(dim=0)
    others = [torch.cat([nearest[:g], nearest[g + 1 :]]).amin(dim=0) for g in range(count if count > 1 else 0)]
    without_x = [(each <= real.radii[0]).double().mean() for each in others]
    kept = [(whole <= radii)[radii >= 0].double().mean() for radii in real.radii[1:]]
    return torch.stack([(whole <= real.radii[0]).double().mean(), *without_x, *kept])


def _transposed(first: int, second: int) -> Tensor:
    """The order that puts the second block of (1, first, second) before the first."""
    return torch.cat([torch.zeros(1), 1 + first + torch.arange(second), 1 + torch.arange(first)]).long()
