r"""What every discrete forward process shares: a Gaussian Markov chain x_0 -> x_1 -> ... -> x_N from data to noise.

Its marginals are x_k = alpha_k x_0 + sigma_k eps, with alpha_0 = 1 and sigma_0 = 0: k = 0 is the data, k = N the end at
the prior. A concrete chain states alpha, sigma and the prior's standard deviation; all else is derived here, once. With
rho = 1 - SNR_k / SNR_j for j < k, which no rounding makes negative,

    q(x_k | x_j)           = N(alpha_k / alpha_j x_j,  sigma_k^2 rho)
    q(x_{k-1} | x_k, x_0)  = N(alpha_{k-1} x_0 + sigma_{k-1} sqrt(1 - rho) eps,  sigma_{k-1}^2 rho),      j = k - 1

(Ho et al., "Denoising diffusion probabilistic models", 2020, eqs. 2, 4, 6 and 7; for NCSN Song et al., 2021, eqs. 20
and 46). beta_k = sigma_k^2 rho is the variance of one step forward, beta_tilde_k = sigma_{k-1}^2 rho that of one step
back from x_k to a known x_0.

``k`` is an int or an integer tensor of shape ``()`` or ``(B,)``, and is never computed from a time. The tables are made
in float64, then cast.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from operator import index
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sde.base import GaussianPrior, Kernel, expand
from sde.score import Prediction

VARIANCES = ("beta", "beta_tilde")
LEARNED = "learned"  # what solvers and bounds call the weights that a model predicts
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Index = int | Tensor


class Transition(NamedTuple):
    """The Gaussian N(mean, variance I) of x_{k-1}; ``variance`` broadcasts over ``mean``."""

    mean: Tensor
    variance: Tensor


class Tables(NamedTuple):
    """One number for each k = 0..N; NaN at k = 0 where a column speaks of the step from k - 1 to k."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    rho: Tensor
    beta: Tensor
    beta_tilde: Tensor
    log_beta: Tensor
    log_beta_tilde: Tensor  # at k = 1, where beta_tilde is 0, that of k = 2
    alpha_before: Tensor
    eps_before: Tensor  # sigma_{k-1} sqrt(1 - rho)


@lru_cache(maxsize=64)
def tables(chain: "GaussianChain", device: torch.device, dtype: torch.dtype) -> Tables:
    """The tables of a chain, made once for each device and type."""
    with torch.inference_mode(False), torch.no_grad():  # what is kept must be fit for training too
        alpha, sigma = chain.levels()
        log_snr = 2 * (alpha.log() - sigma.log())
        change = log_snr.diff()
        rho = -torch.expm1(change)
        beta, beta_tilde = sigma[1:].square() * rho, sigma[:-1].square() * rho
        clipped = beta_tilde.clone()
        clipped[0] = beta_tilde[1] if len(rho) > 1 else beta[0]
        steps = (rho, beta, beta_tilde, beta.log(), clipped.log(), alpha[:-1], sigma[:-1] * torch.exp(0.5 * change))
        nothing = alpha.new_full((1,), torch.nan)
        columns = (alpha, sigma, log_snr, *(torch.cat((nothing, step)) for step in steps))
        return Tables(*(column.to(device, dtype) for column in columns))


def check_variance(variance: str | float | Tensor, title: str) -> None:
    """Refuse what is neither one of ``VARIANCES`` nor a weight in [0, 1]."""
    if isinstance(variance, Tensor):
        right = variance.device.type != "cpu" or bool(((variance >= 0) & (variance <= 1)).all())
    elif isinstance(variance, str):
        right = variance in VARIANCES
    else:
        right = isinstance(variance, int | float) and not isinstance(variance, bool) and 0 <= variance <= 1
    if not right:
        raise ValueError(f"{title}: variance must be 'beta', 'beta_tilde' or a weight in [0, 1], found {variance!r}")


def checked_index(k: Index, low: int, high: int) -> Index:
    """``k`` as an int or an int64 tensor. Its range is looked at on the CPU alone, so that no GPU has to wait."""
    if isinstance(k, bool | float) or (isinstance(k, Tensor) and k.dtype not in _INTEGERS):
        found = k.dtype if isinstance(k, Tensor) else repr(k)
        raise TypeError(f"k must be an int or a tensor of integers, found {found}; an index is never made from a time")
    k = k.long() if isinstance(k, Tensor) else index(k)
    if isinstance(k, int):
        lowest = highest = k
    elif k.dim() > 1:
        raise ValueError(f"k must have the shape () or (B,), found {tuple(k.shape)}")
    elif k.device.type == "cpu" and k.numel():
        lowest, highest = map(int, k.aminmax())
    else:
        return k
    if lowest < low or highest > high:
        raise ValueError(f"k must lie in {low}..{high}, found {lowest if lowest < low else highest}")
    return k


class GaussianChain(ABC):
    """A Markov chain from the data, k = 0, to the prior, k = ``steps``.

    A concrete class is a frozen dataclass of plain numbers. Coefficients come in float64 on the device of ``k``, or,
    where data are given, in their type and on their device.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """N, the number of steps."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I) at k = N."""

    @abstractmethod
    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma at k = 0..N, ``(N + 1,)`` each, in float64 on the CPU; alpha_0 = 1 and sigma_0 = 0."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Self:
        """The chain over x_0 and the x_k of some increasing ``indices`` from 1 to N, with exactly their marginals."""

    def alpha(self, k: Index, like: Tensor | None = None) -> Tensor:
        """Scale of the data in x_k, k = 0..N; shape of ``k``."""
        return self._at("alpha", k, like, 0)

    def sigma(self, k: Index, like: Tensor | None = None) -> Tensor:
        """Standard deviation of the noise in x_k, k = 0..N; shape of ``k``."""
        return self._at("sigma", k, like, 0)

    def log_snr(self, k: Index, like: Tensor | None = None) -> Tensor:
        """2 log(alpha_k / sigma_k), k = 0..N, strictly decreasing from infinity; nats, shape of ``k``."""
        return self._at("log_snr", k, like, 0)

    def beta(self, k: Index, like: Tensor | None = None) -> Tensor:
        """Variance of q(x_k | x_{k-1}), k = 1..N; shape of ``k``."""
        return self._at("beta", k, like)

    def beta_tilde(self, k: Index, like: Tensor | None = None) -> Tensor:
        """Variance of q(x_{k-1} | x_k, x_0), k = 1..N, 0 at k = 1; shape of ``k``."""
        return self._at("beta_tilde", k, like)

    def variance(self, k: Index, variance: str | float | Tensor = "beta", like: Tensor | None = None) -> Tensor:
        """Variance of p(x_{k-1} | x_k), k = 1..N: "beta", "beta_tilde", or a weight v in [0, 1] between the two,

            exp(v log beta + (1 - v) log beta_tilde)

        (Nichol and Dhariwal, 2021, eq. 15), ``()``, ``(B,)`` or of the shape of the data. Like the paper's, this form
        has beta_tilde_2 in the place of beta_tilde_1 = 0. Shape of ``k`` or of ``v``.
        """
        check_variance(variance, type(self).__name__)
        if isinstance(variance, str):
            return self._at(variance, k, like)
        large, small = (self._at(name, k, like) for name in ("log_beta", "log_beta_tilde"))
        if isinstance(variance, Tensor):
            large, small = (expand(c, variance).to(variance) for c in (large, small))
        return torch.exp(variance * large + (1 - variance) * small)

    def perturb(self, x0: Tensor, k: Index, eps: Tensor) -> Tensor:
        """x_k = alpha_k x_0 + sigma_k eps, k = 0..N; shape of ``x0``."""
        return expand(self.alpha(k, x0), x0) * x0 + expand(self.sigma(k, x0), x0) * eps

    def kernel(self, j: Index, k: Index) -> Kernel:
        """q(x_k | x_j), 0 <= j <= k <= N: scale = alpha_k / alpha_j, std = sigma_k sqrt(1 - SNR_k / SNR_j)."""
        change = self.log_snr(k) - self.log_snr(j)
        if change.device.type == "cpu" and bool((change > 0).any()):
            raise ValueError(f"the kernel from x_j to x_k needs j <= k, found j={j}, k={k}")
        rho = -torch.expm1(change.nan_to_num(nan=0.0, neginf=-torch.inf))  # from x_0 to itself
        return Kernel(self.alpha(k) / self.alpha(j), self.sigma(k) * rho.sqrt())

    def posterior(self, x0: Tensor, x_k: Tensor, k: Index) -> Transition:
        """q(x_{k-1} | x_k, x_0), k = 1..N (Ho et al., eqs. 6 and 7)."""
        data, before, sigma = (self._at(name, k, x_k) for name in ("alpha_before", "eps_before", "sigma"))
        mean = expand(data * self._at("rho", k, x_k), x_k) * x0 + expand(before / sigma, x_k) * x_k
        return Transition(mean, expand(self.beta_tilde(k, x_k), x_k))

    def mean(self, prediction: Prediction, k: Index) -> Tensor:
        """The mean of p(x_{k-1} | x_k), k = 1..N: that of the posterior at the predicted x_0; shape of the pair."""
        x0, eps = prediction
        return expand(self._at("alpha_before", k, x0), x0) * x0 + expand(self._at("eps_before", k, x0), x0) * eps

    def reverse(self, prediction: Prediction, k: Index, variance: str | float | Tensor = "beta") -> Transition:
        """p(x_{k-1} | x_k), k = 1..N, from the pair predicted at x_k; ``variance`` as in the method of that name."""
        mean = self.mean(prediction, k)
        spread = self.variance(k, variance, mean)
        return Transition(mean, spread if spread.dim() == mean.dim() else expand(spread, mean))

    def from_eps(self, x_k: Tensor, eps: Tensor, k: Index) -> Prediction:
        """The pair of a predicted eps, k = 1..N."""
        return Prediction((x_k - expand(self.sigma(k, x_k), x_k) * eps) / expand(self._at("alpha", k, x_k), x_k), eps)

    def from_x0(self, x_k: Tensor, x0: Tensor, k: Index) -> Prediction:
        """The pair of a predicted x_0, k = 1..N."""
        return Prediction(x0, (x_k - expand(self.alpha(k, x_k), x_k) * x0) / expand(self._at("sigma", k, x_k), x_k))

    def from_mean(self, x_k: Tensor, mean: Tensor, k: Index) -> Prediction:
        """The pair of a predicted mean of x_{k-1}, k = 1..N; ``mean`` takes the pair back to it."""
        names = ("alpha", "sigma", "rho", "alpha_before", "eps_before")
        alpha, sigma, rho, data, before = (expand(self._at(name, k, x_k), x_k) for name in names)
        x0 = (mean - before / sigma * x_k) / (data * rho)
        return Prediction(x0, (x_k - alpha / data * mean) / (sigma * rho))

    def eps_weight(self, k: Index, variance: str | float | Tensor = "beta") -> Tensor:
        """w_k in L_{k-1} = w_k |eps - eps_hat|^2 + const, k = 1..N; shape of ``k``, infinite where the variance is 0.

        beta^2 / (2 variance alpha (1 - alpha_bar)) in the terms of Ho et al., eq. 12; L_simple (eq. 14) leaves it out.
        """
        names = ("alpha_before", "sigma", "rho", "alpha")
        data, sigma, rho, alpha = (self._at(name, k) for name in names)
        return (data * sigma * rho / alpha).square() / (2 * self.variance(k, variance))

    def respaced(self, steps: int) -> Self:
        """The chain over ``steps`` evenly spaced indices from 1 to N, exactly (Nichol and Dhariwal, 2021, section 4).

        A single step keeps N. Raises ``ValueError`` for more steps than there are.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.steps:
            raise ValueError(f"{self}: respaced steps must be an integer in 1..{self.steps}, found {steps!r}")
        if steps in (1, self.steps):
            return self if steps == self.steps else self.subset([self.steps])
        gaps = steps - 1
        return self.subset([1 + (2 * i * (self.steps - 1) + gaps) // (2 * gaps) for i in range(steps)])

    def __hash__(self) -> int:
        return self._hash  # kept, since the tables are looked up by it in every step

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(torch.cat(self.levels()).tolist()))

    def prior(self, shape: tuple[int, ...]) -> GaussianPrior:
        """N(0, prior_std^2 I) over tensors of ``shape`` = ``(B, ...)``."""
        return GaussianPrior(tuple(shape), self.prior_std)

    def _at(self, column: str, k: Index, like: Tensor | None = None, low: int = 1) -> Tensor:
        k = checked_index(k, low, self.steps)
        source = k if like is None and isinstance(k, Tensor) else like
        device = torch.device("cpu") if source is None else source.device
        table = getattr(tables(self, device, torch.float64 if like is None else like.dtype), column)
        # Indexing by a tensor of shape () would read it back to the CPU.
        return table.take(k.to(device)) if isinstance(k, Tensor) else table[k]
