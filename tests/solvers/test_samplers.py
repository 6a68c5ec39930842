"""Every sampler under every process: right on a correlated Gaussian, independent of the batch, counted, and refused."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from oracles import CORE_SDES, ROWS, SDES, ExactNet, correlated, gaussian, marginal, mixture, quick, response
from torch import nn

import solvers
from models import MLP, ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import VE, VP, Cosine, RectifiedFlow, ScoreModel
from sde.base import last_time
from solvers import (
    DDIM,
    DDPM,
    GRIDS,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    Euler,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    RePaint,
    ReverseDiffusion,
    RungeKutta4,
    Sampler,
    SDEDPMSolver,
    UniPC,
)
from solvers.base import SamplingDiverged

AFFINE = {  # calls of the model per step, and whether a step draws noise
    EulerMaruyama(): (1, 1),
    ReverseDiffusion(): (1, 1),
    SDEDPMSolver(): (1, 1),
    SDEDPMSolver(stochasticity=0.0): (1, 0),
    SDEDPMSolver(order=1, stochasticity=0.5): (1, 1),
    Ancestral(): (1, 1),
    DDIM(): (1, 0),
    DDIM(eta=0.5): (1, 1),
    DDIM(eta=1.0): (1, 1),
    Heun(): (2, 0),
    ExponentialAdams(adaptive=False): (1, 0),
    Heun(churn=10.0): (2, 1),
    Euler(): (1, 0),
    DPMSolver(order=1): (1, 0),
    DPMSolver(order=2): (1, 0),
    DPMSolver(order=3): (1, 0),
    UniPC(order=1): (1, 0),
    UniPC(order=2): (1, 0),
    UniPC(order=3): (1, 0),
    RungeKutta4(): (4, 0),
}
OTHERS = {
    EulerMaruyama(stochasticity=0.0): 1,
    Langevin(): 1,
    Langevin(corrections=3): 3,
    Langevin(step_rule="song"): 1,
    Langevin(step_rule="fixed"): 1,
    PredictorCorrector(EulerMaruyama(), Langevin()): 2,
    PredictorCorrector(DDIM(), Langevin(corrections=2)): 3,
    PredictorCorrector(Heun(), Langevin(snr=0.1)): 3,
    PredictorCorrector(Ancestral(), PredictorCorrector(Langevin(), Langevin(corrections=0)).predictor): 2,
    RePaint(DDIM(), rounds=2): 2,
}
CALLS = {**{sampler: calls for sampler, (calls, _) in AFFINE.items()}, ExponentialAdams(): 1, **OTHERS}

ON_CHAINS = {DDPM, AnnealedLangevin}
"""Over the levels of a chain, and not over a grid of times: they have the same tests in test_chains.py."""


def test_the_stated_calls_per_step_are_these():
    for sampler, calls in CALLS.items():
        assert sampler.calls_per_step == calls, sampler
        assert sampler.with_steps(7) == with_steps(sampler, 7, inner(sampler).grid, sampler.final), sampler


def inner(sampler):
    """The one that has the grid."""
    parts = {PredictorCorrector: "predictor", RePaint: "sampler"}
    return inner(getattr(sampler, parts[type(sampler)])) if type(sampler) in parts else sampler


def with_steps(sampler, steps, grid="log_snr", final="mean"):
    if isinstance(sampler, PredictorCorrector):
        return PredictorCorrector(with_steps(sampler.predictor, steps, grid, final), sampler.corrector)
    if isinstance(sampler, RePaint):
        return replace(sampler, sampler=with_steps(sampler.sampler, steps * sampler.jump, grid, final))
    return replace(sampler, steps=steps, grid=grid, final=final)


def test_every_exported_sampler_is_tested_here():
    exported = [c for c in (getattr(solvers, name) for name in solvers.__all__) if inspect.isclass(c)]
    concrete = {c for c in exported if issubclass(c, Sampler) and not inspect.isabstract(c)}
    assert concrete == {type(s) for s in CALLS} | ON_CHAINS


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", AFFINE, ids=str)
def test_mean_and_covariance_of_a_correlated_gaussian(monkeypatch, sde, sampler):
    """Without Monte Carlo: from the exact p at t_max, the moments of n and of 2 n steps extrapolate to p at t_min."""
    model = correlated(sde)
    mean, covariance = marginal(model, sde.t_min)
    coarse, fine = (
        response(monkeypatch, with_steps(sampler, n, final="sample"), model, 2).moments(
            *marginal(model, last_time(sde))
        )
        for n in ((450, 900) if isinstance(sampler, Euler) else (160, 320))  # without noise errors in t stay
    )
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    assert (root @ coarse[1] @ root.T - torch.eye(2)).abs().max() < 0.15
    assert (root @ (2 * fine[0] - coarse[0] - mean)).norm() < 0.01
    assert (root @ (2 * fine[1] - coarse[1]) @ root.T - torch.eye(2)).abs().max() < 0.01


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
@pytest.mark.parametrize("sampler", AFFINE, ids=str)
def test_all_parametrizations_of_one_model_sample_alike(monkeypatch, sde, sampler):
    sampler, exact = with_steps(sampler, 15), correlated(sde)
    expected = response(monkeypatch, sampler, exact, 2)
    for name in ROWS:
        model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
        for part, whole in zip(response(monkeypatch, sampler, model, 2), expected, strict=True):
            assert torch.allclose(part, whole, rtol=0, atol=1e-12 + 1e-6 * float(whole.abs().max())), name


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("sampler", [s for s in OTHERS if isinstance(s, PredictorCorrector)], ids=str)
def test_corrected_samplers_on_a_correlated_gaussian(sde, sampler):
    """The bias of Langevin steps of snr 0.16 is under 8 %; the rest is Monte Carlo, 5 standard errors."""
    model, n = correlated(sde), 4000
    x = with_steps(sampler, 100)(model, shape=(n, 2), seed=3, dtype=torch.float64).x
    check_moments(x, model, sde, bias=0.08)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_corrected_samplers_of_all_parametrizations(sde, name):
    exact = correlated(sde)
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
    sampler = with_steps(PredictorCorrector(Ancestral(), Langevin()), 20)
    arguments = dict(shape=(16, 2), seed=1, dtype=torch.float64)
    assert torch.allclose(sampler(model, **arguments).x, sampler(exact, **arguments).x, atol=1e-5)


def check_moments(x, model, sde, bias):
    mean, covariance = marginal(model, sde.t_min)
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    y, n = (x - mean) @ root.T, len(x)
    assert y.mean(0).abs().max() < bias + 5 / math.sqrt(n)
    products = torch.stack([y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1]]) - torch.tensor([[1.0], [1.0], [0.0]])
    assert (products.mean(1).abs() < bias + 5 * products.std(1) / math.sqrt(n)).all(), products.mean(1)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_annealed_langevin_reaches_a_narrow_gaussian(sde):
    """At the same steps per noise level that Song and Ermon (2019) take; data narrow against the smallest noise."""
    v = float(sde.sigma(torch.tensor(sde.t_min, dtype=torch.float64)) ** 2)
    model = gaussian(sde, v)
    x = Langevin(40, "log_snr", corrections=30)(model, shape=(2000, 1), seed=0, dtype=torch.float64).x
    # 1-D: too wide by 1 + 2 / (1 + 32) at half of the curvature of pure noise, and by the size of the step.
    assert float(x.var() / marginal(model, sde.t_min)[1]) == pytest.approx(1.06, abs=5 * math.sqrt(2 / 2000))


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_the_probability_flow_carries_p_at_t_max_to_p_at_t_min(sde):
    """For a Gaussian the flow is affine: the images of 0 and of the unit vectors give it whole."""
    model = correlated(sde)
    corners = float(sde.prior((1, 2)).std) * torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    x = ProbabilityFlow(1e-8, 1e-8)(model, x_T=corners).x
    start = (x[1:] - x[0]) / corners.max()
    (mean, covariance), (first, wide) = marginal(model, sde.t_min), marginal(model, sde.t_max)
    assert torch.allclose(x[0] + first @ start, mean, atol=1e-6)
    assert torch.allclose(start.T @ wide @ start, covariance, atol=1e-6)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_the_probability_flow_of_all_parametrizations(sde, name):
    exact = correlated(sde)
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
    x_T = sde.prior((4, 2)).sample(0, dtype=torch.float64)
    found, expected = (ProbabilityFlow(method="rk4", steps=8)(m, x_T=x_T).x for m in (model, exact))
    # Where alpha falls to 0 a network keeps its x_0 over the last thousandth of time.
    atol = 1e-6 if last_time(sde) == sde.t_max else 5e-4
    assert torch.allclose(found, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_the_flow_of_a_gaussian_is_a_scaling(sde):
    """x_T - m_T = sqrt(V_T / V_0) (x_0 - m_0): forwards it widens to the prior, and does not explode or shrink to 0."""
    model = gaussian(sde, 0.25, 0.4)
    (m0, v0), (m1, v1) = marginal(model, sde.t_min), marginal(model, sde.t_max)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    found = ProbabilityFlow(1e-10, 1e-10).encode(model, x)
    assert torch.allclose(found, m1 + (v1 / v0).sqrt() * (x - m0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_decoding_inverts_encoding(sde, method):
    model, flow = mixture(sde), ProbabilityFlow(1e-8, 1e-8, method)
    x = model.sample(32, seed=0)
    latent = flow.encode(model, x)
    assert (flow(model, x_T=latent).x - x).abs().max() < 1e-5
    assert latent.shape == x.shape


# The batch, the seed, and the count of calls.


@pytest.mark.parametrize("sampler", CALLS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    for sde in CORE_SDES:
        model, sampler = mixture(sde), with_steps(sampler, 12)
        whole = sampler(model, shape=(64, 2), seed=5, dtype=torch.float64).x
        alone = sampler(model, shape=(1, 2), seed=5, dtype=torch.float64).x
        assert torch.allclose(alone, whole[:1], rtol=1e-12, atol=1e-12), sde
        assert torch.equal(whole, sampler(model, shape=(64, 2), seed=5, dtype=torch.float64).x), sde
        assert not torch.equal(whole, sampler(model, shape=(64, 2), seed=6, dtype=torch.float64).x), sde


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_an_adaptive_sample_does_not_depend_on_its_batch(sde):
    """Within ten tolerances, with companions a hundred times further out."""
    model, tolerance = mixture(sde), 1e-6
    x_T = sde.prior((64, 2)).sample(0, dtype=torch.float64)
    x_T[1:] *= 100
    flow = ProbabilityFlow(tolerance, tolerance)
    whole, alone = flow(model, x_T=x_T).x[:1], flow(model, x_T=x_T[:1]).x
    assert (whole - alone).abs().max() < 10 * tolerance


@pytest.mark.parametrize("final", ["mean", "sample", "denoise"])
def test_calls_of_the_model_are_counted(final):
    model, seen = mixture(VP()), []
    model.register_forward_hook(lambda *_: seen.append(1))
    for sampler, calls in CALLS.items():
        for steps in (1, 7):
            seen.clear()
            out = with_steps(sampler, steps, final=final)(model, shape=(3, 2))
            assert out.nfe == len(seen) == calls * steps + (final == "denoise"), (sampler, steps)


@pytest.mark.parametrize("flow, calls", [(("euler", 7), 7), (("midpoint", 7), 14), (("rk4", 7), 28)], ids=str)
def test_calls_of_fixed_steps(flow, calls):
    method, steps = flow
    assert ProbabilityFlow(method=method, steps=steps)(mixture(VP()), shape=(3, 2)).nfe == calls


def test_calls_of_an_adaptive_method():
    model, seen = mixture(VP()), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert ProbabilityFlow()(model, shape=(3, 2)).nfe == len(seen) > 20


@pytest.mark.parametrize(
    "sde", quick([*CORE_SDES, RectifiedFlow(), RectifiedFlow(t_min=0.0), Cosine()], RectifiedFlow), ids=str
)
@pytest.mark.parametrize("grid", GRIDS)
def test_any_number_of_steps_is_finite(sde, grid):
    """Also where the plan of a step could divide by zero or take the root of a negative number."""
    model = mixture(sde, torch.float32)
    for sampler in CALLS:
        for steps in (1, 2, 3, 4, 5, 7, 10, 50) if grid == "uniform" else (1, 2, 3, 7):
            x = with_steps(sampler, steps, grid)(model, shape=(4, 2)).x
            assert bool(torch.isfinite(x).all()) and x.shape == (4, 2), (sampler, steps)


@pytest.mark.parametrize("predictor", [s for s in AFFINE if not s.looks_back], ids=str)
def test_without_corrections_the_predictor_is_left(predictor):
    predictor, model = with_steps(predictor, 9), mixture(VP())
    corrected = PredictorCorrector(predictor, Langevin(corrections=0))
    assert torch.equal(corrected(model, shape=(5, 2), seed=2).x, predictor(model, shape=(5, 2), seed=2).x)
    assert corrected(model, shape=(5, 2)).nfe == predictor(model, shape=(5, 2)).nfe


def test_the_network_decides_device_and_type():
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP()).double()
    assert EulerMaruyama(2)(model, shape=(3, 2)).x.dtype == torch.float64
    assert EulerMaruyama(2)(model.float(), shape=(3, 2)).x.dtype == torch.float32
    assert EulerMaruyama(2)(mixture(VP()), shape=(3, 2)).x.dtype == torch.float64
    assert EulerMaruyama(2)(Broken(mixture(VP()), 0.0), shape=(3, 2)).x.dtype == torch.float64


def test_given_noise_takes_the_place_of_the_prior():
    model = mixture(VE())
    x_T = VE().prior((5, 2)).sample(3, dtype=torch.float64)
    kept = x_T.clone()
    for sampler in (*(with_steps(s, 5) for s in CALLS), ProbabilityFlow()):
        assert torch.equal(sampler(model, x_T=x_T, seed=3).x, sampler(model, shape=(5, 2), seed=3).x), sampler
        assert torch.equal(x_T, kept), sampler


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 6), (3, 2, 2, 2)], ids=str)
def test_data_of_any_rank(shape):
    model = ScoreNetwork(MLP(shape[1:], width=8, depth=1), VP())
    for sampler in (*(with_steps(s, 3) for s in CALLS), ProbabilityFlow(1e-2, 1e-2)):
        assert sampler(model, shape=shape).x.shape == shape, sampler


# Trajectories, callbacks and errors.


@pytest.mark.parametrize(
    "every, kept", [(1, range(11)), (3, [0, 3, 6, 9, 10]), (5, [0, 5, 10]), (20, [0, 10])], ids=str
)
def test_a_trajectory_holds_every_kth_state_and_the_last(every, kept):
    sampler, model = EulerMaruyama(10), mixture(VP())
    states = []
    out = sampler(model, shape=(3, 2), trajectory=every, callback=lambda i, x: states.append((i, x.clone())))
    assert [i for i, _ in states] == list(range(11))
    assert torch.equal(out.trajectory, torch.stack([states[i][1] for i in kept]))
    grid = torch.linspace(VP().t_max, VP().t_min, 11, dtype=torch.float64)
    assert torch.allclose(out.times, grid[list(kept)].to(out.times)), out.times
    assert torch.equal(out.trajectory[-1], out.x)


def test_no_trajectory_unless_asked_for():
    out = EulerMaruyama(3)(mixture(VP()), shape=(3, 2))
    assert out.trajectory is None and out.times is None


def test_a_flow_keeps_its_ends():
    out = ProbabilityFlow()(mixture(VP()), shape=(3, 2), trajectory=1)
    assert torch.equal(out.trajectory[-1], out.x) and out.times.tolist() == pytest.approx([1.0, 1e-5])


def test_sampling_leaves_no_graph_and_no_hook():
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP())
    out = EulerMaruyama(2)(model, shape=(3, 2))
    assert not out.x.requires_grad and not model._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Broken(ScoreModel):
    """NaN for the second sample, below a time."""

    def __init__(self, inner, below):
        super().__init__(inner.sde)
        self.inner, self.below = inner, below

    def forward(self, x, t):
        x0, eps = self.inner(x, t)
        bad = torch.zeros_like(x)
        bad[1] = float("nan") if float(t) < self.below else 0.0
        return type(self.inner(x, t))(x0 + bad, eps + bad)


@pytest.mark.parametrize("sampler", CALLS, ids=str)
def test_a_sampler_never_returns_nan(sampler):
    model = Broken(mixture(VP()), 0.5)
    sampler = with_steps(sampler, 5, "uniform")
    words = r"step [34] of 5, at t=0\.[24], .* not finite \(1 of 3 samples.*more steps"
    with pytest.raises(SamplingDiverged, match=words):
        sampler(model, shape=(3, 2))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("arguments", [{}, {"shape": (1, 2), "x_T": torch.zeros(1, 2)}], ids=["neither", "both"])
def test_either_shape_or_noise_is_asked_for(arguments):
    for sampler in (*CALLS, ProbabilityFlow()):
        with pytest.raises(ValueError, match="give either shape, to start from the prior, or x_T"):
            sampler(mixture(VP()), **arguments)


@pytest.mark.parametrize(
    "cls",
    [Euler, EulerMaruyama, Ancestral, DDIM, DPMSolver, ExponentialAdams, Heun, Langevin, RungeKutta4, UniPC],
)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps must be a positive integer, found 0"),
        ({"steps": 2.0}, "steps must be a positive integer, found 2.0"),
        ({"steps": True}, "steps must be a positive integer, found True"),
        ({"grid": "linear"}, "grid must be one of uniform, log_snr, karras, angle, balanced, found 'linear'"),
        ({"final": "tweedie"}, "final must be one of mean, sample, denoise, found 'tweedie'"),
    ],
)
def test_bad_values_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(**arguments)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: DDIM(eta=1.5), ValueError, r"DDIM: eta must lie in \[0, 1\], found 1.5"),
        (lambda: DDIM(eta=math.nan), ValueError, "DDIM: eta must lie"),
        (lambda: Langevin(snr=0.0), ValueError, "Langevin: snr must be positive"),
        (lambda: Langevin(snr=math.nan), ValueError, "Langevin: snr must be positive"),
        (lambda: Langevin(corrections=-1), ValueError, "Langevin: corrections must be an integer of at least 0"),
        (lambda: Langevin(corrections=1.0), ValueError, "Langevin: corrections must be an integer of at least 0"),
        (lambda: PredictorCorrector(VP(), Langevin()), TypeError, "predictor must be a Sampler, found VP"),
        (lambda: PredictorCorrector(DDIM(), None), TypeError, "corrector must be a Corrector, found None"),
        (lambda: PredictorCorrector(DDIM(), DDIM()), TypeError, "corrector must be a Corrector, found DDIM"),
        (lambda: ProbabilityFlow(method="rk4"), ValueError, "takes a fixed number of steps: give steps >= 1"),
        (lambda: ProbabilityFlow(method="rk4", steps=0), ValueError, "give steps >= 1, found 0"),
        (lambda: ProbabilityFlow(steps=10), ValueError, "chooses its own steps: leave steps out"),
        (lambda: ProbabilityFlow(method="rk5"), ValueError, "method must be one of dopri5, dopri8, .* found 'rk5'"),
        (lambda: ProbabilityFlow(rtol=0.0), ValueError, "rtol and atol must be positive, found rtol=0.0"),
        (lambda: ProbabilityFlow(atol=math.nan), ValueError, "rtol and atol must be positive"),
    ],
)
def test_what_can_not_work_is_refused_when_constructed(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_model_of_no_process_is_refused():
    with pytest.raises(TypeError, match="expected a GaussianSDE"):
        ScoreNetwork(nn.Identity(), None)
