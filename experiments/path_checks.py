r"""What must hold of a process's densities, paths and prior, measured as in ``experiments.checks``.

For the score s of any p_t that starts from data (the Fokker-Planck equation; Song et al., 2021, appendix D.1),

    d_t log p = -div f - f . s + (g^2 / 2)(div s + |s|^2),        d/dt log p(x_t) = -div (f - g^2 s / 2)

along the probability flow. The data are a mixture of Gaussians, whose p_t and score are known.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.checks import Subject, Violation, name_of, worst
from solvers import Exact, log_likelihood, simulate
from solvers.ode import integrate

_TOLERANCES = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
_PATHS = 2000
_DRAWS = 20_000


def fokker_planck(s: Subject) -> float:
    n, t = 32, s.times()[::25]
    x = s.noised(t, n).detach().requires_grad_()
    t = t.repeat_interleave(n).requires_grad_()
    with torch.enable_grad():
        log_p = s.mixture.log_prob(x, t)
        score, rise = torch.autograd.grad(log_p.sum(), (x, t), create_graph=True)
        curvature = sum(torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    drift, divergence = Exact().along(lambda y: s.sde.drift(y, t.detach()), x, Exact().directions(x))
    half = 0.5 * s.sde.diffusion(t.detach()).square()
    terms = (rise, divergence[:, 0], (drift * score).sum(1), -half * curvature, -half * score.square().sum(1))
    return worst(sum(terms) / sum(term.abs() for term in terms))


def simulation(s: Subject) -> float:
    """Standard errors between 200 steps and the kernel, beyond the change from 100 steps to 200."""
    (mean, std), (coarse_mean, coarse_std) = (_moments(s, steps) for steps in (200, 100))
    off_mean = (mean.abs() - (mean - coarse_mean).abs()) * _PATHS**0.5
    off_std = ((std - 1).abs() - (std - coarse_std).abs()) * (2 * _PATHS) ** 0.5
    return worst(torch.relu(torch.stack((off_mean, off_std))))


def _moments(s: Subject, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation, 0 and 1 by rights, of simulated paths over the kernel's at four times, ``(4, 2)`` each."""
    x = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(_PATHS, 2)
    out = simulate(s.sde, x, steps, seed=s.seed + steps, grid="log_snr", trajectory=steps // 4)
    scale, std = (c[:, None, None] for c in s.sde.kernel(out.times[0], out.times[1:]))
    units = ((out.trajectory[1:] - scale * x) / std).detach()
    return units.mean(1), units.std(1)


def probability_flow(s: Subject) -> float:
    t = torch.tensor(s.sde.t_min, dtype=torch.float64)
    x = s.noised(t[None], 16).detach()
    directions = Exact().directions(x)

    def slopes(at: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        half = 0.5 * s.sde.diffusion(at).square().detach()

        def velocity(y: Tensor) -> Tensor:
            (score,) = torch.autograd.grad(s.mixture.log_prob(y, at).sum(), y, create_graph=True)
            return s.sde.drift(y, at) - half * score

        return Exact().along(velocity, state[0], directions)

    x_T, change = integrate(slopes, (x, torch.zeros(len(x), 1).to(x)), s.sde.t_min, s.end, max_steps=200, **_TOLERANCES)
    end = torch.tensor(s.end, dtype=torch.float64)
    return worst(s.mixture.log_prob(x_T, end) + change[:, 0] - s.mixture.log_prob(x, t))


def likelihood(s: Subject) -> float:
    t, end = (torch.tensor(t, dtype=torch.float64) for t in (s.sde.t_min, s.sde.t_max))
    x = s.noised(t[None], 16).detach()
    found = log_likelihood(s.mixture, x, prior=lambda x_T: s.mixture.log_prob(x_T, end), **_TOLERANCES)
    return worst(found.log_prob - s.mixture.log_prob(x, t))


# ---------------------------------------------------------------------------------------------------------------------
# The prior. Its density is taken on a grid of a single dimension.


class _Density(NamedTuple):
    """A density on a grid: mass, mean, standard deviation, and kurtosis."""

    mass: float
    mean: float
    std: float
    kurtosis: float


def _draws(s: Subject) -> Tensor:
    x = s.sde.prior((_DRAWS, 1)).sample(seed=s.seed, dtype=torch.float64)
    if x.shape != (_DRAWS, 1) or x.dtype != torch.float64:
        raise Violation(f"a sample of prior(({_DRAWS}, 1)) in float64 is {tuple(x.shape)} of {name_of(x.dtype)}")
    return x[:, 0]


def _density(s: Subject) -> _Density:
    draws = _draws(s)
    x = torch.linspace(-30, 30, _DRAWS + 1, dtype=torch.float64) * draws.std() + draws.mean()
    p = s.sde.prior((len(x), 1)).log_prob(x[:, None]).exp() * (x[1] - x[0])
    mean = (p * x).sum() / p.sum()
    second, fourth = (((x - mean) ** k * p).sum() / p.sum() for k in (2, 4))
    return _Density(*(v.item() for v in (p.sum(), mean, second.sqrt(), fourth / second.square())))


def prior_density(s: Subject) -> float:
    return abs(_density(s).mass - 1)


def prior_samples(s: Subject) -> float:
    """Standard errors between the moments of samples and of the density."""
    draws, expected = _draws(s), _density(s)
    off_mean = (draws.mean().item() - expected.mean) / expected.std * _DRAWS**0.5
    error = max(expected.kurtosis - 1, 0.1) ** 0.5 / 2 / _DRAWS**0.5
    return max(abs(off_mean), abs(draws.std().item() / expected.std - 1) / error)


def prior_std(s: Subject) -> float:
    """How far, relatively, the prior's deviation lies outside those of p_T for data of variance 0 to 1."""
    t = torch.tensor(s.sde.t_max, dtype=torch.float64)
    alpha, sigma = s.sde.alpha(t).item(), s.sde.sigma(t).item()
    found = _density(s)
    size = math.hypot(found.std, found.mean)
    return max(sigma - size, size - math.hypot(alpha, sigma), 0.0) / sigma


def prior_mismatch(s: Subject) -> float:
    """KL(q(x_T | x_0) || prior) for x_0 = 1 and -1, by quadrature; nats."""
    t, total = torch.tensor(s.sde.t_max, dtype=torch.float64), 0.0
    u = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_q = -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
    for x0 in (1.0, -1.0):
        x = s.sde.alpha(t) * x0 + s.sde.sigma(t) * u
        gap = log_q - s.sde.sigma(t).log() - s.sde.prior((len(x), 1)).log_prob(x[:, None])
        total += 0.5 * (log_q.exp() * gap).sum().item() * float(u[1] - u[0])
    return total


def simulation_end(s: Subject) -> float:
    """How far mean and deviation of simulated paths, from standard normal data, end from the prior's, relatively."""
    x = simulate(s.sde, s.noise(_PATHS, 2), steps=400, seed=s.seed).x
    expected = _density(s)
    return max(worst(x.std(0) / expected.std - 1), worst((x.mean(0) - expected.mean) / expected.std))
