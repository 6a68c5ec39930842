r"""The meeting point of networks and solvers: a model predicts the pair (x_0, eps), and all else is read off it.

Everything rests on the invariant x_t = alpha x_0 + sigma eps of the pair. From it (Song et al., 2021, eqs. 6 and 13;
Tweedie's formula)

    score     = -eps / sigma
    velocity  = alpha' x_0 + sigma' eps  =  f - (g^2 / 2) score        (the probability-flow ODE)

In float32 neither x_0 nor eps nor the score alone is accurate at both ends of time; the pair is.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from sde.base import GaussianSDE, expand


class Prediction(NamedTuple):
    """Posterior means of the data and of the noise given x_t: alpha x0 + sigma eps = x_t. Shapes of ``x_t``."""

    x0: Tensor
    eps: Tensor


class ScoreModel(nn.Module, ABC):
    """A model of the score of p_t under ``sde``, for all t; a subclass states ``forward``.

    ``x`` has the shape ``(B, ...)``, ``t`` the shape ``()`` or ``(B,)``.
    """

    def __init__(self, sde: GaussianSDE):
        super().__init__()
        if not isinstance(sde, GaussianSDE):
            raise TypeError(f"expected a GaussianSDE such as VP(), found {type(sde).__name__}")
        self.sde = sde

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        """The pair (x_0, eps) predicted from ``x`` at time ``t``."""

    def score(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        """Gradient of log p_t at ``x``; shape of ``x``."""
        return -self(x, t, **condition).eps / expand(self.sde.sigma(t), x)

    def velocity(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        """dx/dt along the probability-flow ODE; shape of ``x``."""
        prediction, at = self(x, t, **condition), self.sde.coefficients(t)
        return expand(at.d_alpha, x) * prediction.x0 + expand(at.d_sigma, x) * prediction.eps
