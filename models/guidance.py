r"""Conditional models made of others: labels filled in, guidance by a second model or by a likelihood.

Bayes' rule for the scores of p(x_t | y) (Song et al., 2021, section 5, eq. 14) is

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t).

Added to the score, a gradient delta moves the pair of a prediction along the invariant x_t = alpha x_0 + sigma eps:

    x_0 + (sigma^2 / alpha) delta,        eps - sigma delta;

and a combination of two predictions whose weights sum to 1 keeps it as it is. So every model here is a score model like
any other: all solvers, and the likelihood of the flow, take it as it is.

**Exact or not.** With the exact p(y | x_t) and ``scale`` 1 guidance is exact. With a larger ``scale`` w the scores are
those of p(x_t) p(y | x_t)^w at each t, which are of no one diffused density: samples are sharper than p(x) p(y | x)^w,
and not distributed as that. ``Guided`` takes the likelihood of the denoised estimate for that of x_t, which neglects
how uncertain the estimate is: see ``models.posterior`` for what that costs, and for better.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from sde import Around, Inside, Prediction, ScoreModel
from sde.base import expand


def label_rows(label: int | Tensor, classes: int | None) -> Tensor:
    """A label, or the labels of all samples, as rows ``(1,)`` or ``(N,)``; refused unless in 0 .. ``classes`` - 1."""
    rows = torch.as_tensor(label)
    if rows.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16) or rows.dim() > 1 or not rows.numel():
        found = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(label, Tensor) else repr(label)
        raise ValueError(f"label must be a class, or classes (N,) of the samples, as integers; found {found}")
    if classes == 0:
        raise ValueError("the model knows no classes: train its network with classes= (net.classes=10)")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (classes is not None and high >= classes):
        known = "at least 0" if classes is None else f"in 0 .. {classes - 1}"
        raise ValueError(f"label must be {known}, found {low if low < 0 else high}; for no class take the model itself")
    return rows.long().reshape(-1)


def positive(name: str, value: float) -> float:
    """``value``, refused unless it is a positive, finite number."""
    if finite(name, value) <= 0:
        raise ValueError(f"{name} must be positive, found {value!r}")
    return float(value)


def finite(name: str, value: float) -> float:
    """``value``, refused unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, found {value!r}")
    return float(value)


class Conditioned(Around):
    """``model`` with its condition filled in: of a class, of an observation, or both.

    Parameters
    ----------
    label: a class, or int64 ``(N,)``, one for each sample; the model is given it as ``class_label``.
    observation: ``(1, ...)`` for all samples or ``(N, ...)``, of the kind that the network was trained with.

    Raises ``ValueError`` for a class that the model does not know.
    """

    def __init__(self, model: ScoreModel, label: int | Tensor | None = None, observation: Tensor | None = None):
        super().__init__(model.sde)
        if label is None and observation is None:
            raise ValueError("Conditioned: give a label, an observation, or both; found neither")
        self.model, self.predicts_variance = model, model.predicts_variance
        self.names = {}
        if label is not None:
            self.keep_rows("label", label_rows(label, model.classes))
            self.names["class_label"] = "label"
        if observation is not None:
            self.keep_rows("observation", observation)
            self.names["observation"] = "observation"

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        given = {name: self.rows(row, x) for name, row in self.names.items()}
        given = {name: rows.to(x.device).expand(len(x), *rows.shape[1:]) for name, rows in given.items()}
        return self.model(x, t, **given, **condition)


class Blend(Around):
    """(1 - scale) ``first`` + scale ``second``: the affine combination of the predictions of two models of one process.

    At scale 0 and 1 it is the first or the second, bit for bit, and the other is not called. ``scale`` beyond 1 goes on
    beyond the second: with ``first`` a weaker model of the same data this is autoguidance (Karras et al., 2024).
    """

    def __init__(self, first: ScoreModel, second: ScoreModel, scale: float):
        super().__init__(first.sde)
        if first.sde != second.sde:
            raise ValueError(
                f"Blend: expected two models of one process, found {first.sde} and {second.sde}; see under()"
            )
        self.first, self.second, self.scale = first, second, finite("scale", scale)

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if self.scale in (0, 1):
            return (self.second if self.scale else self.first)(x, t, **condition)
        pairs = zip(self.first(x, t, **condition), self.second(x, t, **condition), strict=True)
        return Prediction(*(torch.lerp(a, b, self.scale) for a, b in pairs))


class ClassifierFree(Blend):
    """Classifier-free guidance (Ho and Salimans, 2022, eq. 6, whose w is ``scale`` - 1) of a class-conditional model.

    (1 - scale) model(x, t) + scale model(x, t, label), two calls: 0 is the unconditional model, 1 the conditional one.

    Parameters
    ----------
    model: trained with classes, some of which were dropped, so that it knows both.
    label: a class, or int64 ``(N,)``, one for each sample.
    """

    def __init__(self, model: ScoreModel, label: int | Tensor, scale: float):
        super().__init__(model, Conditioned(model, label), scale)


class Steered(Inside, Around):
    """A model whose score is that of ``model`` plus ``scale`` times a gradient; a subclass states ``steer``."""

    def __init__(self, model: ScoreModel, scale: float = 1.0):
        super().__init__(model.sde)
        self.model, self.scale = model, finite("scale", scale)
        self.singular = self.singular and self.scale != 0  # with nothing to add it is the model, at the ends too

    def _predict(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        alpha, sigma = (expand(c, x) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        pair, shift = self.steer(x, t, alpha, sigma, **condition)
        if self.scale == 0:
            return pair
        shift = self.scale * shift
        return Prediction(pair.x0 + shift, pair.eps - alpha / sigma * shift)

    @abstractmethod
    def steer(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, **condition) -> tuple[Prediction, Tensor]:
        """The pair of ``model``, and (sigma^2 / alpha) times the gradient to add to its score; shapes of ``x``.

        At ``scale`` 0 the gradient is not read, and need not be computed.
        """


class Classifier(Steered):
    """Guidance by a classifier of noisy data (Song et al., 2021, section 5; Dhariwal and Nichol, 2021, algorithm 1).

    Exact at ``scale`` 1 with the exact log p(y | x_t); each call takes one pass back through the classifier, and none
    through ``model``. At scale 0 it is ``model``, bit for bit, and the classifier is not called.

    Parameters
    ----------
    log_prob: a function or module (x_t, t) -> log p(y | x_t), nats, ``(B,)``; with ``label`` ``(B, K)`` of K classes.
    label: a class, or int64 ``(N,)``, one for each sample.
    """

    def __init__(
        self,
        model: ScoreModel,
        log_prob: Callable[[Tensor, Tensor], Tensor],
        scale: float = 1.0,
        label: int | Tensor | None = None,
    ):
        super().__init__(model, scale)
        self.log_prob, self.labelled = log_prob, label is not None
        if self.labelled:
            self.keep_rows("label", label_rows(label, None))
            self.highest = int(self.label.max())

    def steer(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, **condition) -> tuple[Prediction, Tensor]:
        pair = self.model(x, t, **condition)
        if self.scale == 0:
            return pair, torch.zeros_like(x)
        gradient = torch.func.grad(lambda at: self._log_prob(at, t).sum())(x)
        return pair, sigma.square() / alpha * gradient

    def _log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Of each sample, ``(B,)``."""
        found = self.log_prob(x, t)
        fits = found.dim() == 1 + self.labelled and len(found) == len(x)
        if not fits or (self.labelled and found.shape[1] <= self.highest):
            wanted = f"(B, K) of more than {self.highest} classes" if self.labelled else "(B,), or (B, K) with label="
            raise ValueError(
                f"Classifier: log_prob must give log p(y | x_t) of shape {wanted}, found {tuple(found.shape)} for "
                f"{len(x)} samples"
            )
        if not self.labelled:
            return found
        label = self.rows("label", x).to(x.device).expand(len(x))
        return found.gather(1, label[:, None])[:, 0]


class Guided(Steered):
    """Guidance by any differentiable log-likelihood of clean data, at the denoised estimate (Chung et al., 2023).

    The score gains ``scale`` grad log p(y | x0_hat(x_t)), through ``model``: one call and one pass back. p(y | x_t) is
    an average of p(y | x0) over p(x0 | x_t), of which this takes the centre alone, so that it is **biased**: it trusts
    an uncertain estimate as if it were certain, too narrow and pulled too far: on a Gaussian of 16 dimensions, half of
    it observed with noise .3, the mean is .58 posterior standard deviations off and samples are .46 as wide along the
    flow (as ``DPS``; python benchmarks/posterior.py).

    Parameters
    ----------
    log_likelihood: from clean data ``(B, ...)`` to log p(y | x_0), nats, ``(B,)``, each sample by itself.
    """

    def __init__(self, model: ScoreModel, log_likelihood: Callable[[Tensor], Tensor], scale: float = 1.0):
        super().__init__(model, scale)
        self.log_likelihood = log_likelihood

    def steer(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, **condition) -> tuple[Prediction, Tensor]:
        if self.scale == 0:
            return self.model(x, t, **condition), torch.zeros_like(x)
        pair, back = denoised(self.model, x, t, **condition)
        gradient = torch.func.grad(lambda x0: self._log_likelihood(x0).sum())(pair.x0)
        return pair, sigma.square() / alpha * back(gradient)

    def _log_likelihood(self, x0: Tensor) -> Tensor:
        found = self.log_likelihood(x0)
        if found.shape != x0.shape[:1]:
            raise ValueError(
                f"Guided: log_likelihood must give a number for each sample, ({len(x0)},), found {tuple(found.shape)}: "
                "sum over all axes but the first"
            )
        return found


def denoised(model: ScoreModel, x: Tensor, t: Tensor, **condition) -> tuple[Prediction, Callable[[Tensor], Tensor]]:
    """The pair, and J^T u for the Jacobian J of its x_0 by x_t, as often as it is asked; each is a pass back."""

    def predict(at: Tensor) -> tuple[Tensor, Tensor]:
        pair = model(at, t, **condition)
        return pair.x0, pair.eps

    x0, back, eps = torch.func.vjp(predict, x, has_aux=True)
    return Prediction(x0, eps), lambda u: back(u)[0]
