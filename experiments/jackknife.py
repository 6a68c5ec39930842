"""The delete-a-group jackknife: the standard error of any function of a set, from its values without a part of it.

The n examples are divided at random into G groups (Efron and Stein 1981); for groups of unequal sizes m_g, with
h_g = n / m_g, and D_(g) the statistic D without group g (Busing, Meijer and van der Leeden 1999),

    D~_g = h_g D - (h_g - 1) D_(g),    J = G D - sum_g (1 - 1/h_g) D_(g),
    variance = (1/G) sum_g (D~_g - J)^2 / (h_g - 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 20240229  # of the division into groups: any fixed one


@dataclass(frozen=True, eq=False)
class Groups:
    """n examples divided at random into groups of equal size (or nearly): one of them is left out at a time.

    label: (n,), the group of each. With one group there is nothing that could be left out.
    """

    label: Tensor
    count: int

    @classmethod
    def of(cls, n: int, count: int) -> "Groups":
        """The same division whenever n and count are the same; at random, as examples may come sorted by class."""
        order = torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))
        return cls(order % count, count)

    @property
    def left_out(self) -> range:
        """The groups that are left out in turn."""
        return range(self.count if self.count > 1 else 0)

    @property
    def sizes(self) -> Tensor:
        """How many examples each group has, (count,), float64."""
        return torch.bincount(self.label, minlength=self.count).double()

    @property
    def one_hot(self) -> Tensor:
        """(n, count), float64."""
        return torch.nn.functional.one_hot(self.label, self.count).double()

    def subsets(self, x: Tensor) -> list[Tensor]:
        """All of x (n, ...), and x without each group."""
        return [x, *(x[self.label != g] for g in self.left_out)]


def jackknife_variance(table: Tensor, groups: Groups) -> Tensor:
    """The variance of a statistic, from its value for all and without each group, (1 + groups, columns): (columns,)."""
    whole, without = table[0], table[1:]
    h = (groups.sizes.sum() / groups.sizes)[:, None]
    pseudo = h * whole - (h - 1) * without
    centre = groups.count * whole - ((1 - 1 / h) * without).sum(dim=0)
    return ((pseudo - centre).square() / (h - 1)).mean(dim=0)
