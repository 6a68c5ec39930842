"""Distances of sets against closed forms of Gaussians, brute force, and other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg, optimize, stats

from experiments import distances
from experiments.distances import MMD, Energy, Frechet, KernelDistance, SlicedW2
from experiments.metrics import directions, sliced_w2

CHOLESKY = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
SHIFT = torch.tensor([0.5, -0.3], dtype=torch.float64)


def normal(n, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(metric, x, y):
    (found,) = metric(x, y).values()
    return found


def mean_over_draws(metric, sample_x, sample_y, draws=150):
    """The mean of a metric over independent pairs of sets, and its standard error."""
    values = torch.tensor([value(metric, sample_x(2 * i), sample_y(2 * i + 1)) for i in range(draws)]).double()
    return values.mean().item(), values.std().item() / math.sqrt(draws)


def folded_mean(delta, s):
    """E|Z| for Z ~ N(delta, s^2)."""
    return s * math.sqrt(2 / math.pi) * math.exp(-((delta / s) ** 2) / 2) + delta * math.erf(delta / s / math.sqrt(2))


def test_sliced_w2_is_the_function_of_that_name():
    for n, m in ((40, 40), (40, 31)):
        x, y = normal(n, 5), 1.5 * normal(m, 5, seed=1)
        assert value(SlicedW2(), x, y) == pytest.approx(sliced_w2(x, y), rel=1e-12)
        found = value(SlicedW2(projections=9, seed=4), x, y)
        assert found == pytest.approx(sliced_w2(x, y, projections=9, seed=4), rel=1e-12)


def test_w2_in_one_dimension_is_the_cheapest_assignment():
    x, y = normal(30, 1), 2 * normal(30, 1, seed=1).exp()
    cost = (x - y.T).square().numpy()
    best = math.sqrt(cost[optimize.linear_sum_assignment(cost)].mean())
    assert value(SlicedW2(), x, y) == pytest.approx(best, rel=1e-12)
    assert value(SlicedW2(), x, x + 3) == pytest.approx(stats.wasserstein_distance([0.0], [3.0]), rel=1e-12)


def test_sliced_w2_is_that_of_pot():
    ot = pytest.importorskip("ot")
    x, y = normal(40, 5), 1.5 * normal(31, 5, seed=1)
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions(5, 256, 0).numpy())
    assert value(SlicedW2(), x, y) == pytest.approx(theirs, rel=1e-9)


def test_the_energy_distance_is_that_of_scipy_without_the_pairs_of_an_example_with_itself():
    x, y = normal(30, 1), 1.7 * normal(23, 1, seed=1) + 0.4
    across, own, real = ((a - b.T).abs().mean().item() for a, b in ((x, y), (x, x), (y, y)))
    assert stats.energy_distance(x[:, 0], y[:, 0]) ** 2 == pytest.approx(2 * across - own - real, rel=1e-10)
    assert value(Energy(), x, y) == pytest.approx(2 * across - own * 30 / 29 - real * 23 / 22, rel=1e-10)


def test_the_energy_distance_of_gaussians_on_the_line():
    delta, s = 0.7, 1.5
    truth = 2 * folded_mean(delta, math.hypot(1, s)) - folded_mean(0, math.sqrt(2)) - folded_mean(0, s * math.sqrt(2))
    mean, stderr = mean_over_draws(Energy(), lambda i: normal(60, 1, i), lambda i: delta + s * normal(50, 1, i))
    assert stderr < 0.1 * truth and abs(mean - truth) < 4 * stderr


def test_the_energy_distance_of_gaussians_in_many_dimensions():
    d, s = 6, 1.6
    chi = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    truth = chi * (2 * math.hypot(1, s) - math.sqrt(2) - s * math.sqrt(2))
    mean, stderr = mean_over_draws(Energy(), lambda i: normal(60, d, i), lambda i: s * normal(50, d, i))
    assert stderr < 0.1 * truth and abs(mean - truth) < 4 * stderr


def test_the_mmd_of_correlated_gaussians():
    """E exp(-|Z|^2/(2 h^2)) for Z ~ N(m, S) is |I + S/h^2|^(-1/2) exp(-m.(S + h^2 I)^-1 m / 2)."""

    def mean_kernel(shift, covariance, h):
        wide = covariance + h**2 * torch.eye(2, dtype=torch.float64)
        return (wide.det() / h**4) ** -0.5 * torch.exp(-shift @ torch.linalg.solve(wide, shift) / 2)

    factors, eye, cov = (0.5, 1.0, 2.0), torch.eye(2, dtype=torch.float64), CHOLESKY @ CHOLESKY.T
    terms = [
        mean_kernel(0 * SHIFT, 2 * eye, 0.8 * f) - 2 * mean_kernel(SHIFT, eye + cov, 0.8 * f)
        + mean_kernel(0 * SHIFT, 2 * cov, 0.8 * f)
        for f in factors
    ]  # fmt: skip
    truth = sum(terms).item() / 3
    found = MMD(bandwidth=0.8, factors=factors)
    mean, stderr = mean_over_draws(found, lambda i: normal(60, 2, i), lambda i: normal(50, 2, i) @ CHOLESKY.T + SHIFT)
    assert stderr < 0.1 * truth and abs(mean - truth) < 4 * stderr


def test_the_bandwidth_is_of_the_reference_alone():
    x, y = normal(30, 3), normal(40, 3, seed=1)
    h = torch.nn.functional.pdist(y).median().item()
    assert value(MMD(), x, y) == value(MMD(bandwidth=h), x, y) != value(MMD(), y, x)
    assert value(MMD(), 9 * x, y) == value(MMD(bandwidth=h), 9 * x, y)
    assert value(MMD(), 9 * x, 9 * y) == pytest.approx(value(MMD(), x, y), abs=1e-12)


def test_a_reference_of_which_most_are_equal_has_a_bandwidth_too():
    y = torch.cat([torch.zeros(30, 2), normal(10)])
    assert value(MMD(), y, y) == pytest.approx(value(MMD(torch.nn.functional.pdist(y).mean().item()), y, y), abs=1e-12)
    with pytest.raises(ValueError, match="expected examples that differ, found 8 equal ones; give a bandwidth"):
        MMD()(normal(8), torch.ones(8, 2))


def test_the_kernel_distance_compares_three_moments():
    """(x y + 1)^3 = sum_i C(3, i) x^i y^i: in one dimension sum_i C(3, i) (E x^i - E y^i)^2."""
    mu, s = 0.4, 1.3
    truth = 3 * mu**2 + 3 * (1 - mu**2 - s**2) ** 2 + (mu**3 + 3 * mu * s**2) ** 2
    mean, stderr = mean_over_draws(KernelDistance(), lambda i: normal(80, 1, i), lambda i: mu + s * normal(80, 1, i))
    assert stderr < 0.1 * truth and abs(mean - truth) < 4 * stderr
    x, y = normal(20, 3), normal(15, 3, seed=1)
    k = {name: (a @ b.T / 3 + 1) ** 3 for name, (a, b) in {"xx": (x, x), "xy": (x, y), "yy": (y, y)}.items()}
    own, real = ((k[name].sum() - k[name].trace()) / n / (n - 1) for name, n in (("xx", 20), ("yy", 15)))
    assert value(KernelDistance(), x, y) == pytest.approx((own + real - 2 * k["xy"].mean()).item(), rel=1e-10)


@pytest.mark.parametrize("metric", [Energy(), MMD(bandwidth=1.0), KernelDistance()], ids=lambda m: type(m).__name__)
def test_what_is_called_unbiased_is_zero_on_average_for_equal_distributions(metric):
    mean, stderr = mean_over_draws(metric, lambda i: normal(12, 2, i), lambda i: normal(9, 2, i), draws=400)
    assert abs(mean) < 4 * stderr
    with_itself = {Energy: 1 / 12 + 1 / 9, MMD: 1 / 12 + 1 / 9, KernelDistance: 1.0}[type(metric)]
    assert stderr < 0.1 * with_itself  # what pairs of an example with itself would add is seen


def test_the_frechet_distance_of_gaussians():
    x, y = 1.3 * normal(200, 5) @ normal(5, 5, seed=2), normal(150, 5, seed=1) @ normal(5, 5, seed=3) + 0.4
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = linalg.sqrtm(linalg.sqrtm(a) @ b @ linalg.sqrtm(a)).real
    truth = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
    assert value(Frechet(), x, y) == pytest.approx(truth, rel=1e-9)
    assert value(Frechet(), y, x) == pytest.approx(truth, rel=1e-9)
    line, mean, std = x[:, :1], x[:, 0].mean().item(), x[:, 0].std().item()
    assert value(Frechet(), 3 * line, line + 3) == pytest.approx((3 * mean - mean - 3) ** 2 + (2 * std) ** 2, rel=1e-9)


def test_the_frechet_distance_with_fewer_samples_than_dimensions():
    """Sets in planes at right angles share no direction; a set and itself, turned or not, are 0 apart."""
    x, y = torch.zeros(2, 8, 40, dtype=torch.float64)
    x[:, :10], y[:, 20:30] = normal(8, 10), 2 * normal(8, 10, seed=1)
    means = (x.mean(0) - y.mean(0)).square().sum()
    truth = means + x.var(0).sum() + y.var(0).sum()
    assert value(Frechet(), x, y) == pytest.approx(truth.item(), rel=1e-12)
    assert value(Frechet(), x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    turn = torch.linalg.qr(normal(40, 40)).Q
    assert value(Frechet(), x @ turn, y @ turn) == pytest.approx(truth.item(), rel=1e-12)


def test_the_frechet_distance_of_too_many_dimensions_is_refused_with_a_cure():
    with pytest.raises(ValueError, match="at most 3 dimensions, found 4; use features"):
        Frechet(limit=3)(normal(9, 4), normal(9, 4))


@pytest.mark.parametrize("metric", [Energy(), MMD(), Frechet(), SlicedW2()], ids=lambda m: type(m).__name__)
def test_a_common_shift_changes_nothing(metric):
    x, y = normal(30, 3), 1.4 * normal(25, 3, seed=1)
    assert value(metric, x + 1e5, y + 1e5) == pytest.approx(value(metric, x, y), rel=1e-8)


@pytest.mark.parametrize("metric", [Energy(), MMD(), KernelDistance()], ids=lambda m: type(m).__name__)
def test_pieces_of_any_size_come_to_the_same(metric, monkeypatch):
    x, y = normal(50, 3), 1.4 * normal(37, 3, seed=1)
    whole = value(metric, x, y)
    monkeypatch.setattr(distances, "_NUMBERS", 37 * 7 + 1)
    assert value(metric, x, y) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("settings", [{"bandwidth": 0.0}, {"bandwidth": math.inf}, {"factors": ()}, {"factors": (-1,)}])
def test_kernels_without_a_width_are_refused(settings):
    with pytest.raises(ValueError, match="expected a positive bandwidth"):
        MMD(**settings)
