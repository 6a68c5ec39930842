"""The bound over a chain: every part against closed forms, its gap, and the decoder of discrete data."""

import itertools
import math
from dataclasses import replace

import mpmath
import pytest
import torch
from oracles import ROWS, SDES, ExactNet, correlated, gaussian, mixture
from torch.distributions import Normal, kl_divergence

import solvers.bound
from models import MLP, GaussianMixture, ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import EDM, VE, VP, DDPMChain, NCSNLevels, Noise, cosine_betas, geometric_sigmas, linear_betas
from solvers import DiscretizedGaussian, GaussianReference, elbo

CHAINS = [
    DDPMChain(linear_betas(30)),
    DDPMChain(cosine_betas(30)),
    DDPMChain((0.9,)),
    DDPMChain((0.1, 0.9)),
    NCSNLevels(geometric_sigmas(20.0, 0.02, 30)),
]


# The gap. On Gaussian data every loss is a quadratic of (x_0, eps), so that the mean over all signs is the expectation.


class Signs:
    """All signs of eps for each x_0, in place of random numbers; samples are x_0-major."""

    def __init__(self, *_):
        pass

    def normal(self, shape, draw, device, dtype):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=shape[1])), dtype=dtype)
        return signs.repeat(len(signs), 1)


def exact_gap(monkeypatch, model, chain, variance, reference=None):
    """E [log p(x_0) - bound] over x_0 and the noise, and the means of the steps, without Monte Carlo."""
    monkeypatch.setattr(solvers.bound, "Noise", Signs)
    root = model.axes[0] * model.variances[0].sqrt()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(root))), dtype=torch.float64)
    x0 = (model.means[0] + signs @ root.T).repeat_interleave(len(signs), 0)
    found = elbo(model, x0, chain, variance=variance, reference=reference)
    return float((model.log_prob(x0) - found.log_prob).mean()), found


def closed_gap(chain, variances, variance):
    """The KL of L_T, of each transition k = 2..N, and of the last: N(0, r) from N(0, 1), r the ratio of variances."""
    beta, last, parts = [], None, []
    alphas, sigmas = (c.tolist() for c in chain.levels())
    for k in range(1, chain.steps + 1):
        beta.append(sigmas[k] ** 2 - (alphas[k] / alphas[k - 1] * sigmas[k - 1]) ** 2)
    tilde = [b * (sigmas[k] / sigmas[k + 1]) ** 2 for k, b in enumerate(beta)]
    tilde[0] = tilde[1] if len(tilde) > 1 else beta[0]
    for k, chosen in enumerate(beta if variance == "beta" else tilde, start=1):
        total = 0.0
        for v in variances:
            before, now, scale = (
                alphas[k - 1] ** 2 * v + sigmas[k - 1] ** 2,
                alphas[k] ** 2 * v + sigmas[k] ** 2,
                alphas[k] / alphas[k - 1],
            )
            ratio = (before - (scale * before) ** 2 / now) / chosen  # Var(x_{k-1} | x_k)
            total += 0.5 * (ratio - 1 - math.log(ratio))
        last, parts = (total, parts) if k == 1 else (last, [*parts, total])
    ends = [(alphas[-1] ** 2 * v + sigmas[-1] ** 2) / chain.prior_std**2 for v in variances]
    return sum(0.5 * (r - 1 - math.log(r)) for r in ends), parts, last


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
def test_the_gap_is_the_sum_of_gaussian_divergences(monkeypatch, sde, chain, variance):
    """On correlated data, for levels within each process's range."""
    model = correlated(sde)
    kept = chain.log_snr(torch.arange(1, chain.steps + 1)) > sde.log_snr_range[0]
    chain = chain.subset(range(1, int(kept.sum()) + 1)) if chain.steps > 1 else chain
    gap, found = exact_gap(monkeypatch, model, chain, variance)
    prior, parts, last = closed_gap(chain, model.variances[0].tolist(), variance)
    # log p(x_0) = E log q(x_0 | x_1) - ..., so that the gap also has the mean of L_T at the data's own mean.
    shift = float((chain.alpha(chain.steps) * model.means[0]).square().sum()) / (2 * chain.prior_std**2)
    assert gap == pytest.approx(prior + shift + sum(parts) + last, rel=1e-8, abs=1e-10)
    assert len(found.steps) == chain.steps - 1 and found.nfe == chain.steps


@pytest.mark.parametrize("n, quoted", [(50, 0.0219), (200, 0.00547), (1000, 0.00109), (4000, 0.000273)])
def test_with_variance_beta_the_gap_falls_as_one_over_n(monkeypatch, n, quoted):
    """DDPM's linear betas, data of variance 0.25 in one dimension, exact score, Gaussian decoder of variance beta_1."""
    chain = DDPMChain(linear_betas(n))
    prior, parts, last = closed_gap(chain, [0.25], "beta")
    assert prior + sum(parts) + last == pytest.approx(quoted, rel=0.01)
    if n <= 1000:
        assert exact_gap(monkeypatch, gaussian(VP(), 0.25), chain, "beta")[0] == pytest.approx(quoted, rel=0.01)


def test_b46_with_variance_beta_tilde_the_gap_does_not_vanish(monkeypatch):
    """0.456 nats at N = 1000 and 0.346 at 4000 in the transitions alone (k >= 2), 0.570 and 0.487 with a decoder of
    variance beta_tilde_2. Near the data r_k = k / (k - 1), whatever N is: the limit is half of Euler's constant, 0.289,
    and (1 - log 2) / 2 = 0.153 for the decoder.
    """
    totals = {n: closed_gap(DDPMChain(linear_betas(n)), [0.25], "beta_tilde") for n in (1000, 4000, 20000)}
    assert sum(totals[1000][1]) == pytest.approx(0.456, abs=1e-3) and sum(totals[4000][1]) == pytest.approx(
        0.346, abs=1e-3
    )
    assert totals[1000][2] == pytest.approx(0.114, abs=1e-3) and totals[4000][2] == pytest.approx(0.142, abs=1e-3)
    assert sum(totals[20000][1]) == pytest.approx(0.5772156649 / 2, abs=0.02)
    assert totals[20000][2] == pytest.approx((1 - math.log(2)) / 2, abs=3e-3)
    gap, found = exact_gap(monkeypatch, gaussian(VP(), 0.25), DDPMChain(linear_betas(1000)), "beta_tilde")
    assert gap == pytest.approx(0.570, abs=1e-3) == totals[1000][0] + sum(totals[1000][1]) + totals[1000][2]
    assert float(found.transitions.mean()) - float(found.steps.sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_reference_has_no_mean(monkeypatch, variance):
    model, chain = correlated(VP()), DDPMChain(linear_betas(30))
    plain, referred = (
        exact_gap(monkeypatch, model, chain, variance, reference)[0]
        for reference in (None, GaussianReference(0.2, 0.6))
    )
    assert referred == pytest.approx(plain, rel=1e-9)


def test_with_the_data_s_own_moments_as_reference_nothing_is_left_to_chance():
    model, chain = gaussian(VP(), 0.3, 0.4), DDPMChain(linear_betas(30))
    x0 = 0.4 + math.sqrt(0.3) * torch.tensor(
        [[-1.0], [1.0]], dtype=torch.float64
    )  # their mean is that of any quadratic
    found = elbo(model, x0, chain, draws=3, reference=GaussianReference(0.4, math.sqrt(0.3)))
    assert float(found.stderr.max()) < 1e-7  # the time of a level is known to 1e-9
    prior, parts, last = closed_gap(chain, [0.3], "beta")
    shift = float(chain.alpha(chain.steps) * 0.4) ** 2 / 2
    gap = float((model.log_prob(x0) - found.log_prob).mean())
    assert gap == pytest.approx(prior + shift + sum(parts) + last, rel=1e-6)
    decoder = DiscretizedGaussian(4)
    x0 = decoder.centres(torch.arange(4), torch.float64)[:, None]
    found = [elbo(model, x0, chain, decoder, reference=r).reconstruction for r in (None, GaussianReference())]
    assert torch.equal(*found)


# Each part, sample by sample.


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.3])
def test_every_part_is_that_of_the_definition(chain, variance):
    """KLs by torch.distributions between q, by Bayes' rule, and p, from the pair of a model of another process."""
    model, chain_model = mixture(VE(0.001, 5000.0)), mixture(VP(0.1, 40.0))
    x0 = model.sample(5, seed=1)
    found, noise = elbo(model, x0, chain, variance=variance, seed=4), Noise(4)
    total, means = torch.zeros(5, dtype=torch.float64), []
    for k in range(1, chain.steps + 1):
        alpha, sigma = chain.alpha(k), chain.sigma(k)
        x_k = alpha * x0 + sigma * noise.normal((5, 2), k - 1, dtype=torch.float64)
        length = torch.hypot(alpha, sigma)
        t = chain_model.sde.time(chain.log_snr(k))
        pair = chain_model(x_k / length, t)
        chosen = 0.0 if k == 1 and variance == "beta_tilde" else variance
        p = Normal(chain.mean(pair, k), chain.variance(k, chosen).sqrt())
        if k == 1:
            assert torch.allclose(found.reconstruction, -p.log_prob(x0).sum(1), rtol=1e-6)
            continue
        scale, before = alpha / chain.alpha(k - 1), chain.sigma(k - 1) ** 2
        tilde = 1 / (1 / before + scale**2 / chain.beta(k))
        q = Normal(tilde * (chain.alpha(k - 1) * x0 / before + scale * x_k / chain.beta(k)), tilde.sqrt())
        loss = kl_divergence(q, p).sum(1)
        total, means = total + loss, [*means, loss.mean()]
    assert torch.allclose(found.transitions, total, rtol=1e-6, atol=1e-9)
    assert torch.allclose(found.steps, torch.stack(means) if means else torch.zeros(0).double(), rtol=1e-6, atol=1e-9)
    end = Normal(chain.alpha(chain.steps) * x0, chain.sigma(chain.steps))
    expected = kl_divergence(end, Normal(torch.zeros_like(x0), chain.prior_std)).sum(1)
    assert torch.allclose(found.prior, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.log_prob, -(found.prior + (found.transitions + found.reconstruction)))


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_every_process_gives_the_same_bound(sde):
    x0, chain = mixture(VP()).sample(6), NCSNLevels(geometric_sigmas(10.0, 0.05, 12))
    found, expected = (elbo(mixture(s), x0, chain, seed=2).log_prob for s in (sde, VP()))
    assert torch.allclose(found, expected, rtol=1e-4), (found - expected).abs().max()


@pytest.mark.parametrize("name", ROWS)
def test_a_network_gives_the_bound_of_its_exact_model(name):
    exact, chain = correlated(VP()), DDPMChain(linear_betas(30))
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), VP(), name)
    x0 = exact.sample(4)
    found, expected = elbo(model, x0, chain), elbo(exact, x0, chain)
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5) and found.nfe == 30


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.5])
def test_the_bound_lies_below_the_density(variance):
    """Of each sample, up to 5 standard errors of its noise."""
    model = mixture(VP())
    x0 = model.sample(20, seed=3).repeat_interleave(20, 0)
    found = elbo(model, x0, DDPMChain(linear_betas(60)), variance=variance, draws=5)
    mean, error = found.log_prob.reshape(20, 20).mean(1), found.stderr.reshape(20, 20).square().mean(1).sqrt() / 20**0.5
    assert bool((mean - model.log_prob(x0[::20]) < 5 * error).all())


def test_the_standard_error_is_that_of_repetitions():
    """The variance over 400 samples of one x_0 against the mean of the squared errors that are stated."""
    model = mixture(VP())
    x0 = model.sample(1).expand(400, 2)
    found = elbo(model, x0, DDPMChain(linear_betas(30)), draws=8, seed=1)
    assert float(found.stderr.square().mean() / found.log_prob.var()) == pytest.approx(1, abs=0.3)
    assert elbo(model, x0[:2], DDPMChain(linear_betas(30))).stderr is None
    single = [elbo(model, x0[:1], DDPMChain(linear_betas(30)), seed=s).log_prob for s in (1, 1, 2)]
    assert torch.equal(single[0], single[1]) and not torch.equal(single[0], single[2])


def test_samples_do_not_depend_on_their_batch():
    model, chain = mixture(VP()), DDPMChain(linear_betas(30))
    x0 = model.sample(6)
    whole, tail = elbo(model, x0, chain, draws=2, seed=7), elbo(model, x0[4:], chain, draws=2, seed=7, first=4)
    for part in ("log_prob", "prior", "transitions", "reconstruction", "stderr"):
        assert torch.allclose(getattr(whole, part)[4:], getattr(tail, part), rtol=1e-12), part
    assert whole.nfe == tail.nfe == 60


def test_float32_agrees_with_float64():
    """At 1000 levels, to 1e-4 nats: the errors of the pair are weighed where each is accurate."""
    x0, chain = mixture(VP()).sample(32), DDPMChain()
    single, double = (elbo(mixture(VP(), d), x0.to(d), chain) for d in (torch.float32, torch.float64))
    assert single.log_prob.dtype == torch.float32
    noise = Noise(0).normal((32, 2), 5, dtype=torch.float64) - Noise(0).normal((32, 2), 5)  # the draws differ too
    assert noise.abs().max() < 1e-6
    assert (single.log_prob - double.log_prob).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 6), (3, 2, 2, 2)], ids=str)
def test_data_of_any_rank(shape):
    model, decoder = ScoreNetwork(MLP(shape[1:], width=8, depth=1), VP()), DiscretizedGaussian(5)
    x0 = decoder.centres(torch.arange(math.prod(shape)).reshape(shape) % 5)
    for last in (None, decoder):
        found = elbo(model, x0, CHAINS[0], last, draws=2)
        assert found.log_prob.shape == found.stderr.shape == found.prior.shape == (3,)
        assert found.dimensions == math.prod(shape[1:]) and not found.log_prob.requires_grad
    assert not model._forward_pre_hooks


# Discrete data.


@pytest.mark.parametrize(
    "decoder", [DiscretizedGaussian(2), DiscretizedGaussian(17), DiscretizedGaussian(256, 0.0, 3.0)]
)
def test_the_probabilities_of_all_levels_sum_to_one(decoder):
    levels = decoder.centres(torch.arange(decoder.levels), torch.float64)
    for mean in (-50.0, -1.0, 0.0, 0.123, 1.0, 2.9, 700.0):
        for std in (1e-12, 1e-3, decoder.width, 0.3, 5.0, 1e4):
            log_p = decoder.log_prob(levels, torch.tensor(mean), torch.tensor(std))
            assert bool(torch.isfinite(log_p).all()) and float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12), (
                mean,
                std,
            )


def test_the_decoder_against_high_precision():
    decoder = DiscretizedGaussian(256, -1 - 1 / 255, 1 + 1 / 255)
    with mpmath.workdps(50):
        for k, mean, std in itertools.product((0, 1, 100, 254, 255), (-1.0, 0.2, 1.0, 9.0), (1e-4, 1e-2, 0.5, 20.0)):
            low, width, mean_, std_ = map(mpmath.mpf, (decoder.low, decoder.width, mean, std))
            a, b = ((low + (k + i) * width - mean_) / std_ for i in (0, 1))
            a, b = (-mpmath.inf if k == 0 else a), (mpmath.inf if k == 255 else b)
            a, b = (-b, -a) if a + b > 0 else (a, b)
            upper, lower = (mpmath.erfc(-z / mpmath.sqrt(2)) / 2 for z in (b, a))
            expected = mpmath.log(upper - lower)
            x0 = decoder.centres(torch.tensor(k), torch.float64)
            found = float(
                decoder.log_prob(x0, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
            )
            # The edges themselves are rounded, by 1e-16 of 1, and divided by std.
            distance = min(abs(a), abs(b))
            assert found == pytest.approx(float(expected), rel=1e-10, abs=1e-9 + 1e-14 * float(distance / std)), (
                k,
                mean,
                std,
            )


def test_the_paper_s_levels_are_bin_centres():
    decoder = DiscretizedGaussian(256, -1 - 1 / 255, 1 + 1 / 255)
    paper = torch.arange(256) / 127.5 - 1
    assert torch.allclose(decoder.centres(torch.arange(256)), paper, atol=1e-6)
    assert torch.equal(decoder.index(paper), torch.arange(256)) and decoder.width == pytest.approx(2 / 255)


def test_gradients_are_finite_far_out():
    decoder = DiscretizedGaussian(256)
    x0 = decoder.centres(torch.tensor([0, 1, 128, 254, 255]))
    for value, scale in itertools.product((-1e6, -30.0, 0.0, 1.0, 30.0, 1e6), (1e-6, 1e-2, 1.0, 1e3)):
        mean = torch.full((5,), value, requires_grad=True)
        std = torch.full((5,), scale, requires_grad=True)
        log_p = decoder.log_prob(x0, mean, std)
        log_p.sum().backward()
        assert bool(torch.isfinite(log_p).all()), (value, scale)
        assert bool(torch.isfinite(mean.grad).all() and torch.isfinite(std.grad).all()), (value, scale)
        far = (mean.detach() - x0).abs() > 10 * scale + 1
        assert bool((mean.grad * (x0 - mean) >= 0)[far].all()), (value, scale)  # towards the level


TOY = torch.tensor([[0.0, 0.3, 0.05], [0.1, 0.0, 0.2], [0.25, 0.0, 0.1]], dtype=torch.float64)


def toy(sde, decoder):
    """The exact model of two pixels of three levels: a mixture of points."""
    pairs = torch.tensor([p for p in itertools.product(range(3), repeat=2) if TOY[p] > 0])
    points = decoder.centres(pairs, torch.float64)
    weights = TOY[pairs[:, 0], pairs[:, 1]]
    return GaussianMixture(weights, points, torch.zeros(len(pairs), 2, 2).double(), sde), points, weights


@pytest.mark.parametrize(
    "sde, chain", [(VP(), DDPMChain(linear_betas(200))), (VE(), NCSNLevels(geometric_sigmas(levels=100)))]
)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_bits_of_a_discrete_toy_exceed_its_entropy(sde, chain, variance):
    decoder = DiscretizedGaussian(3)
    model, points, weights = toy(sde, decoder)
    n = 200
    found = elbo(model, points.repeat_interleave(n, 0), chain, decoder, variance, draws=2)
    log_prob = found.log_prob.reshape(len(points), n)
    error = log_prob.std(1) / n**0.5
    assert bool((log_prob.mean(1) < weights.log() + 5 * error).all())
    entropy = -float((weights * weights.log2()).sum())
    bits, spread = -float((weights * log_prob.mean(1)).sum()) / math.log(2), float((weights * error).norm())
    # The points have no width: "beta_tilde" is right near them, and "beta" too wide (solvers.bound).
    low, high = (0.0, 0.3) if variance == "beta_tilde" else (1.0, 2.0)
    assert entropy + low - 5 * spread < bits < entropy + high, (entropy, bits)
    value, stderr = found.bits_per_dim()
    assert value == pytest.approx(-float(found.log_prob.mean()) / (2 * math.log(2)), rel=1e-9)
    assert stderr == pytest.approx(
        float(found.log_prob.std()) / math.sqrt(n * len(points)) / (2 * math.log(2)), rel=1e-9
    )
    assert found.discrete and found.mean()[0] == pytest.approx(-value * 2 * math.log(2))


def test_bits_per_dim_need_a_discrete_decoder():
    model = mixture(VP())
    found = elbo(model, model.sample(3), CHAINS[0])
    with pytest.raises(ValueError, match=r"bounds a density, which has no bits per dimension.*DiscretizedGaussian"):
        found.bits_per_dim()
    assert replace(found, discrete=True).bits_per_dim()[0] == pytest.approx(-found.mean()[0] / (2 * math.log(2)))
    with pytest.raises(ValueError, match="whose bins are counted already: leave bin_width out"):
        replace(found, discrete=True).bits_per_dim(0.5)
    # A density of dequantized data: P of a bin is at least w^D exp(E log p).
    value, stderr = found.bits_per_dim(0.125)
    assert value == pytest.approx(-found.mean()[0] / (2 * math.log(2)) + 3) and stderr > 0
    assert elbo(model, model.sample(1), CHAINS[0]).mean()[1] is None


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: elbo(m.sde, x, CHAINS[0]), TypeError, "elbo: model must be a ScoreModel, found VP"),
        (lambda m, x: elbo(m, x, VP()), TypeError, "elbo: chain must be a GaussianChain, found VP"),
        (lambda m, x: elbo(m, x, CHAINS[0], "gaussian"), TypeError, "elbo: decoder must be a DiscretizedGaussian"),
        (lambda m, x: elbo(m, x, CHAINS[0], reference=1.0), TypeError, "reference must be a GaussianReference, found"),
        (lambda m, x: elbo(m, x.long(), CHAINS[0]), TypeError, r"elbo: x0 must be of a floating-point type.*int64"),
        (lambda m, x: elbo(m, x, CHAINS[0], draws=0), ValueError, "elbo: draws must be a positive integer, found 0"),
        (lambda m, x: elbo(m, x, CHAINS[0], variance="best"), ValueError, "elbo: variance must be 'beta'"),
        (
            lambda m, x: elbo(m, x, CHAINS[0], variance="learned"),
            TypeError,
            "elbo: variance='learned' needs a model that predicts it, found GaussianMixture without: .*LearnedVariance",
        ),
        (lambda m, x: elbo(m, x, NCSNLevels((1.0, 1e-5))), ValueError, "has less noise than VP.* at t_min"),
        (
            lambda m, x: elbo(m, x, CHAINS[0], DiscretizedGaussian(4)),
            ValueError,
            "x0: expected the centres of 4 bins over .*-0.75 to 0.75 in steps of 0.5; 2 values are none, such as 0.1",
        ),
        (lambda m, x: DiscretizedGaussian(1), ValueError, "levels must be an integer of at least 2, found 1"),
        (lambda m, x: DiscretizedGaussian(8, 1.0, -1.0), ValueError, "expected finite low < high"),
        (lambda m, x: DiscretizedGaussian(4).index(torch.tensor([1.25])), ValueError, "expected the centres"),
        (lambda m, x: DiscretizedGaussian(4).index(torch.tensor([math.nan])), ValueError, "expected the centres"),
    ],
)
def test_what_can_not_work_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(mixture(VP()), torch.tensor([[0.1, 0.2]], dtype=torch.float64))
