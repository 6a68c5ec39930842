"""The Langevin corrector at a fixed time: what it leaves as it is, and by how much it is wrong."""

import math

import pytest
import torch
from oracles import CORE_SDES, SDES, gaussian, marginal, mixture, quick, response

from models import MLP, GaussianMixture, ScoreNetwork
from sde import VE, VP, Density, Noise, Prediction, RectifiedFlow, ScoreFunction, ScoreModel
from solvers import DDIM, EulerMaruyama, GridSampler, Langevin, PredictorCorrector, Step
from solvers.langevin import RULES, Levels, log_ratio


class Isotropic(ScoreModel):
    """Data N(0, variance I) in any dimension."""

    def __init__(self, sde, variance):
        super().__init__(sde)
        self.variance = variance

    def total(self, t):
        return self.sde.alpha(t) ** 2 * self.variance + self.sde.sigma(t) ** 2

    def forward(self, x, t):
        scaled = x / self.total(t)
        return Prediction(self.sde.alpha(t) * self.variance * scaled, self.sde.sigma(t) * scaled)


def at(model, time, draw):
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    own = Levels(sigma**2, alpha**2 + sigma**2, torch.ones_like(t))
    return Step(model, t, t, alpha, alpha, sigma, sigma, torch.zeros_like, draw, own)


def stationary(corrector, model, time, shape, steps, burn):
    """Variance of a chain that starts from the marginal, relative to it; averaged after ``burn`` steps."""
    t = torch.tensor(time, dtype=torch.float64)
    variance = model.total(t)
    number = iter(range(1, 10**6))
    step = at(model, time, lambda x: Noise(0).normal(tuple(x.shape), next(number), dtype=x.dtype))
    x, found = variance.sqrt() * Noise(0).normal(shape, dtype=torch.float64), []
    for i in range(steps):
        x = corrector.correct(x, step)
        found += [x.square().mean() / variance] * (i >= burn)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("snr", [0.05, 0.16])
def test_the_step_is_that_of_the_paper_in_high_dimension(snr):
    """x <- x + e s + sqrt(2 e) z with e = 2 (snr |z| / |s|)^2, |z|^2 = D, where sigma |s| is near |z|."""
    dimension, sde = 20_000, VE()
    model = Isotropic(sde, 1e-4)
    x = sde.sigma(torch.tensor(0.5)) * Noise(1).normal((3, dimension), dtype=torch.float64)
    z = Noise(2).normal((3, dimension), dtype=torch.float64)
    found = Langevin(snr=snr).correct(x, at(model, 0.5, lambda _: z))
    score = -x / model.total(torch.tensor(0.5, dtype=torch.float64))
    size = 2 * snr**2 * dimension / score.square().sum(1, keepdim=True)
    assert torch.allclose(found, x + size * score + (2 * size).sqrt() * z, rtol=1e-3, atol=1e-4 * float(x.std()))


@pytest.mark.parametrize("snr", [0.16, 0.3])
def test_stationary_variance_in_high_dimension(snr):
    """1 + snr^2: the chain has V' = V / (1 - e / (2 V)), and e = 2 snr^2 V^2 / V' by the score at V'."""
    found = stationary(Langevin(snr=snr), Isotropic(VP(), 1.0), 0.5, (40, 2000), int(6 / snr**2), int(2 / snr**2))
    assert found == pytest.approx(1 + snr**2, abs=0.004)


@pytest.mark.parametrize("dimension", [1, 2, 8])
def test_stationary_variance_in_low_dimension(dimension):
    """1 + 2 / (D + 32) for the step's dependence on the place, and 1 + snr^2 or a little more."""
    model, n = Isotropic(VE(), 1e-6), 4000 // dimension
    found = stationary(Langevin(snr=0.16), model, 0.5, (n, dimension), 600, 150)
    expected = (1 + 2 / (dimension + 32)) * (1 + 0.16**2)
    assert expected - 0.02 < found < expected + 0.03


def test_one_correction_of_the_exact_marginal_moves_it_by_the_square_of_the_step():
    """In one dimension by quadrature: E x^2 after less before is O(snr^2), and falls by 4 when snr halves."""
    sde, nodes = VP(), torch.linspace(-9, 9, 20001, dtype=torch.float64)
    model = gaussian(sde, 1.0)
    weights = torch.exp(-0.5 * nodes**2) / torch.exp(-0.5 * nodes**2).sum()

    def moved(snr):
        corrector = Langevin(snr=snr)
        moved = corrector.correct(nodes[:, None], at(model, 0.5, torch.zeros_like))[:, 0]
        noise = corrector.correct(nodes[:, None], at(model, 0.5, torch.ones_like))[:, 0] - moved
        return float((weights * (moved**2 + noise**2)).sum()) - 1

    assert moved(0.1) / moved(0.05) == pytest.approx(4, abs=0.5)
    # 2 E[e (1 - u)] with u = x^2 / V, whose variance is 2, and e = 2 snr^2 33 / (32 + u); and the square of the step.
    assert 0 < moved(0.16) < 4 * 0.16**2 * 2 / 33 + 4 * 0.16**4


def test_noise_is_added_in_the_last_step_too():
    """Without it the last corrections would shrink the variance by 4 snr^2 each."""
    for sde in SDES:
        v = float(sde.sigma(torch.tensor(sde.t_min, dtype=torch.float64)) ** 2)
        model, arguments = gaussian(sde, v), dict(shape=(50, 1), seed=0, dtype=torch.float64)
        mean, sample = (Langevin(5, "log_snr", f)(model, **arguments).x for f in ("mean", "sample"))
        assert torch.equal(mean, sample), sde


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_the_step_is_bounded_where_the_score_vanishes(sde):
    model, z = gaussian(sde, 0.25), torch.ones(1, 1, dtype=torch.float64)
    for time in (sde.t_min, sde.t_max):
        for snr in (0.16, 10.0):
            found = Langevin(snr=snr).correct(0 * z, at(model, time, lambda _: z))
            sigma = sde.sigma(torch.tensor(time, dtype=torch.float64))
            assert 0 < float(found) <= float(sigma) * math.sqrt(0.5) * (1 + 1e-9), (time, snr)


# Which bias belongs to which rule.


@pytest.mark.parametrize("snr", [0.05, 0.16, 0.7])
@pytest.mark.parametrize("v", [1.0, 0.25, 1e-2, 1e-4])
def test_b9_the_fixed_step_has_the_stationary_variance_of_the_recursion(snr, v):
    """V / (1 - e / (2 V)) from the map's own two coefficients; on pure noise 1 / (1 - snr^2)."""
    for sde in CORE_SDES:
        model, corrector, one = gaussian(sde, v), Langevin(snr=snr, step_rule="fixed"), torch.ones(1, 1).double()
        scale = float(corrector.correct(one, at(model, 0.5, torch.zeros_like)))
        noise = float(corrector.correct(0 * one, at(model, 0.5, torch.ones_like)))
        total, sigma = float(marginal(model, 0.5)[1]), float(sde.sigma(torch.tensor(0.5).double()))
        size = 2 * (snr * sigma) ** 2
        assert (scale, noise) == pytest.approx((1 - size / total, math.sqrt(2 * size)), rel=1e-12), sde
        at_rest = noise**2 / (1 - scale**2)
        assert at_rest == pytest.approx(total / (1 - size / (2 * total)), rel=1e-11), sde
        assert scale**2 * at_rest + noise**2 == pytest.approx(at_rest, rel=1e-12), sde
        if v == 1e-4 and isinstance(sde, VE):
            assert at_rest / total == pytest.approx(1 / (1 - snr**2), rel=1e-3)


@pytest.mark.parametrize("dimension", [32, 1000])
def test_b9_the_step_of_the_actual_score_has_another(dimension):
    """E[1 / |x|^2]^-1 = (1 + snr^2) D V in any dimension, and not 1 / (1 - snr^2): 1.25 and not 1.33 at snr 0.5."""
    model, snr = Isotropic(VP(), 1.0), 0.5
    step, corrector = at(model, 0.5, draws()), Langevin(snr=snr, step_rule="song")
    x, inverse = Noise(7).normal((40_000 // dimension, dimension), dtype=torch.float64), []
    for i in range(120):
        x = corrector.correct(x, step)
        inverse += [dimension / x.square().sum(1)] * (i >= 20)
    found = torch.stack(inverse).mean(0)  # over the time; the chains are independent
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(1 / (1 + snr**2), abs=5 * error)
    assert error < 0.003


def test_b8_a_zero_score_keeps_every_rule_finite_and_every_sample_its_own():
    """The norm of each sample alone: a companion far out or at the mode changes nothing."""
    x = torch.tensor([[0.3, -0.2], [0.0, 0.0], [50.0, 40.0]], dtype=torch.float64)
    model = Isotropic(VP(), 0.25)
    for rule in RULES:
        z = torch.ones(3, 2, dtype=torch.float64)
        corrector = Langevin(step_rule=rule)
        found = corrector.correct(x, at(model, 0.3, lambda like, z=z: z[: len(like)]))
        assert bool(torch.isfinite(found).all()), rule
        alone = corrector.correct(x[:1], at(model, 0.3, lambda like, z=z: z[: len(like)]))
        assert torch.equal(alone, found[:1]), rule


def draws(seed=0):
    """Successive draws of a seed."""
    number = iter(range(1, 10**6))
    return lambda like: Noise(seed).normal(tuple(like.shape), next(number), dtype=like.dtype)


# Adjusted by accepting and refusing.


def pair(model, corrector, x, y, time):
    """States at x and y, and the noise that moves one to the other."""
    step = at(model, time, None)
    state, moved = corrector._at(x, step), corrector._at(y, step)
    size = state.size[:, None]
    return state, moved, (y - x - size * state.score) / (2 * size).sqrt()


@pytest.mark.parametrize("rule", RULES)
def test_the_ratio_is_that_of_the_densities(rule):
    """p(y) q(x | y) / (p(x) q(y | x)) from torch's own normal distributions."""
    model, corrector = mixture(VP()), Langevin(snr=0.7, step_rule=rule, adjusted=True)
    x, y = (Noise(i).normal((50, 2), dtype=torch.float64) for i in (1, 2))
    state, moved, z = pair(model, corrector, x, y, 0.3)

    def log_q(end, start):
        size = start.size[:, None]
        normal = torch.distributions.Normal(start.x + size * start.score, (2 * size).sqrt())
        return normal.log_prob(end.x).sum(1)

    expected = moved.log_prob + log_q(state, moved) - state.log_prob - log_q(moved, state)
    assert torch.allclose(log_ratio(state, moved, z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_the_adjusted_kernel_is_in_detailed_balance_and_leaves_p_as_it_is(rule):
    """On a mixture in one dimension by quadrature: p(x) K(x, y) is symmetric, and p K with what is refused is p."""
    sde = VP()
    one = torch.ones(2, dtype=torch.float64)
    model = GaussianMixture(one, torch.tensor([[-1.0], [1.5]]).double(), 0.1 * one[:, None, None], sde)
    corrector, n = Langevin(snr=0.6, step_rule=rule, adjusted=True), 1201
    nodes = torch.linspace(-7, 7, n, dtype=torch.float64)
    x, y = nodes.repeat_interleave(n)[:, None], nodes.repeat(n)[:, None]
    state, moved, z = pair(model, corrector, x, y, 0.3)
    accept = log_ratio(state, moved, z).clamp(max=0).exp()
    log_q = -0.5 * z[:, 0] ** 2 - 0.5 * (4 * math.pi * state.size).log()
    flow = (state.log_prob.exp() * log_q.exp() * accept).reshape(n, n)
    assert float((flow - flow.T).abs().max()) < 1e-12 * float(flow.max())
    width = float(nodes[1] - nodes[0])
    p, proposed = state.log_prob.exp().reshape(n, n)[:, 0], (log_q.exp() * accept).reshape(n, n)
    after = width * p @ proposed + p * (1 - width * proposed.sum(1))
    assert torch.allclose(after, p, rtol=0, atol=1e-12)
    plain = width * p @ log_q.exp().reshape(n, n)
    assert float((plain - p).abs().max()) > 0.01 * float(p.max())  # and without adjustment it is not left


def test_a_move_is_made_with_the_probability_of_the_ratio():
    """The uniform number just below it, and just above."""
    model, corrector = mixture(VP()), Langevin(snr=0.9, adjusted=True, step_rule="fixed")
    x, z = (Noise(i).normal((200, 2), dtype=torch.float64) for i in (3, 4))
    state = corrector._at(x, at(model, 0.2, None))
    size = state.size[:, None]
    moved = corrector._at(x + size * state.score + (2 * size).sqrt() * z, at(model, 0.2, None))
    ratio = log_ratio(state, moved, z)
    for shift, kept in ((-1e-6, ratio < -1), (1e-6, ratio > 0)):
        number = torch.special.ndtri((ratio.clamp(max=-1e-3) + shift).exp())[:, None]
        answers = iter((z, number))
        found = corrector.correct(x, at(model, 0.2, lambda _, answers=answers: next(answers)))
        expected = moved.x if shift < 0 else torch.where(kept[:, None], moved.x, x)
        assert torch.equal(found, expected), shift
    assert int((ratio < -1).sum()) > 20 and int((ratio > 0).sum()) > 20


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("snr", [0.3, 0.6])
def test_adjusted_steps_leave_mean_and_covariance_exact(rule, snr):
    """Ten steps from the exact p_t, 20 000 samples: within five standard errors, where the unadjusted are far off."""
    sde, n = VP(), 20_000
    model = mixture(sde)
    t = torch.tensor(0.15, dtype=torch.float64)
    x = sde.perturb(model.sample(n, seed=1), t, Noise(2).normal((n, 2), dtype=torch.float64))
    reference = sde.perturb(model.sample(10 * n, seed=3), t, Noise(4).normal((10 * n, 2), dtype=torch.float64))

    def score(x):
        """The worst of five moments, in standard errors."""
        parts = [torch.stack([y[:, 0], y[:, 1], y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1]]) for y in (x, reference)]
        gap = parts[0].mean(1) - parts[1].mean(1)
        return float((gap / (parts[0].var(1) / n + parts[1].var(1) / (10 * n)).sqrt()).abs().max())

    found = [
        score(Langevin(snr=snr, corrections=10, step_rule=rule, adjusted=a).correct(x, at(model, 0.15, draws(5))))
        for a in (False, True)
    ]
    assert found[1] < 5
    if snr == 0.6 and rule != "regularized":  # whose cap holds its step below a quarter of sigma^2
        assert found[0] > 10, found


def test_adjusted_steps_reach_the_stationary_variance_from_elsewhere():
    """From three times too wide, at a step where the unadjusted variance is 1.96 times too large on pure noise."""
    model, n = Gaussian(VE(), 1e-4), 20_000
    total = model.total(torch.tensor(0.5).double())
    x = (3 * total).sqrt() * Noise(1).normal((n, 1), dtype=torch.float64)
    corrector = Langevin(snr=0.7, corrections=60, step_rule="fixed", adjusted=True)
    found = corrector.correct(x, at(model, 0.5, draws())).square() / total
    assert float(found.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    free = Langevin(snr=0.7, corrections=60, step_rule="fixed").correct(x, at(model, 0.5, draws())).square() / total
    assert float(free.mean()) == pytest.approx(1 / (1 - 0.49), abs=10 * math.sqrt(2 / n))


class Gaussian(Isotropic, Density):
    """With a density, given but for its constant, as of an energy."""

    def log_prob(self, x, t):
        return 17.0 - 0.5 * x.square().flatten(1).sum(1) / self.total(t)


ADJUSTED = [
    Langevin(10, "log_snr", adjusted=True, corrections=2),
    PredictorCorrector(EulerMaruyama(10, "log_snr"), Langevin(adjusted=True, step_rule="song")),
    PredictorCorrector(DDIM(10, "log_snr", "denoise"), Langevin(adjusted=True, step_rule="fixed", snr=2.0)),
]


@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_adjusted_samplers_count_their_calls_and_keep_samples_apart(sampler):
    for sde in (*CORE_SDES, RectifiedFlow(t_min=0.0)):
        model = mixture(sde)
        out = sampler(model, shape=(16, 2), seed=2)
        assert bool(torch.isfinite(out.x).all()) and out.nfe == sampler.calls, sde
        alone = sampler(model, shape=(1, 2), seed=2).x
        assert torch.allclose(alone, out.x[:1], rtol=1e-12, atol=1e-12), sde
    assert [s.calls for s in ADJUSTED] == [30, 30, 31]


@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_adjusted_steps_need_a_density_and_say_so_before_any_work(sampler):
    network = ScoreNetwork(MLP((2,), width=8, depth=1), VP())
    for model in (network, ScoreFunction(VP(), lambda x, t: -x), mixture(VP()).under(VP(t_max=0.5))):
        if sampler.needs_pair and isinstance(model, ScoreFunction):
            continue
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
        with pytest.raises(TypeError, match=r"needs the log-density of a Density such as .* leave out adjusted=True"):
            sampler(model, shape=(2, 2))


def test_an_adjusted_score_function_with_a_density_works_under_any_process():
    class Known(ScoreFunction, Density):
        def log_prob(self, x, t):
            return -0.5 * x.square().flatten(1).sum(1)

    found = Langevin(3, adjusted=True)(Known(VP(), lambda x, t: -x), shape=(4, 3, 2)).x
    assert found.shape == (4, 3, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Langevin(step_rule="annealed"), "step_rule must be one of regularized, song, fixed, found 'annealed'"),
        (lambda: Langevin(step_rule="fixed", snr=1.0), "grow without bound for snr >= 1, found 1.0"),
        (lambda: Langevin(snr=math.inf), "snr must be positive and finite, found inf"),
        (lambda: Langevin(corrections=True), "corrections must be an integer of at least 0, found True"),
        (lambda: Langevin(adjusted=True, compile=True), "leave out compile=True or adjusted=True"),
        (
            lambda: PredictorCorrector(DDIM(compile=True), Langevin(adjusted=True)),
            "leave out compile=True or adjusted=True of the corrector",
        ),
    ],
)
def test_bad_options_are_refused_when_constructed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Alone over a grid, and with a predictor.


class Still(GridSampler):
    """A predictor that does no more than keep the state in scale."""

    order, stochastic, calls_per_step = 0, False, 0

    def plan(self, path):
        return (Langevin().plan(path).scale,)

    def step(self, x, step, carry):
        return step.own[0] * x, None


@pytest.mark.parametrize("adjusted", [False, True])
def test_with_a_predictor_that_does_nothing_langevin_is_left(adjusted):
    for sde in CORE_SDES:
        model, arguments = mixture(sde), dict(shape=(5, 2), seed=2)
        corrector = Langevin(9, corrections=2, adjusted=adjusted)
        whole = PredictorCorrector(Still(9), corrector)(model, **arguments)
        alone = corrector(model, **arguments)
        assert torch.equal(whole.x, alone.x) and whole.nfe == alone.nfe == 9 * (2 + adjusted), sde


def test_no_corrections_make_no_calls_and_draw_no_noise():
    for adjusted in (False, True):
        sampler = Langevin(5, corrections=0, adjusted=adjusted)
        out = PredictorCorrector(DDIM(5), sampler)(mixture(VP()), shape=(3, 2), seed=1)
        assert torch.equal(out.x, DDIM(5)(mixture(VP()), shape=(3, 2), seed=1).x) and out.nfe == 5
        assert not sampler.stochastic
        assert PredictorCorrector(DDIM(5), sampler).encode(mixture(VP()), out.x).shape == (3, 2)


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_alone_it_follows_data_as_wide_as_the_scale(monkeypatch, sde):
    """By the exact recursion of the fixed rule: data N(1, 1), 500 steps.

    In a state that kept its scale from one time to the next the variance of VE would come out 1.6 times too large.
    """
    model = gaussian(sde, 1.0, 1.0)
    found = response(monkeypatch, Langevin(500, "log_snr", step_rule="fixed"), model)
    start = torch.zeros(1, dtype=torch.float64), sde.prior_std**2 * torch.eye(1, dtype=torch.float64)
    mean, variance = (float(part) for part in found.moments(*start))
    exact, total = (float(part) for part in marginal(model, sde.t_min))
    assert variance / total == pytest.approx(1.0, abs=0.12)
    assert abs(mean - exact) < 0.5
