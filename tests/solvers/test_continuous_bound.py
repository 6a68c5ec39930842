"""The bound of continuous time: its gap in closed form, its estimate, the limit of chains, and discrete data."""

import itertools
import math

import pytest
import torch
from oracles import ROWS, SDES, SOME_SDES, ExactNet, correlated, gaussian, legendre, mixture, quick, signs

import solvers.bound
import solvers.continuous_bound
from models import MLP, GaussianMixture, ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import EDM, VE, VP, DDPMChain, LearnedSchedule, NCSNLevels, geometric_sigmas, linear_betas, log_snr_betas
from solvers import (
    DiscretizedGaussian,
    GaussianReference,
    LevelPosterior,
    LogSNRDensity,
    continuous_elbo,
    elbo,
    learned_density,
)
from solvers.importance import times

# The gap. On Gaussian data h is a quadratic of (x_0, eps), so that the mean over all signs is the expectation; the
# places within each part are those of Gauss's rule of 2 points.


class Exact:
    """Samples are x_0-major, then all signs of eps, then the 2 places."""

    def __init__(self, *_):
        pass

    def normal(self, shape, draw, device, dtype):
        every = signs(shape[1], dtype)
        return every.repeat_interleave(2, 0).repeat(len(every), 1)

    def words(self, shape, draw, device):
        places = torch.tensor([0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)], dtype=torch.float64)
        return (places * 2.0**32 - 0.5).repeat(shape[0] // 2)[:, None].expand(shape)


def without_chance(monkeypatch, model, data=None, points=200, **options):
    """E [log p(x_0) - bound], p of ``data``, without Monte Carlo; and the bound."""
    data = data or model
    monkeypatch.setattr(solvers.continuous_bound, "Noise", Exact)
    every = signs(data.means.shape[1])
    x0 = data.means[0] + every @ (data.axes[0] * data.variances[0].sqrt()).T
    x0 = x0.repeat_interleave(2 * len(every), 0)
    found = continuous_elbo(model, x0, points=points, **options)
    return float((data.log_prob(x0) - found.log_prob).mean()), found


def divergence(ratio):
    """KL(N(0, ratio) || N(0, 1))."""
    return 0.5 * (ratio - 1 - math.log(ratio))


def closed_gap(sde, variances, mean):
    """KL(q(x_T) || prior) + E KL(q(x_0 | x_t) || p(x_0 | x_t))."""
    low, high = (math.exp(end) for end in sde.log_snr_range)
    end = sde.time(torch.tensor(sde.log_snr_range[0], dtype=torch.float64))
    sigma, unit = float(sde.sigma(end)), sde.prior_std**2
    prior = sum(divergence(sigma**2 * (1 + low * v) / unit) for v in variances)
    shift = float(mean.square().sum()) * low * sigma**2 / (2 * unit)
    return prior + shift + sum(divergence(v / (v + 1 / high)) for v in variances)


@pytest.mark.parametrize("sde", quick(SOME_SDES), ids=str)
@pytest.mark.parametrize("reference", [None, GaussianReference(0.3, 0.9)], ids=["plain", "reference"])
def test_the_gap_is_that_of_the_ends(monkeypatch, sde, reference):
    """On correlated data, with the exact score."""
    model = correlated(sde)
    gap, found = without_chance(monkeypatch, model, reference=reference)
    assert gap == pytest.approx(closed_gap(sde, model.variances[0].tolist(), model.means[0]), rel=1e-8, abs=1e-8)
    assert found.nfe == 201 and len(found.steps) == 200 and not found.discrete


def test_the_gap_of_a_wrong_score_is_the_integral_of_its_error(monkeypatch):
    """The ends' own, and 1/2 int E |eps_hat - eps_hat of the data|^2 dlambda: the fault of the path measure."""
    sde, v, w = VP(), 0.4, 0.25

    def lost(log_snr):
        snr = log_snr.exp()
        return 0.5 * snr**2 * (v - w) ** 2 / ((1 + w * snr) ** 2 * (1 + v * snr))

    weights = LogSNRDensity((1.0, 3.0, 2.0))  # whose borders are among those of 900 points
    gap, _ = without_chance(monkeypatch, gaussian(sde, w), gaussian(sde, v), 900, density=weights)
    s2 = math.exp(-sde.log_snr_range[1])
    ends = closed_gap(sde, [v], torch.zeros(1)) + 0.5 * s2 * (v - w) ** 2 / ((w + s2) ** 2 * (v + s2))
    assert gap == pytest.approx(ends + legendre(lost, *sde.log_snr_range), abs=1e-8)
    assert gap > 0.05


def test_with_the_data_s_own_moments_as_reference_nothing_is_left_to_chance():
    """The bound is log p less the ends, for each sample, from one point."""
    sde, x0 = VP(0.1, 8.0), gaussian(VP(), 0.3, 0.4).sample(50)
    model = gaussian(sde, 0.3, 0.4)
    found = continuous_elbo(model, x0, points=1, draws=3, reference=GaussianReference(0.4, math.sqrt(0.3)))
    assert float(found.stderr.max()) < 1e-9
    end = torch.tensor(1.0, dtype=torch.float64)
    alpha, sigma = sde.alpha(end), sde.sigma(end)
    variance = alpha**2 * 0.3 + sigma**2
    # E of log prior - log p_T over q(x_T | x_0), by Gaussian moments.
    mismatch = sde.prior(x0.shape).log_prob(alpha * x0) - 0.5 * sigma**2 + 0.5 * torch.log(2 * math.pi * variance)
    mismatch += 0.5 * ((alpha * (x0[:, 0] - 0.4)) ** 2 + sigma**2) / variance
    assert torch.allclose(found.log_prob, model.log_prob(x0) + mismatch, rtol=0, atol=2e-5)
    assert mismatch.abs().max() > 1e-3


def test_the_reference_is_integrated_in_closed_form():
    x0 = mixture(VP()).sample(5)
    reference = GaussianReference(torch.tensor([0.1, -0.4]), torch.tensor([0.5, 2.0]))

    def expected(i):
        one = x0[i : i + 1]
        return lambda at: reference.errors(one.expand(len(at), 2), torch.zeros(len(at), 2).double(), at)[1]

    found = reference.integral(x0, torch.tensor(-9.0), torch.tensor(27.0))
    assert found.tolist() == pytest.approx([legendre(expected(i), -9.0, 27.0) for i in range(5)], rel=1e-10)
    every = signs(2)
    at = torch.full((4,), 0.7, dtype=torch.float64)
    for one in x0:
        errors, mean = reference.errors(one.expand(4, 2), every, at)
        assert torch.allclose(errors.mean(), mean, rtol=1e-12)


def test_the_moments_of_data():
    x = mixture(VP()).sample(100)
    found = GaussianReference.of(x)
    assert torch.equal(found.mean, x.mean(0)) and torch.equal(found.std, x.std(0))
    assert float(GaussianReference.of(torch.ones(3, 2)).std.max()) == pytest.approx(1e-3)


# The limit of chains.


@pytest.mark.parametrize("data_variance", [0.25, 0.4])
@pytest.mark.parametrize(
    "sde, chain",
    [
        (VE(), lambda n: NCSNLevels(geometric_sigmas(50.0, 0.01, n))),
        (VE(), lambda n: DDPMChain(log_snr_betas(VE(), n))),
        (VP(), lambda n: DDPMChain(log_snr_betas(VP(), n))),
    ],
)
def test_the_bounds_of_chains_tend_to_it_as_one_over_n(monkeypatch, sde, chain, data_variance):
    """With variance "beta", for an exact score and for a wrong one; from below."""
    model, data = gaussian(sde, 0.25), gaussian(sde, data_variance)
    limit, _ = without_chance(monkeypatch, model, data)
    monkeypatch.setattr(solvers.bound, "Noise", Exact)
    x0 = data.variances[0].sqrt() * signs(1).repeat_interleave(4, 0)
    gaps = []
    for n in (200, 400):
        found = elbo(model, x0, chain(n)).log_prob
        gaps.append(float((data.log_prob(x0) - found).mean()) - limit)
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1) and 0 < gaps[1] < 0.1, gaps


def test_ddpm_tends_to_it_too(monkeypatch):
    """Linear betas: the exact bound's gap at N = 1000 is 0.00109, all of the chain but the prior's 1e-5."""
    model = gaussian(VP(), 0.25)
    limit, _ = without_chance(monkeypatch, model)
    monkeypatch.setattr(solvers.bound, "Noise", Exact)
    x0 = 0.5 * signs(1).repeat_interleave(4, 0)
    gaps = [
        float((model.log_prob(x0) - elbo(model, x0, DDPMChain(linear_betas(n))).log_prob).mean()) for n in (250, 500)
    ]
    assert 0 < limit < 1e-6 and (gaps[0] - limit) / (gaps[1] - limit) == pytest.approx(2, abs=0.05)


# The estimate.

DENSITIES = [None, LogSNRDensity((1.0, 5.0, 0.3, 2.0))]


@pytest.mark.parametrize("density", DENSITIES, ids=["uniform", "weights"])
@pytest.mark.parametrize("points", [1, 8])
@pytest.mark.parametrize("referred", [False, True])
def test_the_estimate_is_unbiased_and_exact_for_each_sample(density, points, referred):
    """The exact score leaves log p itself but for the ends (2e-4 here), at each x_0 and not in the mean alone."""
    model, n = mixture(VP()), 1600 // points
    distinct = model.sample(8, seed=3)
    reference = GaussianReference.of(model.sample(100)) if referred else None
    options = dict(points=points, density=density, reference=reference, seed=5)
    found = continuous_elbo(model, distinct.repeat_interleave(n, 0), **options).log_prob.reshape(8, n)
    error = found.std(1) / math.sqrt(n)
    z = (found.mean(1) - model.log_prob(distinct)) / (error + 2e-4)
    assert float(z.abs().max()) < 4.5 and abs(float(z.sum())) / math.sqrt(8) < 4, z
    assert float(error.max()) < (0.55 if referred else 1.0)


def test_the_order_of_the_bounds():
    """Discrete <= continuous <= log p, at each x_0, up to 5 standard errors; and the gaps are of the stated size."""
    model, n = mixture(VP()), 100
    distinct = model.sample(12, seed=3)
    x0, log_prob = distinct.repeat_interleave(n, 0), model.log_prob(distinct)
    reference = GaussianReference.of(distinct)
    chain = DDPMChain(log_snr_betas(VP(), 25))
    found = [elbo(model, x0, chain), continuous_elbo(model, x0, points=16, reference=reference)]
    (low, low_error), (high, high_error) = (
        (b.log_prob.reshape(12, n).mean(1), b.log_prob.reshape(12, n).std(1) / n**0.5) for b in found
    )
    assert bool((high - log_prob < 5 * high_error).all())
    assert bool((low - high < 5 * torch.hypot(low_error, high_error)).all())
    gap = log_prob.mean() - low.mean()
    assert gap > 5 * low_error.norm() / 12 and gap > 0.2


def test_the_standard_error_is_that_of_repetitions():
    """The variance over 400 samples of one x_0 against the mean of the squares of the stated errors; and coverage."""
    model = mixture(VP())
    x0 = model.sample(1).expand(400, 2)
    found = continuous_elbo(model, x0, points=16, draws=8, reference=GaussianReference(0.0, 1.0), seed=1)
    assert float(found.stderr.square().mean() / found.log_prob.var()) == pytest.approx(1, abs=0.3)
    inside = ((found.log_prob - model.log_prob(x0)).abs() < 2.365 * found.stderr).double().mean()  # t of 7, 95 %
    assert 0.90 < float(inside) < 0.98
    assert continuous_elbo(model, x0[:2]).stderr is None
    single = [continuous_elbo(model, x0[:1], points=4, seed=s).log_prob for s in (1, 1, 2)]
    assert torch.equal(single[0], single[1]) and not torch.equal(single[0], single[2])


def test_a_learned_density_and_a_reference_lower_the_error():
    """The error of one sample with 32 points, root mean square: 1.08, 0.89, 0.43, and 0.24 with both."""
    model = mixture(VP())
    x0 = model.sample(48, seed=2)
    reference = GaussianReference.of(x0)
    errors = []
    for chosen in (None, reference):
        density = learned_density(model, x0, draws=8, reference=chosen)
        assert len(density.weights) == 16 and min(density.weights) < 0.1 * sum(density.weights) / 16 + 1e-9
        for way in (None, density):
            found = continuous_elbo(model, x0, points=32, draws=8, density=way, reference=chosen)
            errors.append(float(found.stderr.square().mean().sqrt()))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.5 * errors[0] and errors[3] < 0.8 * errors[2], errors


def test_the_parts_sum_to_the_bound():
    model = mixture(VP())
    x0 = model.sample(7)
    for reference in (None, GaussianReference(0.0, 1.0)):
        found = continuous_elbo(model, x0, points=5, draws=3, reference=reference, density=DENSITIES[1])
        parts = found.prior + found.transitions + found.reconstruction
        assert torch.allclose(found.log_prob, -parts, rtol=1e-12) and found.nfe == 3 * 6
        assert float(found.steps.sum()) == pytest.approx(float(found.transitions.mean()), rel=1e-10)


def test_samples_do_not_depend_on_their_batch():
    model = mixture(VP())
    x0 = model.sample(6)
    options = dict(points=4, draws=2, seed=7, density=DENSITIES[1], reference=GaussianReference(0.0, 1.0))
    whole, tail = continuous_elbo(model, x0, **options), continuous_elbo(model, x0[4:], first=4, **options)
    split = continuous_elbo(model, x0, batch_size=4, **options)
    for part in ("log_prob", "prior", "transitions", "reconstruction", "stderr"):
        assert torch.allclose(getattr(whole, part)[4:], getattr(tail, part), rtol=1e-10), part
        assert torch.allclose(getattr(whole, part), getattr(split, part), rtol=1e-10), part
    assert torch.allclose(whole.steps, split.steps) and whole.nfe == tail.nfe == split.nfe == 10


@pytest.mark.parametrize("sde", [s for s in SDES if not isinstance(s, LearnedSchedule)], ids=str)
def test_every_process_gives_the_same_bound(sde):
    """Between the same ends."""
    x0, common = mixture(VP()).sample(6), VE(0.02, 20.0)
    found, expected = (
        continuous_elbo(mixture(s).under(common), x0, points=12, draws=2, seed=2).log_prob for s in (sde, common)
    )
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), (found - expected).abs().max()


@pytest.mark.parametrize("name", ROWS)
def test_a_network_gives_the_bound_of_its_exact_model(name):
    exact = correlated(VP())
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), VP(), name)
    x0 = exact.sample(3)
    found, expected = (continuous_elbo(m, x0, points=6) for m in (model, exact))
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5) and found.nfe == 7


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
def test_float32_agrees_with_float64(sde):
    """Near the data dx0 would have lost the digits, far from it deps."""
    x0 = mixture(sde).sample(32)
    for reference in (None, GaussianReference(0.0, 1.0)):
        single, double = (
            continuous_elbo(mixture(sde, d), x0.to(d), points=64, reference=reference)
            for d in (torch.float32, torch.float64)
        )
        assert single.log_prob.dtype == torch.float32
        assert (single.log_prob - double.log_prob).abs().max() < 2e-3


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_times_are_those_of_their_log_snr(sde):
    log_snr = torch.linspace(*sde.log_snr_range, 60, dtype=torch.float64).reshape(3, 20)
    with torch.no_grad():
        assert (sde.log_snr(times(sde, log_snr)) - log_snr).abs().max() < 1e-9


def test_a_density_of_log_snr_is_one():
    """The quantile is the inverse of the distribution, and the density its slope."""
    density = DENSITIES[1]
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    share, found = density.quantile(u)
    counts = torch.histc(share, 4, 0, 1) / 4000
    expected = torch.tensor(density.weights).double() / sum(density.weights)
    assert torch.allclose(counts, expected, atol=1e-3) and bool((share.diff() > 0).all())
    assert torch.allclose(found, 4 * expected[(share * 4).long()], rtol=1e-12)
    ends, _ = density.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 6), (3, 2, 2, 2)], ids=str)
def test_data_of_any_rank(shape):
    model = ScoreNetwork(MLP(shape[1:], width=8, depth=1), VP())
    x0 = DiscretizedGaussian(5).centres(torch.arange(math.prod(shape)).reshape(shape) % 5)
    for last, reference in itertools.product(
        (None, DiscretizedGaussian(5), LevelPosterior(5)), (None, GaussianReference.of(x0))
    ):
        found = continuous_elbo(model, x0, last, points=3, draws=2, reference=reference)
        assert found.log_prob.shape == found.stderr.shape == found.prior.shape == (3,)
        assert found.dimensions == math.prod(shape[1:]) and not found.log_prob.requires_grad and found.nfe == 8
        assert found.discrete == (last is not None)
    assert not model._forward_pre_hooks


# Discrete data.

TOY = torch.tensor([[0.0, 0.3, 0.05], [0.1, 0.0, 0.2], [0.25, 0.0, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
@pytest.mark.parametrize("decoder", [DiscretizedGaussian(3), LevelPosterior(3)], ids=str)
def test_the_bound_of_a_discrete_toy_is_its_log_probability(sde, decoder):
    """Of two pixels of three levels, at each of its states, with the exact model: a mixture of points."""
    pairs = torch.tensor([p for p in itertools.product(range(3), repeat=2) if TOY[p] > 0])
    points, weights = decoder.centres(pairs, torch.float64), TOY[pairs[:, 0], pairs[:, 1]]
    model = GaussianMixture(weights, points, torch.zeros(len(pairs), 2, 2).double(), sde)
    found = continuous_elbo(model, points.repeat_interleave(100, 0), decoder, points=32)
    log_prob = found.log_prob.reshape(len(points), 100)
    error = log_prob.std(1) / 10
    assert float(((log_prob.mean(1) - weights.log()) / (error + 1e-3)).abs().max()) < 4.5
    print("ERT", float(error.max()))
    assert float(found.reconstruction.abs().max()) < 1e-6
    assert found.bits_per_dim()[0] == pytest.approx(-float(found.log_prob.mean()) / (2 * math.log(2)), rel=1e-9)


def test_the_posterior_of_levels_is_bayes_rule():
    decoder = LevelPosterior(4)
    every = decoder.centres(torch.arange(4), torch.float64)
    for scaled, std in itertools.product((-3.0, 0.1, 0.4), (1e-3, 0.2, 3.0)):
        scaled, std = torch.tensor(scaled, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        density = torch.distributions.Normal(every, std).log_prob(scaled)
        assert torch.allclose(decoder.log_prob(every, scaled, std), density - density.logsumexp(0), atol=1e-9)
    x_t, x0_hat = torch.tensor(1.0), torch.tensor(2.0)
    assert decoder.centre(x_t, x0_hat) == 1 and DiscretizedGaussian(4).centre(x_t, x0_hat) == 2


# Refusals.


class Broken(GaussianMixture):
    """Not finite somewhere in time."""

    def forward(self, x, t):
        pair = super().forward(x, t)
        return pair._replace(eps=pair.eps + torch.nan)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: continuous_elbo(m.sde, x), TypeError, "continuous_elbo: model must be a ScoreModel, found VP"),
        (lambda m, x: continuous_elbo(m, x, "vdm"), TypeError, "decoder must be a Decoder, found 'vdm'"),
        (lambda m, x: continuous_elbo(m, x, density="u"), TypeError, "density must be a LogSNRDensity, found 'u'"),
        (lambda m, x: continuous_elbo(m, x, reference=1.0), TypeError, "reference must be a GaussianReference"),
        (lambda m, x: continuous_elbo(m, x.long()), TypeError, r"x0 must be of a floating-point type.*int64"),
        (lambda m, x: continuous_elbo(m, x, points=0), ValueError, "points must be a positive integer, found 0"),
        (lambda m, x: continuous_elbo(m, x, draws=1.5), ValueError, "draws must be a positive integer, found 1.5"),
        (
            lambda m, x: continuous_elbo(m, x, batch_size=0),
            ValueError,
            "batch_size must be a positive integer, found 0",
        ),
        (lambda m, x: continuous_elbo(m, x / 0), ValueError, r"x0 must be finite data.*\(1, 2\) with 2 values"),
        (lambda m, x: continuous_elbo(m, x[:0]), ValueError, r"x0 must be finite data.*\(0, 2\)"),
        (
            lambda m, x: continuous_elbo(m, x, LevelPosterior(4)),
            ValueError,
            "the centres of 4 bins.*LevelPosterior.cen",
        ),
        (lambda m, x: learned_density(m, x, draws=1), ValueError, "a deviation needs at least 2 draws, found 1"),
        (lambda m, x: LogSNRDensity((1.0, 0.0)), ValueError, "weights must be positive numbers.*found"),
        (lambda m, x: LogSNRDensity(()), ValueError, "at least one, found"),
        (lambda m, x: LevelPosterior(1), ValueError, "LevelPosterior: levels must be an integer of at least 2"),
        (lambda m, x: GaussianReference(0.0, 0.0), ValueError, "std positive, found mean=0.0, std=0.0"),
        (lambda m, x: GaussianReference.of(x), ValueError, "moments need at least 2 samples, found 1"),
        (
            lambda m, x: continuous_elbo(Broken(m.log_weights.exp(), m.means, m.axes * 0, m.sde), x),
            RuntimeError,
            "the bound of 1 of 1 samples is not finite",
        ),
    ],
)
def test_what_can_not_work_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(mixture(VP()), torch.tensor([[0.1, 0.2]], dtype=torch.float64))
