"""What a data set is, and what all readers of files share: one kind of error, checks of paths, and drawn splits.

Discrete data are kept as integer levels; a dequantizer owns the map to continuous x. A table's columns are
standardized, z = (x - mean)/std by the mean and deviation of its training split, and a density p(z) of them is in the
units of the file

    log p(x) = log p(z) + log |det dz/dx| = log p(z) - sum_d log std_d.

Splits that a file doesn't come with are drawn: the seed and the number N of examples decide a permutation of them; the
first of it are the test split, the next the validation split, so that the test split does not depend on how many
examples validate.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")
LIMIT = 2**32  # bytes that a reader will hold in memory


class DataError(ValueError):
    """Data that cannot be used: says what was expected, what was found, and the cure."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three splits of shape (N, *shape).

    train, validation, test: uint8 levels 0..levels-1 when `levels` is given, else float32.
    levels: the number of levels of discrete data; None for continuous data.
    labels: split name -> int64 class labels (N,), or None.
    density: the known density of a Gaussian mixture, float64 "weights" (K,), "means" (K, D) and "covariances"
    (K, D, D); or None.
    standardization: "mean" and "std", lists of D numbers, of data that were standardized by them; or None.
    flips: whether an image and its mirror image are equally good examples to train on.
    Raises DataError for splits that are empty or differ in shape.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int | None = None
    labels: dict[str, Tensor] | None = None
    density: dict[str, Tensor] | None = None
    standardization: dict[str, list[float]] | None = None
    flips: bool = False

    def __post_init__(self) -> None:
        shapes = {split: tuple(getattr(self, split).shape) for split in SPLITS}
        if not all(shapes.values()) or any(0 in shape or shape[1:] != self.shape for shape in shapes.values()):
            raise DataError(f"{self.name}: expected three splits of examples of one shape, found {shapes}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train.shape[1:])

    @property
    def log_det(self) -> float:
        """log |det dz/dx| of the standardization, nats: what log p(z) needs to become log p(x); 0 without one."""
        return -math.fsum(map(math.log, self.standardization["std"])) if self.standardization else 0.0

    def in_units_of(self, other: "Data") -> "Data":
        """The same examples, standardized as ``other`` is. Raises DataError where one of both is not standardized."""
        if self.standardization == other.standardization:
            return self
        if not self.standardization or not other.standardization:
            raise DataError(f"{self.name} and {other.name}: expected both standardized, found one; read both by table.")
        moments = [d.standardization[name] for d in (self, other) for name in ("mean", "std")]
        mean, std, new_mean, new_std = torch.tensor(moments, dtype=torch.float64)
        splits = {s: ((getattr(self, s).double() * std + mean - new_mean) / new_std).float() for s in SPLITS}
        return replace(self, **splits, standardization=other.standardization)


def fault(path: Path, expected: str, found: str, cure: str = "get the file again") -> DataError:
    """The one error about a file."""
    return DataError(f"{shown(path)}: expected {expected}, found {found}; {cure}.")


@contextmanager
def explained(path: Path, what: str, *damage: type[Exception]) -> Iterator[None]:
    """A DataError in place of the system's errors, and of ``damage``: what reading no whole ``what`` raises."""
    try:
        yield
    except DataError:
        raise
    except damage as error:
        raise fault(path, f"a whole {what}", f"a damaged one ({error})") from None
    except OSError as error:
        raise fault(path, "a readable file", error.strerror or str(error), "check its permissions") from None


def shown(path: str | Path) -> str:
    """A path that can be printed, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def existing(path: str | Path | None, what: str, folder: bool | None) -> Path:
    """``path`` where it is a file (``folder`` False), a folder (True), or either (None); or else a DataError."""
    kind = {True: "FOLDER", False: "FILE", None: "PATH"}[folder]
    if not path:
        raise DataError(f"data.path={kind} is needed: {what}; found none.")
    # Those of os.path say no, where those of Path raise, to names that are too long or lie where one may not look.
    found = Path(os.path.expanduser(str(path)))
    is_folder, is_file = os.path.isdir(found), os.path.isfile(found)
    if not {True: is_folder, False: is_file, None: is_folder or is_file}[folder]:
        there = "a folder" if is_folder else "a file" if is_file else "nothing there that can be read"
        raise DataError(f"data.path={shown(found)}: expected {what}, found {there}.")
    return found


def last(validation: int, count: int) -> int:
    """How many of the last of ``count`` official training examples validate. Raises DataError."""
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 < validation < count:
        raise DataError(f"data.validation: expected an integer from 1 to {count - 1}, found {validation!r}.")
    return validation


def sizes(count: int, validation: float, test: float) -> dict[str, int]:
    """How many of ``count`` examples each split gets; below 1 a fraction, from 1 on a number. Raises DataError."""
    wanted = {name: _size(name, value, count) for name, value in (("test", test), ("validation", validation))}
    left = count - sum(wanted.values())
    if left < 1:
        found = f"data.test={test}, data.validation={validation} of {count} examples"
        raise DataError(f"expected at least one example to be left to train on, found {found}; hold out fewer.")
    return wanted | {"train": left}


def _size(name: str, value: float, count: int) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (value >= 1 and value != int(value)):
        raise DataError(f"data.{name}: expected a fraction in (0, 1) or a number of examples, found {value!r}.")
    return int(value) if value >= 1 else max(1, round(value * count))


def permutation(count: int, seed: int) -> Tensor:
    """The order in which splits take their examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def cut(values: Tensor, wanted: dict[str, int]) -> dict[str, Tensor]:
    """Three views of examples that are in the order of the permutation: test, validation, train."""
    parts = values.split([wanted["test"], wanted["validation"], wanted["train"]])
    return dict(zip(("test", "validation", "train"), parts, strict=True))


def hold_out(values: Tensor, wanted: dict[str, int], seed: int) -> dict[str, Tensor]:
    """The splits of values (N, ...) that may be larger than memory: only what is held out is copied.

    Training keeps the order of the file and is a view of it: held-out examples among its first rows are overwritten
    by the training examples behind them, on as many pages of a copy-on-write map.
    """
    order, left = permutation(len(values), seed), wanted["train"]
    out, found = order[: len(values) - left], {}
    for name in ("test", "validation"):
        index, order = order[: wanted[name]], order[wanted[name] :]
        found[name] = values[index].clone()
    holes, behind = out[out < left].sort().values, torch.ones(len(values) - left, dtype=torch.bool)
    behind[out[out >= left] - left] = False
    for hole, source in zip(holes.split(1024), (behind.nonzero().flatten() + left).split(1024), strict=True):
        values[hole] = values[source]
    return found | {"train": values[:left]}
