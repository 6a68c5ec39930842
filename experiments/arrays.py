"""Arrays of NumPy: one `.npy` file, mapped and not read, or an `.npz` archive of some.

Of an array (N, ...), N examples of any rank: vectors (N, D), series (N, C, L), images (N, C, H, W), volumes
(N, C, D, H, W). Unsigned bytes are levels, 256 unless said otherwise; floats are continuous unless `levels` says that
they are whole numbers of levels. Object arrays, which hold code to run, are never read.

The size that a header implies is compared with what there is before anything is allocated. A `.npy` file is mapped
copy-on-write: it may be larger than memory, and it is never changed. Format: NumPy's "NEP 1".
"""

import io
import math
import mmap
import platform
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from experiments.dataset import LIMIT, SPLITS, Data, existing, explained, fault, hold_out, shown, sizes
from experiments.idx import DEFLATE_RATIO, read_at_most
from experiments.levels import examples, label_tensor

_HEADERS: dict[tuple[int, int], Callable] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LONGEST_HEADER = 2**14
# NumPy's own copy-on-write map reserves memory for the whole file, and Linux refuses to where there is not as much.
_NO_RESERVE = 0x4000 if (sys.platform, platform.machine()) in (("linux", "x86_64"), ("linux", "aarch64")) else 0
_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | _NO_RESERVE}
_COPY_ON_WRITE = _PRIVATE or {"access": mmap.ACCESS_COPY}
_DAMAGED = ("file of NumPy", zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Header(NamedTuple):
    """What a `.npy` header says, and how many bytes it takes."""

    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    length: int

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize


def npy(
    path: str | None = None,
    levels: int | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    channels: str = "auto",
    labels: str | None = None,
    name: str | None = None,
) -> Data:
    """The array of a `.npy` file; of float32 or unsigned bytes it may be larger than memory.

    levels: the number of levels of discrete data; null is 256 for unsigned bytes, and continuous for floats.
    validation, test: fractions, or numbers of examples, that the seed draws for these splits.
    channels: where they are: "first", "last", "none" (and one is added), or "auto": none in unsigned bytes (N, H, W)
        but for H of 1 or 3, which are series of so many channels; last in (N, H, W, 1 or 3); and otherwise first.
    labels: a second `.npy` file with an integer class for each example.
    name: of the data set, the file's own by default.
    Raises DataError that names the file, what was expected and found, and the cure.
    """
    file = existing(path, "a .npy file", folder=False)
    values, levels = examples(file, _mapped(file), levels, channels)
    classes = None
    if labels is not None:
        where = existing(labels, "a .npy file of labels", folder=False)
        classes = hold_out(label_tensor(where, _mapped(where), len(values)), sizes(len(values), validation, test), seed)
    splits = hold_out(values, sizes(len(values), validation, test), seed)
    return Data(name or shown(file.stem), **splits, levels=levels, labels=classes)


def npz(
    path: str | None = None,
    levels: int | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    channels: str = "auto",
    name: str | None = None,
) -> Data:
    """The arrays of an `.npz` archive, compressed or not: "train", "validation" and "test", or one, whatever its name.

    Class labels are in "train_labels", "validation_labels" and "test_labels", or in "labels". Of one array the seed
    draws the splits, as in ``npy``, whose parameters these are.
    """
    file = existing(path, "an .npz file", folder=False)
    arrays = _unzipped(file)
    values = {key: array for key, array in arrays.items() if not key.endswith("labels")}
    if values.keys() != set(SPLITS) and len(values) != 1:
        found = f"{', '.join(map(ascii, values)) or 'none'}"
        raise fault(file, "arrays train, validation and test, or one alone", found, "save only these")
    read = {key: examples(Path(f"{file}:{key}"), array, levels, channels) for key, array in values.items()}
    splits = {key: tensor for key, (tensor, _) in read.items()}
    classes = {key: _labels_of(file, arrays, key, len(tensor)) for key, tensor in splits.items()}
    if len(splits) == 1:
        (only,), (its_labels,) = splits.values(), classes.values()
        wanted = sizes(len(only), validation, test)
        classes = hold_out(its_labels, wanted, seed) if its_labels is not None else {}
        splits = hold_out(only, wanted, seed)
    found = {levels for _, levels in read.values()}
    if len(found) > 1:
        raise fault(file, "splits of one kind", "floats and levels", "save all as one type, or give data.levels")
    return Data(name or shown(file.stem), **splits, levels=found.pop(), labels=_all_or_none(file, classes))


def _all_or_none(file: Path, classes: dict[str, Tensor | None]) -> dict[str, Tensor] | None:
    there = {key: labels for key, labels in classes.items() if labels is not None}
    if there and len(there) < len(SPLITS):
        raise fault(file, "labels of every split, or of none", f"those of {', '.join(there)}", "save the others too")
    return there or None


def _labels_of(file: Path, arrays: dict[str, np.ndarray], key: str, count: int) -> Tensor | None:
    found = arrays.get(f"{key}_labels", None if key in SPLITS else arrays.get("labels"))
    return None if found is None else label_tensor(Path(f"{file}:{key}_labels"), found, count)


def _mapped(file: Path) -> np.ndarray:
    """The array of a file, as a map of it whose changes stay in memory."""
    with explained(file, *_DAMAGED), file.open("rb") as opened:
        header = read_header(file, opened)
        found = file.stat().st_size
        if found != header.total:
            raise fault(file, f"{header.total} bytes (shape {header.shape} of {header.dtype})", f"{found}")
        if 0 in header.shape:
            raise fault(file, "at least one value", f"the shape {header.shape}", "check what was saved")
        content = mmap.mmap(opened.fileno(), 0, **_COPY_ON_WRITE)
    order = "F" if header.columns_first else "C"
    return np.ndarray(header.shape, header.dtype, content, header.length, order=order)


def _unzipped(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by their names, in memory."""
    with explained(file, *_DAMAGED), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(file, members)
        return {member.filename.removesuffix(".npy"): _member(file, archive, member) for member in members}


def _check_members(file: Path, members: list[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    for member in members:
        if not member.filename.removesuffix(".npy").isidentifier() or names.count(member.filename) > 1:
            raise fault(file, "arrays NAME.npy, each once", ascii(member.filename), "save it by numpy.savez")
        if member.compress_type not in _METHODS or member.flag_bits & 1:
            raise fault(file, "stored or deflated arrays", f"{member.filename} packed otherwise", "use numpy.savez")
        if member.file_size > DEFLATE_RATIO * max(member.compress_size, 1):
            words = f"{member.file_size} bytes of {member.filename} promised in {member.compress_size}"
            raise fault(file, "sizes that deflate can reach", words)
    if (total := sum(member.file_size for member in members)) > LIMIT:
        cure = "save a .npy file, which data=npy maps, or raise experiments.dataset.LIMIT"
        raise fault(file, f"at most {LIMIT} bytes when unpacked", f"{total}", cure)


def _member(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    where = Path(f"{file}:{member.filename}")
    with archive.open(member) as opened:
        header = read_header(where, opened)
        if header.total != member.file_size:
            expected = f"{header.total} bytes (shape {header.shape} of {header.dtype})"
            raise fault(where, expected, f"{member.file_size}")
        content = read_at_most(opened, header.total - header.length + 1)
    if len(content) != header.total - header.length:
        raise fault(where, f"{header.total - header.length} bytes of values", f"{len(content)}")
    flat = np.frombuffer(content, header.dtype)
    return flat.reshape(header.shape, order="F" if header.columns_first else "C")


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of a `.npy` stream, read up to its end. Raises DataError for one of objects, or none at all."""
    start = file.read(12)
    at = 10 if start[6:7] == b"\x01" else 12  # two bytes of length in version 1, four in others
    length = at + int.from_bytes(start[8:at], "little")
    if len(start) < 12 or length > _LONGEST_HEADER:
        raise fault(path, f"a .npy header of at most {_LONGEST_HEADER} bytes", "none", "save it by numpy.save")
    stream = io.BytesIO(start + file.read(length - 12))
    try:
        read = _HEADERS[np.lib.format.read_magic(stream)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, columns_first, dtype = read(stream)
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise fault(path, "a .npy header", f"{type(error).__name__}: {error}"[:200], "save it by numpy.save") from None
    if dtype.hasobject:
        cure = "save it again as numbers, array.astype('float32')"
        raise fault(path, "numbers", "Python objects, which could run code when they are read", cure)
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise fault(path, "an array of integers or floats", f"the type {dtype}", "save it as float32 or uint8")
    if any(type(size) is not int or size < 0 for size in shape):
        raise fault(path, "a shape of positive sizes", f"{shape}")
    return Header(shape, columns_first, dtype, length)
