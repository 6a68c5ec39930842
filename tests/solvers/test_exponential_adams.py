"""Exponential Adams against recursions in Python floats, closed forms of its weights, and measured orders."""

import functools
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import CORE_SDES, SDES, SOME_SDES, gaussian, legendre, marginal, mixture, quick
from recursions import BASHFORTH, FIXED, FORMS, exponential_adams, numbered

from models import GaussianMixture
from sde import EDM, VE, VP, Prediction, RectifiedFlow, ScoreModel
from sde.base import last_time
from solvers import DDIM, GRIDS, ExponentialAdams, Langevin, PredictorCorrector, ProbabilityFlow
from solvers.adams import adams_table, gauss_legendre
from solvers.path import Path, rows

ZERO = RectifiedFlow(t_min=0.0)
VARIANCES = (1.0, 0.25, 1e-2, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The table of Adams-Bashforth.

UNEVEN = torch.tensor([2.1, 1.7, 1.55, 0.9, 0.7, 0.2, -0.05, -0.6, -0.7, -1.4, -1.9], dtype=torch.float64)
TABLES = list(itertools.product((UNEVEN, UNEVEN.flip(0)), (0, 1), (1, 2, 3, 6)))


def kernel(z):
    return torch.exp(0.7 * z) / (1 + z.square())


def divided(z, f):
    """Newton's divided difference of the values at all of ``z``, by its recursion."""
    if len(z) == 1:
        return f[0]
    return (divided(z[:-1], f[:-1]) - divided(z[1:], f[1:])) / (z[0] - z[-1])


def difference(z, f, n, j):
    """phi_j(n) = F[n..n-j] prod (z_n - z_(n-i))."""
    last = [n - i for i in range(j + 1)]
    product = math.prod(z[n] - z[m] for m in last[1:])
    return divided([z[m] for m in last], [f[m] for m in last]) * product


@pytest.mark.parametrize("z, first, order", TABLES, ids=lambda v: "grid" if isinstance(v, torch.Tensor) else str(v))
def test_a_polynomial_is_integrated_exactly(z, first, order):
    """Over the step from each node and the one to it, of a degree below the number of nodes, on an uneven grid."""
    table = adams_table(z, first, order, kernel)
    assert table.beta.shape == (len(z) - 1, order - 1)
    for r, back in ((table.ahead, 0), (table.back, 1)):
        assert r.shape == (len(z) - 1, order)
        for n in range(first + back, len(z) - 1):
            known = min(order, n + 1 - first)
            for degree in range(known):
                f = (z - 0.3) ** degree
                found = sum(float(r[n, j]) * difference(z.tolist(), f.tolist(), n, j) for j in range(known))
                ends = float(z[n - back]), float(z[n + 1 - back])
                exact = legendre(lambda q, d=degree: (q - 0.3) ** d * kernel(q), *ends)
                assert found == pytest.approx(exact, rel=1e-11, abs=1e-13), (n, degree)
            assert not r[n, known:].any(), n
        assert not r[: first + back].any()


@pytest.mark.parametrize("z, first, order", TABLES, ids=lambda v: "grid" if isinstance(v, torch.Tensor) else str(v))
def test_the_recurrence_gives_newtons_divided_differences(z, first, order):
    beta = adams_table(z, first, order, kernel).beta
    f, before = torch.sin(2 * z).tolist(), [0.0] * order
    for n in range(first, len(z) - 1):
        phi = [f[n]]
        for j in range(order - 1):
            phi.append(phi[j] - float(beta[n, j]) * before[j])
        for j in range(min(order, n + 1 - first)):
            assert phi[j] == pytest.approx(difference(z.tolist(), f, n, j), rel=1e-9, abs=1e-12), (n, j)
        before = phi
    assert not beta[: first + 1].any()


@pytest.mark.parametrize("order", [1, 2, 3, 8, 16, 31])
def test_gauss_legendre(order):
    for found, expected in zip(gauss_legendre(order), np.polynomial.legendre.leggauss(order), strict=True):
        assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# The recursion in floats, on N(0, v), where each prediction is a multiple of y = x / alpha.


def recursion(form, nodes, v, gates, sampler):
    """y at all nodes, from 1, under alpha = 1."""
    at = [SimpleNamespace(alpha=1.0, sigma=s) for s in nodes]
    step = exponential_adams(form, sampler.order, sampler.knee, gates, sampler.corrected)
    ys, past = [1.0], []
    for t, s in itertools.pairwise(numbered(at)):
        ys.append(step(v, t, s, ys[-1], None, past))
    return ys


def interpolates(nodes, n):
    """Whether step n is one of Adams: not the last, if it is long."""
    return n < len(nodes) - 2 or nodes[n] < 2 * nodes[n + 1]


@functools.cache
def levels(sampler, sde):
    """alpha, and sigma / alpha as a tuple of floats, at the sampler's times."""
    times = sampler.times(sde)
    alpha, sigma = sde.alpha(times).detach(), sde.sigma(times).detach()
    return alpha, tuple((sigma / alpha).tolist())


def check_recursion(sampler, sde, form, gates=None, rtol=1e-12):
    alpha, nodes = levels(sampler, sde)
    for v in VARIANCES:
        x = sampler(gaussian(sde, v), x_T=alpha[:1, None], trajectory=1).trajectory[:, 0, 0]
        expected = torch.tensor(recursion(form, nodes, v, gates, sampler), dtype=torch.float64)
        # Relative to the states that a step looks back to, of which it cancels all but a part, and to the start.
        size = torch.stack([expected[max(0, n - sampler.order) : n + 1].abs().max() for n in range(len(expected))])
        assert bool(((x / alpha - expected).abs() <= rtol * (size + 0.1 * expected[0])).all()), v


@pytest.mark.parametrize("sde", quick([*SDES, ZERO]), ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_fixed_order_is_exponential_adams_bashforth(sde, form, grid):
    """In the predictions of x_0, of eps and of v; data wide and narrow; from one node at the start to six."""
    check_recursion(ExponentialAdams(12, grid, order=6, data_std=FORMS[form], **BASHFORTH), sde, form)


@pytest.mark.parametrize("sde", quick([*SDES, ZERO]), ids=str)
@pytest.mark.parametrize("form", ["data", "v"])
@pytest.mark.parametrize("grid", GRIDS)
def test_corrected_it_is_exponential_adams_bashforth_moulton(sde, form, grid):
    check_recursion(ExponentialAdams(12, grid, order=6, data_std=FORMS[form], **FIXED), sde, form)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_lower_order_uses_fewer_nodes(order):
    for form, sde in itertools.product(FORMS, (VP(), VE())):
        check_recursion(ExponentialAdams(12, order=order, data_std=FORMS[form], **BASHFORTH), sde, form)
        if form != "noise":
            check_recursion(ExponentialAdams(12, order=order, data_std=FORMS[form], **FIXED), sde, form)


def test_corrections_begin_at_five_steps():
    model, x_T = mixture(VP()), VP().prior((4, 2)).sample(0, dtype=torch.float64)
    for steps in (2, 3, 4, 5):
        found, plain = (ExponentialAdams(steps, corrected=c)(model, x_T=x_T).x for c in (True, False))
        assert torch.equal(found, plain) == (steps < 5), steps


def gate(steps):
    """d_1, d_2, ... of the module's docstring."""
    a = 1.25 * min(1.0, 50 / steps)

    def weights(energy):
        d = [1.0] * len(energy[:1])
        for before, now in itertools.pairwise(energy):
            d.append(d[-1] / (1 + (a**2 * (now / before if before else 0.0)) ** 2))
        return d

    return weights


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
@pytest.mark.parametrize("grid, steps", [("balanced", 12), ("log_snr", 12), ("balanced", 80)])
def test_the_gates_are_those_of_the_recursion(sde, grid, steps):
    """In one dimension they depend on ratios alone, and the recursion is homogeneous still; with the knee too."""
    for order, corrected in itertools.product((2, 3, 6) if steps == 12 else (6,), (True, False)):
        check_recursion(ExponentialAdams(steps, grid, order=order, corrected=corrected), sde, "v", gate(steps))


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_single_term_is_ddim(sde, grid):
    """In x_0 and in eps alike, but for a last step that ends in its own way."""
    model, x_T = mixture(sde), sde.prior((6, 2)).sample(1, dtype=torch.float64)
    ddim = DDIM(30, grid)(model, x_T=x_T, trajectory=1).trajectory
    for data_std in (0.0, math.inf):
        sampler = ExponentialAdams(30, grid, order=1, data_std=data_std, **BASHFORTH)
        found = sampler(model, x_T=x_T, trajectory=1).trajectory
        assert torch.allclose(found[:-1], ddim[:-1], rtol=1e-12, atol=1e-12), data_std
        same = interpolates(levels(sampler, sde)[1], 29)
        assert torch.allclose(found[-1], ddim[-1], rtol=1e-12, atol=1e-12) == same, data_std


# ---------------------------------------------------------------------------------------------------------------------
# The linear part, and the end.


@pytest.mark.parametrize("sde", quick([*SDES, ZERO]), ids=str)
@pytest.mark.parametrize("adaptive", [True, False])
def test_gaussian_data_of_the_stated_width_are_exact(sde, adaptive):
    """At every node of any grid, for any number of steps; a last step that is a long one alone is not."""
    for std, grid, steps in itertools.product((0.1, 0.5, 1.0, 3.0), GRIDS, (2, 5, 30)):
        sampler = ExponentialAdams(steps, grid, adaptive=adaptive, data_std=std)
        alpha, nodes = levels(sampler, sde)
        x = sampler(gaussian(sde, std**2), x_T=alpha[:1, None], trajectory=1).trajectory[:, 0, 0]
        exact = alpha * torch.tensor([math.hypot(std, s) / math.hypot(std, nodes[0]) for s in nodes], dtype=alpha.dtype)
        end = steps + 1 if interpolates(nodes, steps - 1) else steps
        assert torch.allclose(x[:end], exact[:end], rtol=1e-12, atol=0), (std, grid, steps)


def last_row(nodes):
    """The plan's weights of y, eps and the eps before in a last step through these three levels, where alpha is 1."""
    sde = EDM(t_min=nodes[-1], t_max=nodes[0])
    plan = ExponentialAdams(2).plan(Path(sde, torch.tensor(nodes, dtype=torch.float64)))
    return [float(part[-1]) for part in (plan.linear * plan.start, plan.eps, plan.before)]


@pytest.mark.parametrize("nodes", [(0.3, 0.2, 0.002), (0.05, 0.03, 0.01), (0.04, 0.01, 1e-9)], ids=str)
def test_the_end_is_exact_where_the_score_is_linear_in_the_square_of_the_level(nodes):
    """dy / dtau = g / 2 with g = a + b tau."""
    (weight, now, before), (wide, s, end) = last_row(nodes), nodes
    for a, b, y in ((1.0, 0.0, 0.3), (0.0, 1.0, -0.2), (-0.7, 2.0, 1.1)):
        eps, eps_before = (level * (a + b * level**2) for level in (s, wide))
        exact = y - 0.5 * (a * (s**2 - end**2) + b * (s**4 - end**4) / 2)
        assert weight * y + now * eps + before * eps_before == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("v", [0.25, 1.0, 4.0])
def test_the_error_of_the_end_on_gaussian_data_is_of_sixth_order(v):
    """(3 / 16) v^-3 (d^3 / 3 + d^2 (tau_1 - tau) / 2) of y, where d = tau - end^2 and tau_1 is that of the node before.

    It is the integral of the second derivative of g = y / (v + tau), whose y is in proportion to sqrt(v + tau), against
    the product of the distances to the two nodes, over 4.
    """
    errors = []
    for s in (0.04 * math.sqrt(v), 0.02 * math.sqrt(v)):
        nodes = (1.5 * s, s, 0.1 * s)
        weight, now, before = last_row(nodes)
        y = [math.sqrt(v + level**2) for level in nodes]
        found = weight * y[1] + now * y[1] * s / (v + s**2) + before * nodes[0] / y[0]
        d = s**2 - nodes[2] ** 2
        expected = 3 / 16 / v**3 * (d**3 / 3 + d**2 * (nodes[0] ** 2 - s**2) / 2)
        errors.append(abs(found / y[2] - 1))
        assert errors[-1] == pytest.approx(expected, rel=0.02)
    assert errors[0] / errors[1] == pytest.approx(64, rel=0.03)


@pytest.mark.parametrize("ratio", [1.3, 1.8])
def test_a_point_keeps_a_part_of_the_noise_of_the_last_node(ratio):
    """There g is in proportion to 1 / s: of s eps a part 1/2 - 1 / (4 ratio (ratio + 1)) is left, where DDIM leaves 0.

    With eps the same at both nodes; ``ratio`` is that of the levels of the last two.
    """
    s = 0.03
    weight, now, before = last_row((ratio * s, s, 1e-12))
    assert weight == pytest.approx(1, rel=1e-15)
    assert 1 + (now + before) / s == pytest.approx(0.5 - 1 / (4 * ratio * (ratio + 1)), rel=1e-9)


@pytest.mark.parametrize("nodes, ends", [((0.4, 0.3, 0.002), False), ((0.4, 0.2499, 0.002), True)], ids=str)
def test_the_end_is_ddim_where_the_last_node_is_far(nodes, ends):
    weight, now, before = last_row(nodes)
    assert weight == pytest.approx(1, rel=1e-15) and ((now, before) == (nodes[-1] - nodes[1], 0.0)) == (not ends)


# ---------------------------------------------------------------------------------------------------------------------
# Orders.

WIDE = VE(sigma_min=1e-3, sigma_max=1e5)
"""So noisy at first that the first steps, which have fewer terms, err by nothing that shows."""


def through(model, x):
    """The exact flow of a Gaussian."""
    (m0, v0), (m1, v1) = marginal(model, model.sde.t_min), marginal(model, last_time(model.sde))
    return m0 + (v0 / v1).sqrt() * (x - m1)


def slope(sampler, model, x_T, exact, steps):
    """Order of convergence between two numbers of steps."""
    first, last = ((sampler.with_steps(n)(model, x_T=x_T).x - exact).square().mean().sqrt() for n in steps)
    return float((first / last).log()) / math.log(steps[1] / steps[0])


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("grid", ["log_snr", "balanced"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_order_of_convergence_on_a_gaussian(grid, order, adaptive):
    """At least the number of terms; an odd one gains where steps are equal: its leading error integrates to 0.

    Without corrections: with them the one error there is changes its sign on the way.
    """
    model, x_T = gaussian(WIDE, 0.25), torch.full((1, 1), 1e5, dtype=torch.float64)
    sampler = ExponentialAdams(2, grid, order=order, adaptive=adaptive, corrected=False)
    found = slope(sampler, model, x_T, through(model, x_T), (180, 320))
    assert order - 0.4 < found, found


@pytest.fixture(scope="module")
def mixed():
    """A mixture whose halves overlap, starts, and where the flow takes them."""
    weights, means, variances = torch.tensor([[0.4, 0.6], [-0.5, 0.5], [0.3, 0.2]], dtype=torch.float64)
    model = GaussianMixture(weights, means[:, None], variances[:, None, None], WIDE)
    x_T = 1e5 * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    return model, x_T, ProbabilityFlow(1e-12, 1e-12, "dopri8")(model, x_T=x_T).x


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("grid, steps", [("log_snr", (135, 300)), ("balanced", (60, 200))], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_order_of_convergence_on_a_mixture(mixed, grid, steps, order, corrected, adaptive):
    sampler = ExponentialAdams(2, grid, order=order, adaptive=adaptive, corrected=corrected)
    found = slope(sampler, *mixed, steps)
    assert order - 0.5 < found < order + 1.2, found


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("corrected, order, error", [(True, 3, 3e-8), (False, 2, 2e-6)], ids=str)
def test_the_first_steps_are_of_a_low_order(corrected, order, error, adaptive):
    """What is left at last, from a start of sigma / alpha = 150, at 300 steps."""
    sde = VP(t_min=1e-3)
    model, x_T = gaussian(sde, 0.25, 0.4), torch.full((1, 1), 1.3, dtype=torch.float64)
    sampler = ExponentialAdams(300, "log_snr", adaptive=adaptive, corrected=corrected)
    assert (sampler(model, x_T=x_T).x - through(model, x_T)).abs().max() < error
    assert slope(sampler, model, x_T, through(model, x_T), (300, 600)) == pytest.approx(order, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The gates.


class Rough(ScoreModel):
    """Errors of ``size`` in eps that change sign over a distance of pi / ``rate`` in the scale of unit variance."""

    def __init__(self, exact, size=0.05, rate=40.0):
        super().__init__(exact.sde)
        self.exact, self.size, self.rate = exact, size, rate

    def forward(self, x, t):
        x0, eps = self.exact(x, t)
        alpha, sigma = self.sde.alpha(t).to(x), self.sde.sigma(t).to(x)
        error = self.size * torch.sin(self.rate * x / torch.hypot(alpha, sigma))
        return Prediction(x0 - sigma / alpha * error, eps + error)


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
def test_a_rough_score_gets_a_low_order_and_a_smooth_one_a_high_order(sde):
    x_T = sde.prior((64, 2)).sample(3, dtype=torch.float64)
    rough, smooth = (
        (model, steps, ExponentialAdams(2000, "log_snr", order=3, adaptive=False)(model, x_T=x_T).x)
        for model, steps in ((Rough(mixture(sde)), 50), (mixture(sde), 100))
    )

    def errors(corrected, model, steps, exact):
        gated = ExponentialAdams(steps, corrected=corrected)
        samplers = (gated, *(replace(gated, order=order, adaptive=False) for order in (3, 6)))
        return [float((sampler(model, x_T=x_T).x - exact).square().mean().sqrt()) for sampler in samplers]

    for corrected, near in ((True, 1.4), (False, 1.2)):
        adaptive, low, high = errors(corrected, *rough)
        assert adaptive < 0.6 * high and adaptive < 1.2 * low, (corrected, adaptive, low, high)
        adaptive, low, high = errors(corrected, *smooth)
        assert adaptive < 0.6 * low and adaptive < near * high, (corrected, adaptive, low, high)


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_no_sample_is_gated_by_its_companions(sde):
    """However far out they are: alone it is the same to rounding."""
    model, x_T = Rough(mixture(sde)), sde.prior((6, 2)).sample(0, dtype=torch.float64)
    far = torch.cat((x_T[:1], 1e4 * x_T[1:]))
    alone, among, beside = (ExponentialAdams(15)(model, x_T=x).x[0] for x in (x_T[:1], x_T, far))
    assert torch.allclose(among, alone, rtol=1e-12, atol=1e-12) and torch.allclose(
        beside, alone, rtol=1e-12, atol=1e-12
    )


def test_the_gates_do_not_depend_on_scale_or_number_of_values():
    """Values repeated leave every ratio of energies as it is."""
    one = gaussian(VP(), 0.25)
    x_T = torch.tensor([[0.8]], dtype=torch.float64)
    many = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 5).double(), 0.25 * torch.eye(5).double()[None], VP())
    found = ExponentialAdams(12)(many, x_T=x_T.expand(1, 5)).x
    assert torch.allclose(found, ExponentialAdams(12)(one, x_T=x_T).x.expand(1, 5), rtol=1e-12, atol=0)


def test_a_batch_of_nothing_but_zeros_is_left_alone():
    """No term has any energy: 0 / 0 is no gate."""
    x = ExponentialAdams(9)(gaussian(VP(), 0.25), x_T=torch.zeros(3, 1)).x
    assert torch.equal(x, torch.zeros(3, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Any process, number of steps, type and shape.


@pytest.mark.parametrize("sde", quick([*SDES, ZERO, VE(sigma_min=0.01, sigma_max=5.0)]), ids=str)
def test_any_number_of_steps_is_finite_and_near_the_data(sde):
    model = mixture(sde, torch.float32)
    x_T = sde.prior((8, 2)).sample(0)
    for steps in (1, 2, 3, 4, 5, 7, 10, 50, 250):
        for options in ({}, {"adaptive": False}, {"data_std": 0.0}, {**BASHFORTH, "data_std": math.inf}):
            out = ExponentialAdams(steps, **options)(model, x_T=x_T)
            assert out.nfe == steps and bool((out.x.abs() < 5).all()), (steps, options)


class Levels32(ScoreModel):
    """The exact pair of N(0, 1/4) in float64, at alpha and sigma as float32 has them."""

    def forward(self, x, t):
        alpha, sigma = (level(t.float()).to(x) for level in (self.sde.alpha, self.sde.sigma))
        total = alpha**2 / 4 + sigma**2
        return Prediction(alpha / 4 * x / total, sigma * x / total)


@pytest.mark.parametrize("sde", quick([*SDES, ZERO]), ids=str)
def test_float32_at_250_steps(sde):
    """Against float64 for a model whose levels are as they are in float32: under VE that alone moves x by 4e-5."""
    x_T = sde.prior((32, 1)).sample(2)
    single = ExponentialAdams(250)(gaussian(sde, 0.25, dtype=torch.float32), x_T=x_T).x
    double = ExponentialAdams(250)(Levels32(sde), x_T=x_T.double()).x
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-5


def test_the_shape_of_a_sample_is_of_no_account():
    """Values in any arrangement are one vector to the gates."""

    class Images(ScoreModel):
        def __init__(self, inner):
            super().__init__(inner.sde)
            self.inner = inner

        def forward(self, x, t):
            return Prediction(*(part.view_as(x) for part in self.inner(x.flatten(1), t)))

    flat = GaussianMixture(
        torch.tensor([0.4, 0.6]).double(),
        torch.linspace(-1, 1, 24).double().reshape(2, 12),
        torch.stack([0.2 * torch.eye(12), 0.05 * torch.eye(12)]).double(),
        VP(),
    )
    x_T = VP().prior((3, 12)).sample(0, dtype=torch.float64)
    expected = ExponentialAdams(12)(flat, x_T=x_T, trajectory=1)
    for shape in ((3, 3, 4), (3, 1, 2, 6), (3, 2, 3, 2, 1)):
        found = ExponentialAdams(12)(Images(flat), x_T=x_T.view(shape), trajectory=1)
        assert found.trajectory.shape == (13, *shape), shape
        assert torch.allclose(found.trajectory.flatten(2), expected.trajectory, rtol=1e-12, atol=1e-12), shape


@pytest.mark.parametrize("sde", quick([*SDES, ZERO]), ids=str)
def test_decoding_inverts_encoding(sde):
    """To the error of both."""
    model = mixture(sde)
    x, errors = model.sample(16, seed=1), {}
    for steps in (1, 2, 20, 80, 320):
        sampler = ExponentialAdams(steps)
        latent = sampler.encode(model, x)
        assert bool(latent.isfinite().all()), steps
        errors[steps] = float((sampler(model, x_T=latent).x - x).square().mean().sqrt())
    assert errors[20] < 0.2 and errors[80] < 1e-4 and errors[320] < 3e-6, errors


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_error_of_the_first_step_of_encoding(sde):
    """On a Gaussian of variance v: (s - s_min)^2 / (2 v) too much, where s is the level it ends at; then corrected."""
    v, model = 0.01, gaussian(sde, 0.01)
    (m0, v0), (_, v1) = marginal(model, sde.t_min), marginal(model, last_time(sde))
    assert float(m0) == 0

    def error(sampler):
        return float(sampler.encode(model, torch.ones(1, 1, dtype=torch.float64)) / (v1 / v0).sqrt()) - 1

    *_, s, end = levels(ExponentialAdams(100), sde)[1]
    assert error(ExponentialAdams(100, corrected=False)) == pytest.approx(-((s - end) ** 2) / (2 * v), rel=0.05)
    assert abs(error(ExponentialAdams(100))) < 1e-4


def test_the_first_step_of_encoding_is_ddim_and_then_half_a_step_from_its_end():
    """From data without any noise, where F may be infinite; that node is left out of the interpolation."""
    v, s, ones = 0.3, 0.2, torch.ones(1, 1, dtype=torch.float64)
    nodes = torch.tensor([0.0, s, 0.3, 0.4], dtype=torch.float64)
    for data_std in (0.0, 1.0):
        sampler = ExponentialAdams(5, data_std=data_std, knee=math.inf)
        path = Path(ZERO, nodes / (1 + nodes))
        plan = sampler.plan(path)
        assert all(bool(part.isfinite().all()) for part in (*plan.kept, *plan[:5], plan.ahead, plan.back, plan.beta))
        assert not plan.ahead[0].any() and plan.ahead[1, 0] != 0 and not plan.ahead[1, 1:].any()
        assert not plan.back[:2].any() and plan.back[2, :2].all() and not plan.back[2, 2:].any()
        x, carry, seen = ones, None, []
        for own, level in zip(rows(plan, ones), nodes[:-1], strict=True):
            y = x * (1 + level)
            pair = Prediction(y * v / (v + level**2), y * level / (v + level**2))
            seen.append((y, carry))
            x, carry = sampler.step(x, SimpleNamespace(own=own, predict=lambda _, pair=pair: pair), carry)
        assert float(seen[1][0]) == pytest.approx(1, rel=1e-15)
        assert float(seen[2][1].u) * math.hypot(data_std, s) == pytest.approx(1 + s**2 / (2 * (v + s**2)), rel=1e-12)


def test_a_corrector_may_follow_each_step():
    predictor = ExponentialAdams(30, "log_snr", corrected=False)
    out = PredictorCorrector(predictor, Langevin(snr=0.1))(mixture(VP()), shape=(16, 2))
    assert out.nfe == 60 and bool((out.x.abs() < 5).all())
    with pytest.raises(ValueError, match="a step of ExponentialAdams starts from earlier states"):
        PredictorCorrector(ExponentialAdams(), Langevin())


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"order": order}, f"order must be a positive integer, found {order}") for order in (0, -1, 2.5, True)),
        *(({"data_std": c}, f"data_std must be a number of at least 0, found {c}") for c in (-1.0, math.nan)),
        *(({"knee": knee}, f"knee must be a positive number, found {knee}") for knee in (0, 0.0, math.nan, -1.0)),
        *(
            ({"data_std": math.inf, **k}, "data_std=inf .* give knee=inf and corrected=False, found knee")
            for k in ({}, {"knee": math.inf}, {"corrected": False})
        ),
        *(({"adaptive": a}, f"adaptive must be True or False, found {a}") for a in (1, 0, None, 0.5)),
        *(({"corrected": a}, f"corrected must be True or False, found {a}") for a in (1, 0, None)),
        ({"grid": "even"}, "grid must be one of uniform, log_snr, karras, angle, balanced, found 'even'"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"ExponentialAdams: {message}"):
        ExponentialAdams(**options)


def test_the_number_of_steps_sets_how_strict_the_gates_are():
    """1.25 up to 50 steps, and in inverse proportion beyond."""
    energy = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    for steps in (1, 50, 51, 200):
        found = replace(ExponentialAdams(), steps=steps)._gates(energy).flatten()
        assert found[0] == 1 and torch.allclose(
            found[1:], torch.tensor(gate(steps)([4.0, 2.0, 1.0])).double(), rtol=1e-6
        ), steps
