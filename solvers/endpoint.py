r"""From the density at t_min to that of clean data, without a step: the heat equation to first order.

In y = x / alpha the density at the noise level s = sigma / alpha is that of the data, convolved with N(0, s^2), and so

    log p_0(x) = log p_s(x) - (s^2 / 2) (div score + |score|^2) + O(s^4),        score of y at s,

(Fokker and Planck's equation of a process without drift). One call more; an error of s^2 becomes one of s^4.

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
from sde.base import expand
from solvers.divergence import Divergence

_FIRST = 3 * 2**30  # draws of noise apart from those of samples, dequantization and probes
_SIGNIFICANT, _SHARE = 4.0, 0.1


class EndpointWarning(UserWarning):
    """The score at t_min is not accurate enough for ``endpoint_correction``."""


def endpoint(model: ScoreModel, x: Tensor, divergence: Divergence, directions: Tensor) -> tuple[Tensor, Tensor]:
    """alpha x, and the estimates ``(B, E)`` of log p_0(x) - log p_t(alpha x) at t = t_min, for clean data ``x``."""
    t = torch.tensor(model.sde.t_min).to(x)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    start, graph = alpha * x, torch.is_grad_enabled()
    score, trace = divergence.along(lambda y: model.score(y, t), start, directions, graph)
    squared = score.square().flatten(1).sum(1, keepdim=True)
    return start, x[0].numel() * alpha.log() - 0.5 * sigma.square() * (trace + squared)


@torch.no_grad()
def endpoint_bias(model: ScoreModel, x: Tensor, first: int = 0) -> Tensor:
    """(|e|^2 - eps.e) / 2 for one draw of the noise for each sample, nats, ``(B,)``: of mean 0 for an exact score."""
    t = torch.tensor(model.sde.t_min).to(x)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    eps = Noise(0, first).normal(tuple(x.shape), _FIRST, x.device, x.dtype)
    found = model(expand(alpha, x) * x + expand(sigma, x) * eps, t).eps
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
