"""Objectives of a chain against the bound that they estimate, level by level, and the variance that they learn."""

import functools
import itertools
import math

import pytest
import torch
from oracles import gaussian, mixture, train
from torch import nn

from models import (
    MLP,
    AtLevels,
    DenoisingScoreMatching,
    Hybrid,
    LearnedVariance,
    LevelHead,
    LossAwareIndex,
    ScoreNetwork,
    UniformIndex,
    VariationalBound,
)
from models.level_sampling import IndexSampler
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import (
    EDM,
    VE,
    VP,
    DDPMChain,
    DiscretizedGaussian,
    LearnedSchedule,
    LevelPosterior,
    NCSNLevels,
    Noise,
    Prediction,
    RectifiedFlow,
    ScoreModel,
    VariancePrediction,
    geometric_sigmas,
    linear_betas,
)
from sde.bound_terms import transition_divergence
from sde.discrete import VARIANCES
from sde.levels import Levels
from solvers import DDPM, elbo
from solvers.calls import counting

CHAINS = [DDPMChain(linear_betas(25)), NCSNLevels(geometric_sigmas(20.0, 0.02, 7)), DDPMChain((0.9,))]


def network(sde, shape=(2,), row="v", seed=0):
    """A network of two outputs whose weights are not zero; its parameters are those of ``seed``."""
    torch.manual_seed(seed)
    net = MLP(shape, outputs=2, width=8, depth=1)
    model = ScoreNetwork(net, sde, LearnedVariance(PARAMETRIZATIONS[row]())).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


class Always(IndexSampler):
    """One level, as if it were the only one."""

    def __init__(self, steps, k):
        super().__init__(steps)
        self.k = k

    def sample(self, n, generator=None, device=None):
        return torch.full((n,), self.k), torch.ones(n, dtype=torch.float64)

    def probabilities(self):
        raise NotImplementedError

    def observe(self, k, losses):
        pass


def at_every_level(monkeypatch, make, model, x0, steps):
    """The loss at k = 1..N of an objective ``make(index)``, ``(N, B)``, with the noise that ``elbo`` draws there."""
    losses = []
    for k in range(1, steps + 1):
        eps = Noise(3).normal(tuple(x0.shape), k - 1, dtype=x0.dtype)
        monkeypatch.setattr(torch, "randn", lambda *_, noise=eps, **__: noise)
        losses.append(make(Always(steps, k))(model, x0).value)
    return torch.stack(losses)


@pytest.mark.parametrize("sde", [VP(), VE(), RectifiedFlow()], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.3, "learned"])
@pytest.mark.parametrize("levels", [None, 4])
def test_the_objective_over_all_levels_is_minus_the_bound(monkeypatch, sde, chain, variance, levels):
    model, decoder = network(sde), levels and DiscretizedGaussian(levels)
    x0 = Noise(1).normal((4, 2), dtype=torch.float64)
    x0 = x0 if decoder is None else decoder.centres(torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0]]), x0.dtype)
    make = functools.partial(VariationalBound, chain, decoder, variance)
    losses = at_every_level(monkeypatch, make, model, x0, chain.steps)
    objective = VariationalBound(chain, decoder, variance)
    prior = objective.prior(x0) / 2
    total = ((losses - prior).sum(0) + prior) * 2  # p = 1: every level counts once
    found = elbo(model, x0, chain, decoder, variance, seed=3)
    assert torch.allclose(total, -found.log_prob, rtol=1e-10), (total + found.log_prob).abs().max()
    assert found.nfe == chain.steps


@pytest.mark.parametrize("aware", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_objective_at_random_levels_has_the_mean_of_the_bound(aware):
    """Over 4000 batches of one sample's copies, to 5 standard errors; also where levels are drawn by their losses."""
    model, chain = network(VP()), DDPMChain(linear_betas(25))
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64).expand(400, 2)
    objective = VariationalBound(chain, index=LossAwareIndex(25) if aware else None)
    generator = torch.Generator().manual_seed(1)
    means = torch.stack([objective(model, x0, generator).value.mean().detach() for _ in range(200)])
    if aware:
        p = objective.index.probabilities()
        assert float(p.max()) > 0.05  # and not 1/25
        means = means[100:]
    found = elbo(model, x0, chain, draws=20)
    expected, error = -found.mean()[0] / 2, found.mean()[1] / 2
    stderr = math.hypot(float(means.std()) / len(means) ** 0.5, error)
    assert float(means.mean()) == pytest.approx(expected, abs=5 * stderr), (means.mean(), expected, stderr)
    assert stderr < 0.02 * expected


# L_simple.


def test_simple_is_the_bound_without_its_weight():
    """beta^2 / (2 variance alpha (1 - alpha_bar)), by the betas of the paper in Python floats (Ho et al., eq. 12)."""
    chain, model = DDPMChain(linear_betas(30)), network(VP())
    x0, eps = (Noise(2).normal((5, 2), i, dtype=torch.float64) for i in (0, 1))
    levels = Levels.of(VP(), chain, x0)
    alpha_bar = 1.0
    for k, beta in enumerate(chain.betas, start=1):
        before, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        if k == 1:
            continue
        at = levels.at(k)
        pair = model.at_level(chain.perturb(x0, k, eps), at.alpha, at.sigma, at.t)
        tilde = beta * (1 - before) / (1 - alpha_bar)
        for v, variance in ((1.0, beta), (0.0, tilde), (0.4, math.exp(0.4 * math.log(beta) + 0.6 * math.log(tilde)))):
            weight = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))
            constant = 0.5 * (tilde / variance - 1 - math.log(tilde / variance))
            simple = (eps - pair.eps).square().sum(1)
            found = transition_divergence(x0, eps, pair, at, v)
            assert torch.allclose(found, weight * simple + 2 * constant, rtol=1e-9, atol=1e-12), (k, v)


@pytest.mark.parametrize("sde", [VP(), EDM(), RectifiedFlow()], ids=str)
def test_the_levels_of_a_chain_are_drawn_equally_often(sde):
    chain = DDPMChain(linear_betas(20, 0.1, 8.0))
    times = AtLevels(chain)
    t = times.sample(200, sde, torch.Generator().manual_seed(0), dtype=torch.float64)
    values, counts = torch.unique(t, return_counts=True)
    assert torch.allclose(sde.log_snr(values), chain.log_snr(torch.arange(1, 21)), rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [10] * 20
    single = times.sample(200, sde, dtype=torch.float32)
    assert single.dtype == torch.float32 and len(single.unique()) == 20


def test_the_objective_of_ncsn(monkeypatch):
    """Song and Ermon (2019), eqs. 5 and 6: 1/2 E |sigma s(x) + (x - x_0) / sigma|^2 at each sigma, times 2 / D."""
    chain, sde = NCSNLevels(geometric_sigmas(20.0, 0.02, 7)), VE()
    model, x0 = ScoreNetwork(MLP((2,), width=8, depth=1), sde).double(), Noise(0).normal((7, 2), dtype=torch.float64)
    nn.init.normal_(model.net.last[-1].weight)
    eps = Noise(5).normal((7, 2), dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
    found = DenoisingScoreMatching("simple", AtLevels(chain))(model, x0)  # one sample for each level
    sigma = chain.sigma(torch.arange(1, 8))[:, None]
    score = model.score(x0 + sigma * eps, sde.time(chain.log_snr(torch.arange(1, 8))))
    expected = (sigma * score + eps).square().sum(1) / 2
    assert torch.allclose(found.value, expected, rtol=1e-6)
    assert torch.allclose(found.log_snr, chain.log_snr(torch.arange(1, 8)), atol=1e-6)


def test_a_table_of_levels_follows_its_process():
    chain, one = DDPMChain(linear_betas(20, 0.1, 8.0)), torch.ones(())
    times, sde = AtLevels(chain), LearnedSchedule().requires_grad_(False)
    before = times.levels(sde, one)
    assert times.levels(sde, one) is before and times.levels(VP(), one) is not before
    other = LearnedSchedule()
    with torch.no_grad():
        other.weights.fill_(1.0)
    before = times.levels(sde, one)
    sde.load_state_dict(other.state_dict())
    after = times.levels(sde, one)
    assert (after.t - before.t).abs().max() > 1e-3 and torch.allclose(sde.log_snr(after.t), after.log_snr, atol=1e-2)


# The learned variance.


@pytest.mark.parametrize("chain", CHAINS[:2], ids=str)
def test_hybrid_is_the_simple_loss_and_a_thousandth_of_the_bound(monkeypatch, chain):
    model, x0 = network(VP()), Noise(1).normal((4, 2), dtype=torch.float64)
    weight, bound = 0.25, VariationalBound(chain, variance="learned", index=Always(chain.steps, 3))
    both = Hybrid(chain, weight=weight, index=Always(chain.steps, 3))
    eps = Noise(3).normal((4, 2), dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
    with counting(model) as calls:
        found = both(model, x0)
    assert calls.n == 1
    at = Levels.of(VP(), chain, x0).at(3)
    pair = model.at_level(at.alpha * x0 + at.sigma * eps, at.alpha, at.sigma, at.t)
    a, b = model.parametrization.row(at.t, VP())
    target = a * (pair.x0 - x0) + b * (pair.eps - eps)
    # p is 1 here, so that the rate is 1 / N.
    prior = both.prior(x0) / 2
    simple = target.square().mean(1) / chain.steps
    assert torch.allclose(found.value, simple + weight * bound(model, x0).value, rtol=1e-10)
    assert Hybrid(chain).weight == 0.001 and bool((prior > 0).all())
    gradients = [
        torch.autograd.grad(value.sum(), model.net.last[-1].weight)[0]
        for value in (found.value, simple, weight * bound(model, x0).value)
    ]
    pair_part, v_part = slice(0, 2), slice(2, 4)
    assert torch.allclose(gradients[0][pair_part], gradients[1][pair_part], rtol=1e-9, atol=1e-14)
    assert torch.allclose(gradients[0][v_part], gradients[2][v_part], rtol=1e-9, atol=1e-14)
    assert gradients[2][v_part].norm() > 1e-6 and gradients[2][pair_part].norm() > 1e-6


def test_the_weight_is_the_paper_s_line_at_zero_and_stays_within():
    head = LearnedVariance(PARAMETRIZATIONS["noise"]())
    output = torch.tensor([[9.0, -0.02], [9.0, 0.0], [9.0, 0.02], [9.0, 50.0], [9.0, -50.0]], dtype=torch.float64)
    v = head.variance_weight(output)[:, 0]
    assert torch.allclose(v[:3], (output[:3, 1] + 1) / 2, atol=1e-5) and v[1] == 0.5
    assert bool(((v >= 0) & (v <= 1)).all())


@pytest.mark.parametrize("shape", [(4,), (2, 6), (3, 2, 2)], ids=str)
def test_any_rank_and_any_head(shape):
    heads = [PARAMETRIZATIONS["edm"](), LevelHead(torch.zeros(3, *shape))]
    for head in heads:
        x = Noise(0).normal((5, *shape))
        head_with = LearnedVariance(head)
        torch.manual_seed(0)
        model = ScoreNetwork(MLP(shape, outputs=head_with.outputs, width=8, depth=1), VP(), head_with)
        nn.init.normal_(model.net.last[-1].weight)
        pair, t = model(x, torch.tensor(0.3)), torch.tensor(0.3)
        found = model(x, t, with_variance=True)
        assert isinstance(pair, Prediction) and isinstance(found, VariancePrediction)
        assert torch.equal(pair.x0, found.x0) and found.v.shape == x.shape == pair.eps.shape
        alone, weights = MLP(shape, outputs=head.outputs, width=8, depth=1), model.net.state_dict()
        alone.load_state_dict({name: weights[name][: len(own)] for name, own in alone.state_dict().items()})
        alone = ScoreNetwork(alone, VP(), head)
        assert torch.allclose(alone(x, t).x0, pair.x0, rtol=1e-5, atol=1e-6)  # the first channels are the mean's
        assert bool(torch.isfinite(Hybrid(CHAINS[0])(model, x).value).all())


def test_the_weight_reaches_the_solvers_from_the_same_call_also_under_another_process():
    model, chain = network(VP()), DDPMChain(linear_betas(25))
    nn.init.zeros_(model.net.last[-1].weight[2:])
    nn.init.constant_(model.net.last[-1].bias[2:], 0.7)
    v = float(torch.sigmoid(torch.tensor(1.4, dtype=torch.float64)))
    x_T, x0 = (Noise(0).normal((4, 2), i, dtype=torch.float64) for i in (0, 1))
    for one in (model, model.under(EDM(t_min=0.01))):
        scale = float(one.sde.prior_std)
        learned, fixed = (DDPM(chain, variance, final="sample")(one, x_T=scale * x_T) for variance in ("learned", v))
        assert torch.allclose(learned.x, fixed.x, rtol=1e-9) and learned.nfe == fixed.nfe == 25
        bounds = [elbo(one, x0, chain, variance=variance) for variance in ("learned", v)]
        assert torch.allclose(bounds[0].log_prob, bounds[1].log_prob, rtol=1e-9) and bounds[0].nfe == 25
    with torch.no_grad():
        model.net.last[-1].bias[2:] = torch.tensor([-3.0, 3.0])
    assert not torch.allclose(DDPM(chain, "learned")(model, x_T=x_T).x, fixed.x, rtol=1e-3)


class Free(ScoreModel):
    """The exact pair, and one weight for all values."""

    predicts_variance = True

    def __init__(self, exact, v):
        super().__init__(exact.sde)
        self.exact, self.v, self.parametrization = exact, nn.Parameter(v), PARAMETRIZATIONS["noise"]()

    def forward(self, x, t, with_variance=False):
        pair = self.exact(x, t)
        return VariancePrediction(*pair, self.v.expand(x.shape)) if with_variance else pair


@pytest.mark.parametrize("k", [2, 3, 8, 20, 25])
@pytest.mark.parametrize("variance", [0.05, 0.6, 1.0])
def test_the_best_weight_is_that_of_the_posterior_s_variance(monkeypatch, k, variance):
    """Var(x_{k-1} | x_k) of N(0, s^2) data: the minimum over v of E L_{k-1}, an expectation without Monte Carlo."""
    chain, signs = DDPMChain(linear_betas(25)), torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2))).double()
    alpha, sigma, a, s = (float(c(i)) for i in (k, k - 1) for c in (chain.alpha, chain.sigma))
    ahead, scale = a**2 * variance + s**2, alpha / a
    best = ahead - (scale * ahead) ** 2 / (alpha**2 * variance + sigma**2)
    low, high = (float(chain.variance(k, v).log()) for v in (0.0, 1.0))
    expected = (math.log(best) - low) / (high - low)
    assert -1e-9 <= expected <= 1 + 1e-9
    monkeypatch.setattr(torch, "randn", lambda *_, **__: signs[:, 1:])
    model = Free(gaussian(VP(), variance), torch.tensor(0.5, dtype=torch.float64))
    objective = Hybrid(chain, index=Always(25, k))
    x0 = math.sqrt(variance) * signs[:, :1]
    for _ in range(40):  # Newton's method
        loss = objective(model, x0).value.mean()
        slope = torch.autograd.grad(loss, model.v, create_graph=True)[0]
        curvature = torch.autograd.grad(slope, model.v)[0]
        with torch.no_grad():
            model.v.sub_(slope / curvature).clamp_(0, 1)
    found = low + float(model.v.detach()) * (high - low)
    assert found == pytest.approx(math.log(best), abs=1e-8)


@pytest.mark.slow
def test_hybrid_training_learns_a_variance_better_than_either_end():
    """Two modes at 30 levels, 9 s: above the entropy .071 +- .009 nats/dim learned, .123 and 2.56 at the ends.

    The exact score itself has .115 with "beta".
    """
    exact, chain = mixture(VP(), torch.float32), DDPMChain(linear_betas(30))
    torch.manual_seed(0)
    net = MLP((2,), outputs=2, width=64, depth=2)
    model = ScoreNetwork(net, VP(), LearnedVariance(PARAMETRIZATIONS["noise"]()))
    train(Hybrid(chain), model, exact.sample(20000, seed=1), 2000)
    x0 = exact.sample(2000, seed=2)
    truth = float(exact.log_prob(x0).mean())
    gap = {v: (truth - elbo(model, x0, chain, variance=v, draws=4).mean()[0]) / 2 for v in ("learned", *VARIANCES)}
    of_exact = (truth - elbo(exact, x0, chain, draws=4).mean()[0]) / 2
    assert gap["learned"] < min(0.1, of_exact, gap["beta"], gap["beta_tilde"]), gap


# Which levels are drawn.


def test_losses_are_kept_as_by_a_queue_for_each_level():
    index, queues = LossAwareIndex(3, history=4), {1: [], 2: [], 3: []}
    for step, n in enumerate((2, 9, 1, 5, 30, 7)):
        k = Noise(step).words((n, 1), 0)[:, 0] % 3 + 1
        losses = Noise(step).normal((n, 1), 1)[:, 0]
        index.observe(k, losses)
        for one, loss in zip(k.tolist(), losses.tolist(), strict=True):
            queues[one] = [*queues[one], loss][-4:]
        kept = index.losses[:-1].reshape(3, 4)
        for one, queue in queues.items():
            assert sorted(kept[one - 1][: len(queue)].tolist()) == pytest.approx(sorted(queue)), (step, one)
        roots = torch.tensor([math.sqrt(sum(x * x for x in q) / 4) for q in queues.values()]).double()
        full = all(len(queue) == 4 for queue in queues.values())
        expected = 0.999 * roots / roots.sum() + 0.001 / 3 if full else torch.full((3,), 1 / 3).double()
        assert torch.allclose(index.probabilities(), expected, rtol=1e-6), step
    assert full and float(index.probabilities().sum()) == pytest.approx(1, abs=1e-12)
    other = LossAwareIndex(3, history=4)
    other.load_state_dict(index.state_dict())
    assert torch.equal(other.probabilities(), index.probabilities())
    assert torch.allclose(LossAwareIndex(4).probabilities(), torch.full((4,), 0.25).double())


def test_levels_are_drawn_with_their_probabilities_and_each_sample_alike():
    index = LossAwareIndex(4, history=1)
    index.observe(torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 2.0, 3.0, 10.0]))
    p = index.probabilities()
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(8, 4)
    for _ in range(2000):
        k, found = index.sample(8, generator)
        assert torch.equal(found, p[k - 1])
        counts[torch.arange(8), k - 1] += 1
        assert bool(((torch.bincount(k - 1, minlength=4) - 8 * p).abs() < 1).all())  # spread over the batch
    error = (p * (1 - p) / 2000).sqrt()
    assert bool(((counts / 2000 - p).abs() < 5 * error).all())
    k, found = UniformIndex(5).sample(10, generator)
    assert torch.bincount(k - 1).tolist() == [2] * 5 and float(found[0]) == pytest.approx(0.2)


def test_held_out_losses_are_not_learnt_of():
    model, objective = network(VP()), VariationalBound(CHAINS[0], index=LossAwareIndex(25))
    x0 = Noise(0).normal((4, 2), dtype=torch.float64)
    with torch.no_grad():
        objective(model, x0)
    objective.eval()(model, x0)
    assert int(objective.index.seen.sum()) == 0
    objective.train()(model, x0)
    assert int(objective.index.seen.sum()) == 4


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: AtLevels(VP()), TypeError, "chain must be a GaussianChain, found VP"),
        (lambda: VariationalBound(VP()), TypeError, "chain must be a GaussianChain, found VP"),
        (lambda: VariationalBound(CHAINS[0], LevelPosterior(4)), TypeError, "decoder must be a DiscretizedGaussian"),
        (lambda: VariationalBound(CHAINS[0], variance="best"), ValueError, "VariationalBound: variance must be 'beta'"),
        (lambda: Hybrid(CHAINS[0], weight=0.0), ValueError, "Hybrid: weight must be a positive number, found 0.0"),
        (lambda: Hybrid(CHAINS[0], index=UniformIndex(7)), ValueError, "index has 7 steps, the chain 25"),
        (lambda: LossAwareIndex(0), ValueError, "LossAwareIndex: steps must be a positive integer, found 0"),
        (lambda: LossAwareIndex(5, history=0), ValueError, "history must be a positive integer"),
        (lambda: LossAwareIndex(5, uniform=0), ValueError, r"uniform must be a share in \(0, 1\], found 0"),
        (lambda: LearnedVariance("noise"), TypeError, "expected a Parametrization such as NoiseRow"),
        (lambda: DDPM(variance="learned", compile=True), ValueError, "leave out compile"),
        (lambda: DDPM(variance="learned")(gaussian(VP()), (2, 1)), TypeError, "DDPM: variance='learned' needs a model"),
        (lambda: Hybrid(CHAINS[0]).check(gaussian(VP())), ValueError, "Hybrid trains the variance, .*LearnedVariance"),
        (lambda: Hybrid(CHAINS[0])(gaussian(VP()), torch.ones(2, 1)), ValueError, "Hybrid trains the variance"),
        (
            lambda: Hybrid(CHAINS[0]).check(network(LearnedSchedule())),
            ValueError,
            r"has parameters to learn.*VariationalDiffusion, or sde.requires_grad_\(False\)",
        ),
        (lambda: Hybrid(NCSNLevels((1.0, 1e-5))).check(network(VP())), ValueError, "has less noise than VP.* at t_min"),
        (
            lambda: DenoisingScoreMatching("likelihood", AtLevels(CHAINS[0]))(network(VP()), torch.ones(2, 2).double()),
            ValueError,
            "draws from finitely many times, without a density: use weighting='simple'",
        ),
        (
            lambda: VariationalBound(CHAINS[0], DiscretizedGaussian(4))(network(VP()), torch.ones(2, 2).double()),
            ValueError,
            "x0: expected the centres of 4 bins",
        ),
    ],
)
def test_what_can_not_work_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
