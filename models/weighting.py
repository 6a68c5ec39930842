r"""How much the error at each time counts.

Given x_t, the errors of a model's pair obey alpha dx_0 + sigma deps = 0: there is one error e, the length of
(dx_0, deps), and with h^2 = alpha^2 + sigma^2 that of any combination a x_0 + b eps is

    a dx_0 + b deps = (a sigma - b alpha) / h  e,       dx_0 = sigma / h  e,       deps = -alpha / h  e

(e is the error of v = (alpha eps - sigma x_0) / h, up to the sign). A weighting w states what e^2 weighs, so that all
parametrizations have one loss, E w(t) |e|^2 / D, and no weight is infinite at either end of time. In these terms

    simple        (a sigma - b alpha)^2 / h^2         the squared error of the row itself (Ho et al., 2020, eq. 14)
    likelihood    g^2 / (2 sigma^2)  alpha^2 / h^2    g^2 / 2 of the score's (Song et al., "Maximum likelihood training
                                                      of score-based diffusion models", 2021, eq. 7), over all times
    EDM           (alpha^2 s^2 + sigma^2) / (s h)^2   (sigma^2 + s^2) / (sigma s)^2 of x_0's at the noise level
                                                      sigma / alpha (Karras et al., 2022, table 1)
    min-SNR       min(alpha^2, gamma sigma^2) / h^2   min(SNR, gamma) of x_0's (Hang et al., 2023, eq. 7)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.network import ScoreNetwork
from models.parametrization import ROWS, NoiseRow, Parametrization
from sde import GaussianSDE

_NOISE = NoiseRow()


def _row(model: ScoreNetwork | None) -> Parametrization:
    return _NOISE if model is None else model.parametrization


def share(row: Parametrization, t: Tensor, sde: GaussianSDE) -> Tensor:
    """(a sigma - b alpha)^2 / (alpha^2 + sigma^2): the square of the row's error, of that of the pair; shape of t."""
    (a, b), alpha, sigma = row.row(t, sde), sde.alpha(t), sde.sigma(t)
    return ((a * sigma - b * alpha) / torch.hypot(alpha, sigma)).square()


def require_positive(title: str, value: float) -> None:
    """Refuse what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{title} must be a positive number, found {value!r}")


class Weighting(ABC):
    """The weight of the mean over the dimensions of the pair's squared error."""

    integral: ClassVar[bool] = False
    """Whether the loss is the integral over time, whatever the distribution of the times, and not the mean over it."""

    @abstractmethod
    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        """w(t), of the shape of ``t``. ``model``: whose row counts, where one does; noise prediction without any."""


@dataclass(frozen=True)
class SimpleWeighting(Weighting):
    """The error of what the network predicts: the one weighting that depends on the parametrization."""

    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        return share(_row(model), t, sde)


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    """(g^2 / 2) |score error|^2 over all times: up to a constant, the divergence that the error costs, in nats."""

    integral: ClassVar[bool] = True

    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        at = sde.coefficients(t)
        return at.diffusion_squared / (2 * at.sigma.square()) * (at.alpha / torch.hypot(at.alpha, at.sigma)).square()


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """1 on the target of ``EDMRow``, which has unit variance; ``data_std``: s, by default that of the row."""

    data_std: float | None = None

    def __post_init__(self):
        if self.data_std is not None:
            require_positive("EDMWeighting: data_std", self.data_std)

    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        s = _row(model).data_std if self.data_std is None else self.data_std
        return (torch.hypot(alpha * s, sigma) / (s * torch.hypot(alpha, sigma))).square()


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, ``gamma``) |x_0 error|^2."""

    gamma: float = 5.0

    def __post_init__(self):
        require_positive("MinSNR: gamma", self.gamma)

    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return (torch.minimum(alpha, math.sqrt(self.gamma) * sigma) / torch.hypot(alpha, sigma)).square()


@dataclass(frozen=True)
class CustomWeighting(Weighting):
    """A function of one's own.

    Parameters
    ----------
    function: (t, sde) -> the weight, of the shape of ``t``.
    error: the squared error that it weighs: "noise", "data", "v", ... as for ``ScoreNetwork``.
    integral: whether the loss is an integral over time (``Weighting.integral``).
    """

    function: Callable[[Tensor, GaussianSDE], Tensor]
    error: str = "noise"
    integral: bool = False

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(f"CustomWeighting: function must be callable as (t, sde), found {self.function!r}")
        if self.error not in ROWS:
            raise ValueError(f"CustomWeighting: error must be one of {', '.join(ROWS)}, found {self.error!r}")

    def __call__(self, t: Tensor, sde: GaussianSDE, model: ScoreNetwork | None = None) -> Tensor:
        return self.function(t, sde) * share(ROWS[self.error](), t, sde)


WEIGHTINGS = {
    "simple": SimpleWeighting,
    "likelihood": LikelihoodWeighting,
    "edm": EDMWeighting,
    "min_snr": MinSNR,
}
"""The weightings by the names that objectives take."""


def weighting_of(given: str | Weighting | Callable[[Tensor, GaussianSDE], Tensor]) -> Weighting:
    """A weighting by its name, as it is, or of a function (t, sde) that weighs the squared error of eps."""
    if isinstance(given, Weighting):
        return given
    if callable(given):
        return CustomWeighting(given)
    if given not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)} or a Weighting, found {given!r}")
    return WEIGHTINGS[given]()
