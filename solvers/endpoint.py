r"""From the density at t_min to that of clean data, without a step: the heat equation to first order.

In y = x / alpha the density at the noise level s = sigma / alpha is that of the data, convolved with N(0, s^2), and so

    log p_0(x) = log p_s(x) - (s^2 / 2) (div score + |score|^2) + O(s^4),        score of y at s,

(Fokker and Planck's equation of a process without drift). One call more; an error of s^2 becomes one of s^4. With
A = div score + |score|^2 at s and B the same at sqrt(2) s, log p_0 = log p_s - (s^2 / 2) (3 A - B) / 2 + O(s^6): the
derivative of log p with respect to s^2, A / 2, is extrapolated linearly. Another call, and an error of s^6.

**Check.** It needs a score that is accurate at t_min, where a network is at its worst. Let e(x) be the noise predicted
at alpha x + sigma eps for known eps. Then E |e|^2 = E eps.e for a predictor that can't be improved by a factor, as the
exact one is, and by Stein's lemma (E |e|^2 - E eps.e) / 2 is the mean that the correction has over noised data, where
it should be 0: the error that it adds to a mean likelihood. It costs one forward pass.
"""

import math
import warnings

import torch
from torch import Tensor

from sde import Noise, ScoreModel
from solvers.divergence import Divergence

_FIRST = 3 * 2**30  # draws of noise apart from those of samples, dequantization and probes
_SIGNIFICANT, _SHARE = 4.0, 0.1


class EndpointWarning(UserWarning):
    """The score at t_min is not accurate enough for ``endpoint_correction``."""


def endpoint(
    model: ScoreModel, x: Tensor, divergence: Divergence, directions: Tensor, order: int
) -> tuple[Tensor, Tensor]:
    """alpha x, and the estimates ``(B, E)`` of log p_0(x) - log p_t(alpha x) at t = t_min, for clean data ``x``.

    ``order``: of the correction in s^2, 1 or 2.
    """
    sde, t = model.sde, torch.tensor(model.sde.t_min, dtype=torch.float64)
    alpha = sde.alpha(t)
    growth = _growth(model, x, t, divergence, directions)
    if order == 2:
        later = sde.time(sde.log_snr(t) - math.log(2))
        growth = 1.5 * growth - 0.25 * _growth(model, x, later, divergence, directions)
    return alpha.to(x) * x, x[0].numel() * alpha.log().to(x) - 0.5 * growth


def _growth(model: ScoreModel, x: Tensor, t: Tensor, divergence: Divergence, directions: Tensor) -> Tensor:
    """s^2 (div score + |score|^2) of y = x / alpha at the noise level of time ``t``, ``(B, E)``."""
    t, graph = t.to(x), torch.is_grad_enabled()
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    score, trace = divergence.along(lambda y: model.score(y, t), alpha * x, directions, graph)
    return sigma.square() * (trace + score.square().flatten(1).sum(1, keepdim=True))


@torch.no_grad()
def endpoint_bias(model: ScoreModel, x: Tensor, first: int = 0) -> Tensor:
    """(|e|^2 - eps.e) / 2 for one draw of the noise for each sample, nats, ``(B,)``: of mean 0 for an exact score."""
    t = torch.tensor(model.sde.t_min).to(x)
    eps = Noise(0, first).normal(tuple(x.shape), _FIRST, x.device, x.dtype)
    found = model(model.sde.perturb(x, t, eps), t).eps
    return 0.5 * (found * (found - eps)).flatten(1).sum(1)


def check_endpoint(bias: Tensor, correction: Tensor) -> None:
    """Warn where the mean error ``bias`` is beyond chance and not small beside the ``correction``; both ``(B,)``."""
    if len(bias) < 2:
        return
    mean, stderr = float(bias.mean()), float(bias.std()) / math.sqrt(len(bias))
    size = float(correction.square().mean().sqrt())
    if abs(mean) > _SIGNIFICANT * stderr and abs(mean) > _SHARE * size:
        warnings.warn(
            f"endpoint_correction: over noised data its mean should be 0 and is {mean:.3g} +- {stderr:.2g} nats, "
            f"beside a correction of {size:.3g}: the score at t_min is not accurate enough; leave the correction out, "
            "or train the network longer near t_min",
            EndpointWarning,
            stacklevel=3,
        )
