r"""One question put to every way of computing a log-density alike: from these points, what is log p?

A case is a score model, points at t_min, the log-density at t_max that ends the flow, and what the answer must be. The
scores are closed forms in float64, so that an error is the method's own: of the integration alone where the terminal
density is exact. For a perturbed score, which is the gradient of no density, the answer is the density of its own flow,
computed until two tolerances agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models import GaussianMixture
from sde import VE, VP, GaussianSDE, Noise, Prediction, ScoreModel
from solvers import Divergence, Hutchinson, log_likelihood
from targets import Target, converged

SDES: dict[str, GaussianSDE] = {"VP": VP(), "VE": VE(sigma_min=0.01, sigma_max=50.0)}
"""beta .1 to 20 from t = 1e-5; sigma .01 to 50."""
PERTURBATION = 0.02
REFERENCE = (1e-9, 1e-10)
"""Tolerances of dopri8 that must agree."""
SIGNS = Hutchinson(probes=1)
"""Exact for the models of this file."""
_FEATURES = 64
_FRESH = 7919  # the stream of noise at t_min, apart from that of the data


@dataclass(frozen=True)
class Case:
    """Points ``x`` ``(B, ...)`` at t_min, ``terminal`` x_T -> log p_T ``(B,)``, and the ``truth``, nats, ``(B,)``."""

    name: str
    model: ScoreModel
    x: Tensor
    terminal: Callable[[Tensor], Tensor]
    truth: Tensor
    divergence: Divergence
    seed: int = 0

    def error(self, log_prob: Tensor) -> float:
        """Mean absolute error in nats; infinite for values that are not finite."""
        mae = float((log_prob - self.truth).abs().mean())
        return mae if math.isfinite(mae) else math.inf


class _Linked(torch.autograd.Function):
    """A value for whose Jacobian stands the isotropic matrix of the same trace ``(B,)``.

    The divergence is all that is asked of it here: by the D unit vectors, or by one vector of signs, it is exact.
    """

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, trace: Tensor) -> Tensor:
        ctx.save_for_backward(trace[:, None] / x.shape[1])
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


class Closed(ScoreModel):
    """A mixture's exact score whose divergence is a closed form too: one product in place of D.

    For a component k with e_k = sigma C_k^-1 (x - alpha mu_k), eps is the mean of e_k over the posterior of k, and its
    divergence the mean of sigma tr C_k^-1 less the variance of e_k over sigma.
    """

    def __init__(self, mixture: GaussianMixture):
        super().__init__(mixture.sde)
        self.mixture = mixture

    def forward(self, x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (c.reshape(-1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        eps = _Linked.apply(x, *self.noise(x.detach(), t))
        return Prediction((x - sigma * eps) / alpha, eps)

    def noise(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """eps ``(B, D)`` and its divergence ``(B,)`` at ``x``."""
        _, sigma, residual, variance, joint = self.mixture._components(x, t)
        share, precision = torch.softmax(joint, dim=1), sigma / variance
        parts = torch.einsum("kde,bke->bkd", self.mixture.axes, precision * residual)
        eps = torch.einsum("bk,bkd->bd", share, parts)
        spread = (parts - eps[:, None]).square() / sigma
        return eps, (share * (precision - spread).sum(2)).sum(1)


class Perturbed(Closed):
    """The exact score plus a smooth error that is not a gradient: ``share`` of the rms of eps at every noise level.

    The error is a sum of random waves in x / sqrt(alpha^2 + sigma^2) and the log-SNR, of unit rms, fixed by ``seed``.
    The rms of eps is sigma / sqrt(alpha^2 h + sigma^2), h the harmonic mean of the components' variances: exact with
    little noise, where components are apart, and with much.
    """

    def __init__(self, mixture: GaussianMixture, share: float = PERTURBATION, seed: int = 0):
        super().__init__(mixture)
        size, like, noise = mixture.means.shape[1], {"dtype": mixture.means.dtype}, Noise(seed)
        self.share, self.spread = share, 1 / float((1 / mixture.variances).mean())
        self.waves = noise.normal((_FEATURES, size), 0, **like)
        self.directions = noise.normal((_FEATURES, size), 1, **like) * math.sqrt(2 / _FEATURES)
        clock, phase = noise.normal((_FEATURES, 2), 2, **like).unbind(1)
        self.clock, self.phase = 0.5 * clock, 10 * phase

    def noise(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps, trace = super().noise(x, t)
        alpha, sigma = (c.reshape(-1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        length = torch.hypot(alpha, sigma)
        rms = self.share * sigma / torch.sqrt(alpha**2 * self.spread + sigma**2)
        angle = x / length @ self.waves.T + self.sde.log_snr(t).reshape(-1, 1) * self.clock + self.phase
        turn = angle.sin() @ (self.directions * self.waves).sum(1)
        return eps + rms * (angle.cos() @ self.directions), trace - (rms / length)[:, 0] * turn


def points(mixture: GaussianMixture, n: int, seed: int) -> Tensor:
    """``n`` draws of p at t_min, ``(n, D)``."""
    t, x0 = torch.tensor(mixture.sde.t_min, dtype=mixture.means.dtype), mixture.sample(n, seed)
    return mixture.sde.perturb(x0, t, Noise(seed).normal(tuple(x0.shape), _FRESH, dtype=x0.dtype))


def exact_case(target: Target, process: str, seed: int, n: int = 256) -> Case:
    """The exact score, with the exact density at t_max, against the exact density at t_min."""
    mixture = target.model(SDES[process], torch.float64)
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (mixture.sde.t_min, mixture.sde.t_max))
    x = points(mixture, n, seed)
    truth, name = mixture.log_prob(x, first), f"{target.name}, {process}"
    return Case(name, Closed(mixture), x, lambda z: mixture.log_prob(z, last), truth, SIGNS, seed)


def perturbed_case(
    target: Target, process: str, seed: int, n: int = 256, tolerances: tuple[float, float] = REFERENCE
) -> Case:
    """The perturbed score, against the density of its own flow; the same terminal density."""
    exact = exact_case(target, process, seed, n)
    model = Perturbed(target.model(SDES[process], torch.float64))
    case = replace(exact, name=f"{exact.name}, perturbed", model=model)
    return replace(case, truth=own_density(case, tolerances)[0])


def own_density(case: Case, tolerances: tuple[float, float] = REFERENCE, agree: float = 1e-6) -> tuple[Tensor, float]:
    """log p of the flow of the case's model by dopri8, and the largest difference between two tolerances."""
    options = {"divergence": case.divergence, "prior": case.terminal, "method": "dopri8"}

    def solve(tolerance: float) -> Tensor:
        return log_likelihood(case.model, case.x, rtol=tolerance, atol=tolerance, **options).log_prob

    return converged(solve, tolerances, agree)
