"""DPM-Solver++ and UniPC: the algorithms of the papers in plain numbers, their orders, and both ends of time."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import CORE_SDES, SDES, Watch, correlated, gaussian, mixture

from sde import EDM, VE, VP, RectifiedFlow, SubVP
from solvers import DDIM, GRIDS, DPMSolver, Langevin, PredictorCorrector, RungeKutta4, UniPC, time_grid
from solvers.multistep import moments

VARIANCES = (1.0, 0.25, 1e-2, 1e-4)
SAMPLERS = [cls(order=order) for cls in (DPMSolver, UniPC) for order in (1, 2, 3)]
ENDED = RectifiedFlow(t_min=0.0)


def levels(sde, t):
    """alpha, sigma and log(alpha / sigma) as floats."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha, sigma, math.log(alpha) - math.log(sigma)


def lower(order, n, steps):
    """The order of step n: of as many nodes as there are, and lower again in the last of fewer than 15 steps."""
    return min(order, n + 1, steps - n) if steps < 15 else min(order, n + 1)


def pair(sde, v, t, x):
    """x_0 and eps of N(0, v): no difference of nearly equal numbers, at either end of time."""
    alpha, sigma, _ = levels(sde, t)
    total = alpha**2 * v + sigma**2
    return alpha * v / total * x, sigma / total * x


NODES, QUADRATURE = (a / 2 for a in np.polynomial.legendre.leggauss(40))


def dpm(sde, v, times, order):
    """DPM-Solver++ from x = 1 on N(0, v): algorithm 2 of Lu et al. (2022); order 3 by quadrature of the parabola.

    (sigma_s / sigma) x - alpha_s (e^-h - 1) x_0 is written as alpha_s x_0 + sigma_s eps.
    """
    x, seen = 1.0, []
    for n, (t, s) in enumerate(itertools.pairwise(times)):
        (_, _, start), (alpha_s, sigma_s, end) = levels(sde, t), levels(sde, s)
        m, eps = pair(sde, v, t, x)
        seen.insert(0, (start, m))
        k, h = lower(order, n, len(times) - 1), end - start
        x = alpha_s * m + sigma_s * eps
        if k == 2:
            r = (start - seen[1][0]) / h
            x -= alpha_s * math.expm1(-h) / (2 * r) * (m - seen[1][1])
        if k == 3:
            at, parabola = start + (NODES + 0.5) * h, 0.0
            for own, value in seen[:3]:
                parabola += (value - m) * math.prod(
                    (at - other) / (own - other) for other, _ in seen[:3] if other != own
                )
            x += alpha_s * h * float((QUADRATURE * np.exp(h * (NODES - 0.5)) * parabola).sum())
    return x


def unipc(sde, v, times, order):
    """UniPC on N(0, v) in the form of Zhao et al. (2023), algorithms 5 to 8: predicted and corrected states apart.

    Both start from the corrected state, the predicted one plus ``gap``.
    """
    predicted, gap, seen, steps = 1.0, 0.0, [], len(times) - 1

    def added(t, s, k, known, ahead=None):
        """What is added to the first-order step from t to s."""
        (_, _, start), (alpha_s, _, end) = levels(sde, t), levels(sde, s)
        h, base = end - start, known[0][1]
        b, rhs, phi = math.expm1(-h), [], math.expm1(-h) / -h - 1
        for i in range(1, k + 1):
            rhs.append(phi * math.factorial(i) / b)
            phi = phi / -h - 1 / math.factorial(i + 1)
        ratios = [(one - start) / h for one, _ in known[1:k]]
        slopes = [(m - base) / r for (_, m), r in zip(known[1:k], ratios, strict=True)]
        if ahead is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, ahead - base]
        size = len(ratios)
        matrix = np.array([[r**i for r in ratios] for i in range(size)]).reshape(size, size)
        rho = [0.5] if size == 1 else np.linalg.solve(matrix, rhs[:size]) if size else []
        return -alpha_s * b * sum(p * d for p, d in zip(rho, slopes, strict=True))

    for n, (t, s) in enumerate(itertools.pairwise(times)):
        (_, sigma, log), (alpha_s, sigma_s, _) = levels(sde, t), levels(sde, s)
        m, eps = pair(sde, v, t, predicted)
        if n:
            back = times[n - 1], t, lower(order, n - 1, steps), seen
            gap = added(*back, ahead=m) - added(*back)
        seen.insert(0, (log, m))
        predicted = alpha_s * m + sigma_s * eps + sigma_s / sigma * gap + added(t, s, lower(order, n, steps), seen)
    return predicted


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_coefficient_is_that_of_the_papers(sde, sampler, grid):
    """At few steps, where the last have lower orders, and at 20; for wide and narrow data; each final; both ways."""
    recursion, one = {DPMSolver: dpm, UniPC: unipc}[type(sampler)], torch.ones(1, 1, dtype=torch.float64)
    for v, steps in itertools.product(VARIANCES, (4, 20)):
        times, model = time_grid(grid, sde, steps).tolist(), gaussian(sde, v)
        there = replace(sampler, steps=steps, grid=grid)
        expected = recursion(sde, v, times, sampler.order)
        alpha, sigma, _ = levels(sde, times[-1])
        shrink = {"mean": 1.0, "sample": 1.0, "denoise": alpha * v / (alpha**2 * v + sigma**2)}
        for final, factor in shrink.items():
            found = float(replace(there, final=final)(model, x_T=one).x)
            assert found == pytest.approx(factor * expected, rel=1e-12, abs=1e-13), (v, steps, final)
        found = float(there.encode(model, one))
        # Steps of 4 make rounding grow as well: by sigma_s / sigma = 30 and more each.
        tolerance = 1e-11 if steps == 20 else 1e-8
        assert found == pytest.approx(recursion(sde, v, times[::-1], sampler.order), rel=tolerance), (v, steps)


@pytest.mark.parametrize("sde", [*SDES, ENDED], ids=str)
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
@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=str)
@pytest.mark.parametrize("target", [correlated, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_order_of_convergence(cls, extra, order, sde, target, direction):
    """p for DPM-Solver++, p + 1 for UniPC, in both directions, from one and the same beginning."""
    model, p = target(sde), order + extra
    x = sde.prior((4, 2)).sample(1, dtype=torch.float64) if direction == "decode" else model.sample(4, seed=1)

    def moved(sampler):
        return sampler(model, x_T=x).x if direction == "decode" else sampler.encode(model, x)

    exact = moved(RungeKutta4(600))
    coarse, fine = (float((moved(cls(n, "karras", order=order)) - exact).norm()) for n in (240, 480))
    found = math.log2(coarse / fine)
    if target is correlated:
        assert found == pytest.approx(p, abs=0.3), (coarse, fine)
    assert found > p - 0.3, (coarse, fine)  # on the mixture some errors still fall faster


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_decoding_inverts_encoding_to_the_order(sampler):
    sde = VP()
    model, p = mixture(sde), sampler.order + isinstance(sampler, UniPC)
    x = model.sample(8, seed=0)

    def error(steps):
        there = replace(sampler, steps=steps, grid="karras")
        return float((there(model, x_T=there.encode(model, x)).x - x).norm())

    assert error(100) / error(200) > 0.8 * 2**p


@pytest.mark.parametrize("sde", [*SDES, ENDED], ids=str)
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


@pytest.mark.parametrize("sde", SDES, ids=str)
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
