"""DPM-Solver++ and UniPC: the algorithms of the papers in plain numbers, their orders, and both ends of time."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import CORE_SDES, SDES, Watch, correlated, gaussian, marginal, mixture, moved, quick
from recursions import dpm_solver, level, run, unipc

from sde import VE, VP, RectifiedFlow
from solvers import DDIM, GRIDS, DPMSolver, Langevin, PredictorCorrector, RungeKutta4, UniPC, time_grid
from solvers.multistep import moments

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
SAMPLERS = [cls(order=order) for cls in (DPMSolver, UniPC) for order in (1, 2, 3)]
ENDED = RectifiedFlow(t_min=0.0)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_coefficient_is_that_of_the_papers(sde, sampler, grid):
    """At few steps, where the last have lower orders, and at 20; for wide and narrow data; each final; both ways."""
    step = {DPMSolver: dpm_solver, UniPC: unipc}[type(sampler)](sampler.order)
    one = torch.ones(1, 1, dtype=torch.float64)
    for v, steps in ((0.25, 4), *((v, 20) for v in VARIANCES)):
        levels, model = [level(sde, t) for t in time_grid(grid, sde, steps).tolist()], gaussian(sde, v)
        there = replace(sampler, steps=steps, grid=grid)
        for final in ("mean", "sample", "denoise"):
            found = float(replace(there, final=final)(model, x_T=one).x)
            expected = float(run(step, levels, v, final)[0])
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-13), (v, steps, final)
        found = float(there.encode(model, one))
        # Differences of x_0 are known to 1e-16, what they add to eps to 1e-16 / sigma; 4 steps make that grow.
        tolerance = 1e-12 + (5e-16 if steps == 20 else 2e-14) * levels[-1].alpha / levels[-1].sigma
        assert found == pytest.approx(float(run(step, levels[::-1], v)[0]), rel=tolerance), (v, steps)


@pytest.mark.parametrize("sde", quick([*SDES, ENDED]), ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_order_1_is_ddim_bit_for_bit(sde, grid):
    model = mixture(sde, torch.float32)
    for steps in (1, 2, 7, 30):
        first, ddim = DPMSolver(steps, grid, order=1), DDIM(steps, grid)
        assert torch.equal(first(model, shape=(4, 2)).x, ddim(model, shape=(4, 2)).x), steps
        x = torch.ones(1, 2)
        assert torch.equal(first.encode(model, x), ddim.encode(model, x)), steps


@pytest.mark.parametrize("cls, extra", [(DPMSolver, 0), (UniPC, 1)])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sde", quick([VP(), VE()]), ids=str)
@pytest.mark.parametrize("target", [correlated, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_order_of_convergence(cls, extra, order, sde, target, direction):
    """p for DPM-Solver++, p + 1 for UniPC, in both directions, from one and the same beginning."""
    p, exact = order + extra, moved(RungeKutta4(400), sde, target, direction)
    samplers = (cls(n, "karras", order=order) for n in (240, 480))
    coarse, fine = (float((moved(sampler, sde, target, direction) - exact).norm()) for sampler in samplers)
    found = math.log2(coarse / fine)
    if direction == "encode" and sde == VE() and order == 3:
        assert p - 1 < found < p, (coarse, fine)  # the first steps, of lower order, show: data noise of 0.01
    elif target is correlated:
        assert found == pytest.approx(p, abs=0.3), (coarse, fine)
    else:
        assert found > p - 0.3, (coarse, fine)  # on the mixture some errors still fall faster


def test_orders_fall_to_those_of_the_first_steps_where_x_0_moves_in_them():
    """Encoding under VE, against the closed form: 3 falls to 2, UniPC's 4 to 3."""
    sde = VE()
    model = gaussian(sde, 0.25)
    exact = math.sqrt(float(marginal(model, sde.t_max)[1] / marginal(model, sde.t_min)[1]))
    for cls, limit in ((DPMSolver, 2), (UniPC, 3)):
        samplers = (cls(n, "karras", order=3) for n in (40, 80, 1000, 2000))
        errors = [abs(float(s.encode(model, torch.ones(1, 1, dtype=torch.float64))) - exact) for s in samplers]
        few, many = (math.log2(a / b) for a, b in (errors[:2], errors[2:]))
        assert few > limit + 0.5 and limit - 0.1 < many < limit + 0.5, (cls, few, many)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_decoding_inverts_encoding_to_the_order(sampler):
    sde = VP()
    model, p = mixture(sde), sampler.order + isinstance(sampler, UniPC)
    x = model.sample(8, seed=0)

    def error(steps):
        there = replace(sampler, steps=steps, grid="karras")
        return float((there(model, x_T=there.encode(model, x)).x - x).norm())

    assert error(100) / error(200) > 0.8 * 2**p


@pytest.mark.parametrize("sde", quick([*SDES, ENDED], RectifiedFlow), ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_b34_any_number_of_steps_is_finite_and_each_level_is_used_once(sde, grid):
    for sampler, steps in itertools.product(SAMPLERS, (1, 2, 3, 4, 5, 7, 10, 50)):
        model = Watch(mixture(sde, torch.float32))
        x = replace(sampler, steps=steps, grid=grid)(model, shape=(3, 2)).x
        assert bool(torch.isfinite(x).all()), (sampler, steps)
        assert float(x.abs().max()) < 100, (sampler, steps)
        expected = time_grid(grid, sde, steps)[:-1].float().tolist()
        assert model.times == expected and len(set(model.times)) == steps, (sampler, steps)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_b34_the_last_step_without_noise_gives_the_prediction(sampler):
    """log-SNR = infinity at the end: order 1, alpha x_0 = x_0; encoding sets out from there."""
    model, calls = mixture(ENDED), []
    model.register_forward_hook(lambda module, args, pair: calls.append(pair.x0))
    x = replace(sampler, steps=20)(model, shape=(3, 2), dtype=torch.float64).x
    assert torch.allclose(x, calls[-1], rtol=0, atol=1e-15)
    latent = replace(sampler, steps=200).encode(model, x)
    assert torch.allclose(latent, RungeKutta4(200).encode(model, x), atol=0.05)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_float32_is_as_good_as_float64(sde, sampler):
    x_T = sde.prior((16, 2)).sample(0)
    there = replace(sampler, steps=30)
    single, double = (there(mixture(sde, d), x_T=x_T.to(d)).x for d in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 2e-4


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_rotation_of_data_and_noise_rotates_the_samples(sde, sampler):
    model, angle = mixture(sde), torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).reshape(2, 2)
    turned = mixture(sde)
    turned.means, turned.axes = model.means @ turn.T, turn @ model.axes
    x_T, there = sde.prior((8, 2)).sample(0, dtype=torch.float64), replace(sampler, steps=12)
    assert torch.allclose(there(turned, x_T=x_T @ turn.T).x, there(model, x_T=x_T).x @ turn.T, rtol=0, atol=1e-10)


def test_the_moments_are_the_integrals():
    """Also where they cancel, for small h, and for h of either sign."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for h in (-20.0, -3.0, -0.99, -1e-5, 1e-9, 1e-3, 0.5, 1.0, 1.01, 7.0, 20.0):
        found = moments(torch.tensor([h], dtype=torch.float64), 4)[0]
        for k in range(1, 5):
            r = (nodes + 1) / 2
            assert float(found[k - 1]) == pytest.approx(
                float((weights / 2 * np.exp(-h * (1 - r)) * r**k).sum()), rel=1e-12
            )


def test_unipc_is_no_predictor_for_a_corrector():
    with pytest.raises(ValueError, match="a step of UniPC starts from earlier states, which a corrector"):
        PredictorCorrector(UniPC(), Langevin())
    assert PredictorCorrector(DPMSolver(), Langevin()).calls_per_step == 2


@pytest.mark.parametrize("cls", [DPMSolver, UniPC])
@pytest.mark.parametrize("order", [0, 4, 2.5, True, "2"])
def test_other_orders_are_refused(cls, order):
    with pytest.raises(ValueError, match=f"{cls.__name__}: order must be 1, 2 or 3, found {order!r}"):
        cls(order=order)


def test_corrected_states_pay():
    """A corrector without a call: at 10 and 20 calls UniPC is ahead of the predictor alone."""
    sde = VP()
    model, x_T = mixture(sde), sde.prior((128, 2)).sample(0, dtype=torch.float64)
    exact = RungeKutta4(300)(model, x_T=x_T).x
    for order, steps in itertools.product((1, 2), (10, 20, 50)):
        predictor, both = ((c(steps, order=order)(model, x_T=x_T).x - exact).norm() for c in (DPMSolver, UniPC))
        assert both < predictor, (order, steps)
