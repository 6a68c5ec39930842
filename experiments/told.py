"""Samples that were asked to be of a class, and what a classifier of clean data takes them for.

The classifier is one that neither the model nor its guidance has seen. It errs on real examples, too: a share near its
accuracy on them is what samples of the true p(x | c) would have, and a higher one means samples more typical than data.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.table_cells import table


@dataclass(frozen=True)
class Share:
    """A share of n, with its binomial standard error, at (n p + 1) / (n + 2): where all are right it is not 0."""

    value: float
    n: int

    @property
    def stderr(self) -> float:
        """Of the share."""
        p = (self.n * self.value + 1) / (self.n + 2)
        return (p * (1 - p) / self.n) ** 0.5

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True, eq=False)
class Told:
    """k samples for each of L classes.

    Parameters
    ----------
    labels: the classes asked for, int64 ``(L,)``. samples: ``(L, k, *shape)``.
    predicted: what the classifier takes them for, ``(L, k)``. accuracy: of the classifier, of real test examples.
    """

    labels: Tensor
    samples: Tensor
    predicted: Tensor
    accuracy: float

    @property
    def agreement(self) -> Share:
        """The share of samples that are taken for the class asked for."""
        return self._share(self.predicted == self.labels[:, None])

    @property
    def by_class(self) -> dict[int, Share]:
        """The same for each class."""
        rows = zip(self.labels.tolist(), self.predicted, strict=True)
        return {label: self._share(row == label) for label, row in rows}

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        agreement = self.agreement
        return {
            "labels": self.labels.tolist(),
            "samples_per_class": self.samples.shape[1],
            "agreement": agreement.value,
            "agreement_stderr": agreement.stderr,
            "agreement_by_class": {str(label): share.value for label, share in self.by_class.items()},
            "accuracy_of_the_classifier": self.accuracy,
        }

    def __str__(self) -> str:
        shares = {f"class {label}": share for label, share in self.by_class.items()} | {"all": self.agreement}
        rows = [(name, f"{share.value:.4f}", f"{share.stderr:.4f}") for name, share in shares.items()]
        rows.append(("real test examples", f"{self.accuracy:.4f}", ""))
        title = f"{self.samples.shape[1]} samples of each of {len(self.labels)} classes, as a classifier sees them"
        return f"{title}\n{table(('samples of', 'taken for it', 'standard error'), rows)}"

    @staticmethod
    def _share(right: Tensor) -> Share:
        return Share(right.double().mean().item(), right.numel())
