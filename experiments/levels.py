"""From arrays of numbers to examples: where the channels are, integer levels or continuous values, and class labels.

What is not certain is refused, and what is done beyond the reading is said in the log: a silent guess of the range of
the values (0..255, 0..1 or -1..1) is a silent error in every number that follows.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.dataset import LIMIT, DataError, fault, shown

log = logging.getLogger(__name__)
COLOURS = (1, 3)
_PIECE = 2**26  # bytes that are looked at together


def examples(path: Path, array: np.ndarray, levels: int | None, channels: str) -> tuple[Tensor, int | None]:
    """Examples (N, ...) and their number of levels: uint8, or float32 and None; ``path`` is for messages.

    An array of float32 or uint8 is not copied. Raises DataError for other ranks, values that are not finite, and
    values that are not levels.
    """
    if array.ndim < 2 or 0 in array.shape:
        cure = "a column of numbers is of the shape (N, 1)"
        raise fault(path, "examples (N, ...) of at least one value", f"the shape {array.shape}", cure)
    if levels is not None and (type(levels) is not int or not 2 <= levels <= 256):
        raise DataError(f"data.levels: expected an integer from 2 to 256, or null, found {levels!r}.")
    array = _PLACES[_checked_channels(channels)](path, array)
    if array.dtype.kind == "f" and levels is None:
        return _continuous(path, array), None
    return _discrete(path, array, _levels_of(path, array, levels))


def label_tensor(path: Path, array: np.ndarray, count: int) -> Tensor:
    """Class labels (N,), int64. Raises DataError for anything but ``count`` integers from 0."""
    if array.shape != (count,) or array.dtype.kind not in "ui":
        found = f"the shape {array.shape} of {array.dtype}"
        raise fault(path, f"integer labels of the shape ({count},)", found, "save one class for each example")
    if int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise fault(path, "labels from 0", f"{array.min()} to {array.max()}", "number the classes from 0")
    return torch.from_numpy(array.astype(np.int64))


def _checked_channels(channels: str) -> str:
    if channels not in _PLACES:
        raise DataError(f"data.channels: expected one of {', '.join(_PLACES)}, found {channels!r}.")
    return channels


def _auto(path: Path, array: np.ndarray) -> np.ndarray:
    shape = array.shape
    if array.ndim == 3 and array.dtype == np.uint8 and shape[1] not in COLOURS:
        return _none(path, array)
    if array.ndim != 4 or shape[3] not in COLOURS:
        return array
    if shape[1] in COLOURS:
        cure = "say data.channels=first or data.channels=last"
        raise fault(path, "images whose channels can be told", f"the shape {shape}", cure)
    return _last(path, array)


def _last(path: Path, array: np.ndarray) -> np.ndarray:
    log.info("%s: channels last, %s; moved to the first place", shown(path.name), array.shape)
    return np.moveaxis(array, -1, 1)


def _none(path: Path, array: np.ndarray) -> np.ndarray:
    log.info("%s: without channels, %s; one is added", shown(path.name), array.shape)
    return array[:, None]


_PLACES: dict[str, Callable[[Path, np.ndarray], np.ndarray]] = {
    "auto": _auto,
    "first": lambda _, array: array,
    "last": _last,
    "none": _none,
}


def _continuous(path: Path, array: np.ndarray) -> Tensor:
    low, high, whole = np.inf, -np.inf, True
    for first, part in _parts(array):
        _check_finite(path, part, first)
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        whole = whole and bool((part == np.rint(part)).all())
    if max(-low, high) > torch.finfo(torch.float32).max:
        raise fault(path, "values that float32 can hold", f"{low:g} to {high:g}", "divide them by their deviation")
    hint = _hint(low, high, whole)
    if hint:
        log.warning("%s: continuous values from %g to %g; %s", shown(path.name), low, high, hint)
    return _tensor(path, array, np.float32)


def _discrete(path: Path, array: np.ndarray, levels: int) -> tuple[Tensor, int]:
    low, high, any_will_do = 0.0, 0.0, array.dtype.name == "bool" or (array.dtype == np.uint8 and levels == 256)
    for first, part in () if any_will_do else _parts(array):
        if array.dtype.kind == "f":
            _check_finite(path, part, first)
        found = float(part.min()), float(part.max())
        low, high = min(low, found[0]), max(high, found[1])
        if low < 0 or high >= levels or not (part == np.rint(part)).all():
            words = f"{found[0]:g} to {found[1]:g} in examples {first} to {first + len(part) - 1}"
            raise fault(path, f"whole numbers 0 to {levels - 1}", words, _cure(*found, levels))
    return _tensor(path, array, np.uint8), levels


def _levels_of(path: Path, array: np.ndarray, levels: int | None) -> int:
    """As given, or 256 of unsigned bytes and 2 of booleans."""
    known = levels or {"uint8": 256, "bool": 2}.get(array.dtype.name)
    if known is None:
        cure = "give data.levels=K, or save continuous values as float32"
        raise fault(path, "unsigned bytes, floats, or a number of levels", f"integers of {array.dtype}", cure)
    return known


def _check_finite(path: Path, part: np.ndarray, first: int) -> None:
    bad = ~np.isfinite(part)
    if bad.any():
        index = [int(i) for i in np.argwhere(bad)[0]]
        found = f"{part[tuple(index)]} at index {[first + index[0], *index[1:]]}"
        raise fault(path, "finite numbers", found, "drop or mend those examples")


def _hint(low: float, high: float, whole: bool) -> str | None:
    """What values that look like pictures want to be told."""
    if whole and low >= 0 and 1 < high <= 255:
        return f"these are whole numbers: give data.levels={256 if high > 16 else int(high) + 1} for bits/dim"
    if low >= 0 and high <= 1:
        return "for images save round(255 x) as uint8 (bits/dim need levels), or else standardize them"
    return None


def _cure(low: float, high: float, levels: int) -> str:
    if -1 <= low < 0 and high <= 1:
        return f"values in -1..1 become levels by round((x + 1) / 2 * {levels - 1})"
    if low >= 0 and high <= 1:
        return f"values in 0..1 become levels by round(x * {levels - 1})"
    return "give the data's own data.levels, or leave it at null for continuous floats"


def _tensor(path: Path, array: np.ndarray, dtype: type) -> Tensor:
    """Without a copy where the type is right; otherwise in memory, up to the limit."""
    if array.dtype != dtype:
        needed = array.size * np.dtype(dtype).itemsize
        if needed > LIMIT:
            cure = f"save it as {np.dtype(dtype)}, which is mapped and not read"
            raise fault(path, f"at most {LIMIT} bytes to convert from {array.dtype}", f"{needed}", cure)
        array = array.astype(dtype)
    return torch.from_numpy(np.asarray(array))


def _parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of an array that may be larger than memory, each with the number of its first example."""
    size = max(1, _PIECE // max(1, array[0].nbytes))
    for first in range(0, len(array), size):
        yield first, array[first : first + size]
