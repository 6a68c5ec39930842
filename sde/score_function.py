"""A score without a pair, for processes that have no Gaussian kernel.

Drift and diffusion give the rest: velocity = f - (g^2 / 2) score, reverse drift = f - g^2 score.
"""

from collections.abc import Callable

from torch import Tensor

from sde.base import SDE, expand
from sde.score import ScoreField


class ScoreFunction(ScoreField):
    """A function or network ``function(x, t, **condition)`` as the score under any SDE, affine or not."""

    def __init__(self, sde: SDE, function: Callable[..., Tensor]):
        super().__init__(sde)
        self.function = function

    def forward(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        return self.function(x, t, **condition)

    def score(self, x: Tensor, t: Tensor, sigma: Tensor | None = None, **condition) -> Tensor:
        return self(x, t, **condition)

    def velocity(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        return self._drift(x, t, 0.5, **condition)

    def reverse_drift(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        return self._drift(x, t, 1.0, **condition)

    def _drift(self, x: Tensor, t: Tensor, share: float, **condition) -> Tensor:
        """f - share g^2 score."""
        return self.sde.drift(x, t) - expand(share * self.sde.diffusion(t).square(), x) * self(x, t, **condition)
