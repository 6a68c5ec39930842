r"""The chain of DDPM: x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, variance-preserving, and its schedules.

alpha_k^2 = prod (1 - beta_j), the paper's alpha_bar, and sigma_k^2 = 1 - alpha_k^2 (Ho et al., 2020, eq. 4). With
beta_k = beta(k / N) / N its limit for N -> infinity is ``VP``, at a distance of O(1/N) (Song et al., 2021, eq. 11).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sde.base import GaussianSDE, last_time, require_count
from sde.discrete import GaussianChain


def linear_betas(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[float, ...]:
    """``steps`` betas, equally spaced from beta_min / steps to beta_max / steps: 1e-4 to 0.02 for 1000 (Ho et al.).

    Raises ``ValueError`` unless beta_max / steps < 1.
    """
    require_count(steps, "linear_betas: steps")
    if not 0 < beta_min <= beta_max:
        raise ValueError(f"linear_betas: expected 0 < beta_min <= beta_max, found {beta_min} and {beta_max}")
    if not beta_max / steps < 1:
        raise ValueError(
            f"linear_betas: the last beta is beta_max / steps = {beta_max} / {steps} and must be below 1; take more "
            "steps than beta_max, or sde_betas(VP(...), steps), which is exact for any number"
        )
    return tuple(torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float64).tolist())


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> tuple[float, ...]:
    """beta_k = min(1 - f(k) / f(k - 1), largest), f(k) = cos^2((k / N + s) / (1 + s) pi/2), s the offset.

    Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17.
    """
    require_count(steps, "cosine_betas: steps")
    if not (offset >= 0 and 0 < largest < 1):
        raise ValueError(f"cosine_betas: expected offset >= 0 and largest in (0, 1), found {offset} and {largest}")
    angles = [(k / steps + offset) / (1 + offset) * math.pi / 2 for k in range(steps + 1)]
    # cos^2 a - cos^2 b = sin(b - a) sin(b + a): free of cancellation for many steps.
    return tuple(min(math.sin(b - a) * math.sin(b + a) / math.cos(a) ** 2, largest) for a, b in pairwise(angles))


def sde_betas(sde: GaussianSDE, steps: int = 1000) -> tuple[float, ...]:
    """The betas for which the chain has exactly the marginals of a variance-preserving ``sde`` at t_k = k / N t_max.

    beta_k = 1 - alpha(t_k)^2 / alpha(t_{k-1})^2, with alpha = 1 at k = 0, in (0, 1) for any number of steps. Where
    alpha vanishes at t_max, ``sde.base.last_time`` stands for it. Raises ``ValueError`` unless alpha^2 + sigma^2 = 1.
    """
    require_count(steps, "sde_betas: steps")
    times = last_time(sde) * torch.arange(1, steps + 1, dtype=torch.float64) / steps
    with torch.no_grad():
        total, log_snr = sde.alpha(times).square() + sde.sigma(times).square(), sde.log_snr(times)
    if not bool(((total - 1).abs() < 1e-6).all()):
        raise ValueError(
            f"sde_betas needs a variance-preserving SDE, alpha^2 + sigma^2 = 1, found {sde}; see sde.preserving"
        )
    # log alpha^2 from the log-SNR: log(alpha) itself loses digits where alpha is close to 1.
    return _betas(torch.nn.functional.logsigmoid(log_snr))


def log_snr_betas(sde: GaussianSDE, steps: int = 1000) -> tuple[float, ...]:
    """The betas of levels evenly spaced in log-SNR over the range of any Gaussian ``sde``, from t_min to t_max.

    The chain is that process in the coordinates x / sqrt(alpha^2 + sigma^2), in which it preserves the variance.
    """
    require_count(steps, "log_snr_betas: steps")
    low, high = sde.log_snr_range
    return _betas(torch.nn.functional.logsigmoid(torch.linspace(high, low, steps, dtype=torch.float64)))


def _betas(log_alpha_bar: Tensor) -> tuple[float, ...]:
    """1 - alpha_bar_k / alpha_bar_{k-1} from log alpha_bar at k = 1..N."""
    return tuple((-torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))).tolist())


@dataclass(frozen=True, repr=False)
class DDPMChain(GaussianChain):
    """The chain of given ``betas``, beta_1 to beta_N in (0, 1); ``linear_betas(1000)``, those of the paper, by default.

    >>> chain = DDPMChain()
    >>> chain, float(chain.alpha(1000) ** 2)
    (DDPMChain(1000 betas, 0.0001 to 0.02), 4.03...e-05)
    """

    betas: Sequence[float] = field(default_factory=linear_betas)

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if not self.betas:
            raise ValueError("DDPMChain: expected at least one beta, found none")
        for k, beta in enumerate(self.betas, start=1):
            if not 0 < beta < 1:
                raise ValueError(f"DDPMChain: each beta must lie in (0, 1), found beta_{k} = {beta}")
        if not float(self.levels()[0][-1]) > 0:
            raise ValueError("DDPMChain: alpha_N = prod sqrt(1 - beta) is 0 in float64; take fewer or smaller betas")

    __hash__ = GaussianChain.__hash__

    def __repr__(self) -> str:
        return f"DDPMChain({len(self.betas)} betas, {self.betas[0]:.3g} to {self.betas[-1]:.3g})"

    @property
    def steps(self) -> int:
        return len(self.betas)

    @property
    def prior_std(self) -> float:
        return 1.0

    def levels(self) -> tuple[Tensor, Tensor]:
        total = self._log_alpha_bar()
        return torch.exp(0.5 * total), torch.sqrt(-torch.expm1(total))

    def subset(self, indices: Sequence[int]) -> "DDPMChain":
        return DDPMChain(_betas(self._log_alpha_bar()[list(indices)]))

    def _log_alpha_bar(self) -> Tensor:
        betas = torch.tensor((0.0, *self.betas), dtype=torch.float64)
        return torch.log1p(-betas).cumsum(0)
