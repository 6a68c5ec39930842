"""Exact likelihoods: against closed forms, as densities that integrate to one, with honest errors and failures."""

import math

import pytest
import torch
from oracles import (
    CORE_SDES,
    ROWS,
    SDES,
    SOME_SDES,
    ExactNet,
    Watch,
    correlated,
    gaussian,
    legendre,
    marginal,
    mixture,
    quick,
)
from torch import nn

from models import MLP, LevelHead, ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import VE, VP, Noise, RectifiedFlow, SubVP, TimeChanged
from sde.base import last_time
from solvers import Exact, Hutchinson, ODEError, ProbabilityFlow, log_likelihood
from solvers.ode import ADAPTIVE, FIXED, integrate

WAYS = [dict(method="dopri5"), dict(method="dopri8"), dict(coordinates="time")]
"""Ways to integrate that must give the same number."""


def at_t_min(model, n, seed=0):
    """Samples of p at t_min, a few of them moved to where it has little mass."""
    x = model.sample(n, seed)
    t = torch.tensor(model.sde.t_min, dtype=x.dtype)
    x = model.sde.perturb(x, t, Noise(seed + 1).normal(tuple(x.shape), dtype=x.dtype))
    x[::4] += 1.5
    return x, model.log_prob(x, t)


def terminal(model):
    """The exact log-density at t_max."""
    return lambda x: model.log_prob(x, torch.tensor(model.sde.t_max, dtype=x.dtype))


@pytest.mark.parametrize("sde", quick(SOME_SDES, VP), ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_log_density_of_a_mixture(sde, way):
    """With the exact density at t_max the number is exact but for the solver: 1e-5 at tolerance 1e-8."""
    model = mixture(sde)
    x, exact = at_t_min(model, 16)
    found = log_likelihood(model, x, rtol=1e-8, atol=1e-8, prior=terminal(model), **way)
    assert (found.log_prob - exact).abs().max() < 1e-5
    loose = log_likelihood(model, x, prior=terminal(model), **way)
    assert (loose.log_prob - exact).abs().max() < 1e-2


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_what_the_prior_costs_is_its_mismatch(sde):
    """With the process's own prior the error is log prior - log p at the latent, and nothing else."""
    model = mixture(sde)
    x, exact = at_t_min(model, 16)
    found = log_likelihood(model, x, rtol=1e-8, atol=1e-8)
    mismatch = sde.prior(tuple(x.shape)).log_prob(found.latent) - terminal(model)(found.latent)
    assert (found.log_prob - exact - mismatch).abs().max() < 1e-5
    assert torch.equal(found.prior, sde.prior(tuple(x.shape)).log_prob(found.latent))
    assert torch.allclose(found.prior + found.change, found.log_prob, rtol=1e-14) and found.endpoint is None


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_all_parametrizations_have_one_likelihood(sde, name):
    exact = correlated(sde)
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
    x, _ = at_t_min(exact, 4)
    found, expected = (log_likelihood(m, x, method="rk4", steps=8) for m in (model, exact))
    # Where alpha falls to 0 a network keeps its x_0 over the last thousandth of time: the steps of a fixed-step method
    # there see it.
    atol = 1e-6 if last_time(sde) == sde.t_max else 5e-4
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("method, ratio, slack", [("euler", 2, 0.1), ("midpoint", 4, 0.3), ("rk4", 16, 3)])
def test_order_of_fixed_steps(method, ratio, slack):
    model = gaussian(VP(t_min=1e-2), 0.25, 0.3)
    x, exact = at_t_min(model, 4)

    def error(steps):
        found = log_likelihood(model, x, method=method, steps=steps, prior=terminal(model))
        return float((found.log_prob - exact).abs().mean())

    assert error(80) / error(160) == pytest.approx(ratio, abs=slack)


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
def test_the_coordinates_of_the_integration_do_not_matter(sde):
    model = mixture(sde)
    x, _ = at_t_min(model, 8)
    angle, time = (log_likelihood(model, x, rtol=1e-7, atol=1e-7, coordinates=c) for c in ("angle", "time"))
    for name in ("log_prob", "prior", "change", "latent"):
        assert torch.allclose(getattr(angle, name), getattr(time, name), rtol=1e-5, atol=1e-5), name
    back = [ProbabilityFlow(1e-7, 1e-7, coordinates=c)(model, x_T=angle.latent).x for c in ("angle", "time")]
    assert torch.allclose(*back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde", quick([VP(), SubVP(), VE(), RectifiedFlow()]), ids=str)
@pytest.mark.parametrize("coordinates", ["angle", "time"])
def test_float32_costs_no_more_than_the_tolerance(sde, coordinates):
    exact, model = mixture(sde), mixture(sde, torch.float32)
    x, _ = at_t_min(exact, 16)
    found = log_likelihood(model, x.float(), coordinates=coordinates).log_prob
    expected = log_likelihood(exact, x, rtol=1e-8, atol=1e-8, coordinates=coordinates).log_prob
    assert (found - expected).abs().max() < 1e-3, (found, expected)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_latent_is_that_of_the_flow(sde):
    model = mixture(sde)
    x, _ = at_t_min(model, 8)
    found = log_likelihood(model, x, rtol=1e-7, atol=1e-7)
    assert torch.allclose(found.latent, ProbabilityFlow(1e-7, 1e-7).encode(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_the_change_of_a_gaussian_is_the_logarithm_of_its_scaling(sde):
    model = correlated(sde)
    (_, first), (_, last) = marginal(model, sde.t_min), marginal(model, sde.t_max)
    expected = 0.5 * (torch.logdet(last) - torch.logdet(first))
    found = log_likelihood(model, model.sample(3), rtol=1e-9, atol=1e-9).change
    assert torch.allclose(found, expected.expand(3), atol=1e-6)


@pytest.mark.parametrize("name, reach", [("noise", 2000), ("data", 0.5), ("v", 12), ("levels", 12)])
def test_any_network_gives_a_density(name, reach):
    """Untrained, with random weights: the density integrates to one on a line, over where its samples fall."""
    torch.manual_seed(1)
    levels = name == "levels"
    sde = VP(t_min=1e-2)
    net = MLP((1,), 5 if levels else 1, width=16, depth=1)
    nn.init.normal_(net.last[-1].weight, std=0.03 if name == "data" else 0.3)
    model = ScoreNetwork(net, sde, LevelHead(torch.randn(5, 1)) if levels else name).double()

    def density(x):
        return log_likelihood(model, x[:, None], rtol=1e-6, atol=1e-6).log_prob.exp()

    assert legendre(density, -reach, reach, panels=100, order=12) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_companions_do_not_change_a_likelihood(sde):
    """Alone or among 64 with far outliers: within ten tolerances."""
    model, tolerance = mixture(sde), 1e-5
    x, _ = at_t_min(model, 64)
    x[32:] *= 30
    whole = log_likelihood(model, x, rtol=tolerance, atol=tolerance).log_prob
    for i in (1, 5, 40):
        alone = log_likelihood(model, x[i : i + 1], rtol=tolerance, atol=tolerance).log_prob
        size = max(1.0, float(alone.abs()))
        assert abs(float(alone - whole[i])) < 10 * tolerance * size, i


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", pytest.param("adaptive_heun", marks=pytest.mark.slow)])
def test_easy_companions_do_not_loosen_the_tolerance(method):
    """One sample in a thousand moves: its steps are those that it takes alone, not ones of an average error."""

    def slopes(t, y):
        return (rate * torch.cos(20 * t) * y[0],)

    rate = torch.zeros(1000, 1, dtype=torch.float64)
    rate[0] = 20.0
    (whole,) = integrate(slopes, state(1000), 0.0, 1.0, method, 1e-6, 1e-6)
    rate = rate[:1]
    (alone,) = integrate(slopes, state(1), 0.0, 1.0, method, 1e-6, 1e-6)
    exact = math.exp(math.sin(20.0))
    assert abs(float(alone) - exact) < 1e-4
    assert abs(float(whole[0]) - exact) < 2 * abs(float(alone) - exact) + 1e-7


def test_permuted_samples_have_permuted_likelihoods():
    model = mixture(VP())
    x, _ = at_t_min(model, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        log_likelihood(model, x[order]).log_prob, log_likelihood(model, x).log_prob[order], rtol=1e-12, atol=1e-12
    )


# The endpoint.


def test_the_endpoint_correction_takes_the_error_from_second_to_fourth_and_sixth_order():
    """When sigma_min halves, the error of log p of clean data falls by 4 without, by 16 and 64 with the correction."""
    errors = {False: [], True: [], 2: []}
    for sigma_min in (0.02, 0.01):
        model = mixture(VE(sigma_min=sigma_min, t_min=1e-9))
        x = model.sample(24, seed=2)
        for corrected, found in errors.items():
            ll = log_likelihood(model, x, steps=150, prior=terminal(model), endpoint_correction=corrected)
            found.append(float((ll.log_prob - model.log_prob(x)).abs().mean()))
            if corrected:
                assert torch.allclose(ll.prior + ll.change + ll.endpoint, ll.log_prob, rtol=1e-12)
    assert errors[False][0] / errors[False][1] == pytest.approx(4, abs=0.3)
    assert errors[True][0] / errors[True][1] == pytest.approx(16, abs=3)
    assert errors[2][0] / errors[2][1] == pytest.approx(64, abs=16)
    assert errors[True][1] < 0.05 * errors[False][1] and errors[2][1] < 0.1 * errors[True][1]


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_endpoint_correction_of_a_process_with_a_mean(sde):
    model = mixture(sde)
    x = model.sample(16, seed=2)
    plain, corrected = (
        log_likelihood(model, x, rtol=1e-8, atol=1e-8, prior=terminal(model), endpoint_correction=c)
        for c in (False, True)
    )
    exact = model.log_prob(x)
    assert (corrected.log_prob - exact).abs().mean() < 0.2 * (plain.log_prob - exact).abs().mean() + 1e-6


def test_the_endpoint_correction_counts_the_scale_of_the_data():
    """At t_min the data are alpha x: D log alpha is part of it. For data far wider than the noise it is all of it."""
    model = gaussian(VP(t_min=1e-2), 100.0)
    x = model.sample(8, seed=2)
    found = log_likelihood(model, x, rtol=1e-9, atol=1e-9, prior=terminal(model), endpoint_correction=True)
    assert (found.log_prob - model.log_prob(x)).abs().max() < 1e-7
    assert torch.equal(found.endpoint < -5e-4, torch.ones(8, dtype=torch.bool))


# Units, counts, and failures.


def test_units():
    """log p of a x + b is log p of x, less D log a: the same field in other units, by another mixture."""
    sde, a = VE(), 3.0
    model = mixture(sde)
    scaled = type(model)(
        model.log_weights.exp(),
        a * model.means,
        a**2 * (model.axes * model.variances[:, None]) @ model.axes.mT,
        VE(sigma_min=a * sde.sigma_min, sigma_max=a * sde.sigma_max),
    )
    x, _ = at_t_min(model, 6)
    found, expected = (log_likelihood(m, y, rtol=1e-7, atol=1e-7) for m, y in ((scaled, a * x), (model, x)))
    assert torch.allclose(found.log_prob, expected.log_prob - 2 * math.log(a), atol=1e-5)


@pytest.mark.parametrize(
    "sde",
    quick([VP(), SubVP(), VE(), RectifiedFlow(), TimeChanged(VE(), lambda t: 0.1 * t)], TimeChanged),
    ids=["VP", "SubVP", "VE", "RF", "slow"],
)
@pytest.mark.parametrize("coordinates", ["angle", "time"])
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_no_evaluation_outside_the_interval(sde, method, coordinates):
    """And the number of evaluations is the number of calls."""
    model = Watch(mixture(sde))
    x, _ = at_t_min(model.inner, 3)
    options = dict(method=method, steps=10 if method in FIXED else None, coordinates=coordinates, rtol=1e-3, atol=1e-3)
    ll = log_likelihood(model, x, **options)
    assert ll.nfe == len(model.times)
    flow = ProbabilityFlow(**options)
    assert flow(model, x_T=ll.latent).nfe == len(model.times) - ll.nfe
    assert min(model.times) >= sde.t_min and max(model.times) <= sde.t_max


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_trial_of_a_first_step_stays_inside_too(method, ends):
    """A slow field suggests a first step of any length: 0.01 |y| / |y'| is 10^4 here."""
    seen = []

    def field(t, state):
        seen.append(float(t))
        return (1e-6 * state[0],)

    (found,) = integrate(field, (torch.ones(2, 1, dtype=torch.float64),), *ends, method)
    assert min(seen) >= 0 and max(seen) <= 1
    assert torch.allclose(found, torch.full_like(found, math.exp(1e-6 * (ends[1] - ends[0]))), rtol=1e-12)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=3)], ids=str)
def test_one_call_gives_velocity_and_divergence(divergence):
    assert log_likelihood(correlated(VP()), torch.zeros(2, 2).double(), divergence, method="rk4", steps=5).nfe == 20


def test_parameters_are_as_they_were():
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP())
    frozen = [p for i, p in enumerate(model.parameters()) if i % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    x = torch.zeros(2, 2)
    ll = log_likelihood(model, x, method="euler", steps=2)
    assert [p.requires_grad for p in model.parameters()] == before and not ll.log_prob.requires_grad
    with pytest.raises(ODEError):
        log_likelihood(model, x * float("nan"), method="euler", steps=2)
    assert [p.requires_grad for p in model.parameters()] == before and not model._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def state(n=2):
    return (torch.ones(n, 1, dtype=torch.float64),)


def nan_late(t, y):
    return (y[0] * (float("nan") if float(t) > 0.7 else 1.0),)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_a_field_that_turns_nan_raises(method):
    with pytest.raises(ODEError, match=r"the right-hand side is not finite at t=0\.[789].*raise t_min"):
        integrate(nan_late, state(), 0.0, 1.0, method, steps=20 if method in FIXED else None)


def test_too_many_steps_raise():
    with pytest.raises(ODEError, match=r"dopri5 stopped near t=0.* after \d+ evaluations .*take method='rk4'"):
        integrate(lambda t, y: (torch.cos(1e4 * t) * y[0],), state(), 0.0, 1.0, "dopri5", 1e-9, 1e-9, max_steps=50)


def test_a_singular_field_raises():
    """y' = y^2 from 1 blows up at t = 1."""
    with pytest.raises(ODEError):
        integrate(lambda t, y: (y[0] ** 2,), state(), 0.0, 2.0, "dopri5", 1e-6, 1e-6)


def test_growth_beyond_the_largest_number_raises():
    with pytest.raises(ODEError):
        integrate(lambda t, y: (1e300 * y[0] ** 2,), state(), 0.0, 1.0, "rk4", steps=5)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (1e-5, 0.7), (0.3, 1 / 3)], ids=str)
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_exponentials_in_both_directions(method, ends):
    start, end = ends
    steps = 500 if method in FIXED else None
    tolerance = 1e-7 if method == "adaptive_heun" else 1e-9  # order 2
    (y,) = integrate(lambda t, y: (y[0] * torch.cos(t),), state(), start, end, method, tolerance, tolerance, steps)
    expected = math.exp(math.sin(end) - math.sin(start))
    assert torch.allclose(y, torch.full_like(y, expected), rtol=2e-3 if method == "euler" else 1e-6), y


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "rk4"}, "give steps >= 1, found None"),
        ({"method": "euler", "steps": True}, "give steps >= 1, found True"),
        ({"method": "dopri5", "steps": 10}, "chooses its own steps"),
        ({"method": "heun3"}, "method must be one of"),
        ({"rtol": -1.0}, "rtol and atol must be positive"),
        ({"coordinates": "sigma"}, "coordinates must be one of auto, angle, ratio, log_snr, time, found 'sigma'"),
    ],
)
def test_a_wrong_combination_is_refused_before_the_first_call(arguments, message):
    model = Watch(mixture(VP()))
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, torch.zeros(1, 2).double(), **arguments)
    assert not model.times


def test_the_parts_of_a_data_set_have_the_probes_of_the_whole():
    model = mixture(VP())
    x, divergence = model.sample(6, seed=0), Hutchinson(probes=2)
    whole = log_likelihood(model, x, divergence, rtol=1e-8, atol=1e-8)
    tail = log_likelihood(model, x[4:], divergence, rtol=1e-8, atol=1e-8, first=4)
    assert torch.allclose(tail.change, whole.change[4:], atol=1e-6)
    other = log_likelihood(model, x[4:], divergence, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(other.change, whole.change[4:], atol=1e-3)
