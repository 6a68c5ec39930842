"""The data sets: three fixed splits, and what is known about the data.

Discrete data stay integer levels here; a dequantizer owns the map to continuous x. Each data set is a plain function
of keyword arguments (a Hydra target) that returns a `Data`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.idx import DataError, read_idx

__all__ = ["Data", "DataError", "digits", "digits_inverted", "digits_shuffled", "mixture2d", "mnist"]


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three splits of shape (N, *shape).

    train, validation, test: uint8 levels 0..levels-1 when `levels` is given, else float32.
    levels: the number of levels of discrete data; None for continuous data.
    labels: split name -> int64 class labels (N,), or None.
    density: the known density of a Gaussian mixture, float64 "weights" (K,), "means" (K, D) and "covariances"
    (K, D, D); or None.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int | None = None
    labels: dict[str, Tensor] | None = None
    density: dict[str, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train.shape[1:])


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
    splits = {split: change(getattr(data, split), generator) for split in ("train", "validation", "test")}
    return replace(data, name=name, **splits)


def mnist(path: str | None = None, validation: int = 5000) -> Data:
    """MNIST, or a data set in its format, from a folder: (1, 28, 28), 256 levels, with labels, in the official order.

    path: the folder with the four official IDX files, each plain or `.gz`.
    validation: how many of the last training images are the validation split.
    Raises DataError that names the file, what was expected and found, and the cure.
    """
    folder = _folder(path)
    images, labels = _pair(folder, "train")
    test, test_labels = _pair(folder, "t10k")
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 < validation < len(images):
        raise DataError(f"data.validation: expected an integer from 1 to {len(images) - 1}, found {validation!r}.")
    cut = len(images) - validation
    classes = {"train": labels[:cut], "validation": labels[cut:], "test": test_labels}
    return Data("mnist", images[:cut], images[cut:], test, levels=256, labels=classes)


def _folder(path: str | None) -> Path:
    if not path:
        raise DataError("data.path=FOLDER is needed: the folder with the four IDX files of MNIST; found none.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise DataError(f"data.path={path}: expected a folder with the four IDX files of MNIST, found {found}.")
    return folder


def _pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    image_file, label_file = _find(folder, prefix, "images", 3), _find(folder, prefix, "labels", 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise DataError(f"{image_file}: expected images of 28x28, found {size}; point data.path at the original files.")
    if len(images) != len(labels):
        found = f"{len(images)} images and {len(labels)} labels"
        raise DataError(f"{label_file}: expected one label per image, found {found}; take both files from one source.")
    return images.unsqueeze(1), labels.long()


def _find(folder: Path, prefix: str, kind: str, rank: int) -> Path:
    names = [f"{prefix}-{kind}{mark}idx{rank}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: expected one of {', '.join(names)}, found none; put it there or change data.path.")


# Narrow, tilted and of unequal weight: isotropic or balanced components would hide errors. Close to zero mean and
# unit variance as a whole.
WEIGHTS = [0.25, 0.2, 0.2, 0.15, 0.12, 0.08]
MEANS = [[-1.2, 0.6], [1.1, 0.9], [0.2, -1.3], [-0.9, -0.9], [1.2, -0.5], [0.1, 1.6]]
DEVIATIONS = [[0.35, 0.15], [0.2, 0.4], [0.45, 0.2], [0.15, 0.3], [0.25, 0.25], [0.3, 0.1]]
CORRELATIONS = [0.8, -0.7, 0.5, 0.6, -0.85, -0.4]


def mixture2d(train: int = 20000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Data:
    """Draws from a fixed mixture of six correlated Gaussians in the plane: (2,), float32, with its exact density.

    The test split depends on `seed` and `test` alone, so that runs with more training data are compared on it.
    """
    for name, size in {"train": train, "validation": validation, "test": test}.items():
        if size < 1:
            raise DataError(f"data.{name}: expected at least 1 point, found {size}.")
    density, generator = _density(), torch.Generator().manual_seed(seed)
    held_out = {name: _draw(density, size, generator) for name, size in (("test", test), ("validation", validation))}
    return Data("mixture2d", train=_draw(density, train, generator), **held_out, density=density)


def _density() -> dict[str, Tensor]:
    weights, means, deviations = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, MEANS, DEVIATIONS))
    correlations = torch.eye(2, dtype=torch.float64).repeat(len(weights), 1, 1)
    correlations[:, 0, 1] = correlations[:, 1, 0] = torch.tensor(CORRELATIONS, dtype=torch.float64)
    covariances = deviations[:, :, None] * correlations * deviations[:, None, :]
    return {"weights": weights, "means": means, "covariances": covariances}


def _draw(density: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    index = torch.multinomial(density["weights"], size, replacement=True, generator=generator)
    noise = torch.randn(size, 2, 1, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(density["covariances"])
    return (density["means"][index] + (factors[index] @ noise).squeeze(-1)).float()
