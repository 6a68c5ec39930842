"""Tables of numbers: CSV files, one example a row, standardized by the training split (see ``dataset``).

A table is modelled as a density over its columns. Columns that are constant, or have few distinct values, have no such
density: its likelihood has no bound.
"""

import csv
import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from experiments.dataset import Data, DataError, cut, existing, fault, permutation, shown, sizes

log = logging.getLogger(__name__)
BYTES = 2**30  # of the file
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")


def table(
    path: str | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Data:
    """The numbers of a CSV file: (D,), float32, each column of zero mean and unit variance over the training split.

    The first row is a header where it is not all numbers; without one the columns are called 1, 2, ....
    columns: the names of those to take, null for all. delimiter: the character between them.
    validation, test: fractions, or numbers of rows, that the seed draws for these splits.
    name: of the data set, the file's own by default.
    Raises DataError that names the row and the column, what was expected and found, and the cure.
    """
    file = existing(path, "a CSV file", folder=False)
    if file.stat().st_size > BYTES:
        raise fault(file, f"at most {BYTES} bytes", f"{file.stat().st_size}", "save the numbers as .npy, for data=npy")
    names, values = _numbers(file, columns, delimiter)
    splits = cut(values[permutation(len(values), seed)], sizes(len(values), validation, test))
    mean, std = splits["train"].mean(0), splits["train"].std(0, correction=0)
    _check_spread(file, names, splits["train"], std)
    moments = {"mean": mean.tolist(), "std": std.tolist()}
    standardized = {split: ((x - mean) / std).float() for split, x in splits.items()}
    return Data(name or shown(file.stem), **standardized, standardization=moments)


def _numbers(file: Path, columns: Sequence[str] | None, delimiter: str) -> tuple[list[str], Tensor]:
    """The columns' names and all rows (N, D), float64."""
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise DataError(f"data.delimiter: expected one character, found {delimiter!r}.")
    with _explained(file), file.open(newline="", encoding="utf-8-sig") as opened:
        rows = _rows(csv.reader(opened, delimiter=delimiter, strict=True))
        line, first = next(rows, (1, []))
        headed = not first or not all(_is_number(cell) or _is_missing(cell) for cell in first)
        names = [cell.strip() for cell in first] if headed else [str(i + 1) for i in range(len(first))]
        taken = _taken(file, names, columns, delimiter)
        values = array("d")  # eight bytes a number, where a list takes four times as much
        for at, row in rows if headed else chain([(line, first)], rows):
            values.extend(_row(file, at, row, names, taken))
    if not values:
        raise fault(file, "rows of numbers", "none", "check what was saved")
    return [names[i] for i in taken], torch.frombuffer(values, dtype=torch.float64).view(-1, len(taken))


def _rows(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    for row in reader:
        if row:
            yield reader.line_num, row


def _taken(file: Path, names: list[str], columns: Sequence[str] | None, delimiter: str) -> list[int]:
    if columns is None:
        return list(range(len(names)))
    wanted = [str(column) for column in columns]
    for column in wanted:
        if names.count(column) != 1:
            cure = "name some of them in data.columns, and check data.delimiter"
            raise fault(file, f"one column {column!r}", f"{', '.join(names)} (delimiter {delimiter!r})"[:300], cure)
    if not wanted:
        raise DataError("data.columns: expected at least one name, found none; null takes all.")
    return [names.index(column) for column in wanted]


def _row(file: Path, line: int, row: list[str], names: list[str], taken: list[int]) -> list[float]:
    if len(row) != len(names):
        found = f"{len(row)} in line {line}"
        raise fault(file, f"{len(names)} cells in each row, as in the first", found, "mend it, or check data.delimiter")
    return [_number(file, line, names[i], row[i]) for i in taken]


def _number(file: Path, line: int, name: str, cell: str) -> float:
    where, drop = f"in line {line}, column {name!r}", "leave the row out, or the column by data.columns"
    if _is_missing(cell):
        raise fault(file, "a number", f"a missing value {cell!r} {where}", drop)
    if not _is_number(cell):
        raise fault(file, "a number", f"{cell[:40]!r} {where}", f"{drop}, or check data.delimiter")
    return float(cell)


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _check_spread(file: Path, names: list[str], train: Tensor, std: Tensor) -> None:
    tiny = 1e-12 * train.abs().amax(0)
    constant = [name for name, bad in zip(names, (std <= tiny).tolist(), strict=True) if bad]
    if constant:
        found = f"the same number in all {len(train)} training rows of {', '.join(constant)}"
        raise fault(file, "columns that vary", found[:300], "leave them out by data.columns")
    if not std.isfinite().all():
        raise fault(file, "numbers whose variance is finite", f"up to {train.abs().max():g}", "change their unit")
    few = [name for name, x in zip(names, train.T, strict=True) if 2 * len(x.unique()) < len(x) ** 0.5]
    if few:
        log.warning(
            "%s: few distinct values in %s; a density of them has no bound", shown(file.name), ", ".join(few)[:300]
        )


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise fault(file, "a CSV file in UTF-8", f"{error}", "save it anew") from None
    except OSError as error:
        raise fault(file, "a readable file", error.strerror or str(error), "check its permissions") from None
