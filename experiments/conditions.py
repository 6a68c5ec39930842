"""What is known of the examples, for ``condition=``: operators on data of a shape, and classes.

A condition on data is a function of ``shape``, that of one example, to a ``LinearOperator``: those of ``models``, and
here the ones that choose their own size by the shape, or read a file. A condition on classes is a function of
``classes``, how many there are.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.build import ConfigError
from models import Mask, RandomProjection, box_mask
from models.image_operators import places


def box(shape: Sequence[int], size: int | None = None) -> Mask:
    """A box in the middle is hidden: half of each axis of places, at least one place; or ``size`` places along each."""
    return box_mask(shape, [max(1, axis // 2) for axis in places(shape)] if size is None else size)


def mask_file(shape: Sequence[int], path: str) -> Mask:
    """The mask of a ``.npy`` file: 1 where known, 0 where hidden, of the ``shape`` of an example or its last axes.

    Raises ``ConfigError`` for a file that is not there or no such array, and for another shape or other values.
    """
    values, fitting = _array(path), [tuple(shape[i:]) for i in range(len(shape))]
    if values.shape not in fitting:
        wanted = " or ".join(map(str, fitting))
        raise ConfigError(f"path={path}: expected a mask of shape {wanted}, found {values.shape}; cut it to that")
    strange = values[~np.isin(values, (0, 1))]
    if strange.size:
        cure = "save mask > 0.5 or so"
        raise ConfigError(f"path={path}: expected 1 (known) and 0 (hidden) alone, found {strange.flat[0]}; {cure}")
    return Mask(torch.from_numpy(values.astype(bool)), shape)


def _array(path: str) -> np.ndarray:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"path={path}: expected a .npy file of a mask, found no file; write it by numpy.save")
    try:
        with file.open("rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"path={path}: expected a .npy file of a mask ({error}); write it by numpy.save") from error


def projection(shape: Sequence[int], share: float = 0.25, seed: int = 0) -> RandomProjection:
    """Random orthonormal directions, as many as the ``share`` of the values of an example, rounded, at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"share, of the values that are observed, must be above 0 and at most 1, found {share!r}")
    return RandomProjection(shape, max(1, round(share * torch.Size(shape).numel())), seed)


def noise(shape: Sequence[int]) -> Mask:
    """All values are observed: denoising."""
    return Mask(torch.ones(tuple(shape), dtype=torch.bool))


def labels(classes: int, chosen: Sequence[int] | None = None) -> Tensor:
    """The ``chosen`` classes, int64 ``(K,)``, or all. Raises ``ConfigError`` for others than 0 to ``classes`` - 1."""
    if chosen is None:
        return torch.arange(classes)
    strange = [label for label in chosen if not 0 <= label < classes]
    if strange or not chosen or len(set(chosen)) < len(chosen):
        found = f"{strange[0]}" if strange else f"{list(chosen)}"
        raise ConfigError(
            f"posterior.labels: expected different classes in 0 .. {classes - 1}, found {found}; null is for all"
        )
    return torch.tensor(list(chosen))
