"""Likelihood in one pass: against closed forms and against the flow's own density, its error estimate, its parts."""

import math

import numpy as np
import pytest
import torch
from oracles import CORE_SDES, SDES, correlated, gaussian, mixture, quick

import solvers.one_pass
from models import MLP, ScoreNetwork
from sde import EDM, VE, VP, Noise, Prediction, RectifiedFlow, ScoreFunction, ScoreModel
from solvers import Exact, Hutchinson, ODEError, inconsistency, line_likelihood, log_likelihood, solver_error
from solvers.one_pass import Rule, one_pass
from solvers.spectral import differentiation, gauss_radau, interpolation

SLOW = pytest.param(dict(rtol=1e-6, atol=1e-6), marks=pytest.mark.slow)


def at_t_min(model, n=32, seed=0):
    """Samples of p at t_min, and their log-density."""
    x, t = model.sample(n, seed), torch.tensor(model.sde.t_min, dtype=torch.float64)
    x = model.sde.perturb(x, t, Noise(seed + 1).normal(tuple(x.shape), dtype=x.dtype))
    return x, model.log_prob(x, t)


def terminal(model):
    """The exact log-density at t_max."""
    return lambda x: model.log_prob(x, torch.tensor(model.sde.t_max, dtype=x.dtype))


class Perturbed(ScoreModel):
    """A score that is the gradient of no density: 5 % of a rotation is added to eps."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner = inner

    def forward(self, x, t):
        x0, eps = self.inner(x, t)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        u = 2 * x / torch.hypot(alpha, sigma)
        added = 0.05 * torch.stack((torch.sin(u[:, 1] + 0.3), torch.cos(u[:, 0])), 1)
        return Prediction(x0 - sigma / alpha * added, eps + added)


# Nodes and weights.


@pytest.mark.parametrize("n", [2, 3, 8, 40, 150])
def test_gauss_and_radau_integrate_and_differentiate_polynomials(n):
    nodes, weights = gauss_radau(n)
    assert nodes[0] == -1 and (nodes.diff() > 0).all() and nodes[-1] < 1
    for degree in range(0, 2 * n - 1, max(1, n // 4)):
        exact = (1 - (-1) ** (degree + 1)) / (degree + 1)
        assert float((weights * nodes**degree).sum()) == pytest.approx(exact, abs=1e-14)
    assert abs(float((weights * nodes ** (2 * n - 1)).sum())) > 1e-14 or n > 20  # no further
    polynomial = np.polynomial.Chebyshev(np.cos(np.arange(n)))  # of degree n - 1
    values, slopes = (torch.from_numpy(f(nodes.numpy())) for f in (polynomial, polynomial.deriv()))
    assert torch.allclose(differentiation(nodes) @ values, slopes, rtol=1e-8, atol=1e-9 * float(slopes.abs().max()))
    places = torch.tensor([-1.0, -0.3, 1.0], dtype=torch.float64)
    assert torch.allclose(interpolation(nodes, places) @ values, torch.from_numpy(polynomial(places.numpy())))


def test_the_rule_through_every_other_node():
    nodes, weights = Rule(0.2, 1.7, 9).nodes(every=2)
    assert torch.equal(nodes, Rule(0.2, 1.7, 9).nodes()[0][::2])
    for degree in range(5):
        assert float((weights * nodes**degree).sum()) == pytest.approx(
            (1.7 ** (degree + 1) - 0.2 ** (degree + 1)) / (degree + 1)
        )


# Against closed forms.


@pytest.mark.parametrize("sde", quick(SDES, VP, VE, RectifiedFlow), ids=str)
def test_log_density_of_a_mixture(sde):
    """With an exact score 60 calls do better than dopri5 at 1e-7 does with three times as many."""
    model = mixture(sde)
    x, exact = at_t_min(model)
    found = log_likelihood(model, x, steps=60, prior=terminal(model))
    assert (found.log_prob - exact).abs().max() < 1e-4 and found.nfe == 60
    assert (found.log_prob - exact).abs().median() < 1e-6
    assert torch.allclose(found.prior + found.change, found.log_prob, rtol=1e-12)
    assert torch.allclose(found.prior, terminal(model)(found.latent), rtol=1e-12)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_error_falls_faster_than_any_power(sde):
    """From 20 to 40 calls by more than 30, which would be order 5, and from 40 to 80 by more than 1000."""
    model = mixture(sde)
    x, exact = at_t_min(model, 64)
    errors = [
        float((log_likelihood(model, x, steps=n, prior=terminal(model)).log_prob - exact).abs().mean())
        for n in (20, 40, 80)
    ]
    assert errors[0] > 30 * errors[1] > 30 * 1000 * errors[2]


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_latent_of_a_gaussian_is_as_good_as_the_path_and_the_density_much_better(sde):
    """Its flow is affine: x_T = root of the ratio of the variances, about the means."""
    model = gaussian(sde, 0.3, 0.4)
    x, exact = at_t_min(model, 8)
    found = log_likelihood(model, x, steps=60, prior=terminal(model))
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    (a, s), (b, r) = ((sde.alpha(t), sde.sigma(t)) for t in (first, last))
    ratio = torch.sqrt((0.3 * b**2 + r**2) / (0.3 * a**2 + s**2))
    assert torch.allclose(found.latent / r, (0.4 * b + ratio * (x - 0.4 * a)) / r, atol=1e-4)
    assert torch.allclose(found.change, ratio.log().expand(8), atol=1e-4)
    assert (found.log_prob - exact).abs().max() < 1e-10


@pytest.mark.parametrize("sde", quick([VP(), VE()]), ids=str)
def test_a_learned_score_has_the_density_of_its_flow(sde):
    """Not that of the line: the defect's term takes the path's error to second order, and the line has no path."""
    model = Perturbed(mixture(sde))
    x, _ = at_t_min(model.inner)
    flow = log_likelihood(model, x, rtol=1e-8, atol=1e-8).log_prob
    errors = [float((log_likelihood(model, x, steps=n).log_prob - flow).abs().mean()) for n in (40, 80)]
    assert errors[0] < 3e-3 and errors[1] < 1e-4, errors
    line = line_likelihood(model, x, 60)
    assert float((line - flow).abs().mean()) > 0.02
    assert torch.allclose(inconsistency(model, x), line_likelihood(model, x, 50) - log_likelihood(model, x).log_prob)


def test_the_defect_corrects_the_path(monkeypatch):
    """Without its term the error is that of the path: a hundred times larger."""
    model = mixture(VP())
    x, exact = at_t_min(model)
    divergence = Exact()
    with torch.no_grad():
        found = one_pass(model, x, 40, divergence, divergence.directions(x))
    plain = terminal(model)(found.whole.latent) + found.whole.change[:, 0] - found.defect
    corrected = plain + found.defect
    assert float((plain - exact).abs().median()) > 100 * float((corrected - exact).abs().median())


@pytest.mark.parametrize("sde", quick([VP(), VE(), EDM()], VE), ids=str)
def test_the_error_estimate_is_on_the_safe_side(sde):
    model = Perturbed(mixture(sde))
    x, _ = at_t_min(model.inner, 64)
    flow = log_likelihood(model, x, rtol=1e-8, atol=1e-8).log_prob
    for steps in (20, 40, 80):
        found = log_likelihood(model, x, steps=steps)
        true = (found.log_prob - flow).abs()
        assert float((true <= found.error + 1e-7).double().mean()) > 0.9, steps
        assert float(found.error.mean()) < 0.5


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_float32_costs_no_more_than_1e_4(sde):
    """The path is kept in double precision: its derivative would turn the rounding of single into errors of 1e-2."""
    exact, single = mixture(sde), mixture(sde, torch.float32)
    x, _ = at_t_min(exact)
    found = log_likelihood(single, x.float(), steps=100)
    assert found.log_prob.dtype == found.latent.dtype == found.error.dtype == torch.float32
    assert (found.log_prob - log_likelihood(exact, x, steps=100).log_prob).abs().max() < 1e-4


def test_companions_and_parts_do_not_matter():
    model, divergence = correlated(VE()), Hutchinson(3)
    x, _ = at_t_min(model, 9)
    x[4:] *= 30
    whole = log_likelihood(model, x, divergence, steps=30)
    parts = log_likelihood(model, x, divergence, steps=30, batch_size=4)
    alone = log_likelihood(model, x[2:3], divergence, steps=30, first=2)
    for name in ("log_prob", "prior", "change", "latent", "stderr", "error"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9), name
        assert torch.allclose(getattr(alone, name), getattr(whole, name)[2:3], rtol=1e-9, atol=1e-9), name
    assert parts.nfe == whole.nfe == 30


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=str)
def test_any_rank(shape):
    model = ScoreNetwork(MLP(shape, width=8, depth=1), VP(t_min=1e-2)).double()
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x = Noise(0).normal((4, *shape), dtype=torch.float64)
    found = log_likelihood(model, x, steps=80)
    assert found.latent.shape == x.shape and found.log_prob.shape == (4,)
    assert torch.allclose(found.log_prob, log_likelihood(model, x, rtol=1e-8, atol=1e-8).log_prob, atol=2e-3)


def test_probes_have_the_mean_of_the_exact_divergence():
    model = correlated(VP(t_min=1e-3))
    x, _ = at_t_min(model, 1)
    copies = x.expand(400, 2)
    found, exact = log_likelihood(model, copies, Hutchinson(4), steps=40), log_likelihood(model, x, steps=40)
    stderr = float(found.log_prob.std()) / 20
    assert abs(float(found.log_prob.mean() - exact.log_prob[0])) < 4 * stderr
    assert float(found.stderr.square().mean().sqrt()) == pytest.approx(20 * stderr, rel=0.15)


@pytest.mark.parametrize("method", [dict(steps=40), dict(method="rk4", steps=20), SLOW], ids=str)
def test_gradients(method):
    """With respect to data and parameters, against central differences."""
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP(t_min=1e-2)).double()
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.2)
    x = Noise(1).normal((2, 2), dtype=torch.float64).requires_grad_()
    weight = model.net.last[-1].weight
    tolerance = 1e-3 if "rtol" in method else 1e-5  # the steps of an adaptive method depend on x, its gradient does not

    def value(x):
        return log_likelihood(model, x, gradients=True, **method).log_prob.sum()

    by_x, by_weight = torch.autograd.grad(value(x), (x, weight))
    step = 1e-5
    with torch.no_grad():
        shift = torch.zeros_like(x)
        shift[0, 1] = step
        numeric = (value(x + shift) - value(x - shift)) / (2 * step)
        assert float(by_x[0, 1]) == pytest.approx(float(numeric), rel=tolerance)
        values = []
        for sign in (1, -1):
            weight[1, 3] += sign * step
            values.append(float(value(x)))
            weight[1, 3] -= sign * step
        assert float(by_weight[1, 3]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=tolerance)
    assert not log_likelihood(model, x, **method).log_prob.requires_grad


# What the line says of exact scores, and of others.


@pytest.mark.parametrize("sde", quick(SDES, VP, VE, RectifiedFlow), ids=str)
def test_the_line_is_exact_for_an_exact_score(sde):
    model = mixture(sde)
    x, exact = at_t_min(model)
    assert (line_likelihood(model, x, 40, prior=terminal(model)) - exact).abs().max() < 1e-4
    assert (line_likelihood(model, x, 20, prior=terminal(model)) - exact).abs().mean() < 1e-3


def test_the_line_needs_a_pair():
    with pytest.raises(TypeError, match="line_likelihood needs a ScoreModel"):
        line_likelihood(ScoreFunction(VP(), lambda x, t: -x), torch.zeros(1, 2))


# The default, the error by a second pass, and refusals.


def test_the_default_is_one_pass_unless_tolerances_are_given():
    model, x = mixture(VP()), torch.zeros(2, 2).double()
    assert log_likelihood(model, x).nfe == 100 and log_likelihood(model, x).error is not None
    assert log_likelihood(model, x, steps=12).nfe == 12
    for adaptive in (dict(rtol=1e-4), dict(atol=1e-4), dict(coordinates="ratio"), dict(method="dopri5")):
        assert log_likelihood(model, x, **adaptive).error is None
    function = ScoreFunction(VP(t_min=1e-2), lambda x, t: -x)
    assert log_likelihood(function, x).error is None


@pytest.mark.parametrize("way", [dict(steps=20), dict(method="rk4", steps=10), dict(rtol=1e-3, atol=1e-3)], ids=str)
def test_the_solver_error_is_that_of_the_coarse_pass(way):
    model = mixture(VP())
    x, exact = at_t_min(model, 40)
    found = solver_error(model, x, samples=16, prior=terminal(model), **way)
    true = log_likelihood(model, x[:16], prior=terminal(model), **way).log_prob - exact[:16]
    assert found.samples == 16 and found.nfe > 0
    assert found.rms == pytest.approx(float(true.square().mean().sqrt()), rel=0.25)
    assert found.mean == pytest.approx(float(true.mean()), abs=0.25 * found.rms)
    assert found.largest >= found.rms >= abs(found.mean) and "16 samples" in str(found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="one_pass"), "steps must be a positive integer, found None"),
        (dict(steps=4), "needs steps >= 8, found 4"),
        (dict(steps=2.5), "steps must be a positive integer, found 2.5"),
        (dict(method="one_pass", steps=20, coordinates="time"), "has coordinates of its own"),
        (dict(batch_size=0), "batch_size must be a positive integer, found 0"),
        (dict(method="dopri5", max_steps=0), "max_steps must be a positive integer, found 0"),
    ],
)
def test_what_can_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(mixture(VP()), torch.zeros(1, 2).double(), **arguments)


def test_data_that_are_no_numbers_raise():
    with pytest.raises(ODEError, match=r"one_pass with 100 steps met values .* step 1 of 99, at t="):
        log_likelihood(mixture(VP()), torch.full((2, 2), math.nan, dtype=torch.float64))


class Broken(ScoreModel):
    """Finite itself, and with a derivative that is not."""

    def forward(self, x, t):
        eps = torch.sqrt(x.square()) * self.sde.sigma(t)
        return Prediction((x - self.sde.sigma(t) * eps) / self.sde.alpha(t), eps)


def test_a_divergence_that_is_no_number_raises():
    with pytest.raises(ODEError, match="one_pass with 20 steps met values that are not finite; check"):
        log_likelihood(Broken(VP()), torch.zeros(2, 2).double(), steps=20)


def test_a_process_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="needs a ScoreModel"):
        log_likelihood(ScoreFunction(VP(), lambda x, t: -x), torch.zeros(1, 2), method="one_pass", steps=20)


def test_the_strict_gates_keep_rough_samples_from_spoiling_the_path(monkeypatch):
    """With every term in full, samples between modes go wrong by nats at 40 calls."""
    model = mixture(VE())
    x, exact = at_t_min(model, 256)
    worst = {}
    for strict in (0.0, 2.5):
        monkeypatch.setattr(solvers.one_pass, "_STRICT", strict)
        found = log_likelihood(model, x, steps=25, prior=terminal(model))
        worst[strict] = float((found.log_prob - exact).abs().max())
    assert worst[0.0] > 3 * worst[2.5]
