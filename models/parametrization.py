r"""What the network predicts: the second row of a 2x2 system over the unknowns (x_0, eps).

    [ x_t ]   [ alpha  sigma ] [ x_0 ]
    [  y  ] = [   a      b   ] [ eps ]

Training regresses y = a x_0 + b eps; inference inverts the matrix. A row is scaled to unit length, a^2 + b^2 = 1, so
that the network's output has the scale of its inputs at every noise level (for a row that says -eps/sigma the network
then gives -eps, as in the code of Song et al., 2021); EDM's has unit variance instead. Rows:

    noise     (0, 1)             Ho et al., "Denoising diffusion probabilistic models", 2020
    data      (1, 0)
    v         (-sigma, alpha)    Salimans and Ho, "Progressive distillation", 2022
    velocity  (alpha', sigma')   the probability-flow velocity; Lipman et al., "Flow matching", 2023
    score     (0, -1/sigma)      Song et al., 2021
    edm       (sigma/s, -alpha s) / sqrt(alpha^2 s^2 + sigma^2), data of standard deviation s: the network F of Karras
              et al., 2022, eq. 7 and table 1 (c_skip, c_out, c_in), whose target has unit variance at all levels
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from sde import GaussianSDE, Prediction
from sde.base import expand


class Parametrization(nn.Module, ABC):
    """How a network's output, given x_t, becomes the pair (x_0, eps)."""

    outputs: int = 1
    """Numbers that the network gives for each value of the data."""
    data_std: float = 1.0
    """Standard deviation of the data; the network's input is divided by sqrt(alpha^2 data_std^2 + sigma^2)."""

    @abstractmethod
    def predict(self, output: Tensor, x: Tensor, t: Tensor, sde: GaussianSDE) -> Prediction:
        """The pair from ``output`` of shape ``(B, outputs * C, ...)`` and ``x`` of shape ``(B, C, ...)``."""

    @abstractmethod
    def row(self, t: Tensor, sde: GaussianSDE) -> tuple[Tensor, Tensor]:
        """(a, b) of unit length: the combination a x_0 + b eps whose squared error is the simple loss."""


class _Row(Parametrization):
    """A network that predicts y = a x_0 + b eps."""

    def predict(self, output: Tensor, x: Tensor, t: Tensor, sde: GaussianSDE) -> Prediction:
        a, b, alpha, sigma = (expand(c, x) for c in (*self.row(t, sde), sde.alpha(t), sde.sigma(t)))
        determinant = alpha * b - sigma * a
        return Prediction((b * x - sigma * output) / determinant, (alpha * output - a * x) / determinant)


class VarianceHead(ABC):
    """What a parametrization also is whose network predicts the variance of a chain's steps back."""

    @abstractmethod
    def variance_weight(self, output: Tensor) -> Tensor:
        """v in [0, 1] of ``GaussianChain.variance``, of the shape of the data, from all that the network gives."""


def _unit(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.hypot(a, b)
    return a / length, b / length


class NoiseRow(_Row):
    """y = eps."""

    def row(self, t, sde):
        return torch.zeros_like(t), torch.ones_like(t)


class DataRow(_Row):
    """y = x_0."""

    def row(self, t, sde):
        return torch.ones_like(t), torch.zeros_like(t)


class ScoreRow(_Row):
    """y = -eps, the score in units of 1/sigma."""

    def row(self, t, sde):
        return torch.zeros_like(t), -torch.ones_like(t)


class VRow(_Row):
    """y = alpha eps - sigma x_0, over sqrt(alpha^2 + sigma^2)."""

    def row(self, t, sde):
        return _unit(-sde.sigma(t), sde.alpha(t))


class EDMRow(_Row):
    """y = (sigma / s x_0 - alpha s eps) / sqrt(alpha^2 s^2 + sigma^2), s the data's standard deviation; s = 1: -v."""

    def __init__(self, data_std: float = 0.5):
        super().__init__()
        if isinstance(data_std, bool) or not isinstance(data_std, (int, float)) or not 0 < data_std < math.inf:
            raise ValueError(f"EDMRow: data_std must be a positive number, found {data_std!r}")
        self.data_std = data_std

    def row(self, t, sde):
        alpha, sigma, s = sde.alpha(t), sde.sigma(t), self.data_std
        length = torch.hypot(alpha * s, sigma)
        return sigma / (s * length), -alpha * s / length


class VelocityRow(_Row):
    """y = alpha' x_0 + sigma' eps, over sqrt(alpha'^2 + sigma'^2)."""

    def row(self, t, sde):
        at = sde.coefficients(t)
        return _unit(at.d_alpha, at.d_sigma)


ROWS = {
    "noise": NoiseRow,
    "data": DataRow,
    "v": VRow,
    "velocity": VelocityRow,
    "score": ScoreRow,
    "edm": EDMRow,
}
"""The parametrizations by the names that ``ScoreNetwork`` takes."""
