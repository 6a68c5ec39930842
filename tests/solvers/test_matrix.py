r"""Every sampler under every Gaussian process: its coefficients against a recursion in Python floats of its own.

With the exact score of N(0, v) a step is affine, x_s = a x_t + b z. Run on x_T = 1 and on each z = 1 in turn, a sampler
must give the products of the a and b that its paper states: no Monte Carlo. alpha, sigma, f and g of a process are its
own here, one time at a time (the closed forms of the papers are in test_recursion.py).
"""

import functools
import inspect
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import SDES, ExactNet, gaussian, response

import solvers
from models import ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import DDPMChain, NCSNLevels, RectifiedFlow, geometric_sigmas, linear_betas
from solvers import (
    DDIM,
    DDPM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
)

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
SNR = 0.3


@functools.cache
def level(sde, t):
    """alpha, sigma, f / x and g^2 at the float ``t``, as floats."""
    time = torch.tensor(t, dtype=torch.float64)
    at = sde.coefficients(time)
    alpha, sigma = float(sde.alpha(time).detach()), float(sde.sigma(time).detach())
    rate, squared = float(at.rate.detach()), float(at.diffusion_squared.detach())
    return SimpleNamespace(t=t, alpha=alpha, sigma=sigma, rate=rate, squared=squared)


def grid(sampler, sde):
    """The levels at the sampler's times, numbered."""
    return [SimpleNamespace(index=i, **vars(level(sde, t))) for i, t in enumerate(sampler.times(sde).tolist())]


# One function each: the moves of one step from level t to level s on data N(0, v). A move (a, b) takes x to a x + b z;
# b is None where no noise is drawn, and (a, b, ALWAYS) draws it in the last step too, whatever ``final`` says.

ALWAYS = "always"


def x0_weight(v, at):
    """E[x_0 | x_t] / x_t."""
    return at.alpha * v / (at.alpha**2 * v + at.sigma**2)


def eps_weight(v, at):
    """E[eps | x_t] / x_t."""
    return at.sigma / (at.alpha**2 * v + at.sigma**2)


def euler_maruyama(eta):
    def step(v, t, s):
        dt = t.t - s.t
        drift = t.rate + (1 + eta**2) / 2 * t.squared / (t.alpha**2 * v + t.sigma**2)
        yield 1 - dt * drift, eta * math.sqrt(t.squared * dt) if eta else None

    return step


def ddim(eta):
    """Song et al. (2021), DDIM, eqs. 12 and 16, with sigma_s^2 - noise^2 as a sum."""

    def step(v, t, s):
        kept = t.alpha * s.sigma / (s.alpha * t.sigma)
        direction = s.sigma * math.sqrt(1 - eta**2 + (eta * kept) ** 2)
        noise = eta * s.sigma * math.sqrt((1 - kept) * (1 + kept)) if eta else None
        yield s.alpha * x0_weight(v, t) + direction * eps_weight(v, t), noise

    return step


def ancestral(v, t, s):
    """Bayes' rule with x_t as a noisy observation of x_s, in products that may vanish with sigma_s."""
    scale = t.alpha / s.alpha
    added = (t.sigma - scale * s.sigma) * (t.sigma + scale * s.sigma)
    mean = (s.alpha * added * x0_weight(v, t) + scale * s.sigma**2) / t.sigma**2
    yield mean, s.sigma * math.sqrt(added) / t.sigma


def heun(v, t, s):
    h = s.sigma / s.alpha - t.sigma / t.alpha
    euler = s.alpha * (1 / t.alpha + h * eps_weight(v, t))
    yield s.alpha * (1 / t.alpha + h / 2 * (eps_weight(v, t) + eps_weight(v, s) * euler)), None


def langevin(v, t, s):
    """The fixed step, alone: in the scale of unit variance."""
    yield math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma), None
    yield correction(v, s)


def correction(v, s):
    size = 2 * (SNR * s.sigma) ** 2
    return 1 - size / (s.alpha**2 * v + s.sigma**2), math.sqrt(2 * size), ALWAYS


def chain_level(chain, k):
    at = torch.tensor(k)
    return SimpleNamespace(alpha=float(chain.alpha(at)), sigma=float(chain.sigma(at)))


def ddpm(chain):
    """Bayes' rule at the levels of the chain, in the scale of the process; k = 0 is alpha x_0."""

    def step(v, t, s):
        k = chain.steps - t.index
        before, after = chain_level(chain, k), chain_level(chain, k - 1)
        scale = math.hypot(t.alpha, t.sigma) / math.hypot(before.alpha, before.sigma)
        end = math.hypot(s.alpha, s.sigma) / math.hypot(after.alpha, after.sigma) if k > 1 else s.alpha
        ((a, b),) = ancestral(v, before, after)
        yield end * a / scale, end * b

    return step


def annealed_langevin(sampler):
    """T steps on y = x / alpha at each level, after x_T has become noise of the first."""

    def step(v, t, s):
        yield (s.alpha / t.alpha if t.index else math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma)), None
        sigma, least = (chain_level(sampler.levels, k).sigma for k in (sampler.steps - t.index, 1))
        size = s.alpha**2 * sampler.step_size * (sigma / least) ** 2
        for _ in range(sampler.steps_per_level):
            yield 1 - size / (s.alpha**2 * v + s.sigma**2), math.sqrt(2 * size), ALWAYS

    return step


N = 5
CHAIN = DDPMChain(linear_betas(N, 0.2, 4.0))
ANNEALED = AnnealedLangevin(NCSNLevels(geometric_sigmas(5.0, 0.05, N)), 2, 1e-4, "sample")
MATRIX = [
    (EulerMaruyama(N, "log_snr", stochasticity=0.0), euler_maruyama(0.0)),
    (EulerMaruyama(N, "log_snr", stochasticity=0.5), euler_maruyama(0.5)),
    (EulerMaruyama(N, "log_snr", stochasticity=1.0), euler_maruyama(1.0)),
    (DDIM(N, "log_snr", eta=0.0), ddim(0.0)),
    (DDIM(N, "log_snr", eta=0.5), ddim(0.5)),
    (DDIM(N, "log_snr", eta=1.0), ddim(1.0)),
    (Ancestral(N, "karras"), ancestral),
    (Heun(N), heun),
    (DDPM(CHAIN), ddpm(CHAIN)),
    (ANNEALED, annealed_langevin(ANNEALED)),
    (Langevin(N, "log_snr", snr=SNR, step_rule="fixed"), langevin),
]
"""A sampler, and the recursion of one of its steps."""

CORRECTORS = [None, Langevin(snr=SNR, step_rule="fixed")]
FINALS = ("mean", "sample", "denoise")
REFUSED = {(DDPM, "denoise"): "DDPM: final must be", (AnnealedLangevin, "mean"): "AnnealedLangevin: final must be"}
"""Ways to end that a sampler refuses when it is constructed."""


def recursion(levels, v, step, corrector, final):
    """The factors in the result of x_T, and of all draws in their order."""
    start, noise = 1.0, []
    for t, s in itertools.pairwise(levels):
        last = s.index == len(levels) - 1
        for a, b, *always in (*step(v, t, s), *([correction(v, s)] if corrector else ())):
            start, noise = a * start, [a * n for n in noise]
            if b is not None and (always or not last or final != "mean"):
                noise.append(b)
    end = x0_weight(v, levels[-1]) if final == "denoise" else 1.0
    return [end * start, *(end * n for n in noise)]


def check(monkeypatch, sampler, step, corrector, model, v, rtol):
    whole = PredictorCorrector(sampler, corrector) if corrector else sampler
    found = response(monkeypatch, whole, model, draws=3)
    expected = recursion(grid(sampler, model.sde), v, step, corrector, sampler.final)
    expected = torch.tensor(expected + [0.0] * (3 * N + 1 - len(expected)), dtype=torch.float64)
    actual = torch.cat([found.start[0], found.noise[:, 0, 0]])
    # Where two terms of a step all but cancel the coefficient is as good as the largest allows.
    error = (actual - expected).abs() - 1e-2 * rtol * expected.abs().max()
    assert bool((error <= rtol * expected.abs()).all()), (whole, v, actual, expected)


def cases(sde, sampler):
    """Every corrector and way to end; those that are refused are left out, once they have been."""
    for corrector, final in itertools.product(CORRECTORS, FINALS):
        if (type(sampler), final) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[type(sampler), final]):
                replace(sampler, final=final)
        else:
            yield replace(sampler, final=final), corrector


def name(case):
    return str(case[0]) if isinstance(case, tuple) else str(case)


@pytest.mark.parametrize("sde", [*SDES, RectifiedFlow(t_min=0.0)], ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_every_sampler_is_its_recursion_under_every_process(monkeypatch, sde, case):
    """With each corrector and each way to end; two of the four widths of the data for each, in turn."""
    widths = itertools.cycle(VARIANCES)
    for sampler, corrector in cases(sde, case[0]):
        for v in (next(widths), next(widths)):
            check(monkeypatch, sampler, case[1], corrector, gaussian(sde, v), v, 1e-12)


def through_a_network(monkeypatch, sde, case, products):
    """Through a network that gives the exact target of a parametrization; the widths in turn."""
    for ((sampler, corrector), row), v in zip(products, itertools.cycle(VARIANCES), strict=False):
        made = PARAMETRIZATIONS[row]()
        model = ScoreNetwork(ExactNet(gaussian(sde, v), made.row, made.data_std), sde, row)
        check(monkeypatch, sampler, case[1], corrector, model, v, 1e-12)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_so_it_is_for_every_parametrization(monkeypatch, sde, case):
    """Corrector and way to end in turn: over processes and samplers each parametrization meets them all."""
    first = SDES.index(sde) + [c[0] for c in MATRIX].index(case[0])
    turn = itertools.islice(itertools.cycle(cases(sde, case[0])), first, None)
    through_a_network(monkeypatch, sde, case, zip(turn, PARAMETRIZATIONS, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_so_it_is_for_the_whole_product(monkeypatch, sde, case):
    through_a_network(monkeypatch, sde, case, itertools.product(cases(sde, case[0]), PARAMETRIZATIONS))


LOOKS_BACK = {ExponentialAdams}
"""Whose step is no function of x_t alone: the recursion is in a test file of its own."""


def test_every_exported_sampler_is_here():
    exported = [getattr(solvers, name) for name in solvers.__all__]
    samplers = {c for c in exported if inspect.isclass(c) and issubclass(c, Sampler) and not inspect.isabstract(c)}
    assert samplers == {type(sampler) for sampler, _ in MATRIX} | {PredictorCorrector} | LOOKS_BACK
