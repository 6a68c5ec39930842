r"""What every forward process shares, and what every Gaussian one derives from alpha and sigma.

A Gaussian forward process has the kernel p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I). It solves the linear SDE
dx = f(x, t) dt + g(t) dw (Song et al., "Score-based generative modeling through stochastic differential equations",
2021, eqs. 5 and 29) with

    f(x, t) = (alpha'/alpha) x,        g(t)^2 = 2 sigma (sigma' - (alpha'/alpha) sigma),

(Kingma et al., "Variational diffusion models", 2021, appendix): both follow from d/dt of the mean and of the variance.
In the log signal-to-noise ratio lambda = 2 log(alpha / sigma), g^2 = -sigma^2 dlambda/dt. A concrete class states
alpha, sigma and its prior's standard deviation; everything else is derived here, once.

Time runs from the data (t_min) to the prior (t_max). ``t`` is a tensor of shape ``()`` or ``(B,)``; it carries device
and dtype, and no SDE holds a tensor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.noise import Noise

_PARTS = 64
_LOWEST, _HIGHEST = -14.0, 20.0


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Give a coefficient of shape ``()`` or ``(B,)`` the dimensions to broadcast over ``x`` of shape ``(B, ...)``."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.dim() - 1)) if coefficient.dim() else coefficient


def value_and_derivative(function: Callable[[Tensor], Tensor], t: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
    """f(t) and f'(t), elementwise, with a graph to the parameters of f or without any.

    Reverse mode: on scalars it costs a fifth of forward mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()  # a tensor of inference mode has no gradient, its clone has
        value = function(t)
        # A constant f has no graph to t at all.
        slopes = torch.autograd.grad(value.sum() + 0 * t.sum(), t, create_graph=graph)
    return (value, slopes[0]) if graph else (value.detach(), slopes[0])


class Kernel(NamedTuple):
    """The transition N(scale x_s, std^2 I) from time s to a later time t; shapes of ``t``."""

    scale: Tensor
    std: Tensor


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to time; shapes of ``t``."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def rate(self) -> Tensor:
        """alpha'/alpha, the linear coefficient of the drift."""
        return self.d_alpha / self.alpha

    @property
    def diffusion_squared(self) -> Tensor:
        """g^2 = 2 sigma (sigma' - (alpha'/alpha) sigma)."""
        return 2 * self.sigma * (self.d_sigma - self.rate * self.sigma)


class Curve(NamedTuple):
    """The log-SNR and its derivative with respect to time; shapes of ``t``.

    ``interior``: tensors of that shape through which the gradient of the two reaches what a schedule learns between its
    ends, where a bound does not depend on it; none where nothing is learned.
    """

    log_snr: Tensor
    slope: Tensor
    interior: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GaussianPrior:
    """N(0, std^2 I) over tensors of ``shape`` = ``(B, ...)``: where the reverse process starts."""

    shape: tuple[int, ...]
    std: float

    def sample(self, seed: int = 0, device=None, dtype=torch.float32, first: int = 0) -> Tensor:
        """Draw of shape ``(B, ...)``, of samples ``first`` and on; sample i depends on ``seed`` and i alone."""
        return self.std * Noise(seed, first).normal(self.shape, 0, device, dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, ``(B,)``."""
        squares = (x / self.std).square().flatten(1).sum(1)
        return -0.5 * squares - x[0].numel() * math.log(self.std * math.sqrt(2 * math.pi))


class SDE(ABC):
    """A forward process dx = f(x, t) dt + g(t) dw on ``[t_min, t_max]``."""

    t_min: float
    t_max: float

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), of the shape of ``x``."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), of the shape of ``t``."""

    @abstractmethod
    def prior(self, shape: tuple[int, ...]):
        """The distribution at t_max: has ``sample(seed, device, dtype, first)`` and ``log_prob(x) -> (B,)``."""


def last_time(sde: SDE) -> float:
    """The latest time at which drift and diffusion can be used: t_max, or just before it where they are infinite."""
    end = torch.tensor(sde.t_max, dtype=torch.float64)
    if isinstance(sde, GaussianSDE):  # infinite where alpha is 0: told without differentiating, in every training step
        return sde.t_max if sde.log_snr(end) > -math.inf else float(sde.time(end.new_tensor(sde.log_snr_range[0])))
    if not bool(torch.isfinite(sde.diffusion(end))):
        raise ValueError(f"{sde}: the diffusion is infinite at t_max={sde.t_max}; choose a smaller t_max")
    return sde.t_max


def require_count(value: int, title: str) -> None:
    """Refuse what is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{title} must be a positive integer, found {value!r}")


def require_positive(sde: "GaussianSDE", names: list[str]) -> None:
    """Refuse parameters that are no positive numbers, or in the wrong order."""
    title = type(sde).__name__
    for name in names:
        value, zero = getattr(sde, name), name in sde.may_be_zero
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (0 < value < math.inf or (zero and value == 0)):
            raise ValueError(f"{title}: {name} must be a positive number{' or 0' * zero}, found {value!r}")
    for low, high in (("t_min", "t_max"), *sde.ordered):
        if getattr(sde, low) >= getattr(sde, high):
            found = f"{low}={getattr(sde, low)}, {high}={getattr(sde, high)}"
            raise ValueError(f"{title}: {low} must be smaller than {high}, found {found}")


class GaussianSDE(SDE):
    """A forward process with the kernel N(alpha(t) x_0, sigma(t)^2 I).

    A concrete class is a frozen dataclass of positive numbers, ``t_min`` and ``t_max`` among them; its clock runs over
    t / t_max, so that another ``t_max`` changes the speed and not the family of kernels.
    """

    ordered: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of fields of which the first must be the smaller, beside t_min and t_max."""
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Fields that may be zero."""
    learned: ClassVar[bool] = False
    """Whether alpha and sigma have parameters to learn, which ``coefficients`` then keeps a graph to."""
    learns_ends: ClassVar[bool] = False
    """Whether the ends of the log-SNR are learned too, which takes all parts of a likelihood bound."""
    cures: ClassVar[tuple[str, str]] = ("lower t_min", "raise t_max or the noise there")
    """What to change against too much noise at t_min, and against a prior that is not p_T: a verb and a parameter."""

    def __post_init__(self):
        require_positive(self, [f.name for f in fields(self)])

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data in x_t; shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t; shape of ``t``."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I) at t_max."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma, alpha', sigma' at ``t``, by differentiation."""
        graph = self.learned and torch.is_grad_enabled()
        (alpha, d_alpha), (sigma, d_sigma) = (value_and_derivative(f, t, graph) for f in (self.alpha, self.sigma))
        return Coefficients(alpha, sigma, d_alpha, d_sigma)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) = (alpha'/alpha) x."""
        return expand(self.coefficients(t).rate, x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sqrt(2 sigma (sigma' - (alpha'/alpha) sigma))."""
        return self.coefficients(t).diffusion_squared.sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = 2 log(alpha / sigma), strictly decreasing; nats."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def curve(self, t: Tensor) -> Curve:
        """lambda and dlambda/dt at ``t``, by differentiation; a schedule with parameters keeps a graph to them."""
        return Curve(*value_and_derivative(self.log_snr, t, self.learned and torch.is_grad_enabled()))

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The lowest lambda, at t_max, and the highest, at t_min.

        Where it is infinite, -14 or 20 stands for it: there a sample is noise to 1e-3, or data to 5e-5.
        """
        ends = self.log_snr(torch.tensor((self.t_max, self.t_min), dtype=torch.float64))
        return tuple(ends.detach().nan_to_num(neginf=_LOWEST, posinf=_HIGHEST).tolist())

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of ``log_snr``; a value beyond the ends of time gives the nearer end.

        Here by repeated division, for any process; one that has a closed form may state it.
        """
        low, width = torch.full_like(log_snr, self.t_min)[..., None], self.t_max - self.t_min
        parts = torch.arange(_PARTS, device=log_snr.device, dtype=log_snr.dtype) / _PARTS
        for _ in range(7 if log_snr.dtype == torch.float32 else 11):
            times = low + width * parts  # the part that holds the answer starts at the last time before it
            before = (self.log_snr(times) > log_snr[..., None]).sum(-1, keepdim=True)
            low, width = times.gather(-1, (before - 1).clamp(min=0)), width / _PARTS
        return low.squeeze(-1)

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) eps; shape of ``x0``."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def kernel(self, s: Tensor, t: Tensor) -> Kernel:
        """The transition from time s to a later t: scale = alpha_t / alpha_s, std^2 = sigma_t^2 - scale^2 sigma_s^2."""
        # The variance as sigma_t^2 (1 - SNR_t / SNR_s): no cancellation, and rounding can't make it negative.
        change = (self.log_snr(t) - self.log_snr(s)).clamp(max=0)
        return Kernel(self.alpha(t) / self.alpha(s), self.sigma(t) * torch.sqrt(-torch.expm1(change)))

    def prior(self, shape: tuple[int, ...]) -> GaussianPrior:
        """N(0, prior_std^2 I) over tensors of ``shape`` = ``(B, ...)``."""
        return GaussianPrior(tuple(shape), self.prior_std)
