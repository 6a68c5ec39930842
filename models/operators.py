r"""Linear operators A with their adjoints: what is observed of data in an inverse problem.

An observation of x0 is y = A x0 + noise_std n with n ~ N(0, I). The gradient of its log-likelihood is
A^T (y - A x0) / noise_std^2, and where x0 is known as N(m, C) alone, y moves its mean by

    C A^T (A C A^T + noise_std^2 I)^-1 (y - A m)

(Gaussian conditioning; Song et al., 2023, "Pseudoinverse-guided diffusion models for inverse problems"). That needs no
more than A and its adjoint A^T, the inverse by conjugate gradients. The adjoint is defined by <A x, y> = <x, A^T y>.

An operator is no part of a trained model: its tensors are rebuilt from its arguments, never kept in a checkpoint. They
are held in float64, so that A is exact for data of every floating type; ``operator.float()`` spares a conversion.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from sde import Noise

# Draws apart from those of samples, probes and dequantization, also under the same seed.
NOISE, ROWS, PROBES, PLACES = range(7 * 2**29, 7 * 2**29 + 4)


class LinearOperator(nn.Module, ABC):
    """y = A x for every sample of a batch, and its adjoint; a subclass states ``_forward`` and ``_adjoint``.

    Both run inside ``torch.func.vjp`` and ``vmap``: nothing in them may depend on the values of the data.

    Parameters
    ----------
    shape, observed: shapes of one x and of one y, without the batch.
    told: what ``repr`` says beyond them.
    """

    def __init__(self, shape: Sequence[int], observed: Sequence[int], **told: object):
        super().__init__()
        self.shape, self.observed, self._told = sizes(shape), sizes(observed), told

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """``(B, *shape)`` to ``(B, *observed)``, in the type and on the device of ``x``."""

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """``(B, *observed)`` to ``(B, *shape)``, in the type and on the device of ``y``."""

    def forward(self, x: Tensor) -> Tensor:
        """A x, ``(B, *shape)`` to ``(B, *observed)``; in the precision of ``x`` also under autocast."""
        self._check(x, self.shape, "x")
        with _without_autocast(x):
            return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, ``(B, *observed)`` to ``(B, *shape)``; in the precision of ``y`` also under autocast."""
        self._check(y, self.observed, "y")
        with _without_autocast(y):
            return self._adjoint(y)

    def simulate(self, x: Tensor, noise_std: float, seed: int = 0, first: int = 0) -> Tensor:
        """y = A x + noise_std n for the samples ``x``, ``(B, *shape)``, numbered from ``first`` on; ``(B, *observed)``.

        The noise of a sample depends on ``seed`` and its number alone. It lies on all of y, also where a mask hides x.
        """
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must be at least 0 and finite, found {noise_std!r}")
        y = self(x)
        return y + noise_std * Noise(seed, first).normal(tuple(y.shape), NOISE, y.device, y.dtype)

    def probe(self, device: torch.device | str | None = None) -> Tensor:
        """A x of one x of random numbers, ``(*observed)`` in float64: 0 where A writes nothing, as behind a mask."""
        return self(Noise(0).normal((1, *self.shape), PROBES, device, torch.float64))[0]

    def extra_repr(self) -> str:
        told = (f"{name}={value!r}" for name, value in self._told.items() if value is not None)
        return ", ".join((f"{self.shape} -> {self.observed}", *told))

    def _check(self, x: Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(x.shape[1:]) != shape:
            expected = f"(B, {', '.join(map(str, shape))})"
            raise ValueError(
                f"{type(self).__name__} expected {name} of shape {expected}, found {tuple(x.shape)}; "
                f"give one sample as {name}[None], and build the operator anew for data of another shape"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} expected {name} of a floating type, found {x.dtype}; "
                f"map it to the range of the data first"
            )


def _without_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type  # "meta", of shapes without values, has no autocast to switch off
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple of positive integers. Raises ``ValueError``."""
    found = tuple(shape)
    if not found or not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(f"expected the shape of one sample, such as (2,) or (3, 32, 32), found {found}")
    return found


def like(buffer: Tensor, x: Tensor) -> Tensor:
    """``buffer`` in the type and on the device of ``x``."""
    return buffer.to(device=x.device, dtype=x.dtype)


def kept(values: object, name: str) -> Tensor:
    """A copy of ``values`` in float64. Raises ``ValueError`` if any isn't finite."""
    tensor = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must hold finite numbers, found {tensor[~tensor.isfinite()][0].item()}")
    return tensor


class Mask(LinearOperator):
    """x where ``mask`` is 1 and 0 elsewhere: inpainting, and tables with missing values. y has the shape of x.

    Values of x that are hidden don't count, not even where they are NaN.

    Parameters
    ----------
    mask: 1 or True for what is known, 0 or False for what is hidden; some must be known.
    shape: shape of one x if ``mask`` is to be broadcast to it, such as ``(H, W)`` to ``(C, H, W)``.
    """

    def __init__(self, mask: Tensor, shape: Sequence[int] | None = None):
        mask = torch.as_tensor(mask)
        other = (mask != 0) & (mask != 1)
        if bool(other.any()):
            found = mask[other][0].item()
            raise ValueError(f"a mask must hold 1 (known) and 0 (hidden) alone, found {found}; say mask > 0.5 or so")
        shape = tuple(mask.shape) if shape is None else sizes(shape)
        if mask.dim() > len(shape) or any(
            n not in (1, size) for n, size in zip(mask.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"expected a mask that broadcasts to the shape {shape} of one sample, found {tuple(mask.shape)}; "
                f"leave axes out at its front or give them the size 1"
            )
        if not bool(mask.any()):
            raise ValueError("expected a mask with something known (1), found all hidden (0); 1 stands for known")
        mask = mask.bool().expand(shape).clone()
        super().__init__(shape, shape, known=f"{int(mask.sum())} of {mask.numel()}")
        self.register_buffer("mask", mask, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask.to(x.device), x, 0.0)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


class _Dense(LinearOperator):
    """A matrix ``(m, D)`` on the D values of x taken flat; y is ``(m,)``."""

    def __init__(self, matrix: Tensor, shape: Sequence[int], **told: object):
        super().__init__(shape, (len(matrix),), **told)
        self.register_buffer("matrix", matrix, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ like(self.matrix, x).mT

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ like(self.matrix, y)).reshape(len(y), *self.shape)


class Matrix(_Dense):
    """A ``matrix`` of shape ``(m, D)`` on the D values of x taken flat; ``shape`` is that of x, by default ``(D,)``."""

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None):
        matrix = kept(matrix, "matrix")
        shape = tuple(matrix.shape[1:]) if shape is None else sizes(shape)
        if matrix.dim() != 2 or not matrix.numel() or matrix.shape[1] != math.prod(shape):
            raise ValueError(
                f"expected a matrix of shape (m, D) with D = {math.prod(shape)} values of x, found "
                f"{tuple(matrix.shape)}; one that maps y to x has to be transposed"
            )
        super().__init__(matrix, shape)


class RandomProjection(_Dense):
    """``rows`` orthonormal directions, uniform among all and fixed by ``seed``: compressed sensing. A A^T = I.

    They are the Q of a Gaussian matrix's QR decomposition with a positive diagonal of R, which makes it unique and its
    distribution Haar's (Mezzadri, 2007, "How to generate random matrices from the classical compact groups").
    """

    def __init__(self, shape: Sequence[int], rows: int, seed: int = 0):
        shape = sizes(shape)
        size = math.prod(shape)
        if not isinstance(rows, int) or not 1 <= rows <= size:
            raise ValueError(f"rows must be an integer from 1 to {size}, the number of values of x, found {rows!r}")
        gaussian = Noise(seed).normal((rows, size), ROWS, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian.mT)
        super().__init__((q * r.diagonal().sign()).mT.contiguous(), shape, seed=seed)


class Composition(LinearOperator):
    """outer(inner(x)), such as the downsampling of a blurred image."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        for part in (outer, inner):
            if not isinstance(part, LinearOperator):
                raise TypeError(f"expected a LinearOperator, found {type(part).__name__}; wrap a function in Linear")
        if outer.shape != inner.observed:
            raise ValueError(
                f"expected an outer operator on {inner.observed}, what {type(inner).__name__} observes, found "
                f"{type(outer).__name__} on {outer.shape}; build it with shape={inner.observed}"
            )
        super().__init__(inner.shape, outer.observed)
        self.outer, self.inner = outer, inner

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))
