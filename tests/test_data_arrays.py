"""Arrays of NumPy: what is read, and what is refused before it costs anything."""

import io
import logging
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from experiments import levels as level_module
from experiments.arrays import read_header
from experiments.data import npy, npz

SPLITS = ("train", "validation", "test")
random = np.random.default_rng(0)
SERIES, VECTORS = (random.normal(size=shape).astype(np.float32) for shape in ((30, 2, 16), (30, 5)))
BYTES = random.integers(0, 256, (30, 3, 4, 4), dtype=np.uint8)


def saved(folder, array, name="a.npy", **options):
    np.save(folder / name, array, **options)
    return folder / name


def whole(data):
    return torch.cat([getattr(data, split) for split in SPLITS])


def same_examples(data, array):
    return sorted(tuple(row.reshape(-1).tolist()) for row in array) == sorted(
        tuple(row.reshape(-1).tolist()) for row in whole(data)
    )


def header(text, version=1):
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


@pytest.mark.parametrize("array", [VECTORS, SERIES, BYTES, SERIES.reshape(30, 1, 2, 4, 4)], ids=lambda a: str(a.shape))
def test_any_rank_is_read_and_every_example_is_in_one_split(tmp_path, array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = npy(saved(tmp_path, array), validation=4, test=5)
    assert (data.name, data.shape) == ("a", array.shape[1:])
    assert [len(getattr(data, split)) for split in SPLITS] == [21, 4, 5]
    assert data.levels == (256 if array is BYTES else None) and same_examples(data, array)
    assert data.train.dtype == (torch.uint8 if array is BYTES else torch.float32)


@pytest.mark.parametrize(
    ("array", "levels"),
    [
        (SERIES.astype(np.float64), None),
        (SERIES.astype(">f4"), None),
        (np.asfortranarray(SERIES), None),
        (BYTES.astype(np.int64), 256),
        (BYTES.astype(np.float32), 256),
        (BYTES % 7, 7),
        (BYTES > 99, None),
    ],
    ids=["double", "big-endian", "columns first", "integers", "whole floats", "7 levels", "booleans"],
)
def test_other_types_and_orders_give_the_same_numbers(tmp_path, array, levels):
    data = npy(saved(tmp_path, array), levels=levels)
    assert same_examples(data, array)
    assert data.levels == (2 if array.dtype == bool else levels)
    assert data.train.dtype == (torch.float32 if data.levels is None else torch.uint8)


def test_a_file_is_mapped_and_never_changed(tmp_path):
    path = saved(tmp_path, SERIES)
    before = path.read_bytes()
    data = npy(path, validation=9, test=9)
    assert data.train.data_ptr() % 4096 == 128, "values start behind the header of a page of the map"
    data.train.zero_()
    assert path.read_bytes() == before


def test_labels_stay_with_their_examples(tmp_path):
    labels = saved(tmp_path, np.arange(30), "labels.npy")
    data = npy(saved(tmp_path, np.arange(60.0).reshape(30, 2)), labels=labels, validation=9, test=9)
    for split in SPLITS:
        assert torch.equal(2.0 * data.labels[split], getattr(data, split)[:, 0])
    for wrong in (np.arange(29), np.arange(30.0), np.arange(30) - 1):
        path = saved(tmp_path, wrong, "wrong.npy")
        refused(lambda path=path: npy(tmp_path / "a.npy", labels=path), "wrong.npy", "labels")


# --- where the channels are


@pytest.mark.parametrize(
    ("array", "channels", "shape"),
    [
        (BYTES[:, 0], "auto", (1, 4, 4)),
        (np.moveaxis(BYTES, 1, 3), "auto", (3, 4, 4)),
        (BYTES[:, :, :, :1], "last", (1, 3, 4)),
        (SERIES, "auto", (2, 16)),
        (BYTES.reshape(30, 3, 16), "auto", (3, 16)),
        (SERIES, "last", (16, 2)),
        (SERIES, "none", (1, 2, 16)),
        (BYTES, "first", (3, 4, 4)),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_the_channels_come_first(tmp_path, array, channels, shape, caplog):
    caplog.set_level(logging.INFO)
    data = npy(saved(tmp_path, array), channels=channels)
    assert data.shape == shape
    moved = shape != array.shape[1:]
    assert bool([r for r in caplog.records if "moved" in r.message or "added" in r.message]) == moved
    if array.ndim == 4 and channels == "auto":
        assert same_examples(data, BYTES)


def test_channels_that_can_be_either_are_asked_for(tmp_path):
    path = saved(tmp_path, BYTES[:, :, :, :3])
    refused(lambda: npy(path), "can be told", "(30, 3, 4, 3)", "data.channels=first or data.channels=last")
    refused(lambda: npy(path, channels="middle"), "auto, first, last, none", "middle")


# --- values


def test_values_that_are_not_finite_are_found_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(level_module, "_PIECE", 256)  # so that the fault lies in a later piece
    for bad in (np.nan, -np.inf):
        array = SERIES.copy()
        array[17, 1, 3] = bad
        path = saved(tmp_path, array)
        refused(partial(npy, path), "a.npy", "finite", bad, "[17, 1, 3]")
        refused(partial(npy, saved(tmp_path, np.trunc(abs(array))), levels=9), "finite", "[17, 1, 3]")


@pytest.mark.parametrize(
    ("array", "levels", "words"),
    [
        (BYTES / np.float32(255), 256, ("0..1", "round(x * 255)")),
        (BYTES / np.float32(127.5) - 1, 256, ("-1..1", "round((x + 1) / 2 * 255)")),
        (BYTES, 17, ("whole numbers 0 to 16", "data.levels")),
        (BYTES.astype(np.int16) - 3, 256, ("whole numbers 0 to 255", "-3")),
        (BYTES.astype(np.int64), None, ("integers of int64", "data.levels=K")),
        (SERIES.astype(np.complex64), None, ("complex64", "float32")),
        (SERIES.astype("U5"), None, ("<U5", "float32")),
        (SERIES.astype(np.float64) * 1e39, None, ("float32 can hold",)),
        (SERIES[:0], None, ("at least one value", "(0, 2, 16)")),
        (SERIES[:, :, :0], None, ("at least one value",)),
        (SERIES[:, 0, 0], None, ("examples (N, ...)", "(30,)", "(N, 1)")),
        (np.float32(3), None, ("examples (N, ...)",)),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_values_that_are_no_examples_are_refused(tmp_path, array, levels, words):
    refused(lambda: npy(saved(tmp_path, array), levels=levels), "a.npy", "expected", "found", *words)


@pytest.mark.parametrize("levels", [1, 0, 257, 2.5, True, "many"])
def test_levels_are_a_number_from_2_to_256(tmp_path, levels):
    refused(lambda: npy(saved(tmp_path, BYTES), levels=levels), "data.levels", "2 to 256", levels)


@pytest.mark.parametrize(
    ("array", "word"),
    [(BYTES / np.float32(255), "uint8"), (BYTES.astype(np.float32), "data.levels=256"), (SERIES, None)],
    ids=["0..1", "0..255", "normal"],
)
def test_floats_that_look_like_pictures_get_a_hint(tmp_path, array, word, caplog):
    npy(saved(tmp_path, array))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (word is not None) and (word is None or word in warned[0])


# --- files that are not what they say


def test_paths_are_files(tmp_path):
    refused(lambda: npy(), "data.path=FILE is needed", "a .npy file")
    refused(lambda: npz(), "data.path=FILE is needed", "an .npz file")
    refused(lambda: npy(tmp_path / "no"), "nothing there")
    refused(lambda: npz(tmp_path), "found a folder")
    for odd in ("x" * 5000, "~there_is_no_such_user/a.npy", "a\0b", f"{tmp_path}/\udcff.npy"):
        refused(partial(npy, odd), "data.path=", "nothing there")
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    refused(lambda: npy(tmp_path / "loop.npy"), "nothing there")


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    content = saved(tmp_path, SERIES[:5]).read_bytes()
    for length in [*range(0, 140), len(content) - 1]:
        (tmp_path / "cut.npy").write_bytes(content[:length])
        refused(lambda: npy(tmp_path / "cut.npy"), "cut.npy", "expected", "found")
    (tmp_path / "long.npy").write_bytes(content + b"\0")
    refused(lambda: npy(tmp_path / "long.npy"), f"{len(content)} bytes", f"{len(content) + 1}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(99),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -1), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': 3, }"),
        header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }"),
        header("__import__('os').system('true')"),
        header("(" * 9000),
        header("-" * 9000 + "1"),
        header("{}", version=2),
        header("{}", version=3),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99),
        b"\x93NUMPY\x09\x00" + bytes(99),
    ],
    ids=range(13),
)
def test_headers_that_say_nonsense_are_refused(tmp_path, content):
    (tmp_path / "odd.npy").write_bytes(content)
    refused(lambda: npy(tmp_path / "odd.npy"), "odd.npy", "expected", "found")


class Touch:
    """What, read as an object, would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_objects_are_never_read(tmp_path):
    marker = tmp_path / "marker"
    path = saved(tmp_path, np.array([[Touch(marker)]], dtype=object), allow_pickle=True)
    refused(lambda: npy(path), "Python objects", "run code", "astype('float32')")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(path, "x.npy")
    refused(lambda: npz(tmp_path / "a.npz"), "x.npy", "Python objects")
    refused(lambda: npy(saved(tmp_path, SERIES, "b.npy"), labels=path), "Python objects")
    assert not marker.exists()


def test_eight_terabytes_are_refused_before_anything_is_allocated(tmp_path):
    """In a process that may not have 2 GB more than it has."""
    lie = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000, 2000), }")
    (tmp_path / "a.npy").write_bytes(lie)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", lie)
    code = (
        "import resource, sys; from experiments.data import npy, npz, DataError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**31\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used, used))\n"
        "for read, path in zip((npy, npz), sys.argv[1:]):\n"
        "    try: read(path)\n"
        "    except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.npy", tmp_path / "a.npz"], capture_output=True, text=True, check=True
    )
    assert [line.count("expected 80000000000") for line in done.stdout.splitlines()] == [1, 1], done


# --- archives


def zipped(folder, compress=False, **arrays):
    (np.savez_compressed if compress else np.savez)(folder / "a.npz", **arrays)
    return folder / "a.npz"


@pytest.mark.parametrize("compress", [False, True])
def test_an_archive_holds_the_splits_and_their_labels(tmp_path, compress):
    splits = {"train": BYTES[:20], "validation": BYTES[20:25], "test": BYTES[25:]}
    labels = {f"{name}_labels": np.arange(len(x)) for name, x in splits.items()}
    data = npz(zipped(tmp_path, compress, **splits, **labels))
    for name, x in splits.items():
        assert torch.equal(getattr(data, name), torch.from_numpy(x))
        assert torch.equal(data.labels[name], torch.arange(len(x)))
    assert data.levels == 256 and data.labels["test"].dtype == torch.int64


def test_an_archive_may_keep_arrays_column_by_column(tmp_path):
    assert same_examples(npz(zipped(tmp_path, x=np.asfortranarray(SERIES))), SERIES)


def test_a_long_header_is_not_even_read(tmp_path):
    taken = []

    class Watched(io.BytesIO):
        def read(self, size=-1):
            taken.append(size)
            return super().read(size)

    refused(lambda: read_header(tmp_path, Watched(header(" " * 2**20, version=2))), "at most 16384 bytes")
    assert taken == [12]


def test_an_archive_of_one_array_is_split_as_a_file_is(tmp_path):
    path = zipped(tmp_path, x=VECTORS, labels=np.arange(30))
    data, plain = npz(path, seed=4), npy(saved(tmp_path, VECTORS), seed=4)
    assert all(torch.equal(getattr(data, split), getattr(plain, split)) for split in SPLITS)
    where = {tuple(row): i for i, row in enumerate(VECTORS.tolist())}
    assert [where[tuple(row)] for row in data.test.tolist()] == data.labels["test"].tolist()


def test_archives_of_anything_else_are_refused(tmp_path):
    refused(lambda: npz(zipped(tmp_path, a=BYTES, b=BYTES)), "train, validation and test", "'a', 'b'")
    refused(lambda: npz(zipped(tmp_path)), "train, validation and test", "none")
    halves = {"train": BYTES, "validation": BYTES, "test": BYTES}
    refused(lambda: npz(zipped(tmp_path, **halves, train_labels=np.arange(30))), "every split", "train")
    refused(lambda: npz(zipped(tmp_path, **halves | {"test": SERIES.reshape(30, 2, 4, 4)})), "splits of one kind")
    refused(lambda: npz(zipped(tmp_path, **halves | {"test": BYTES[:, :2]})), "one shape")
    bad = VECTORS.copy()
    bad[3, 2] = np.nan
    refused(lambda: npz(zipped(tmp_path, x=bad)), "a.npz:x", "[3, 2]")


@pytest.mark.parametrize("name", ["../x.npy", "/x.npy", "a/../../x.npy", "x/y.npy", ".npy", "x\\y.npy"])
def test_names_outside_the_archive_are_refused(tmp_path, name):
    buffer = io.BytesIO()
    np.save(buffer, VECTORS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, buffer.getvalue())
    refused(lambda: npz(tmp_path / "a.npz"), "NAME.npy, each once")


def member(text, size, **options):
    """An archive of one array with this header and so many zero bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        archive.writestr("x.npy", header(text) + bytes(size))
    return bytearray(buffer.getvalue())


def test_archives_that_would_grow_or_are_damaged_are_refused(tmp_path, monkeypatch):
    path, text = tmp_path / "a.npz", "{'descr': '|u1', 'fortran_order': False, 'shape': (10, 1000), }"
    bomb = member(text, 10**4, compression=zipfile.ZIP_DEFLATED)
    at = bomb.rindex(b"PK\x01\x02")
    bomb[at + 24 : at + 28] = struct.pack("<I", 10**9)
    path.write_bytes(bomb)
    refused(lambda: npz(path), "deflate can reach", "1000000000")
    path.write_bytes(member(text, 10**4, compression=zipfile.ZIP_LZMA))
    refused(lambda: npz(path), "stored or deflated")
    good = member(text, 10**4)
    for damaged in (good[:-30], good[:500], bytes(99), b"", good.replace(b"\0" * 50, b"\1" * 50)):
        path.write_bytes(damaged)
        refused(lambda: npz(path), "a.npz", "damaged")
    path.write_bytes(member(text, 10**4 - 1))
    refused(lambda: npz(path), "x.npy", "shape (10, 1000)")
    path.write_bytes(good)
    assert npz(path).shape == (1000,)
    monkeypatch.setattr("experiments.arrays.LIMIT", 10**4)
    refused(lambda: npz(path), "at most 10000 bytes when unpacked", "data=npy")
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("x.npy", b"again")
    refused(lambda: npz(path), "each once")


def test_what_must_be_converted_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(level_module, "LIMIT", 4 * SERIES.size - 1)
    refused(lambda: npy(saved(tmp_path, SERIES.astype(float))), "to convert from float64", "mapped and not read")
    npy(saved(tmp_path, SERIES))


def test_a_file_may_be_twice_as_large_as_memory(tmp_path):
    """A sparse one, of whose training examples twenty are looked at here."""
    memory, size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 2**24
    shape = (2 * memory // size + 1, 1, 2**12, 2**12)
    start = header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n")
    try:
        with (tmp_path / "a.npy").open("wb") as file:
            file.write(start)
            file.truncate(len(start) + shape[0] * size)
    except OSError:
        pytest.skip("this file system has no sparse files")
    data = npy(tmp_path / "a.npy", validation=2, test=2)
    assert len(data.train) == shape[0] - 4 and data.train.nbytes > 1.9 * memory
    assert all(int(data.train[i, 0, 0, 0]) == 0 for i in range(0, len(data.train), len(data.train) // 20))
