r"""A lower bound on the log-likelihood: a score model as a hierarchical VAE over the levels of a chain.

With the reverse chain p(x_{k-1} | x_k), whose mean is read off the model's pair at level k, and q the forward chain
(Sohl-Dickstein et al., 2015, eq. 14; Ho et al., 2020, eq. 5)

    -log p(x_0) <= L_T + sum_{k=2..N} L_{k-1} + L_0,
    L_T     = KL(q(x_N | x_0) || N(0, prior_std^2 I))
    L_{k-1} = E_q KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k))
    L_0     = -E_q log p(x_0 | x_1).

Each KL is that of two Gaussians, in closed form; the expectations over x_k ~ q(x_k | x_0) are by draws, independent for
each k, so that the estimate is unbiased and its standard error is known. The last step is the density of a Gaussian
for continuous data, or a ``DiscretizedGaussian`` for data of known levels, which gives bits per dimension.

With the exact score and variance "beta" the gap of the bound, the sum of E KL(q(x_{k-1} | x_k) || p(x_{k-1} | x_k)),
vanishes as 1 / N for data of a density. With "beta_tilde" it does not: near the data sigma_k^2 is nearly proportional
to k however large N is, so that beta_tilde / beta = sigma_{k-1}^2 / sigma_k^2 = 1 - 1 / k, and half of Euler's
constant, 0.29 nats per dimension, remains. For data at points, such as the centres of bins, it is the other way round:
"beta_tilde" is the variance of the exact step near them, and "beta" leaves (1 - 0.58) / 2 = 0.21 nats per dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import DiscretizedGaussian, GaussianChain, Noise, ScoreModel
from sde.base import require_count
from sde.bound_terms import WEIGHTS, last_divergence, reconstruction, transition_divergence, variance_terms
from sde.discrete import LEARNED, check_variance
from sde.levels import Levels
from solvers.base import require_variance
from solvers.calls import counting
from solvers.importance import GaussianReference, referred


@dataclass(frozen=True)
class Bound:
    """A lower bound on log-likelihoods and its parts; nats, ``(B,)``.

    log_prob = -(prior + transitions + reconstruction): L_T, the sum of the L_{k-1}, and L_0. ``steps``: the mean over
    samples and draws of each L_{k-1}, k = 2..N, ``(N - 1,)``; in continuous time of each part of the integral.
    ``stderr``: standard error of log_prob over the draws of the noise, None for a single draw. ``nfe``: calls of the
    model. ``dimensions``: values in one sample. ``discrete``: whether log_prob bounds a probability, and not a density.
    """

    log_prob: Tensor
    prior: Tensor
    transitions: Tensor
    reconstruction: Tensor
    stderr: Tensor | None
    steps: Tensor
    nfe: int
    dimensions: int
    discrete: bool

    def mean(self) -> tuple[float, float | None]:
        """Mean of log_prob in nats, and its standard error over the samples, None for a single one."""
        values = self.log_prob.double()
        return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None

    def bits_per_dim(self, bin_width: float | None = None) -> tuple[float, float | None]:
        """Upper bound on the bits per dimension, and its standard error over the samples.

        For a discrete decoder as it is; for a density of uniformly dequantized data with their ``bin_width``.
        """
        if self.discrete == (bin_width is not None):
            raise ValueError(
                "this bounds probabilities, whose bins are counted already: leave bin_width out"
                if self.discrete
                else "this bounds a density, which has no bits per dimension without the width of a bin: give the "
                "bin_width of uniformly dequantized data, or call elbo with decoder=DiscretizedGaussian(levels) on bin "
                "centres, as the model was trained"
            )
        unit, volume = math.log(2.0), 0.0 if self.discrete else math.log2(bin_width)
        mean, stderr = self.mean()
        return -mean / (self.dimensions * unit) - volume, None if stderr is None else stderr / (self.dimensions * unit)


def elbo(
    model: ScoreModel,
    x0: Tensor,
    chain: GaussianChain,
    decoder: DiscretizedGaussian | None = None,
    variance: str | float = "beta",
    draws: int = 1,
    seed: int = 0,
    first: int = 0,
    reference: GaussianReference | None = None,
) -> Bound:
    """The bound on log p(x_0) of clean data ``x0``, ``(B, ...)``, under a score model of any Gaussian process.

    Parameters
    ----------
    chain: the levels. Its least noise must not be less than any that the model has seen.
    decoder: None - p(x_0 | x_1) is a Gaussian density; or ``DiscretizedGaussian(levels)``, for ``x0`` of bin centres.
    variance: of the reverse steps, "beta", "beta_tilde" or a weight in [0, 1] (``GaussianChain.variance``), or
        "learned", the model's own weights. At k = 1 "beta_tilde" stands for beta_tilde_2, since beta_tilde_1 = 0 would
        give data no density.
    draws: of the noise at each level; each costs N calls. Sample i's noise depends on ``seed`` and i alone.
    first: number of the first sample, for data that are evaluated in parts.
    reference: a control variate, for data with a density (``solvers.importance``).
    """
    _check(model, x0, chain, decoder, variance, draws, reference)
    plan, noise, variance = Levels.of(model.sde, chain, x0), Noise(seed, first), WEIGHTS.get(variance, variance)
    with torch.no_grad(), counting(model) as calls:
        prior = last_divergence(x0, chain)
        losses = [_losses(model, x0, chain, plan, decoder, variance, noise, draw, reference) for draw in range(draws)]
    last, between, steps = (torch.stack(parts) for parts in zip(*losses, strict=True))
    stderr = (last + between).std(0) / math.sqrt(draws) if draws > 1 else None
    parts = (-(prior + (last + between).mean(0)), prior, between.mean(0), last.mean(0), stderr, steps.mean(0))
    return Bound(*parts, calls.n, x0[0].numel(), decoder is not None)


def _check(model, x0, chain, decoder, variance, draws, reference) -> None:
    """Refuse arguments that can't work."""
    given = (("model", model, ScoreModel), ("chain", chain, GaussianChain))
    optional = (("decoder", decoder, DiscretizedGaussian), ("reference", reference, GaussianReference))
    for name, value, kind in (*given, *(one for one in optional if one[1] is not None)):
        if not isinstance(value, kind):
            raise TypeError(f"elbo: {name} must be a {kind.__name__}, found {value!r}")
    if not x0.is_floating_point():
        raise TypeError(f"elbo: x0 must be of a floating-point type, found {x0.dtype}; see DiscretizedGaussian.centres")
    require_count(draws, "elbo: draws")
    if variance == LEARNED:
        require_variance(model, "elbo")
        if reference is not None:
            raise ValueError(
                "elbo: a reference is of a variance that is the same for all x_k: leave it out of 'learned'"
            )
    else:
        check_variance(variance, "elbo")


def _losses(model, x0, chain, plan, decoder, variance, noise, draw, reference) -> tuple[Tensor, Tensor, Tensor]:
    """L_0 ``(B,)``, the sum of the L_{k-1} ``(B,)``, and the mean of each ``(N - 1,)``, from one draw at each level."""
    total, means, last, learned = x0.new_zeros(len(x0)), [], None, variance == LEARNED
    for k in range(1, chain.steps + 1):
        at = plan.at(k)
        eps = noise.normal(tuple(x0.shape), draw * chain.steps + k - 1, x0.device, x0.dtype)
        x_k, extra = at.alpha * x0 + at.sigma * eps, {"with_variance": True} if learned else {}
        pair = model.at_level(x_k, at.alpha, at.sigma, at.t, **extra)
        v = pair.v if learned else variance
        of_reference, expected = referred(reference if k > 1 or decoder is None else None, x0, eps, at.log_snr)
        change = (expected - of_reference) * (at.sigma / at.alpha).square()  # of |x0 - x0_hat|^2 / 2
        if k == 1:
            std = chain.variance(1, v).sqrt().to(x0)
            last = reconstruction(decoder, x0, pair.x0, std)
            last = last if reference is None else last + change / std.square()
            continue
        loss = transition_divergence(x0, eps, pair, at, v)
        if reference is not None:
            precision = 2 * at.weight * variance_terms(at.gap, v)[0] * (1 + torch.exp(at.log_snr))
            loss = loss + precision * change
        total, means = total + loss, [*means, loss.mean()]
    return last, total, torch.stack(means) if means else x0.new_zeros(0)
