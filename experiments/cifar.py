"""CIFAR-10 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009) in either official version.

The binary version, cifar-10-binary.tar.gz: records of 3073 bytes, a label 0..9, then 1024 red, 1024 green and 1024 blue
values, row by row. The python version, cifar-10-python.tar.gz: the same in the streams of ``cifar_batches``. Either as
the archive or as the folder that it unpacks to.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.cifar_batches import read_batch
from experiments.dataset import Data, existing, explained, fault, last
from experiments.idx import read_at_most
from experiments.tar import tar_members

CLASSES, RECORD = 10, 1 + 3 * 32 * 32
LIMIT, WHOLE = 2**26, 2**28  # bytes of one batch and of the unpacked archive, officially 3.1e7 and 1.9e8
_PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_FOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")
Read = Callable[[Path, bytes], tuple[Tensor, Tensor]]


def cifar10(path: str | None = None, validation: int = 5000, flip: bool = True) -> Data:
    """CIFAR-10: (3, 32, 32), 256 levels, with labels, in the official order.

    path: one of the official archives, or its folder once unpacked.
    validation: how many of the last training images are the validation split.
    flip: whether training may mirror images.
    Raises DataError that names the file, what was expected and found, and the cure.
    """
    place = existing(path, "cifar-10-binary.tar.gz or cifar-10-python.tar.gz, or the folder of either", folder=None)
    batches = [_shaped(place / name, *read(place / name, content)) for name, read, content in _contents(place)]
    images, labels = (torch.cat(parts) for parts in zip(*batches[:-1], strict=True))
    kept = len(images) - last(validation, len(images))
    test, test_labels = batches[-1]
    classes = {"train": labels[:kept], "validation": labels[kept:], "test": test_labels}
    splits = {"train": images[:kept], "validation": images[kept:], "test": test}
    return Data("cifar10", **splits, levels=256, labels=classes, flips=flip)


def _contents(place: Path) -> list[tuple[str, Read, bytes]]:
    """Name, reader and content of the five training batches and of the test batch."""
    versions: list[tuple[Read, list[str]]] = [(_records, [f"{n}.bin" for n in _PARTS]), (read_batch, list(_PARTS))]
    wanted = [name for _, names in versions for name in names]
    found = _of_folder(place, wanted) if place.is_dir() else tar_members(place, wanted, LIMIT, WHOLE)
    for read, names in versions:
        if found.keys() >= set(names):
            return [(name, read, found[name]) for name in names]
    there = ", ".join(sorted(found)) or "none of them"
    expected = "data_batch_1 to data_batch_5 and test_batch, all with .bin or all without"
    raise fault(place, expected, there, "give the official archive, or its folder")


def _of_folder(place: Path, wanted: list[str]) -> dict[str, bytes]:
    files = [place / folder / name for folder in _FOLDERS for name in wanted]
    return {file.name: _file(file) for file in files if file.is_file()}


def _file(file: Path) -> bytes:
    with explained(file, "file", EOFError), file.open("rb") as opened:
        content = bytes(read_at_most(opened, LIMIT + 1))
    if len(content) > LIMIT:
        raise fault(file, f"at most {LIMIT} bytes", "more")
    return content


def _records(path: Path, content: bytes) -> tuple[Tensor, Tensor]:
    if not content or len(content) % RECORD:
        raise fault(path, f"a multiple of {RECORD} bytes", f"{len(content)}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
    return rows[:, 1:], rows[:, 0].long()


def _shaped(path: Path, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) != len(labels):
        raise fault(path, "one label per image", f"{len(rows)} images and {len(labels)} labels")
    if int(labels.max()) >= CLASSES:
        raise fault(path, f"labels 0 to {CLASSES - 1}", f"{int(labels.max())}", "this is not CIFAR-10")
    return rows.reshape(-1, 3, 32, 32), labels
