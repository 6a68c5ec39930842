r"""The variational bound of continuous time: a lower bound on log p(x_0) under the reverse SDE of a score model.

The chain of ``solvers.bound`` with infinitely many levels between lambda_min, at t_max, and lambda_max, at t_min:

    -log p(x_0) <= L_T + 1/2 int g^2 / sigma^2 E |eps - eps_hat|^2 dt + L_0
                 = L_T + 1/2 int_{lambda_min}^{lambda_max} E |eps - eps_hat(x_lambda)|^2 dlambda + L_0

(Song, Durkan, Murray and Ermon, "Maximum likelihood training of score-based diffusion models", 2021, theorem 3 and
eq. 11; Kingma et al., "Variational diffusion models", 2021, eqs. 11-19), since g^2 / sigma^2 = -dlambda/dt. It depends
on the process through the two ends alone (VDM, section 5). L_T = KL(q(x_T | x_0) || prior), and L_0 =
-E log p(x_0 | x_t) at t_min is that of a decoder, or for continuous data of the Gaussian about the predicted mean

    p(x_0 | x_t) = N(x0_hat(x_t), (sigma / alpha)^2 I).

The bound is on the density of the reverse SDE that starts from the prior; that of the
probability-flow ODE is another, unless the score is exact. Then the SDE's law given any x_0 is that of the data, and
the bound is log p(x_0) itself but for the ends, in the mean over the data

    E [log p - bound] = KL(q(x_T) || prior) + E KL(q(x_0 | x_t) || p(x_0 | x_t)),

the last of order (sigma / alpha)^4 at t_min.

lambda is drawn stratified: one draw has a point in each of M parts of equal probability, each sample at points of its
own. It is unbiased for any M and any density (``solvers.importance``); independent draws give the standard error.
Where alpha or sigma is 0 at an end, ``log_snr_range`` stands for it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import Decoder, GaussianSDE, Noise, Prediction, ScoreModel, of_samples
from sde.base import expand, last_time, require_count
from sde.bound_terms import pair_error, prior_divergence, reconstruction
from solvers.bound import Bound
from solvers.calls import counting
from solvers.importance import GaussianReference, LogSNRDensity, referred, times

_FLOOR = 0.1


def continuous_elbo(
    model: ScoreModel,
    x0: Tensor,
    decoder: Decoder | None = None,
    points: int = 64,
    draws: int = 1,
    density: LogSNRDensity | None = None,
    reference: GaussianReference | None = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
) -> Bound:
    """The bound on log p(x_0) of clean data ``x0``, ``(B, ...)``, under a score model of any Gaussian process.

    Parameters
    ----------
    decoder: None - p(x_0 | x_t) at t_min is a Gaussian density; or ``DiscretizedGaussian(levels)`` or
        ``LevelPosterior(levels)``, for ``x0`` of bin centres.
    points: times in one draw, stratified; with one more for the last step each is a call.
    draws: independent repetitions; the standard error of each sample needs at least 2. Sample i's noise depends on
        ``seed`` and i alone.
    density: of the log-SNR; uniform by default. reference: a control variate, for data with a density.
    first: number of the first sample, for data that are evaluated in parts.
    batch_size: samples at a time, to bound the memory; the result is the same.

    Returns ``Bound``; its ``steps`` are the contributions of the M parts, from the data to the prior, and its ``nfe``
    counts the calls for one micro-batch, draws (points + 1). Raises ``RuntimeError`` where the model is not finite.
    """
    sampling = _Sampling(points, density or LogSNRDensity(), reference, decoder)
    _check(model, x0, sampling, draws, batch_size)
    parts, losses = x0.split(batch_size or len(x0)), []
    with torch.no_grad(), counting(model) as calls:
        prior = _prior(model.sde, x0)
        for part in parts:
            noise = Noise(seed, first)
            run = of_samples(model, noise, len(part))
            draw_losses = [_losses(run, part, sampling, noise, draw) for draw in range(draws)]
            losses.append([torch.stack(loss) for loss in zip(*draw_losses, strict=True)])
            first += len(part)
    last, strata = (torch.cat(loss, -1) for loss in zip(*losses, strict=True))
    return _bound(prior, last, strata, calls.n // len(parts), x0[0].numel(), decoder is not None)


def learned_density(
    model: ScoreModel,
    x0: Tensor,
    parts: int = 16,
    draws: int = 4,
    reference: GaussianReference | None = None,
    seed: int = 2**32,
) -> LogSNRDensity:
    """The density in ``parts`` equal parts of log-SNR that a pilot run on some data ``x0`` shows to be the best.

    Proportional to the root mean square, over samples, of the deviation over ``draws`` (at least 2) of each part, and
    not below a tenth of its mean. The pilot takes ``draws * (parts + 1)`` calls; give ``reference`` as it will be
    used, and a ``seed`` other than the estimate's.
    """
    sampling = _Sampling(parts, LogSNRDensity(), reference, None)
    _check(model, x0, sampling, draws, None)
    if draws < 2:
        raise ValueError(f"learned_density: a deviation needs at least 2 draws, found {draws}")
    with torch.no_grad():
        strata = torch.stack([_losses(model, x0, sampling, Noise(seed), draw)[1] for draw in range(draws)])
        spread = strata.double().var(0).mean(1).sqrt()
        least = (_FLOOR * spread.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    return LogSNRDensity(tuple(spread.clamp(min=least).tolist()))


@dataclass(frozen=True)
class _Sampling:
    """How one draw is made."""

    points: int
    density: LogSNRDensity
    reference: GaussianReference | None
    decoder: Decoder | None


def _check(model, x0, sampling, draws, batch_size) -> None:
    """Refuse arguments that can't work."""
    kinds = (
        ("model", model, ScoreModel, False),
        ("decoder", sampling.decoder, Decoder, True),
        ("density", sampling.density, LogSNRDensity, False),
        ("reference", sampling.reference, GaussianReference, True),
    )
    for name, value, kind, optional in kinds:
        if not (isinstance(value, kind) or (optional and value is None)):
            raise TypeError(f"continuous_elbo: {name} must be a {kind.__name__}, found {value!r}")
    if not x0.is_floating_point():
        raise TypeError(
            f"continuous_elbo: x0 must be of a floating-point type, found {x0.dtype}; see DiscretizedGaussian.centres"
        )
    if x0.dim() < 2 or not len(x0) or not bool(torch.isfinite(x0).all()):
        raise ValueError(
            f"continuous_elbo: x0 must be finite data of the shape (B, ...), B > 0, found the shape {tuple(x0.shape)} "
            f"with {int((~torch.isfinite(x0)).sum())} values that are not finite"
        )
    counts = {"points": sampling.points, "draws": draws} | ({} if batch_size is None else {"batch_size": batch_size})
    for name, value in counts.items():
        require_count(value, f"continuous_elbo: {name}")


@dataclass(frozen=True)
class _Plan:
    """What one draw needs of time, at t_min and then at the M points, ``(M + 1, B)``; ``edges`` of the parts, down."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    weight: Tensor
    edges: Tensor


def _plan(sde: GaussianSDE, x0: Tensor, sampling: _Sampling, noise: Noise, number: int) -> _Plan:
    low, high = sde.log_snr_range
    words = noise.words((len(x0), sampling.points), number, x0.device)
    start = torch.arange(sampling.points + 1, device=x0.device, dtype=torch.float64)
    u = (start[:-1, None] + (words.T.double() + 0.5) * 2.0**-32) / sampling.points
    share, density = sampling.density.quantile(u)
    log_snr = high - (high - low) * torch.cat((torch.zeros_like(share[:1]), share))
    t = times(sde, log_snr)
    edges = high - (high - low) * sampling.density.quantile(start / sampling.points)[0]
    weight = (high - low) / (sampling.points * density)
    columns = (t, sde.alpha(t), sde.sigma(t), log_snr, torch.cat((weight[:1], weight)), edges)
    return _Plan(*(column.to(x0) for column in columns))


def _prior(sde: GaussianSDE, x0: Tensor) -> Tensor:
    """L_T, ``(B,)``."""
    end = torch.tensor(last_time(sde), dtype=torch.float64, device=x0.device)
    return prior_divergence(x0, sde.alpha(end), sde.sigma(end), sde.prior_std)


@dataclass(frozen=True)
class _Draw:
    """One draw of all points, each with its own noise."""

    model: ScoreModel
    x0: Tensor
    sampling: _Sampling
    noise: Noise
    number: int
    plan: _Plan

    def losses(self) -> tuple[Tensor, Tensor]:
        """L_0 ``(B,)``, and the integral over each of the M parts ``(M, B)``."""
        last = self.last() if self.sampling.decoder is None else self.decoded(self.sampling.decoder)
        return last, torch.stack([self.part(i) for i in range(1, self.sampling.points + 1)])

    def predict(self, i: int) -> tuple[Tensor, Tensor, Prediction]:
        """eps, x_t and the pair of the model at point i; 0 is t_min."""
        alpha, sigma = self.plan.alpha[i], self.plan.sigma[i]
        eps = self.noise.normal(tuple(self.x0.shape), self.number + 1 + i, self.x0.device, self.x0.dtype)
        x_t = expand(alpha, self.x0) * self.x0 + expand(sigma, self.x0) * eps
        return eps, x_t, self.model.at_level(x_t, alpha, sigma, self.plan.t[i])

    def errors(self, i: int) -> tuple[Tensor, Tensor]:
        """h at point i less that of the reference, and the mean of the latter over eps, ``(B,)`` each."""
        eps, _, pair = self.predict(i)
        alpha, sigma = (expand(c[i], self.x0) for c in (self.plan.alpha, self.plan.sigma))
        error = alpha / torch.hypot(alpha, sigma) * pair_error(self.x0, eps, pair, alpha, sigma)
        of_reference, expected = referred(self.sampling.reference, self.x0, eps, self.plan.log_snr[i])
        return 0.5 * error.square().flatten(1).sum(1) - of_reference, expected

    def part(self, i: int) -> Tensor:
        """The integral over part i."""
        weighted, reference = self.plan.weight[i] * self.errors(i)[0], self.sampling.reference
        if reference is None:
            return weighted
        return weighted + reference.integral(self.x0, self.plan.edges[i], self.plan.edges[i - 1])

    def last(self) -> Tensor:
        """L_0 of a density: (x_0 - x0_hat) alpha / sigma is eps_hat - eps."""
        difference, expected = self.errors(0)
        volume = math.sqrt(2 * math.pi) * self.plan.sigma[0] / self.plan.alpha[0]
        return difference + expected + self.x0[0].numel() * torch.log(volume)

    def decoded(self, decoder: Decoder) -> Tensor:
        """L_0 of known levels."""
        _, x_t, pair = self.predict(0)
        alpha, sigma = (expand(c[0], self.x0) for c in (self.plan.alpha, self.plan.sigma))
        centre = decoder.centre(x_t / alpha, pair.x0)
        return reconstruction(decoder, self.x0, centre, sigma / alpha)


def _losses(model: ScoreModel, x0: Tensor, sampling: _Sampling, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
    number = draw * (sampling.points + 2)  # of the times; each point has the next
    return _Draw(model, x0, sampling, noise, number, _plan(model.sde, x0, sampling, noise, number)).losses()


def _bound(prior: Tensor, last: Tensor, strata: Tensor, nfe: int, dimensions: int, discrete: bool) -> Bound:
    """From L_0 ``(R, B)`` and the parts ``(R, M, B)`` of R draws."""
    total = last + strata.sum(1)
    stderr = total.std(0) / math.sqrt(len(total)) if len(total) > 1 else None
    log_prob = -(prior + total.mean(0))
    if not bool(torch.isfinite(log_prob).all()):
        wrong = int((~torch.isfinite(log_prob)).sum())
        raise RuntimeError(
            f"continuous_elbo: the bound of {wrong} of {len(log_prob)} samples is not finite, so the model's output is "
            "not somewhere in time; check its weights, and x0 against the range of its training data"
        )
    parts = (log_prob, prior, strata.sum(1).mean(0), last.mean(0), stderr, strata.mean((0, 2)))
    return Bound(*parts, nfe, dimensions, discrete)
