"""The data sets by name. Each is a plain function of keyword arguments (a Hydra target) that returns a `Data`.

Here are the digits and the files of MNIST's form; densities in the plane are in ``planes``, and the readers of the
user's own files in ``arrays``, ``images`` and ``tables``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.arrays import npy, npz
from experiments.cifar import cifar10
from experiments.dataset import SPLITS, Data, DataError, existing, fault, last
from experiments.idx import read_idx
from experiments.images import image_folder
from experiments.planes import checkerboard, mixture2d, moons, swiss_roll
from experiments.tables import table

__all__ = [
    "Data",
    "DataError",
    "checkerboard",
    "cifar10",
    "digits",
    "digits_inverted",
    "digits_shuffled",
    "fashion_mnist",
    "image_folder",
    "mixture2d",
    "mnist",
    "moons",
    "npy",
    "npz",
    "swiss_roll",
    "table",
]


def digits(seed: int = 0) -> Data:
    """The 1797 digits of scikit-learn: (1, 8, 8), 17 levels, with labels.

    The splits are stratified by label: 300 test images are drawn first, then 200 validation images, and 1297 are left
    to train on. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), its test part.
    """
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.to(torch.uint8).view(-1, 1, 8, 8)
    rest, test = _stratified(torch.arange(len(labels)), labels, 300, seed)
    train, validation = _stratified(rest, labels, 200, seed)
    splits = {"train": train, "validation": validation, "test": test}
    classes = {name: labels[index].long() for name, index in splits.items()}
    return Data("digits", **{name: images[index] for name, index in splits.items()}, levels=17, labels=classes)


def _stratified(index: Tensor, labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    parts = train_test_split(index.numpy(), test_size=size, stratify=labels[index].numpy(), random_state=seed)
    return tuple(torch.from_numpy(part) for part in parts)


def digits_inverted(seed: int = 0) -> Data:
    """``digits`` with dark for bright: level k becomes 16 - k."""
    return _altered("digits_inverted", lambda images, _: 16 - images, seed)


def digits_shuffled(seed: int = 0) -> Data:
    """``digits`` with the pixels of each image in a random order of its own."""

    def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.rand(len(images), 64, generator=generator).argsort(dim=1)
        return images.flatten(1).gather(1, order).view_as(images)

    return _altered("digits_shuffled", shuffled, seed)


def _altered(name: str, change: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> Data:
    """The digits, in the splits of ``seed``, with their images changed."""
    data, generator = digits(seed), torch.Generator().manual_seed(seed)
    splits = {split: change(getattr(data, split), generator) for split in SPLITS}
    return replace(data, name=name, **splits)


def mnist(path: str | None = None, validation: int = 5000) -> Data:
    """MNIST from a folder: (1, 28, 28), 256 levels, with labels, in the official order.

    path: the folder with the four official IDX files, each plain or `.gz`.
    validation: how many of the last training images are the validation split.
    Raises DataError that names the file, what was expected and found, and the cure.
    """
    return _of_idx_files("mnist", path, validation)


def fashion_mnist(path: str | None = None, validation: int = 5000) -> Data:
    """Fashion-MNIST, which has the form, the counts and the file names of MNIST; see ``mnist``.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset", 2017.
    """
    return _of_idx_files("fashion_mnist", path, validation)


def _of_idx_files(name: str, path: str | None, validation: int) -> Data:
    folder = existing(path, f"the folder with the four IDX files of {name}", folder=True)
    images, labels = _pair(folder, "train")
    test, test_labels = _pair(folder, "t10k")
    kept = len(images) - last(validation, len(images))
    classes = {"train": labels[:kept], "validation": labels[kept:], "test": test_labels}
    return Data(name, images[:kept], images[kept:], test, levels=256, labels=classes)


def _pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    image_file, label_file = _find(folder, prefix, "images", 3), _find(folder, prefix, "labels", 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise fault(image_file, "images of 28x28", size, "point data.path at the original files")
    if len(images) != len(labels):
        found = f"{len(images)} images and {len(labels)} labels"
        raise fault(label_file, "one label per image", found, "take both files from one source")
    return images.unsqueeze(1), labels.long()


def _find(folder: Path, prefix: str, kind: str, rank: int) -> Path:
    names = [f"{prefix}-{kind}{mark}idx{rank}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise fault(folder, f"one of {', '.join(names)}", "none", "put it there or change data.path")
