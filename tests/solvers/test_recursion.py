"""Samplers on Gaussian data, where each step is affine: exact coefficients, orders of convergence, final steps."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from oracles import FEW_SDES, SDES, Watch, gaussian, marginal, one_step, paper, response
from recursions import ancestral, ddim, euler_maruyama, heun, run

from models import GaussianMixture
from sde import VE, VP, SubVP
from sde.base import last_time
from solvers import (
    DDIM,
    GRIDS,
    Ancestral,
    EulerMaruyama,
    Heun,
    ProbabilityFlow,
    ReverseDiffusion,
    SDEDPMSolver,
    time_grid,
)
from solvers.path import Path

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
NAMES = ("alpha", "sigma", "rate", "squared")


AFFINE = [
    (EulerMaruyama, {}, euler_maruyama(1.0)),
    (Ancestral, {}, ancestral),
    (DDIM, {"eta": 0.0}, ddim(0.0)),
    (DDIM, {"eta": 0.5}, ddim(0.5)),
    (DDIM, {"eta": 1.0}, ddim(1.0)),
    (Heun, {}, heun()),
]


def names(case):
    return case[0].__name__ + "".join(str(v) for v in case[1].values()) if isinstance(case, tuple) else str(case)


@pytest.mark.parametrize("sde", FEW_SDES, ids=str)
@pytest.mark.parametrize("case", AFFINE, ids=names)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_coefficient_is_that_of_the_recursion(monkeypatch, sde, case, grid):
    """Starting from x_T and noise of 1 in turn; at 20 steps, for wide and for narrow data, for each way to end."""
    cls, options, step = case
    levels = [
        SimpleNamespace(t=t, **dict(zip(NAMES, paper(sde, t), strict=True))) for t in time_grid(grid, sde, 20).tolist()
    ]
    for v, final in itertools.product(VARIANCES, ("mean", "sample", "denoise")):
        expected = torch.from_numpy(run(step, levels, v, final))
        found = response(monkeypatch, cls(20, grid, final, **options), gaussian(sde, v))
        actual = torch.cat([found.start[0], found.noise[:, 0, 0]])
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14 * expected.abs().max()), (v, final)


def variance_error(monkeypatch, sampler, sde, v=0.25):
    """Variance of the samples less that of p at t_min, from the exact p at t_max."""
    model = gaussian(sde, v)
    found = response(monkeypatch, sampler, model).moments(*marginal(model, sde.t_max))[1]
    return float(found - marginal(model, sde.t_min)[1])


# Orders, at steps N for which the error is in its asymptotic range.
ORDERS = [
    (EulerMaruyama, {"grid": "uniform", "final": "sample"}, VP(), 200, 2.0),
    (EulerMaruyama, {"grid": "log_snr", "final": "sample"}, SubVP(), 200, 2.0),
    (Ancestral, {"grid": "log_snr", "final": "sample"}, VP(), 200, 2.0),
    (Ancestral, {"grid": "log_snr", "final": "sample"}, VE(), 200, 2.0),
    (DDIM, {"grid": "uniform", "eta": 0.5, "final": "sample"}, VP(), 200, 2.0),
    (DDIM, {"grid": "uniform"}, VP(), 200, 2.0),
    (DDIM, {"grid": "log_snr"}, VE(), 200, 2.0),
    (Heun, {"grid": "log_snr"}, VP(), 100, 4.0),
    (Heun, {"grid": "karras"}, VP(), 100, 4.0),
    (Heun, {"grid": "karras"}, VE(), 100, 4.0),
]


@pytest.mark.parametrize("cls, options, sde, steps, ratio", ORDERS, ids=str)
def test_order_of_convergence(monkeypatch, cls, options, sde, steps, ratio):
    """The error of the variance falls by 2^order when the number of steps doubles."""
    coarse, fine = (abs(variance_error(monkeypatch, cls(steps=n, **options), sde)) for n in (steps, 2 * steps))
    assert coarse / fine == pytest.approx(ratio, abs=0.05 * ratio), (coarse, fine)
    assert coarse < 0.05


@pytest.mark.parametrize("method, ratio, slack", [("euler", 2, 0.1), ("midpoint", 4, 0.2), ("rk4", 16, 3)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_order_of_the_probability_flow(method, ratio, slack, direction):
    """Against x_0 = sqrt(V_0 / V_T) x_T, in both directions."""
    sde = VP(t_min=1e-2)
    model, one = gaussian(sde, 0.25), torch.ones(1, 1, dtype=torch.float64)
    exact = math.sqrt(float(marginal(model, sde.t_min)[1] / marginal(model, sde.t_max)[1]))

    def error(steps):
        flow = ProbabilityFlow(method=method, steps=steps, coordinates="angle")
        if direction == "encode":
            return abs(float(flow.encode(model, one)) - 1 / exact)
        return abs(float(flow(model, x_T=one).x) - exact)

    assert error(80) / error(160) == pytest.approx(ratio, abs=slack)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_ancestral_is_euler_maruyama_to_second_order(sde):
    model, x = gaussian(sde, 0.25, 0.3), torch.ones(1, 1, dtype=torch.float64)

    def difference(dt):
        return float(
            one_step(Ancestral(), model, 0.5, 0.5 - dt, x) - one_step(EulerMaruyama(), model, 0.5, 0.5 - dt, x)
        )

    assert difference(4e-4) / difference(2e-4) == pytest.approx(4, abs=0.1)


def point_mass(sde):
    point = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    return GaussianMixture(torch.ones(1), point, torch.zeros(1, 2, 2, dtype=torch.float64), sde), point


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_ddim_is_exact_on_a_point_in_one_step(sde):
    """The flow of a point mass keeps eps: x_s = alpha_s x_0 + sigma_s eps, in one step or in many."""
    model, point = point_mass(sde)
    eps = torch.tensor([[0.7, -1.3], [0.0, 2.0]], dtype=torch.float64)
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (last_time(sde), sde.t_min))
    for steps in (1, 2, 7):
        found = DDIM(steps=steps)(model, x_T=sde.perturb(point.expand(2, 2), start, eps)).x
        assert torch.allclose(found, sde.perturb(point.expand(2, 2), end, eps), rtol=1e-9), steps


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_with_full_noise_is_ancestral_bit_for_bit(sde, grid):
    model = gaussian(sde, 0.25, 0.3, torch.float32)
    arguments = dict(shape=(16, 1), seed=4)
    assert torch.equal(DDIM(15, grid, eta=1.0)(model, **arguments).x, Ancestral(15, grid)(model, **arguments).x)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("cls", [EulerMaruyama, Ancestral])
def test_the_last_noise_is_what_final_says(monkeypatch, sde, cls):
    """ "sample" adds the last step's noise to "mean" and nothing else; "denoise" on a point mass is the point."""
    model = gaussian(sde, 0.25)
    mean, sample = (response(monkeypatch, cls(10, "log_snr", final), model) for final in ("mean", "sample"))
    assert torch.equal(mean.start, sample.start) and torch.equal(mean.noise[:-1], sample.noise[:-1])
    assert not mean.noise[-1].any() and sample.noise[-1].all()
    monkeypatch.undo()
    model, point = point_mass(sde)
    found = cls(10, "log_snr", "denoise")(model, shape=(3, 2)).x
    assert torch.allclose(found, point.expand(3, 2).to(found), atol=1e-6), found


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_mean_of_the_last_ancestral_step_on_a_point_is_alpha_times_the_point(monkeypatch, sde):
    """The posterior mean of x_s: alpha_s x_0 + sigma_s (sigma_s alpha_t) / (sigma_t alpha_s) eps."""
    model, point = point_mass(sde)
    grid = time_grid("log_snr", sde, 50)
    t, s = grid[-2], grid[-1]
    eps = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    found = one_step(Ancestral(), model, float(t), float(s), sde.perturb(point, t, eps))
    keep = sde.sigma(s) ** 2 * sde.alpha(t) / (sde.sigma(t) * sde.alpha(s))
    assert torch.allclose(found, sde.alpha(s) * point + keep * eps, rtol=1e-10)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 30, 1000])
def test_b1_the_steps_are_those_of_the_grid_and_end_at_t_min(sde, steps):
    """Each evaluation at a time of the grid, none twice, and the steps sum to the whole interval."""
    model, seen = Watch(gaussian(sde, 0.25)), []
    grid = time_grid("uniform", sde, steps)

    class Widths(EulerMaruyama):
        def step(self, x, step, carry):
            seen.append(float(step.t - step.s))
            return super().step(x, step, carry)

    Widths(steps)(model, shape=(1, 1), dtype=torch.float64)
    assert model.times == grid[:-1].tolist()
    assert sum(seen) == pytest.approx(last_time(sde) - sde.t_min, abs=1e-12 * sde.t_max)


@pytest.mark.parametrize("steps, variance", [(30, 0.0506), (100, 0.0038), (1000, 2.9e-4)])
def test_b1_narrow_data_come_out_as_narrow_as_a_consistent_grid_makes_them(monkeypatch, steps, variance):
    """Data of variance 1e-4: steps of 1/N that overshoot t_min would give 16, 0.085 and 1.7e-4."""
    sde = VP(t_min=1e-3)
    model = gaussian(sde, 1e-4)
    found = response(monkeypatch, EulerMaruyama(steps, final="sample"), model).moments(*marginal(model, 1.0))[1]
    assert float(found) == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("ratio", [1 + 1e-12, 1 + 1e-7, 1.001, 2.0, 1e4, 1e8])
def test_b33_no_ratio_of_noise_levels_gives_the_root_of_a_negative_number(ratio):
    """sigma_s^2 less the variance of the noise is sigma_s^4 / sigma_t^2, without a difference, and never below 0."""
    sde = VE(sigma_min=1e-4, sigma_max=1e-4 * ratio)
    t, s = (float(sde.sigma(torch.tensor(time, dtype=torch.float64))) for time in (sde.t_max, sde.t_min))
    path = Path(sde, torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    weights = Ancestral().plan(path)
    assert float(weights.eps) == pytest.approx(s**2 / t, rel=1e-9)
    assert float(weights.noise) ** 2 == pytest.approx(s**2 * (t - s) * (t + s) / t**2, rel=1e-9, abs=1e-14 * s**2)
    samplers = (Ancestral, DDIM, ReverseDiffusion, SDEDPMSolver, Heun)
    noisy = ({}, {"eta": 1.0}, {}, {}, {"churn": 10.0})
    for steps, (cls, options) in itertools.product((1, 2, 5), zip(samplers, noisy, strict=True)):
        sampler = cls(steps, "log_snr", "sample", **options)
        x = sampler(gaussian(sde, 0.25, 0.3, torch.float32), shape=(4, 1)).x
        assert x.dtype == torch.float32 and bool(torch.isfinite(x).all()), sampler


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_b33_no_pair_of_times_does_either(sde):
    """A thousand times at random, next to each other and far apart, and all of the process in one step."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    between = sde.t_min * (last_time(sde) / sde.t_min) ** u.sort(descending=True).values
    ends = torch.tensor([last_time(sde), sde.t_min], dtype=torch.float64)
    for times in (between, ends, torch.stack((ends[:1].expand(1000), between)).T):
        paths = [Path(sde, times)] if times.ndim == 1 else [Path(sde, pair) for pair in times[::20]]
        for path, sampler in itertools.product(paths, (Ancestral(), DDIM(eta=0.5), ReverseDiffusion(), SDEDPMSolver())):
            noise, sigma = sampler.plan(path).noise, path.sigma
            most = sigma[:-1] if isinstance(sampler, ReverseDiffusion) else sigma[1:]
            assert bool((noise >= 0).all()) and bool((noise <= most).all()), sampler
