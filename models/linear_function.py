r"""A function that is linear, though nobody wrote its matrix down, as an operator.

The adjoint of f at any point is its derivative's transpose, v -> (df/dx)^T v, one pass backwards; for a linear f that
is the same at all points. What isn't linear is refused at construction, by the definition: f(0) = 0 and

    f(a x + b x') = a f(x) + b f(x')

on random x, x', of the default type and on the default device, to half of the digits of the type.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.operators import PROBES, LinearOperator, sizes
from sde import Noise

_A, _B = -300.0, 7.0  # unlike in sign and size, so that neither abs nor a clamp at the range of the data is missed


class Linear(LinearOperator):
    """A linear ``function`` of ``(B, *shape)``, each sample on its own, differentiable by torch.

    A filter, a Fourier transform's real part, a tomograph, a module such as a convolution without bias. The shape of y
    is found by calling it. Raises ``ValueError`` where it isn't linear, mixes samples, or hides its derivative.

    Parameters
    ----------
    function: ``(B, *shape)`` to ``(B, *observed)``, for any B.
    shape: shape of one x.
    seed: of the inputs on which it is checked.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], shape: Sequence[int], seed: int = 0):
        x = Noise(seed).normal((3, *sizes(shape)), PROBES, dtype=torch.get_default_dtype())
        with torch.no_grad():
            y = function(x)
            _check_output(y, x)
            _check_batch(function, x, y)
            _check_linear(function, x, y)
        super().__init__(shape, y.shape[1:])
        self.function = function
        self._check_adjoint(x, y, Noise(seed).normal(tuple(y.shape), PROBES + 2**20, y.device, y.dtype))

    def _forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        _, transpose = torch.func.vjp(self.function, y.new_zeros(len(y), *self.shape))
        return transpose(y)[0]

    def _check_adjoint(self, x: Tensor, y: Tensor, v: Tensor) -> None:
        with torch.no_grad():
            error = ((y * v).sum() - (x * self.adjoint(v)).sum()).abs()
        if not bool(error <= _digits(y) * y.norm() * v.norm()):
            raise ValueError(
                f"Linear: expected a function with a derivative, found <f(x), y> off by {float(error):.2g} of "
                f"<x, f^T y>; compute it by torch, without detach or no_grad"
            )


def _digits(y: Tensor) -> float:
    return torch.finfo(y.dtype).eps ** 0.5


def _check_output(y: Tensor, x: Tensor) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() < 2 or len(y) != len(x):
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"Linear: expected a function from {tuple(x.shape)} to a floating tensor of shape ({len(x)}, ...), found "
            f"{found}; keep the batch as axis 0 and, for one number a sample, an axis 1 of size 1"
        )


def _check_batch(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    alone = torch.cat([function(part) for part in x.split(1)])
    if alone.shape != y.shape or not _close(alone, y):
        raise ValueError(
            "Linear: expected a function of each sample on its own, found that its value for a sample changes with the "
            "batch; don't mix along axis 0"
        )


def _check_linear(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    offset = float(function(torch.zeros_like(x)).abs().max())
    if offset != 0:  # exact: of zeros, sums of products are zeros
        raise ValueError(
            f"Linear: expected a linear function, found f(0) = {offset:.2g}; take f(0) off the function and off the "
            f"observation, or use Guided for a nonlinear observation"
        )
    expected, found = _A * y + _B * y.roll(1, 0), function(_A * x + _B * x.roll(1, 0))
    if not _close(found, expected):
        raise ValueError(
            f"Linear: expected a linear function, found f(a x + b x') off by {float((found - expected).norm()):.2g} of "
            f"a f(x) + b f(x'); use Guided for a nonlinear observation"
        )


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _digits(expected) * expected.norm())
