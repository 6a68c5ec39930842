"""The reverse-time SDE on a grid: exact coefficients, measured orders, amounts of noise, and whole distributions."""

import itertools
import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from oracles import CORE_SDES, SDES, SOME_SDES, Watch, gaussian, marginal, mixture, one_step, quick, response
from recursions import euler_maruyama, level, reverse_diffusion, run, sde_dpm_solver

from experiments.metrics import sliced_w2
from models import GaussianMixture
from sde import VE, VP, RectifiedFlow, SubVP
from sde.base import last_time
from solvers import (
    DDIM,
    GRIDS,
    Ancestral,
    EulerMaruyama,
    ProbabilityFlow,
    ReverseDiffusion,
    SamplingDiverged,
    SDEDPMSolver,
    time_grid,
)
from solvers.path import Path

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
AMOUNTS = (0.0, 0.5, 1.0, 2.0)


EXACT = [
    *((EulerMaruyama(stochasticity=eta), euler_maruyama(eta)) for eta in AMOUNTS),
    (ReverseDiffusion(), reverse_diffusion),
    *((SDEDPMSolver(stochasticity=eta), sde_dpm_solver(eta, 2)) for eta in AMOUNTS),
    *((SDEDPMSolver(stochasticity=eta, order=1), sde_dpm_solver(eta, 1)) for eta in AMOUNTS),
]


def name(case):
    sampler = case[0] if isinstance(case, tuple) else case
    if not is_dataclass(sampler):
        return str(sampler)
    own = [f"{f.name}={getattr(sampler, f.name)}" for f in fields(sampler) if f.name in ("stochasticity", "order")]
    return f"{type(sampler).__name__}({', '.join(own)})"


def some(samplers):
    """For ``parametrize``: those with as much noise as the process has, and without any; the others are slow."""
    usual = [getattr(sampler, "stochasticity", None) in (0.0, 1.0) for sampler in samplers]
    return [
        s if quick_one else pytest.param(s, marks=pytest.mark.slow)
        for s, quick_one in zip(samplers, usual, strict=True)
    ]


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_every_coefficient_is_that_of_the_recursion(monkeypatch, sde, case):
    """To 1e-12 of the largest, in float64, for wide and for narrow data."""
    for v, grid in itertools.product(VARIANCES, ("uniform", "log_snr")):
        sampler = replace(case[0], steps=12, grid=grid, final="sample")
        levels = [level(sde, t) for t in time_grid(grid, sde, 12).tolist()]
        found, expected = response(monkeypatch, sampler, gaussian(sde, v)), run(case[1], levels, v, "sample")
        actual = torch.cat([found.start[0], found.noise[:, 0, 0]])
        assert abs(actual.numpy() - expected).max() < 1e-12 * abs(expected).max(), (v, grid)


def error(monkeypatch, sampler, sde, v=0.1):
    """Relative error of the variance of the samples, from the exact p at the first time."""
    model = gaussian(sde, v)
    found = response(monkeypatch, replace(sampler, final="sample"), model).moments(*marginal(model, last_time(sde)))[1]
    return float(found / marginal(model, sde.t_min)[1]) - 1


@pytest.mark.parametrize("sde", quick(SOME_SDES, VP), ids=str)
@pytest.mark.parametrize("sampler", some([case[0] for case in EXACT]), ids=name)
def test_weak_order(monkeypatch, sde, sampler):
    """The error of the variance, less that of its limit, falls by 2^order; no amount of noise moves the limit."""
    sampler = replace(sampler, grid="log_snr")
    counts = (400, 800, 1600) if sampler.order == 1 else (160, 320, 640)
    coarse, middle, fine = (error(monkeypatch, sampler.with_steps(n), sde) for n in counts)
    assert abs(coarse) < (0.15 if sampler.order == 1 else 0.03), coarse
    limit = (2**sampler.order * fine - middle) / (2**sampler.order - 1)
    assert abs(limit) < 3e-3, limit
    if abs(coarse) > 1e-3:  # in a few cases the leading term nearly cancels
        assert (coarse - middle) / (middle - fine) == pytest.approx(2**sampler.order, rel=0.15)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_left_of_the_noise_at_the_start(monkeypatch, sde, order, eta):
    """E[x_s | x_T] is linear in x_T: with slope (alpha_T / alpha_s) V_s / V_T by the SDE, sqrt(V_s / V_T) by the flow.

    By the SDE it is exact in any steps: there E[x_0 | x_t] is a martingale, and its extrapolation is too, on average.
    """
    model = gaussian(sde, 0.25, 1.0)
    (m_T, v_T), (m_s, v_s) = marginal(model, sde.t_max), marginal(model, sde.t_min)
    slope = float(m_T / m_s * v_s / v_T if eta else (v_s / v_T).sqrt())

    def sampled(steps):
        sampler = SDEDPMSolver(steps, order=order, stochasticity=eta, final="sample")
        return response(monkeypatch, sampler, model)

    coarse, fine = (float(sampled(n).start) / slope - 1 for n in (200, 400))
    assert coarse / fine == pytest.approx(2**order, rel=0.1) if not eta else max(abs(coarse), abs(fine)) < 1e-9
    assert abs(float(sampled(20).moments(m_T, v_T)[0] - m_s)) < 1e-12  # at the mean x_0 is the same at all times


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_without_noise_euler_maruyama_is_euler_on_the_probability_flow(sde):
    model, x = mixture(sde), sde.prior((9, 2)).sample(1, dtype=torch.float64)
    expected, times = x, time_grid("log_snr", sde, 6)
    for t, s in itertools.pairwise(times):
        expected = expected + (s - t) * model.velocity(expected, t)
    assert torch.allclose(EulerMaruyama(6, "log_snr", stochasticity=0.0)(model, x_T=x).x, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "sampler, ratio", [(EulerMaruyama(stochasticity=0.0), 2), (SDEDPMSolver(stochasticity=0.0), 4)], ids=name
)
@pytest.mark.parametrize("sde", [VP(t_min=1e-3), SubVP(t_min=1e-2)], ids=str)
def test_a_sampler_without_noise_converges_on_a_path_and_encodes(sde, sampler, ratio):
    """Strong order, decoding and encoding, against the exact flow of a Gaussian."""
    sampler, model, x = replace(sampler, grid="log_snr"), gaussian(sde, 0.25, 0.4), torch.ones(1, 1).double()
    flow = ProbabilityFlow(1e-11, 1e-11)
    for moved, exact in (
        (lambda s: s(model, x_T=x).x, flow(model, x_T=x).x),
        (lambda s: s.encode(model, x), flow.encode(model, x)),
    ):
        coarse, fine = (float(moved(sampler.with_steps(n)) - exact) for n in (200, 400))
        assert coarse / fine == pytest.approx(ratio, rel=0.1), (coarse, fine)


@pytest.mark.parametrize("sampler", [EulerMaruyama(), ReverseDiffusion(), SDEDPMSolver()], ids=name)
def test_what_adds_noise_does_not_encode(sampler):
    with pytest.raises(ValueError, match="adds noise, so its data have no latent"):
        sampler.encode(gaussian(VP()), torch.zeros(1, 1))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_first_order_solver_is_ddim(eta, grid):
    for sde in (*SDES, RectifiedFlow(t_min=0.0)):
        model, arguments = mixture(sde), dict(shape=(5, 2), seed=3, dtype=torch.float64)
        found = SDEDPMSolver(9, grid, order=1, stochasticity=eta)(model, **arguments).x
        assert torch.allclose(found, DDIM(9, grid, eta=eta)(model, **arguments).x, rtol=1e-9, atol=1e-12), sde


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", [ReverseDiffusion(), SDEDPMSolver(), Ancestral()], ids=lambda s: type(s).__name__)
def test_one_step_is_euler_maruyama_to_second_order(sde, sampler):
    """Difference of the means, from the middle of time: 4 times smaller for half of the step."""
    model, x = gaussian(sde, 0.25, 0.3), torch.ones(1, 1, dtype=torch.float64)

    def difference(dt):
        return float(one_step(sampler, model, 0.5, 0.5 - dt, x) - one_step(EulerMaruyama(), model, 0.5, 0.5 - dt, x))

    assert difference(4e-4) / difference(2e-4) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize(
    "sampler, variance",
    [
        (EulerMaruyama(), lambda sde, t, s: float(sde.diffusion(t)) ** 2 * float(t - s)),
        (EulerMaruyama(stochasticity=0.5), lambda sde, t, s: float(sde.diffusion(t)) ** 2 * float(t - s) / 4),
        (ReverseDiffusion(), lambda sde, t, s: float(sde.kernel(s, t).std) ** 2),
        (SDEDPMSolver(), lambda sde, t, s: float(sde.sigma(s) ** 2 * (1 - torch.exp(sde.log_snr(t) - sde.log_snr(s))))),
    ],
    ids=["em", "em-half", "reverse-diffusion", "sde-dpm"],
)
def test_the_last_noise_is_what_final_says(monkeypatch, sde, sampler, variance):
    """ "sample" adds the noise of the last step to "mean", of the stated variance, and nothing else."""
    model, sampler = gaussian(sde, 0.25), replace(sampler, steps=10, grid="log_snr")
    mean, sample = (response(monkeypatch, replace(sampler, final=final), model) for final in ("mean", "sample"))
    assert torch.equal(mean.start, sample.start) and torch.equal(mean.noise[:-1], sample.noise[:-1])
    assert not mean.noise[-1].any()
    assert float(sample.noise[-1]) ** 2 == pytest.approx(variance(sde, *time_grid("log_snr", sde, 10)[-2:]), rel=1e-9)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", [ReverseDiffusion(), SDEDPMSolver()], ids=name)
def test_denoised_samples_of_a_point_are_the_point(sde, sampler):
    point = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    model = GaussianMixture(torch.ones(1), point, torch.zeros(1, 2, 2, dtype=torch.float64), sde)
    found = replace(sampler, steps=10, grid="log_snr", final="denoise")(model, shape=(3, 2)).x
    assert torch.allclose(found, point.expand(3, 2).to(found), atol=1e-6)


# Mistakes of other implementations.


@pytest.mark.parametrize("steps, largest", [(30, 0.02), (100, 0.002), (1000, 2e-4)])
def test_b1_narrow_data_come_out_narrow(monkeypatch, steps, largest):
    """Variance 1e-4; steps that overshoot t_min would give 16, .085 and 1.7e-4 at these numbers of equal steps."""
    sde = VP(t_min=1e-3)
    model = gaussian(sde, 1e-4)
    for sampler in (ReverseDiffusion(steps), SDEDPMSolver(steps, "uniform"), SDEDPMSolver(steps)):
        found = response(monkeypatch, replace(sampler, final="sample"), model).moments(*marginal(model, 1.0))[1]
        assert float(found) < 3 * largest + float(marginal(model, sde.t_min)[1]), sampler


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 15, 20])
def test_b3_fewer_steps_than_beta_max_are_no_nan(monkeypatch, steps):
    """A chain with beta_max / N > 1 takes the root of a negative number; 1 - (alpha_t / alpha_s)^2 is below 1."""
    for grid in GRIDS:
        path = Path(VP(), time_grid(grid, VP(), steps))
        weights = ReverseDiffusion(steps, grid).plan(path)
        kernel = VP().kernel(path.times[1:], path.times[:-1])
        assert torch.allclose(weights.noise, kernel.std, rtol=1e-9) and bool((kernel.std < 1).all())
        for sampler in (ReverseDiffusion(steps, grid), SDEDPMSolver(steps, grid)):
            found = response(monkeypatch, sampler, gaussian(VP(), 0.25)).moments(*marginal(gaussian(VP(), 0.25), 1.0))
            assert 0 < float(found[1]) < 10, sampler


def test_b4_no_probability_flow_by_reverse_diffusion(monkeypatch):
    """Without noise and with half of the score it would be no Euler step; the flows that there are err below 1e-2."""
    assert not {f.name for f in fields(ReverseDiffusion)} & {"stochasticity", "eta", "probability_flow"}
    assert ReverseDiffusion.stochastic
    target = float(marginal(gaussian(VP(), 0.25), VP().t_min)[1])
    for sampler in (EulerMaruyama(100, stochasticity=0.0), SDEDPMSolver(100, stochasticity=0.0)):
        assert abs(error(monkeypatch, sampler, VP(), 0.25)) * target < 1e-2, sampler


@pytest.mark.parametrize("sampler", [EulerMaruyama(), ReverseDiffusion(), SDEDPMSolver()], ids=name)
def test_b26_each_time_of_the_grid_but_the_last_is_seen_once_and_nan_is_an_error(sampler):
    """The first evaluation is at t_max, the last one step before t_min; the number of steps is not left to rounding."""
    for sde, steps in itertools.product((VP(), VE(), VP(t_max=3.0)), (1, 7, 30, 333)):
        model, sampler = Watch(gaussian(sde)), sampler.with_steps(steps)
        sampler(model, shape=(1, 1), dtype=torch.float64)
        assert model.times == time_grid(sampler.grid, sde, steps)[:-1].tolist()
    with pytest.raises(SamplingDiverged, match="step 1 of 333"):
        sampler(gaussian(VP()), x_T=torch.full((2, 1), math.nan))


@pytest.mark.parametrize("sde", [VE(), VE(sigma_min=0.5)], ids=str)
def test_b35_reverse_diffusion_and_ancestral_differ_in_their_noise(sde):
    """Under VE, eq. 47 adds sigma_t^2 - sigma_s^2, the posterior q(x_s | x_t, x_0) that times sigma_s^2 / sigma_t^2.

    As sigma_s falls to 0 the one tends to sigma_t^2 and the other to 0; as s tends to t they agree.
    """
    times = torch.tensor([0.9, 0.3, 0.0], dtype=torch.float64)
    path = Path(sde, times.clamp(min=sde.t_min))
    t, s = path.sigma[:-1].square(), path.sigma[1:].square()
    assert torch.allclose(ReverseDiffusion().plan(path).noise ** 2, t - s, rtol=1e-9)
    assert torch.allclose(Ancestral().plan(path).noise ** 2, (t - s) * s / t, rtol=1e-9)
    near = Path(sde, torch.tensor([0.5, 0.5 - 1e-5], dtype=torch.float64))
    ratio = Ancestral().plan(near).noise / ReverseDiffusion().plan(near).noise
    assert float(ratio) == pytest.approx(1, abs=1e-3)


def test_b35_the_noise_of_the_last_step_when_the_data_are_reached():
    sde = RectifiedFlow(t_min=0.0)
    path = Path(sde, torch.tensor([0.4, 0.0], dtype=torch.float64))
    assert float(Ancestral().plan(path).noise) == 0
    assert float(ReverseDiffusion().plan(path).noise) == pytest.approx(float(sde.sigma(path.times[0])))


# Whole distributions.

SAMPLERS = [
    EulerMaruyama(200, "log_snr", "sample"),
    ReverseDiffusion(300, "log_snr", "sample"),
    SDEDPMSolver(60, final="sample"),
    SDEDPMSolver(60, final="sample", stochasticity=0.5),
]


def scores(x, model):
    """Mean, second moments and share of the first component of GM2, in standard errors from the truth; p at t_min."""
    sde = model.sde
    true = model.sample(400_000, seed=77)
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    true = sde.perturb(true, t, torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=true.dtype))
    a, b = (
        torch.stack(
            [y[:, 0], y[:, 1], y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1], (y[:, 0] > y[:, 1] + 0.3).double()]
        )
        for y in (x.double(), true)
    )
    return (a.mean(1) - b.mean(1)) / (a.var(1) / a.shape[1] + b.var(1) / b.shape[1]).sqrt()


@pytest.mark.parametrize("sde", quick([VP(), VE()]), ids=str)
@pytest.mark.parametrize("sampler", some(SAMPLERS), ids=name)
def test_twenty_thousand_samples_of_a_mixture(sde, sampler):
    model = mixture(sde)
    z = scores(sampler(model, shape=(20_000, 2), seed=11, dtype=torch.float64).x, model)
    assert z.abs().max() < 5, z


def ring(sde):
    """Eight components on a circle, of standard deviations 0.06 to 0.17, in standardized coordinates."""
    std = torch.linspace(0.06, 0.17, 8)[[0, 5, 2, 7, 4, 1, 6, 3]]
    radius = math.sqrt(2 - 2 * float(std.square().mean()))
    angle = torch.arange(8) * math.pi / 4
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(torch.ones(8), means, std.square()[:, None, None] * torch.eye(2), sde)


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
def test_twenty_and_fifty_calls_for_eight_components_on_a_circle(sde):
    """Sliced W2 of 10,000 samples from as many data, between which it is 0.015 to 0.037; and width of components."""
    model = ring(sde)
    data = model.sample(10_000, seed=99)
    variances = model.variances[:, 0]
    for steps, bar, wide in ((20, 0.04, 0.25), (50, 0.04, 0.06)):
        if steps == 20 and sde == SubVP():
            continue  # its log-SNR goes up to 27: 20 steps over all of it are too wide
        out = SDEDPMSolver(steps)(model, shape=(10_000, 2), seed=2)
        squares = (out.x[:, None] - model.means).square().sum(-1)
        excess = float((squares.min(1).values / (2 * variances[squares.argmin(1)])).mean()) - 1
        assert out.nfe == steps and sliced_w2(out.x, data) < bar and abs(excess) < wide, (steps, excess)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SDEDPMSolver(order=3), "SDEDPMSolver: order must be 1 or 2, found 3"),
        (lambda: SDEDPMSolver(stochasticity=-0.1), "SDEDPMSolver: stochasticity must be a number of at least 0"),
        (lambda: SDEDPMSolver(stochasticity=math.inf), "SDEDPMSolver: stochasticity must be a number of at least 0"),
        (lambda: EulerMaruyama(stochasticity=-1), "EulerMaruyama: stochasticity must be a number of at least 0"),
        (lambda: EulerMaruyama(stochasticity=math.nan), "EulerMaruyama: stochasticity must be a number of at least 0"),
        (lambda: ReverseDiffusion(0), "ReverseDiffusion: steps must be a positive integer, found 0"),
    ],
    ids=["order", "negative", "infinite", "em", "em-nan", "steps"],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
