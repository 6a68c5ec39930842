"""Measures of sample quality, each with a standard error and with the value that perfect samples would have.

A measure D(X, Y) compares samples X = (x_1 .. x_n) with real examples Y = (y_1 .. y_m), and both are chance. Its error
comes from leaving out a tenth of either set at a time (``jackknife``); the variance over the samples and the one over
the reference set add up.

A few real examples are no more like the reference set than chance allows: ``floors`` says what n of them come to. Of
the measures, those with a bias (sliced W2, Frechet, neighbours) change with n and m, and can be compared at equal n and
m only; the others (energy, MMD, kernel distance) are 0 on average for samples of the right distribution.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.build import ConfigError, build
from experiments.jackknife import Groups, jackknife_variance
from experiments.metrics import Floor, rows

BEST = ("low", "high", "zero")


@dataclass(frozen=True)
class Column:
    """One number of a metric. best: "low", "high" or "zero" (nearest to 0, where chance gives negative values too)."""

    name: str
    title: str
    best: str = "low"

    def __post_init__(self):
        if self.best not in BEST:
            raise ValueError(f"{self.name}: best must be one of {', '.join(BEST)}, found {self.best!r}")


@dataclass(frozen=True)
class Measured:
    """A value, its standard error, and the degrees of freedom that the error is known with."""

    value: float
    stderr: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, by Student's t: of the mean that the measure has at these sizes of both sets.

        Of energy, MMD and kernel distance, which have no bias, that is the distance itself.
        """
        from scipy.special import stdtrit

        reach = float(stdtrit(self.freedom, 0.975)) * self.stderr
        return self.value - reach, self.value + reach


class Metric(ABC):
    """How far samples are from real examples, in one number or several.

    Subclasses are frozen dataclasses of plain numbers. ``columns`` names the numbers; ``of_features`` says that, where
    there are features, the metric is to be given those of the samples and of the reference. A metric that any function
    of two sets will do for is a ``Recomputed``.
    """

    columns: ClassVar[tuple[Column, ...]]
    of_features: ClassVar[bool] = False

    def __call__(self, x: Tensor, reference: Tensor) -> dict[str, float]:
        """The value of each column for samples (N, ...) and a reference set (M, ...), in one unit.

        Raises ValueError for sets of different shapes, of too few examples, or with numbers that are not finite.
        """
        return Yardstick(self, reference, groups=1).value(x)

    @property
    def fewest(self) -> int:
        """The smallest number of samples, and of reference examples, that it can be computed of."""
        return 2

    @abstractmethod
    def prepare(self, reference: Tensor, groups: Groups) -> Any:
        """Whatever depends on the reference set (M, D) alone, and is needed for all samples; float64."""

    @abstractmethod
    def leave_out(self, x: Tensor, groups: Groups, prepared: Any) -> Tensor:
        """For samples (N, D), float64: the columns of all, without each group of x, without each of the reference.

        Returns (1 + number of the first + number of the second, columns), float64.
        """


class Recomputed(Metric):
    """A metric that is a plain function of two sets, computed anew for every subset."""

    @abstractmethod
    def distance(self, x: Tensor, reference: Tensor) -> Sequence[float]:
        """The columns' values for (N, D) and (M, D), float64."""

    def prepare(self, reference: Tensor, groups: Groups) -> list[Tensor]:
        return groups.subsets(reference)

    def leave_out(self, x: Tensor, groups: Groups, prepared: list[Tensor]) -> Tensor:
        pairs = [(part, prepared[0]) for part in groups.subsets(x)] + [(x, part) for part in prepared[1:]]
        return torch.tensor([tuple(self.distance(*pair)) for pair in pairs], dtype=torch.float64)


class Yardstick:
    """A metric with its reference set (M, ...), of which everything that no sample changes is computed once.

    groups: into how many parts either set is divided for the standard error; fewer where there are fewer examples.
    """

    def __init__(self, metric: Metric, reference: Tensor, groups: int = 10):
        if groups < 1:
            raise ValueError(f"groups: expected at least 2, found {groups}.")
        self.metric, reference = metric, rows("reference", reference)
        self.dimensions, self.count = reference.shape[1], groups
        self.groups = self._groups("reference", len(reference))
        self._prepared = metric.prepare(reference, self.groups)

    def value(self, x: Tensor) -> dict[str, float]:
        """The value of each column for samples (N, ...)."""
        return self._named(self._table(x, 1)[0].tolist())

    def measure(self, sets: Sequence[Tensor]) -> dict[str, Measured]:
        """See ``measure``."""
        if not sets or self.groups.count < 2:
            raise ValueError(f"expected a set of samples and 2 groups, found {len(sets)} and {self.groups.count}.")
        tables, divided = zip(*((self._table(x, self.count), self._groups("x", len(x))) for x in sets), strict=True)
        counts = [1 + groups.count for groups in divided]
        own = [jackknife_variance(table[:n], groups) for table, n, groups in zip(tables, counts, divided, strict=True)]
        # One reference set for all: what leaving out a part of it does to their mean.
        mean = torch.stack([torch.cat([table[:1], table[n:]]) for table, n in zip(tables, counts, strict=True)]).mean(0)
        of_samples = torch.stack(own).sum(dim=0) / len(sets) ** 2
        parts = (
            (of_samples, sum(n - 2 for n in counts)),
            (jackknife_variance(mean, self.groups), self.groups.count - 1),
        )
        variance = sum(part for part, _ in parts)
        # Welch and Satterthwaite's; where nothing varies, any will do.
        freedom = variance.square() / sum(part.square() / n for part, n in parts).clamp_min(1e-300)
        found = zip(mean[0].tolist(), variance.sqrt().tolist(), freedom.clamp_min(1).tolist(), strict=True)
        return self._named([Measured(*each) for each in found])

    def floors(self, pool: Tensor, n: int, draws: int = 20, seed: int = 0) -> dict[str, Floor]:
        """See ``floors``."""
        if not 0 < n <= len(pool):
            raise ValueError(f"n: expected 1 to {len(pool)} (the real data there are), found {n}; use fewer samples.")
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, found {draws}.")
        generator = torch.Generator().manual_seed(seed)
        subsets = (pool[torch.randperm(len(pool), generator=generator)[:n]] for _ in range(draws))
        values = torch.stack([self._table(subset, 1)[0] for subset in subsets])
        spread = zip(values.mean(dim=0).tolist(), values.std(dim=0, correction=0).tolist(), strict=True)
        return self._named([Floor(*each) for each in spread])

    def _table(self, x: Tensor, count: int) -> Tensor:
        x = rows("x", x)
        if x.shape[1] != self.dimensions:
            found = f"{x.shape[1]} and {self.dimensions}"
            raise ValueError(f"x, reference: expected as many dimensions in both, found {found}.")
        table = self.metric.leave_out(x, self._groups("x", len(x), count), self._prepared)
        if not table.isfinite().all():
            raise ValueError(f"{type(self.metric).__name__}: the numbers are too large to be squared; rescale them.")
        return table

    def _groups(self, name: str, n: int, count: int | None = None) -> Groups:
        """The division of n examples; refuses what would leave too few for the metric."""
        wanted = self.count if count is None else count
        count = min(wanted, max(n, 2))  # of one example, which can't be left out, one group would be none
        left = n - (-(-n // count) if count > 1 else 0)
        if left < self.metric.fewest:
            needed = self.metric.fewest + (-(-n // count) if count > 1 else 0)
            kind = type(self.metric).__name__
            raise ValueError(
                f"{name}: {kind} needs at least {needed} examples, found {n}; use more, or another metric."
            )
        return Groups.of(n, count)

    def _named(self, values: Sequence[Any]) -> dict[str, Any]:
        return {column.name: value for column, value in zip(self.metric.columns, values, strict=True)}


def measure(metric: Metric, sets: Sequence[Tensor], reference: Tensor, groups: int = 10) -> dict[str, Measured]:
    """The metric's mean over sets of samples (N, ...), one per seed, against one reference set (M, ...).

    The standard error has a part from the samples and a part from the reference set. The samples of a seed have random
    numbers of their own, so that they are as independent of each other as of those of another seed: the error over the
    samples is found within each of the S sets, and that of the mean is their root mean square over sqrt(S). The spread
    over the seeds estimates the same from S numbers only: for three seeds that error is known to 50 %, where ten groups
    of each of three sets give 14 %. The part from the reference set does not become smaller with more seeds, and is
    common to all samplers that are held against one reference set.

    It is rather too large than too small. Near the floor most measures are quadratic in the noise, and a jackknife then
    finds sqrt(2) times their spread (1.4 to 1.5 for 100 samples); further away 1.1 to 1.2 times. The shares among
    neighbours jump, and their errors are 1.2 to 2 times the spread; one that is 0 or 1 everywhere has error 0.
    Raises ValueError as a metric's call does.
    """
    return Yardstick(metric, reference, groups).measure(sets)


def floors(metric: Metric, pool: Tensor, reference: Tensor, n: int, draws: int = 20, seed: int = 0) -> dict[str, Floor]:
    """What n perfect samples would have: n real examples of ``pool``, none of which is in ``reference``, against it.

    pool: (N, ...), training and validation data together, of which n are drawn without replacement, `draws` times. As n
    nears the size of the pool the draws overlap, and the deviation no longer contains the pool's own chance.
    Raises ValueError where the pool has fewer than n examples, and as a metric's call does.
    """
    return Yardstick(metric, reference, groups=1).floors(pool, n, draws, seed)


def build_metrics(settings: DictConfig) -> dict[str, Metric]:
    """The metrics that ``compare.metrics`` lists, by name, of those under ``compare.measures``. Raises ConfigError."""
    found = {name: _build_metric(settings, name) for name in settings.metrics}
    owners: dict[str, str] = {}
    for name, metric in found.items():
        for column in metric.columns:
            if (other := owners.setdefault(column.name, name)) != name:
                raise ConfigError(f"compare.metrics: {other} and {name} both give {column.name}; take one of them")
    return found


def _build_metric(settings: DictConfig, name: str) -> Metric:
    known = settings.measures
    if name not in known:
        raise ConfigError(
            f"compare.metrics: no metric {name!r}; choose from {', '.join(known)}, or add a file metric/{name}.yaml "
            f"of your own by +metric@compare.measures.{name}={name}"
        )
    metric = build(known[name], where=f"compare.measures.{name}")
    if not isinstance(metric, Metric):
        raise ConfigError(f"compare.measures.{name} must be a Metric, found {type(metric).__name__}")
    return metric


def require_enough(metrics: Mapping[str, Metric], samples: int, reference: int, groups: int = 10) -> None:
    """Refuse, by ConfigError, fewer samples or reference examples than the standard errors of the metrics need."""
    for name, metric in metrics.items():
        for what, n in (("compare.samples", samples), ("the reference set", reference)):
            left = n - math.ceil(n / min(groups, n))
            if left < metric.fewest:
                others = [other for other in metrics if other != name]
                cure = f"use more, or compare.metrics=[{','.join(others)}]"
                raise ConfigError(
                    f"{what}: {n} are too few for {name}, which needs {metric.fewest} after one part of "
                    f"{min(groups, n)} is left out; {cure}"
                )
