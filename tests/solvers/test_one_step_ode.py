"""Euler, Heun with and without churn, and Runge-Kutta: exact recursions, orders, and both ends of time."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracles import CORE_SDES, SDES, Watch, correlated, gaussian, marginal, mixture, moved, quick, response
from recursions import euler_maruyama, heun, level, run, runge_kutta

from sde import VE, VP, RectifiedFlow
from sde.base import last_time
from solvers import GRIDS, Euler, EulerMaruyama, Heun, ProbabilityFlow, RungeKutta4, SamplingDiverged, time_grid

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
SAMPLERS = [Euler(), Heun(), RungeKutta4()]
ENDED = RectifiedFlow(t_min=0.0)


STEPS = {Euler: euler_maruyama(0.0), Heun: heun(), RungeKutta4: runge_kutta}


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_coefficient_is_that_of_the_recursion(sde, sampler, grid):
    """At 20 steps from x = 1, for wide and for narrow data, for each way to end, and for encoding."""
    levels, step = [level(sde, t) for t in time_grid(grid, sde, 20).tolist()], STEPS[type(sampler)]
    one = torch.ones(1, 1, dtype=torch.float64)
    for v in VARIANCES:
        model = gaussian(sde, v)
        for final in ("mean", "sample", "denoise"):
            found = float(replace(sampler, steps=20, grid=grid, final=final)(model, x_T=one).x)
            assert found == pytest.approx(float(run(step, levels, v, final)[0]), rel=1e-11, abs=1e-13), (v, final)
        found = float(replace(sampler, steps=20, grid=grid).encode(model, one))
        assert found == pytest.approx(float(run(step, levels[::-1], v)[0]), rel=1e-10), v


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_euler_is_euler_maruyama_without_noise(sde, grid):
    model = mixture(sde)
    x_T = sde.prior((4, 2)).sample(0, dtype=torch.float64)
    found, expected = (s(model, x_T=x_T).x for s in (Euler(25, grid), EulerMaruyama(25, grid, stochasticity=0.0)))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_euler_sets_out_from_data_without_noise_and_euler_maruyama_can_not():
    """-eps / sigma is no number there; the pair needs none."""
    model, x = mixture(ENDED), torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(SamplingDiverged):
        EulerMaruyama(50, stochasticity=0.0).encode(model, x)
    assert torch.allclose(Euler(2000).encode(model, x), RungeKutta4(200).encode(model, x), atol=0.01)


@pytest.mark.parametrize("sde", quick([VP(), VE()]), ids=str)
@pytest.mark.parametrize(
    "sampler",
    [Euler(grid="log_snr"), Heun(), RungeKutta4(), pytest.param(RungeKutta4(grid="karras"), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("target", [correlated, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_measured_order_is_the_stated_one(sde, sampler, target, direction):
    case = (sde, target, direction)
    exact, n = moved(RungeKutta4(600), *case), {1: 400, 2: 200, 4: 120}[sampler.order]
    coarse, fine = (float((moved(sampler.with_steps(k), *case) - exact).norm()) for k in (n, 2 * n))
    assert math.log2(coarse / fine) == pytest.approx(sampler.order, abs=0.3), (coarse, fine)


@pytest.mark.parametrize("sampler", [Euler(grid="log_snr"), Heun(), RungeKutta4()], ids=str)
def test_decoding_inverts_encoding_to_the_order(sampler):
    model = mixture(VP())
    x, n = model.sample(8, seed=0), {1: 200, 2: 100, 4: 25}[sampler.order]

    def error(steps):
        there = sampler.with_steps(steps)
        return float((there(model, x_T=there.encode(model, x)).x - x).norm())

    assert error(n) / error(2 * n) > 0.8 * 2**sampler.order


@pytest.mark.parametrize("sde", quick([*SDES, ENDED], RectifiedFlow), ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_b34_any_number_of_steps_is_finite_and_the_last_level_is_reached_once(sde, grid):
    for sampler, steps in itertools.product([*SAMPLERS, Heun(churn=5.0)], (1, 2, 3, 4, 5, 7, 10, 50)):
        model = Watch(mixture(sde, torch.float32))
        there = replace(sampler, steps=steps, grid=grid)
        out = there(model, shape=(3, 2))
        assert bool(torch.isfinite(out.x).all()), (sampler, steps)
        assert out.nfe == len(model.times) == there.calls == steps * sampler.calls_per_step
        last = torch.tensor(sde.t_min).item()
        assert model.times.count(last) == (sampler.calls_per_step > 1), (sampler, steps)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_rotation_of_data_and_noise_rotates_the_samples(sde, sampler):
    model, angle = mixture(sde), torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).reshape(2, 2)
    turned = mixture(sde)
    turned.means, turned.axes = model.means @ turn.T, turn @ model.axes
    x_T, there = sde.prior((8, 2)).sample(0, dtype=torch.float64), replace(sampler, steps=40, grid="log_snr")
    assert torch.allclose(there(turned, x_T=x_T @ turn.T).x, there(model, x_T=x_T).x @ turn.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_float32_is_as_good_as_float64(sde, sampler):
    x_T, there = sde.prior((16, 2)).sample(0), replace(sampler, steps=30, grid="log_snr")
    single, double = (there(mixture(sde, d), x_T=x_T.to(d)).x for d in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 2e-4


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_grid_in_the_angle_is_the_best_for_runge_kutta(sde):
    model, x_T = mixture(sde), sde.prior((64, 2)).sample(0, dtype=torch.float64)
    exact = ProbabilityFlow(1e-9, 1e-9)(model, x_T=x_T).x
    for steps in (5, 12, 25):
        error = {
            g: float((RungeKutta4(steps, g)(model, x_T=x_T).x - exact).norm()) for g in ("angle", "log_snr", "karras")
        }
        assert error["angle"] < 0.5 * min(error["log_snr"], error["karras"]), (steps, error)


# Churn.


@pytest.mark.parametrize("sde", quick([*SDES, ENDED]), ids=str)
@pytest.mark.parametrize("churn, low, high, scale", [(4.0, 0, math.inf, 1.0), (40.0, 0.05, 50.0, 1.003), (0, 0, 9, 1)])
def test_heun_with_churn_is_algorithm_2(monkeypatch, sde, churn, low, high, scale):
    for v, grid in itertools.product((0.25, 1e-2), GRIDS):
        sampler = Heun(20, grid, churn=churn, churn_min=low, churn_max=high, churn_noise=scale)
        levels = [level(sde, t) for t in time_grid(grid, sde, 20).tolist()]
        expected = torch.from_numpy(run(heun(churn, low, high, scale), levels, v))
        if not sampler.stochastic:
            found = [float(sampler(gaussian(sde, v), x_T=torch.ones(1, 1, dtype=torch.float64)).x)]
            assert found == pytest.approx(expected[:1].tolist(), rel=1e-10), (v, grid)
            continue
        with monkeypatch.context() as patch:
            found = response(patch, sampler, gaussian(sde, v))
        found = torch.cat([found.start[0], found.noise[:, 0, 0]])
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max())), (v, grid)
        assert found[1] == 0 and (not found[2:].any() or found.count_nonzero() > 2)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
@pytest.mark.parametrize("churn", [1.0, 10.0])
def test_churn_keeps_the_marginals_to_second_order(monkeypatch, sde, churn):
    """The noise is exact in law, so that the order is Heun's."""
    model = gaussian(sde, 0.25)

    def error(steps):
        with monkeypatch.context() as patch:
            found = response(patch, Heun(steps, churn=churn), model).moments(*marginal(model, sde.t_max))[1]
        return float(found - marginal(model, sde.t_min)[1])

    coarse, fine = error(100), error(200)
    assert coarse / fine == pytest.approx(2 ** Heun().order, abs=0.3), (coarse, fine)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_churn_never_asks_for_more_noise_than_the_first_time_has(sde):
    """Nor outside the levels it is given; a raised time lies between its node and the one before it or the first."""
    model = Watch(mixture(sde))
    Heun(10, churn=100.0)(model, shape=(2, 2), dtype=torch.float64)
    assert max(model.times) <= last_time(sde) * (1 + 1e-12)
    grid = time_grid("karras", sde, 10).tolist()
    assert all(raised > node for raised, node in zip(model.times[2::2], grid[1:-1], strict=True))
    model.times.clear()
    Heun(10, churn=100.0, churn_min=1e6, churn_max=2e6)(model, shape=(2, 2), dtype=torch.float64)
    assert model.times[::2] == grid[:-1]


def test_a_churning_sampler_has_no_latents():
    with pytest.raises(ValueError, match="adds noise, so its data have no latent"):
        Heun(churn=1.0).encode(mixture(VP()), torch.zeros(1, 2))
    assert Heun(churn=1.0).stochastic and not Heun().stochastic


def test_heun_with_ten_calls_is_behind_euler():
    model, x_T = mixture(VP()), VP().prior((256, 2)).sample(0, dtype=torch.float64)
    exact = RungeKutta4(200)(model, x_T=x_T).x
    few, many = (Heun(5), Euler(10)), (Heun(50), Euler(100))
    for (two, one), better in ((few, False), (many, True)):
        errors = [(s(model, x_T=x_T).x - exact).norm() for s in (two, one)]
        assert (errors[0] < errors[1]) == better, (two, errors)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"churn": -1.0}, "churn must be a number of at least 0, found -1.0"),
        ({"churn": math.nan}, "churn must be a number of at least 0, found nan"),
        ({"churn_min": -0.1}, "0 <= churn_min < churn_max is needed, found churn_min=-0.1"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "0 <= churn_min < churn_max is needed"),
        ({"churn_noise": 0.0}, "churn_noise must be a positive number, found 0.0"),
    ],
)
def test_wrong_churn_is_refused(options, message):
    with pytest.raises(ValueError, match=f"Heun: {message}"):
        Heun(**options)
