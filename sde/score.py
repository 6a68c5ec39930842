r"""The meeting point of networks and solvers: a model predicts the pair (x_0, eps), and all else is read off it.

Everything rests on the invariant x_t = alpha x_0 + sigma eps of the pair. From it (Song et al., 2021, eqs. 6 and 13;
Tweedie's formula)

    score     = -eps / sigma
    velocity  = alpha' x_0 + sigma' eps  =  f - (g^2 / 2) score        (the probability-flow ODE)
    reverse drift  =  velocity - (g^2 / 2) score                       (the reverse-time SDE)

In float32 neither x_0 nor eps nor the score alone is accurate at both ends of time; the pair is.

A process without a Gaussian kernel has no such pair: there a ``ScoreFunction`` gives the score, and drift and diffusion
the rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from sde.base import SDE, GaussianSDE, expand
from sde.noise import Noise


class Prediction(NamedTuple):
    """Posterior means of the data and of the noise given x_t: alpha x0 + sigma eps = x_t. Shapes of ``x_t``."""

    x0: Tensor
    eps: Tensor


class VariancePrediction(NamedTuple):
    """The pair, and the weight v in [0, 1] of the variance of a chain's step back (``GaussianChain.variance``).

    Shapes of ``x_t``. What a model gives that ``predicts_variance``, for ``with_variance=True``.
    """

    x0: Tensor
    eps: Tensor
    v: Tensor


def carried(
    predict: Callable[..., Prediction],
    sde: GaussianSDE,
    x: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    **condition,
) -> Prediction:
    """The pair for x = alpha x_0 + sigma eps from a model under ``sde`` at its time ``t`` of about the same log-SNR.

    Where the levels differ, as beyond the ends of time, the pair is corrected, by the least change, to the invariant.
    """
    length = torch.hypot(alpha, sigma)
    scale = torch.hypot(sde.alpha(t), sde.sigma(t)) / length
    pair = predict(expand(scale, x) * x, t, **condition)
    a, b = expand(alpha / length, x), expand(sigma / length, x)
    residual = x / expand(length, x) - a * pair.x0 - b * pair.eps
    return pair._replace(x0=pair.x0 + a * residual, eps=pair.eps + b * residual)


class ScoreField(nn.Module, ABC):
    """What a solver needs of a model under any ``sde``: the score of p_t and the probability-flow velocity.

    ``x`` has the shape ``(B, ...)``, ``t`` the shape ``()`` or ``(B,)``.
    """

    def __init__(self, sde: SDE):
        super().__init__()
        if not isinstance(sde, SDE):
            raise TypeError(f"expected an SDE such as VP(), found {type(sde).__name__}")
        self.sde = sde

    @abstractmethod
    def score(self, x: Tensor, t: Tensor, sigma: Tensor | None = None, **condition) -> Tensor:
        """Gradient of log p_t at ``x``; shape of ``x``. ``sigma``: sigma(t), where it is known already."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        """dx/dt along the probability-flow ODE; shape of ``x``."""

    @abstractmethod
    def reverse_drift(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        """Drift f - g^2 score of the reverse-time SDE; shape of ``x``."""


class Density(ABC):
    """What a model also is whose density is known, as those in closed form and energies are; networks have none."""

    @abstractmethod
    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t at ``x``, up to a constant that may depend on t; nats, ``(B,)``."""


class PerSample(ABC):
    """What a model also is that does not treat all samples alike: with labels, observations or noise of their own."""

    @abstractmethod
    def of_samples(self, noise: Noise, count: int) -> Self:
        """The model for the ``count`` samples from number ``noise.first`` on; what it draws, it draws from ``noise``.

        Raises ``ValueError`` where it has not got what it needs for as many.
        """


def of_samples(model: nn.Module, noise: Noise, count: int) -> nn.Module:
    """``PerSample.of_samples`` of a model that has it; any other treats all samples alike."""
    return model.of_samples(noise, count) if isinstance(model, PerSample) else model


class ScoreModel(ScoreField):
    """A model of the score of p_t under a Gaussian ``sde``, for all t; a subclass states ``forward``."""

    predicts_variance: bool = False
    """Whether it takes ``with_variance=True``, for a ``VariancePrediction`` from the same call."""
    classes: int | None = None
    """Number of classes that its ``class_label`` may name, 0 for none; None where that is not known."""

    def __init__(self, sde: GaussianSDE):
        if not isinstance(sde, GaussianSDE):
            hint = "; for an SDE without a Gaussian kernel use ScoreFunction" if isinstance(sde, SDE) else ""
            raise TypeError(f"expected a GaussianSDE such as VP(), found {type(sde).__name__}{hint}")
        super().__init__(sde)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        """The pair (x_0, eps) predicted from ``x`` at time ``t``."""

    def score(self, x: Tensor, t: Tensor, sigma: Tensor | None = None, **condition) -> Tensor:
        return -self(x, t, **condition).eps / expand(self.sde.sigma(t) if sigma is None else sigma, x)

    def velocity(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        prediction, at = self(x, t, **condition), self.sde.coefficients(t)
        return expand(at.d_alpha, x) * prediction.x0 + expand(at.d_sigma, x) * prediction.eps

    def reverse_drift(self, x: Tensor, t: Tensor, **condition) -> Tensor:
        prediction, at = self(x, t, **condition), self.sde.coefficients(t)
        of_noise = 2 * at.d_sigma - at.rate * at.sigma  # sigma' + g^2 / (2 sigma), finite where sigma is 0
        return expand(at.d_alpha, x) * prediction.x0 + expand(of_noise, x) * prediction.eps

    def at_level(self, x: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor | None = None, **condition) -> Prediction:
        """The pair for x = alpha x_0 + sigma eps with any ``alpha`` and ``sigma``, of shape ``()`` or ``(B,)``.

        All Gaussian kernels of one log-SNR are one kernel up to a scale: the model is asked at the time ``t`` of that
        log-SNR (found here unless given), or the nearest that it has, about x in the scale of its own process.
        """
        t = self.sde.time(2 * (alpha.log() - sigma.log())) if t is None else t
        return carried(self, self.sde, x, t, alpha, sigma, **condition)

    def under(self, sde: GaussianSDE) -> "ScoreModel":
        """This model as one under another ``sde``, for samplers and likelihoods of that one.

        Raises ``ValueError`` where ``sde`` has less noise at its t_min than this model has ever seen.
        """
        return _Under(self, sde)


class Inside(ScoreModel):
    """A model that divides by alpha or sigma: where one of them is 0, it is asked just before, where it is not.

    A subclass states ``_predict``.
    """

    def __init__(self, sde: GaussianSDE):
        super().__init__(sde)
        low, high = sde.log_snr_range
        self.ends = sde.time(torch.tensor((high, low), dtype=torch.float64)).tolist()
        self.singular = bool(torch.isinf(sde.log_snr(torch.tensor((sde.t_min, sde.t_max)))).any())

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if not self.singular:
            return self._predict(x, t, **condition)
        inside = t.clamp(*self.ends)
        return carried(self._predict, self.sde, x, inside, self.sde.alpha(t), self.sde.sigma(t), **condition)

    @abstractmethod
    def _predict(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        """``forward`` where alpha and sigma are positive."""


class Around(ScoreModel, PerSample):
    """A model around others, its children, and around rows of tensors that belong to the samples.

    ``noise``: whatever it draws itself comes from here; a solver says which by ``of_samples``.
    """

    def __init__(self, sde: GaussianSDE):
        super().__init__(sde)
        self.noise, self._rows = Noise(0), ()

    def keep_rows(self, name: str, rows: Tensor) -> None:
        """Keep ``rows`` as the buffer ``name``: a row for each sample, ``(N, ...)``, or one for all, ``(1, ...)``."""
        self.register_buffer(name, rows)
        self._rows = (*self._rows, name)

    def of_samples(self, noise: Noise, count: int) -> Self:
        twin = self.__new__(type(self))
        twin.__dict__ = self.__dict__ | {"noise": noise}
        twin._modules = {name: of_samples(child, noise, count) for name, child in self._modules.items()}
        start = noise.first - self.noise.first
        chosen = {name: _cut(name, self._buffers[name], start, count) for name in self._rows}
        twin._buffers = self._buffers | chosen
        return twin

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The buffer ``name`` for the samples ``x``, of as many rows or one; ``ValueError`` for another number."""
        found = self._buffers[name]
        if len(found) not in (1, len(x)):
            raise ValueError(
                f"{type(self).__name__}: {name} has {len(found)} rows, found {len(x)} samples; give 1 or as many"
            )
        return found


def _cut(name: str, rows: Tensor, start: int, count: int) -> Tensor:
    """Those of the samples from number ``start`` on."""
    if len(rows) == 1:
        return rows
    if not 0 <= start <= start + count <= len(rows):
        raise ValueError(
            f"{name} has {len(rows)} rows, one for each sample; found samples {start} to {start + count - 1}: give one "
            "row for all samples, or as many rows as there are"
        )
    return rows[start : start + count]


class _Under(Around):
    """A model at the levels of another process than its own."""

    def __init__(self, model: ScoreModel, sde: GaussianSDE):
        super().__init__(sde)
        own, other = model.sde.log_snr_range[1], sde.log_snr_range[1]
        if other > own + 1e-3:
            time = float(sde.time(torch.tensor(own, dtype=torch.float64)))
            raise ValueError(
                f"{sde} begins at log-SNR {other:.4g}, with less noise than {model.sde} of this model, at {own:.4g}; "
                f"raise its t_min to {time * 1.0001:.4g}"
            )
        self.model, self.predicts_variance, self.classes = model, model.predicts_variance, model.classes

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        return self.model.at_level(x, self.sde.alpha(t), self.sde.sigma(t), **condition)
