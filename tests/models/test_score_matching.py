"""Denoising score matching by quadrature: what it equals, what it is equal under, and where its minimum is."""

import math

import numpy as np
import pytest
import torch
from oracles import FEW_SDES, PAPER_SDES, ROWS, SDES, ExactNet, gaussian, learned, legendre, mixture, paper

from models import MLP, FixedTimes, ScoreNetwork, UniformLogSNR, UniformTime, denoising_score_matching
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import VP, LearnedSchedule, Prediction, ScoreModel
from sde.base import last_time

TIMES = [UniformTime(), UniformLogSNR()]


class At(FixedTimes):
    """The times of ``inner`` at given points ``u`` of its distribution, in place of random ones."""

    spread = "stratified"

    def __init__(self, inner, u):
        self.inner, self.u = inner, u

    def quantile(self, u, sde):
        return self.inner.quantile(self.u, sde)

    def cumulative(self, t, sde):
        return self.inner.cumulative(t, sde)

    def density(self, t, sde):
        return self.inner.density(t, sde)


class Linear(ScoreModel):
    """eps_hat = w x."""

    def __init__(self, sde, w):
        super().__init__(sde)
        self.w, self.parametrization = w, PARAMETRIZATIONS["noise"]()

    def forward(self, x, t):
        alpha, sigma = (c.reshape(-1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        return Prediction((x - sigma * self.w * x) / alpha, self.w * x)


def hermite(n=20):
    """Nodes and weights for the mean over a standard normal variable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def plane(n=20):
    """Two independent normal variables: nodes ``(n^2, 1)`` each, and weights ``(n^2,)``."""
    z, w = hermite(n)
    first, second = torch.meshgrid(z, z, indexing="ij")
    return first.reshape(-1, 1), second.reshape(-1, 1), torch.outer(w, w).flatten()


def loss(monkeypatch, model, x0, eps, times, weighting):
    """Losses at given noise."""
    monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
    return denoising_score_matching(model, x0, weighting, times)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("weighting", ["simple", "likelihood"])
def test_denoising_and_explicit_matching_differ_by_a_constant(monkeypatch, sde, weighting):
    """E|w x - eps|^2 - E|w x - E[eps | x]|^2 = E Var(eps | x), whatever w."""
    z, eps, weights = plane()
    u, variance = torch.full((len(z),), 0.4, dtype=torch.float64), 0.25
    t = UniformTime().quantile(u, sde)
    alpha, sigma = sde.alpha(t[0]), sde.sigma(t[0])
    total = alpha**2 * variance + sigma**2
    scale = 1.0 if weighting == "simple" else 0.5 * (sde.diffusion(t[0]) / sigma) ** 2 * (last_time(sde) - sde.t_min)
    for w in (-1.0, 0.0, 0.3, float(sigma / total), 2.0):
        found = loss(monkeypatch, Linear(sde, w), math.sqrt(variance) * z, eps, At(UniformTime(), u), weighting)
        explicit = (w - sigma / total) ** 2 * total
        expected = scale * (explicit + 1 - sigma**2 / total)
        assert float((weights * found).sum()) == pytest.approx(float(expected), rel=1e-11), (sde, w)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("weighting", ["simple", "likelihood"])
def test_the_minimum_is_the_score(monkeypatch, sde, weighting):
    """The loss of a linear model is smallest at eps_hat = sigma x / V, that is at the score -x / V."""
    z, eps, weights = plane()
    u, variance = torch.full((len(z),), 0.3, dtype=torch.float64), 0.25
    t = UniformTime().quantile(u, sde)[0]
    best = sde.sigma(t) / (sde.alpha(t) ** 2 * variance + sde.sigma(t) ** 2)
    w = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slopes = []
    for value in w:
        value.requires_grad_()
        found = loss(monkeypatch, Linear(sde, value), math.sqrt(variance) * z, eps, At(UniformTime(), u), weighting)
        slopes.append(torch.autograd.grad((weights * found).sum(), value)[0])
    # The loss is a parabola: its minimum lies where the line through two slopes is zero.
    assert float(-slopes[0] / (slopes[1] - slopes[0])) == pytest.approx(float(best), rel=1e-10), sde


@pytest.mark.parametrize("sde", PAPER_SDES, ids=str)
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_the_likelihood_weighted_loss_is_the_integral_over_time(monkeypatch, sde, times):
    """At fixed data and noise, whatever the distribution of the times: integral of g^2 / (2 sigma^2) |error|^2 dt."""
    sde = type(sde)(t_min=1e-2, t_max=sde.t_max)
    model, x0, eps = gaussian(sde, 0.25, 0.3), 0.7, -1.2

    def integrand(t):
        values = []
        for one in t.tolist():
            alpha, sigma, _, g_squared = paper(sde, one)
            x = alpha * x0 + sigma * eps
            eps_hat = sigma * (x - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2)
            values.append(g_squared / (2 * sigma**2) * (eps_hat - eps) ** 2)
        return torch.tensor(values, dtype=torch.float64)

    def by_times(u):
        one = torch.ones(len(u), 1, dtype=torch.float64)
        return loss(monkeypatch, model, x0 * one, eps * one, At(times, u), "likelihood")

    expected = legendre(integrand, sde.t_min, sde.t_max, panels=32)
    assert legendre(by_times, 0.0, 1.0, panels=32) == pytest.approx(expected, rel=1e-8), (sde, times)


@pytest.mark.parametrize("sde", FEW_SDES, ids=str)
def test_the_likelihood_weighted_loss_is_the_rate_of_the_divergence(monkeypatch, sde):
    """For Gaussians p and q: loss(q) - loss(p) = KL(p||q) at t_min less KL(p||q) at t_max."""
    z, eps, weights = plane(8)
    vp, vq = 0.25, 0.6

    def divergence(t):
        alpha, sigma, _, _ = paper(sde, t)
        p, q = (alpha**2 * v + sigma**2 for v in (vp, vq))
        return 0.5 * (p / q - 1 - math.log(p / q))

    def difference(u):
        total = []
        for one in u:
            at = At(UniformLogSNR(), one.expand(len(z)))
            x0 = math.sqrt(vp) * z
            q, p = (loss(monkeypatch, gaussian(sde, v), x0, eps, at, "likelihood") for v in (vq, vp))
            total.append((weights * (q - p)).sum())
        return torch.stack(total)

    expected = divergence(sde.t_min) - divergence(sde.t_max)
    assert legendre(difference, 0.0, 1.0, panels=8, order=8) == pytest.approx(expected, rel=1e-6), sde


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_losses_of_all_parametrizations_agree(monkeypatch, sde):
    """The error of a x_0 + b eps is (b - a sigma / alpha) times that of eps; the likelihood weighting is one."""
    exact = mixture(sde)
    x0 = exact.sample(6, seed=1)
    eps = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    times = At(UniformTime(), u)
    t = times.quantile(u, sde)
    models = {n: ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[n]().row), sde, n) for n in ROWS}
    simple, likelihood = (
        {n: loss(monkeypatch, m, x0, eps, times, w) for n, m in models.items()} for w in ("simple", "likelihood")
    )
    for name in ROWS:
        a, b = PARAMETRIZATIONS[name]().row(t, sde)
        factor = (b - a * sde.sigma(t) / sde.alpha(t)).square()
        assert torch.allclose(simple[name], factor * simple["noise"], rtol=1e-6), (sde, name)
        assert torch.allclose(likelihood[name], likelihood["noise"], rtol=1e-6), (sde, name)


@pytest.mark.parametrize("sde", PAPER_SDES, ids=str)
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_densities_of_the_times_integrate_to_one(sde, times):
    """In log t, where the density of the second is smooth. The log-SNR one is g^2 / sigma^2 over the range of it."""
    total = legendre(
        lambda s: times.density(s.exp(), sde) * s.exp(), math.log(sde.t_min), math.log(sde.t_max), panels=64
    )
    assert total == pytest.approx(1, rel=1e-9), (sde, times)


@pytest.mark.parametrize("sde", PAPER_SDES, ids=str)
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_times_have_their_density(sde, times):
    """Stratified: the i-th smallest of n has the cumulative probability i / n to within 1 / n."""
    n = 64
    t = times.sample(n, sde, torch.Generator().manual_seed(0), dtype=torch.float64)
    assert t.min() >= sde.t_min and t.max() <= sde.t_max
    start = math.log(sde.t_min)
    for i, one in enumerate(t.sort().values.tolist()):
        below = legendre(lambda s: times.density(s.exp(), sde) * s.exp(), start, math.log(one), panels=32)
        assert i / n - 1e-6 <= below <= (i + 1) / n + 1e-6, (sde, times, i)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_each_time_alone_varies_over_its_stratum(sde, times):
    """The offset differs from call to call, and a generator repeats it."""
    draw = [times.sample(4, sde, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_losses_are_finite_in_float32_at_both_ends_of_time():
    for sde in SDES:
        for name in ROWS:
            model = ScoreNetwork(ExactNet(mixture(sde, torch.float32), PARAMETRIZATIONS[name]().row), sde, name)
            x0 = mixture(sde, torch.float32).sample(64, seed=0)
            for times in TIMES:
                at = At(times, torch.cat([torch.zeros(32), torch.ones(32)]))
                for weighting in ("simple", "likelihood"):
                    values = denoising_score_matching(model, x0, weighting, at, torch.Generator().manual_seed(0))
                    assert values.shape == (64,) and bool(torch.isfinite(values).all()), (sde, name, times, weighting)


def test_the_bound_does_not_depend_on_a_learned_schedule(monkeypatch):
    """Kingma et al. (2021), eq. 18: at fixed ends the expected loss and hence its gradient are free of the schedule.

    For one wrong model in terms of the noise level, by quadrature over noise and time; its variance does depend on it.
    """
    z, eps, weights = plane(8)

    def bound(sde, panels=96):
        def expected(u):
            class Fixed(UniformTime):
                def sample(self, n, sde, *_):
                    return self.quantile(u.repeat_interleave(len(z)), sde)

            n = len(u)
            x0 = 0.5 * z.repeat(n, 1)
            values = loss(monkeypatch, Linear(sde, 0.4), x0, eps.repeat(n, 1), Fixed(), "likelihood")
            return (values.reshape(n, -1) * weights).sum(1)

        nodes, node_weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
        edges = torch.linspace(0, 1, panels + 1, dtype=torch.float64) ** 2
        half = 0.5 * edges.diff()[:, None]
        u = (edges[:-1, None] + half * (1 + nodes)).flatten()
        return (expected(u) * (half * node_weights).flatten()).sum()

    # The first instants, before t_min, differ: let them be few.
    start, moved = LearnedSchedule(hidden=4, t_min=1e-9), learned(hidden=4, t_min=1e-9).requires_grad_(True)
    first, second = bound(start), bound(moved)
    assert second.item() == pytest.approx(first.item(), rel=1e-6)
    gradients = torch.autograd.grad(second, list(moved.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-5 * second.item()
    assert bound(LearnedSchedule(log_snr_min=-6.0, t_min=1e-9)).item() != pytest.approx(first.item(), rel=1e-3)


@pytest.mark.parametrize("weighting, times", [("simple", UniformTime()), ("likelihood", UniformLogSNR())], ids=str)
def test_a_loss_that_would_spoil_the_schedule_is_refused(weighting, times):
    sde = LearnedSchedule(hidden=3)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), sde)
    with pytest.raises(ValueError, match=r"only weighting='likelihood' with times=UniformTime\(\).*requires_grad_"):
        denoising_score_matching(model, torch.zeros(4, 2), weighting, times)
    assert bool(torch.isfinite(denoising_score_matching(model, torch.zeros(4, 2), "likelihood")).all())
    sde.requires_grad_(False)
    assert bool(torch.isfinite(denoising_score_matching(model, torch.zeros(4, 2), weighting, times)).all())


def test_an_unknown_weighting_is_refused():
    with pytest.raises(
        ValueError, match="weighting must be one of simple, likelihood, edm, min_snr or a Weighting, found 'uniform'"
    ):
        denoising_score_matching(gaussian(VP()), torch.zeros(1, 1), "uniform")
