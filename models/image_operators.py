r"""Linear operators on data with places: images (C, H, W), signals (C, L), and single rows (L,).

All axes but the first, the channels', are places; in data of one axis, that is it, and there is one channel. The
operators are those of the literature's inverse problems, inpainting, deblurring, super-resolution, colorization (Kawar
et al., 2022, "Denoising diffusion restoration models"; Chung et al., 2023, "Diffusion posterior sampling").
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.operators import PLACES, LinearOperator, Mask, kept, like, sizes
from sde import Noise

_CORRELATIONS = (F.conv1d, F.conv2d, F.conv3d)
_BT601 = (0.299, 0.587, 0.114)
_SIDES = {"left": (-1, False), "right": (-1, True), "top": (-2, False), "bottom": (-2, True)}  # axis, the second half


def places(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of places in the ``shape`` of one sample."""
    shape = sizes(shape)
    return shape[1:] or shape


class Blur(LinearOperator):
    """Every channel convolved with a ``kernel``, or with a Gaussian of ``std`` in places; y has the shape of x.

    A single bright place becomes the kernel, centred on it. Beyond the borders there are zeros, so that the adjoint is,
    exactly, the convolution with the flipped kernel.

    Parameters
    ----------
    shape: shape of one x, of 1 to 3 axes of places.
    std: standard deviation of the Gaussian, of sum 1.
    radius: places from its centre to its end; by default 4 std, beyond which about 1e-4 of it lies.
    kernel: instead of these, the kernel itself, of odd sizes, one for each axis of places; taken as it is.
    """

    def __init__(
        self,
        shape: Sequence[int],
        std: float | None = None,
        radius: int | None = None,
        kernel: Tensor | None = None,
    ):
        axes = len(places(shape))
        if axes > len(_CORRELATIONS):
            raise ValueError(f"Blur takes data of 1 to 3 axes of places, found {axes} in the shape {tuple(shape)}")
        if (std is None) == (kernel is None) or (std is None and radius is not None):
            raise ValueError(
                f"Blur takes either std, with or without radius, or kernel, found std={std!r}, radius={radius!r} and "
                f"{'no' if kernel is None else 'a'} kernel; leave out the others"
            )
        kernel = gaussian_kernel(std, radius, axes) if kernel is None else _given_kernel(kernel, axes)
        super().__init__(shape, shape, std=std, kernel=tuple(kernel.shape))
        self.register_buffer("kernel", kernel, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        # What torch calls a convolution is a correlation: the kernel turned around.
        return self._correlate(x, self.kernel.flip(tuple(range(self.kernel.dim()))))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._correlate(y, self.kernel)

    def _correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        axes = kernel.dim()
        maps = x.reshape(x.shape[:-axes].numel(), 1, *x.shape[-axes:])
        padding = tuple(size // 2 for size in kernel.shape)
        return _CORRELATIONS[axes - 1](maps, like(kernel, x)[None, None], padding=padding).reshape(x.shape)


def gaussian_kernel(std: float, radius: int | None = None, axes: int = 2) -> Tensor:
    """exp(-r^2 / (2 std^2)) at the distances r from the centre, of sum 1; float64, ``2 radius + 1`` along each axis."""
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, in places, found {std!r}")
    radius = math.ceil(4 * std) if radius is None else radius
    if not isinstance(radius, int) or radius < 1:
        raise ValueError(f"radius must be a number of places, at least 1, found {radius!r}")
    squares = torch.arange(-radius, radius + 1, dtype=torch.float64).square()
    weights = torch.softmax(-squares / (2 * std**2), dim=0)
    kernel = weights
    for _ in range(axes - 1):
        kernel = kernel[..., None] * weights
    return kernel


def _given_kernel(values: object, axes: int) -> Tensor:
    kernel = kept(values, "kernel")
    if kernel.dim() != axes or not all(size % 2 for size in kernel.shape):
        raise ValueError(
            f"expected a kernel of {axes} axes of odd sizes, so that it has a centre, found {tuple(kernel.shape)}; "
            f"pad it with zeros"
        )
    return kernel


class Downsampling(LinearOperator):
    """The means of blocks of ``factor`` places along each of their axes: super-resolution. A A^T = I / factor^k."""

    def __init__(self, shape: Sequence[int], factor: int):
        shape, grid = sizes(shape), places(shape)
        if not isinstance(factor, int) or factor < 1 or any(size % factor for size in grid):
            raise ValueError(
                f"expected a factor that divides {' and '.join(map(str, grid))}, the axes of places in {shape}, found "
                f"{factor!r}; take another, or crop the data"
            )
        channels, coarse = shape[: -len(grid)], [size // factor for size in grid]
        super().__init__(shape, (*channels, *coarse), factor=factor)
        self._blocks = (*channels, *(n for size in coarse for n in (size, factor)))
        self._single = (*channels, *(n for size in coarse for n in (size, 1)))
        self._within = tuple(range(-2 * len(grid) + 1, 0, 2))
        self._count = factor ** len(grid)

    def _forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self._blocks).mean(self._within)

    def _adjoint(self, y: Tensor) -> Tensor:
        blocks = (y / self._count).reshape(len(y), *self._single).expand(len(y), *self._blocks)
        return blocks.reshape(len(y), *self.shape)


class Grayscale(LinearOperator):
    """The ``weights`` sum over the channels, ``(C, ...)`` to ``(1, ...)``: colorization.

    ``weights`` are C numbers; by default the luma of ITU-R BT.601, 0.299, 0.587 and 0.114, for 3 channels, and 1 / C
    for others: these sum to 1, so that y has the range of the data.
    """

    def __init__(self, shape: Sequence[int], weights: Sequence[float] | None = None):
        shape = sizes(shape)
        channels = shape[0] if len(shape) > 1 else 1
        if channels == 1:
            raise ValueError(
                f"Grayscale takes data (C, ...) of 2 channels or more, found the shape {shape}; what has one channel "
                f"has no colour"
            )
        default = _BT601 if channels == len(_BT601) else (1 / channels,) * channels
        weights = kept(default if weights is None else list(weights), "weights")
        if weights.shape != (channels,) or not bool(weights.any()):
            raise ValueError(f"expected {channels} weights, one for each channel, not all 0, found {weights.tolist()}")
        super().__init__(shape, (1, *shape[1:]), weights=tuple(round(w, 4) for w in weights.tolist()))
        self.register_buffer("weights", weights.reshape(channels, *(1 for _ in shape[1:])), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return (like(self.weights, x) * x).sum(1, keepdim=True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return like(self.weights, y) * y


def box_mask(shape: Sequence[int], size: int | Sequence[int]) -> Mask:
    """A box of ``size`` places in the middle is hidden, the rest known, in all channels; one size, or one an axis."""
    grid = places(shape)
    size = (size,) * len(grid) if isinstance(size, int) else tuple(size)
    if len(size) != len(grid) or not all(0 < n <= whole for n, whole in zip(size, grid, strict=True)):
        raise ValueError(f"expected a size of the hidden box from 1 to {grid}, the axes of places, found {size}")
    mask = torch.ones(grid, dtype=torch.bool)
    mask[tuple(slice((whole - n) // 2, (whole - n) // 2 + n) for n, whole in zip(size, grid, strict=True))] = False
    return Mask(mask, shape)


def half_mask(shape: Sequence[int], side: str = "left") -> Mask:
    """The half at ``side`` (left, right, top or bottom) is known, the other hidden; the middle of odd sizes is hidden.

    Left and right are along the last axis, top and bottom along the one before it.
    """
    grid = places(shape)
    if side not in _SIDES or len(grid) < -_SIDES[side][0]:
        fitting = [name for name, (axis, _) in _SIDES.items() if len(grid) >= -axis]
        raise ValueError(f"side must be one of {', '.join(fitting)} for data of shape {tuple(shape)}, found {side!r}")
    axis, second = _SIDES[side]
    known = torch.arange(grid[axis]) < grid[axis] // 2
    known = known.flip(0) if second else known
    return Mask(known.reshape(-1, *(1 for _ in range(-axis - 1))), shape)


def random_mask(shape: Sequence[int], share: float, seed: int = 0) -> Mask:
    """A ``share`` of the places, rounded, is known and the rest hidden, in all channels; which ones, ``seed`` says."""
    grid = places(shape)
    if not 0 < share <= 1:
        raise ValueError(f"share, of the places that are known, must be above 0 and at most 1, found {share!r}")
    count = math.prod(grid)
    order = Noise(seed).words((1, count), PLACES)[0].argsort(stable=True)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[: round(share * count)]] = True
    return Mask(mask.reshape(grid), shape)
