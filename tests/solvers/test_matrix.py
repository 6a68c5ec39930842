r"""Every sampler under every Gaussian process: its coefficients against a recursion in Python floats of its own.

Run on x_T = 1 and on each z = 1 in turn, a sampler must give the coefficients that the papers' formulas in
``recursions.py`` give: no Monte Carlo. alpha, sigma, f and g of a process are its own here, one time at a time (their
closed forms are in test_recursion.py).
"""

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracles import SDES, ExactNet, gaussian, quick, response
from recursions import (
    BASHFORTH,
    FIXED,
    FORMS,
    ancestral,
    annealed_langevin,
    correction,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    exponential_adams,
    heun,
    langevin,
    level,
    reverse_diffusion,
    run,
    runge_kutta,
    sde_dpm_solver,
    unipc,
)

import solvers
from models import ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import VE, VP, DDPMChain, NCSNLevels, RectifiedFlow, geometric_sigmas, linear_betas
from solvers import (
    DDIM,
    DDPM,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    Euler,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    Langevin,
    PredictorCorrector,
    RePaint,
    ReverseDiffusion,
    RungeKutta4,
    Sampler,
    SDEDPMSolver,
    UniPC,
)

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
ENDED = RectifiedFlow(t_min=0.0)
PROCESSES = [*SDES, ENDED]
SNR, N, DRAWS = 0.3, 5, 3

CHAIN = DDPMChain(linear_betas(N, 0.2, 4.0))
ANNEALED = AnnealedLangevin(NCSNLevels(geometric_sigmas(5.0, 0.05, N)), 2, 1e-4, "sample")
CHURN = {"churn": 1.5, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
MATRIX = [
    *((EulerMaruyama(N, "log_snr", stochasticity=eta), euler_maruyama(eta)) for eta in (0.0, 0.5, 1.0, 2.0)),
    (ReverseDiffusion(N, "karras"), reverse_diffusion),
    *((SDEDPMSolver(N, order=1, stochasticity=eta), sde_dpm_solver(eta, 1)) for eta in (0.0, 0.5, 1.0)),
    *((SDEDPMSolver(N, "karras", order=2, stochasticity=eta), sde_dpm_solver(eta, 2)) for eta in (0.0, 0.5, 1.0, 2.0)),
    *((DDIM(N, "log_snr", eta=eta), ddim(eta)) for eta in (0.0, 0.5, 1.0)),
    (Ancestral(N, "karras"), ancestral),
    (Euler(N, "log_snr"), euler_maruyama(0.0)),
    (Heun(N), heun()),
    (Heun(N, churn=40.0), heun(40.0)),
    (Heun(N, "log_snr", **CHURN), heun(*CHURN.values())),
    (RungeKutta4(N), runge_kutta),
    *((DPMSolver(N, "karras", order=order), dpm_solver(order)) for order in (1, 2, 3)),
    *((UniPC(N, "karras", order=order), unipc(order)) for order in (1, 2, 3)),
    *((ExponentialAdams(N, data_std=c, **BASHFORTH), exponential_adams(form, 6)) for form, c in FORMS.items()),
    (ExponentialAdams(N, data_std=0.0, **FIXED), exponential_adams("data", 6, corrected=True)),
    (ExponentialAdams(N, **FIXED), exponential_adams("v", 6, corrected=True)),
    (ExponentialAdams(N, order=3, adaptive=False, knee=6.0), exponential_adams("v", 3, 6.0, corrected=True)),
    (DDPM(CHAIN), ddpm(CHAIN)),
    (ANNEALED, annealed_langevin(ANNEALED)),
    (Langevin(N, "log_snr", snr=SNR, step_rule="fixed"), langevin(SNR)),
    (Langevin(N, "log_snr", snr=SNR, step_rule="fixed", corrections=2), langevin(SNR, 2)),
]
"""A sampler, and the recursion of one of its steps; what looks back, on steps that differ in the log-SNR."""

CORRECTORS = [None, Langevin(snr=SNR, step_rule="fixed")]
FINALS = ("mean", "sample", "denoise")
REFUSED = {(DDPM, "denoise"): "DDPM: final must be", (AnnealedLangevin, "mean"): "AnnealedLangevin: final must be"}
"""Ways to end that a sampler refuses when it is constructed."""


def coefficients(monkeypatch, case, model, v):
    """Of x_T and of all draws, as they are and as they should be."""
    sampler, corrector, step = case
    whole, correct = (PredictorCorrector(sampler, corrector), correction(SNR)) if corrector else (sampler, None)
    levels = [level(model.sde, t) for t in sampler.times(model.sde).tolist()]
    expected = torch.from_numpy(run(step, levels, v, sampler.final, DRAWS, correct))
    found = response(monkeypatch, whole, model, draws=DRAWS)
    return torch.cat([found.start[0], found.noise[:, 0, 0]]), expected


def cases(case):
    """Every corrector and way to end; those that are refused are left out, once they have been."""
    sampler, step = case
    for corrector, final in itertools.product(CORRECTORS, FINALS):
        if (type(sampler), final) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[type(sampler), final]):
                replace(sampler, final=final)
        elif corrector and sampler.looks_back:
            with pytest.raises(ValueError, match=f"a step of {type(sampler).__name__} starts from earlier states"):
                PredictorCorrector(replace(sampler, final=final), corrector)
        else:
            yield replace(sampler, final=final), corrector, step


def name(case):
    return str(case[0]) if isinstance(case, tuple) else str(case)


@pytest.mark.parametrize("sde", quick(PROCESSES, VP, VE, RectifiedFlow), ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_every_sampler_is_its_recursion_under_every_process(monkeypatch, sde, case):
    """With each corrector and each way to end; over the processes each of them meets all widths of the data."""
    widths = itertools.islice(itertools.cycle(VARIANCES), PROCESSES.index(sde), None)
    for one, v in zip(cases(case), widths, strict=False):
        actual, expected = coefficients(monkeypatch, one, gaussian(sde, v), v)
        # Where two terms of a step all but cancel, a coefficient is as good as the largest allows.
        error = (actual - expected).abs() - 1e-14 * expected.abs().max()
        assert bool((error <= 1e-12 * expected.abs()).all()), (one, v, actual, expected)


def rounding(sde, row):
    """Of x, in the pair: from eps alone x_0 = (x - sigma eps) / alpha, from x_0 alone eps = (x - alpha x_0) / sigma."""
    low, high = sde.log_snr_range
    worst = {"noise": math.exp(-0.5 * low), "score": math.exp(-0.5 * low), "data": math.exp(0.5 * high)}
    return torch.finfo(torch.float64).eps * worst.get(row, 1.0)


def through_a_network(monkeypatch, sde, products):
    """Through a network that gives the exact target of a parametrization: to 1e-12 of the largest, and rounding."""
    for case, row, v in products:
        if sde == ENDED and isinstance(case[0], RungeKutta4):
            continue  # it reads eps where sigma is 0, which a network can only tell just before
        made = PARAMETRIZATIONS[row]()
        model = ScoreNetwork(ExactNet(gaussian(sde, v), made.row, made.data_std), sde, row)
        actual, expected = coefficients(monkeypatch, case, model, v)
        largest = float(expected.abs().max())
        within = 1e-12 * largest + rounding(sde, row) * max(1.0, largest)  # x_T, where it starts, is 1
        assert float((actual - expected).abs().max()) <= within, (case, row, v, actual, expected)


@pytest.mark.parametrize("sde", quick(PROCESSES), ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_so_it_is_for_every_parametrization(monkeypatch, sde, case):
    """Three of them, each with one corrector, way to end and width: over all processes and samplers each meets all."""
    first = PROCESSES.index(sde) + [c[0] for c in MATRIX].index(case[0])
    turn = itertools.islice(itertools.cycle(cases(case)), first // 2, None)
    widths = itertools.islice(itertools.cycle(VARIANCES), PROCESSES.index(sde), None)
    through_a_network(monkeypatch, sde, zip(turn, list(PARAMETRIZATIONS)[first % 2 :: 2], widths, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("sde", PROCESSES, ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_so_it_is_for_the_whole_product(monkeypatch, sde, case):
    through_a_network(monkeypatch, sde, itertools.product(cases(case), PARAMETRIZATIONS, VARIANCES))


def test_every_exported_sampler_is_here():
    exported = [getattr(solvers, name) for name in solvers.__all__]
    samplers = {c for c in exported if inspect.isclass(c) and issubclass(c, Sampler) and not inspect.isabstract(c)}
    assert samplers == {type(sampler) for sampler, _ in MATRIX} | {PredictorCorrector, RePaint}
