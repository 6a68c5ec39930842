r"""The terms of a variational bound, for its evaluation and for training alike (Ho et al., 2020, eq. 5).

    L_T     = KL(N(alpha x_0, sigma^2 I) || N(0, prior_std^2 I))
    L_{k-1} = KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)),     k = 2..N
    L_0     = -log p(x_0 | x_1)

p has the mean of the pair and the variance exp(v log beta + (1 - v) log beta_tilde) (Nichol and Dhariwal, 2021,
eq. 15). With r = -v log(beta / beta_tilde), the log of beta_tilde over that variance, each value has

    L_{k-1} = w e^r |eps - eps_hat|^2 + (e^r - 1 - r) / 2,

w the weight of Ho et al., eq. 12, at the variance beta_tilde.
"""

import math

import torch
from torch import Tensor

from sde.base import expand
from sde.decoder import Decoder
from sde.discrete import GaussianChain
from sde.levels import Levels
from sde.score import Prediction

WEIGHTS = {"beta": 1.0, "beta_tilde": 0.0}
"""v of the variances that have a name. At k = 1, where that of beta_tilde would be 0, v = 0 stands for beta_tilde_2."""


def prior_divergence(x0: Tensor, alpha: Tensor, sigma: Tensor, prior_std: float) -> Tensor:
    """KL(N(alpha x_0, sigma^2 I) || N(0, prior_std^2 I)), ``(B,)``; ``alpha`` and ``sigma`` are float64, ``()``."""
    excess = (sigma / prior_std).square() - 1
    squares = (alpha.to(x0) / prior_std * x0).square().flatten(1).sum(1)
    return 0.5 * (squares + x0[0].numel() * (excess - torch.log1p(excess)).to(x0))


def last_divergence(x0: Tensor, chain: GaussianChain) -> Tensor:
    """L_T of a chain, ``(B,)``."""
    return prior_divergence(x0, chain.alpha(chain.steps), chain.sigma(chain.steps), chain.prior_std)


def pair_error(x0: Tensor, eps: Tensor, pair: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The error of eps_hat times sqrt(alpha^2 + sigma^2) / alpha, without cancellation; shape of ``x0``.

    The errors of a pair obey alpha dx0 + sigma deps = 0. In float32 dx0 is accurate where sigma is large, deps where
    alpha is; this is made of whichever is.
    """
    return (sigma * (x0 - pair.x0) - alpha * (eps - pair.eps)) / torch.hypot(alpha, sigma)


def variance_terms(gap: Tensor, v: float | Tensor) -> tuple[Tensor, Tensor]:
    """e^r and (e^r - 1 - r) / 2 of the weight ``v`` of the variance; ``gap`` is log(beta / beta_tilde).

    Shapes of ``gap * v``. The derivative by v vanishes where the variance is beta_tilde (1 + 2 w |eps - eps_hat|^2).
    """
    r = -v * gap
    return torch.exp(r), 0.5 * (torch.expm1(r) - r)


def transition_divergence(x0: Tensor, eps: Tensor, pair: Prediction, at: Levels, v: float | Tensor) -> Tensor:
    """L_{k-1} of each sample at its level, k = 2..N, from the ``pair`` predicted at alpha x_0 + sigma eps; ``(B,)``.

    ``at`` has the shapes ``()`` or ``(B,)``; ``v`` is a number or of the shape of ``x0``.
    """
    alpha, sigma, weight, gap = (expand(c, x0) for c in (at.alpha, at.sigma, at.weight, at.gap))
    scale, constant = variance_terms(gap, v)
    error = pair_error(x0, eps, pair, alpha, sigma)
    return (weight * scale * error.square() + constant).flatten(1).sum(1)


def reconstruction(decoder: Decoder | None, x0: Tensor, mean: Tensor, std: Tensor, check: bool = True) -> Tensor:
    """-log p(x_0 | mean, std) of each sample, ``(B,)``; of levels, or without a decoder the density of a Gaussian.

    ``std`` broadcasts over ``x0``; ``check`` as for ``Decoder.index``.
    """
    if decoder is not None:
        return -decoder.log_prob(x0, mean, std, check).to(x0).flatten(1).sum(1)
    losses = 0.5 * ((x0 - mean) / std).square() + torch.log(std * math.sqrt(2 * math.pi))
    return losses.flatten(1).sum(1)
