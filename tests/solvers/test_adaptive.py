"""The reverse-time SDE with a step size for every sample: unbiased, independent of the batch, ending at t_min."""

import math

import pytest
import torch
from oracles import CENTRE, correlated, gaussian, marginal, mixture, quick
from tanh_process import Benes, exact_model

import solvers.adaptive
from sde import VE, VP, Cosine, Noise, Prediction, RectifiedFlow, ScoreFunction, ScoreModel, SubVP
from sde.base import last_time
from solvers import AdaptiveSDE, SamplingDiverged
from solvers.brownian import BrownianPaths

WHOLE = (VP(), VE())


def standardized(x, model):
    mean, covariance = marginal(model, model.sde.t_min)
    return (x.double() - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def largest_z(y):
    """Of means, second moments and products, against those of N(0, I)."""
    parts = torch.stack([y[:, 0], y[:, 1], y[:, 0] ** 2 - 1, y[:, 1] ** 2 - 1, y[:, 0] * y[:, 1]])
    return float((parts.mean(1) / parts.std(1)).abs().max()) * math.sqrt(len(y))


@pytest.mark.parametrize("sde", [*WHOLE, SubVP(), RectifiedFlow(t_min=0.0)], ids=str)
def test_mean_and_covariance_of_a_correlated_gaussian(sde):
    model = correlated(sde)
    x = AdaptiveSDE(0.05, 0.01)(model, shape=(4000, 2), seed=1, dtype=torch.float64).x
    assert largest_z(standardized(x, model)) < 5


@pytest.mark.parametrize("sde", quick(WHOLE), ids=str)
def test_twenty_thousand_samples_of_a_mixture(sde):
    """Means, second moments and the share of a component."""
    model, n = mixture(sde), 20_000
    x = AdaptiveSDE(0.1, 0.02)(model, shape=(n, 2), seed=1).x.double()
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    true = sde.perturb(model.sample(200_000, 7), t, Noise(8).normal((200_000, 2), dtype=torch.float64))
    a, b = (torch.stack([*y.T, *(y**2).T, y.prod(1), (y[:, 0] > y[:, 1] + 0.3).double()]) for y in (x, true))
    z = (a.mean(1) - b.mean(1)) / (a.var(1) / n + b.var(1) / 200_000).sqrt()
    assert z.abs().max() < 5, z


@pytest.mark.parametrize("sde", WHOLE, ids=str)
def test_refused_steps_leave_no_bias(monkeypatch, sde):
    """Were their noise drawn anew, the variance would come out 2 to 4 times too large."""
    model, arguments = gaussian(sde, 0.25), dict(shape=(8000, 1), seed=3, dtype=torch.float64)
    true = float(marginal(model, sde.t_min)[1])
    assert float(AdaptiveSDE(0.1, 0.02)(model, **arguments).x.var()) / true == pytest.approx(1, abs=0.08)

    def forget(self, passed):
        self.depth = torch.zeros_like(self.depth)

    monkeypatch.setattr(BrownianPaths, "pass_by", forget)
    assert float(AdaptiveSDE(0.1, 0.02)(model, **arguments).x.var()) / true > 1.8


def test_a_smaller_tolerance_takes_more_calls_and_errs_less():
    """Along one Brownian path, which the seed does not fix but the moments show: error of the covariance."""
    model = correlated(VP())
    errors, calls = [], []
    for tolerance in (2.0, 0.5, 0.05):
        out = AdaptiveSDE(tolerance, 0.1 * tolerance)(model, shape=(4000, 2), seed=5, dtype=torch.float64)
        errors.append(float((torch.cov(standardized(out.x, model).T) - torch.eye(2)).abs().max()))
        calls.append(out.nfe)
    assert calls[0] < calls[1] < calls[2] and errors[0] > 1.5 * errors[1] > 2 * errors[2], (calls, errors)


class Watch(ScoreModel):
    """Keeps all times at which it is called."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner, self.seen = inner, []

    def forward(self, x, t):
        self.seen.append(t.expand(len(x)).double())
        return self.inner(x, t)


@pytest.mark.parametrize("sde", [*WHOLE, VP(t_max=3.0), RectifiedFlow(t_min=0.0), Cosine()], ids=str)
def test_every_sample_ends_at_t_min_and_none_goes_beyond(sde):
    model = Watch(mixture(sde))
    out = AdaptiveSDE(0.3, 0.03)(model, shape=(50, 2), trajectory=1, dtype=torch.float64)
    seen = torch.stack(model.seen)
    assert out.nfe == len(seen) and float(seen.min()) == sde.t_min and (seen[-1] == sde.t_min).all()
    assert (seen[0] == last_time(sde)).all() and float(seen.max()) == last_time(sde)
    assert (seen[1::2] <= seen[::2]).all() and (seen[2::2] <= seen[:-2:2]).all(), "time runs towards the data"
    assert out.times.tolist() == pytest.approx([last_time(sde), sde.t_min])
    assert torch.equal(out.trajectory[-1], out.x) and bool(torch.isfinite(out.x).all())
    first = seen[0] - seen[1]
    assert torch.allclose(first, torch.full_like(first, 0.01 * (sde.t_max - sde.t_min)))


@pytest.mark.parametrize("sde", WHOLE, ids=str)
def test_a_sample_depends_neither_on_its_batch_nor_on_micro_batches(sde):
    """Companions a hundred times further out take other steps, and more of them."""
    model, solver = mixture(sde), AdaptiveSDE(0.3, 0.03)
    x_T = sde.prior((9, 2)).sample(0, dtype=torch.float64)
    x_T[3:] *= 100
    whole = solver(model, x_T=x_T, seed=4)
    alone = solver(model, x_T=x_T[:1], seed=4)
    assert torch.allclose(alone.x, whole.x[:1], rtol=1e-6, atol=1e-6)
    parts = solver(model, x_T=x_T, seed=4, batch_size=2)
    assert torch.allclose(parts.x, whole.x, rtol=1e-6, atol=1e-6) and parts.nfe == whole.nfe
    assert torch.equal(whole.x, solver(model, x_T=x_T, seed=4).x)
    assert not torch.equal(whole.x, solver(model, x_T=x_T, seed=5).x)


def test_the_tolerance_is_met_by_the_rms_over_the_values_of_a_sample():
    """Ten copies of a coordinate have the error of one, and take its steps."""
    model = ScoreFunction(VP(), lambda x, t: -x)
    one = torch.full((1, 1), 1.5, dtype=torch.float64)
    walks = [solvers.adaptive._Walk(AdaptiveSDE(0.01, 0.001), model, x) for x in (one, one.expand(1, 10))]
    for walk in walks:
        for z in (0.3, -0.4, 0.9, 0.1):
            walk.advance(torch.full_like(walk.x, z))
            assert walk.underway()
    assert torch.allclose(walks[0].t, walks[1].t, rtol=1e-12) and torch.allclose(walks[0].h, walks[1].h, rtol=1e-12)


def test_one_step_is_that_of_the_algorithm():
    """x', x~, x'' and the next h in plain numbers, with the drift and the diffusion of VP for N(0, 1): -x + beta x."""
    sde, x, z, rtol, atol = VP(), 0.7, -0.4, 0.04, 0.02
    walk = solvers.adaptive._Walk(
        AdaptiveSDE(rtol, atol), gaussian(sde, 1.0), torch.full((1, 1), x, dtype=torch.float64)
    )
    walk.advance(torch.full((1, 1), z, dtype=torch.float64))

    def beta(t):
        return 0.1 + 19.9 * t

    h = 0.01 * (1 - 1e-5)
    w = math.sqrt(h) * z
    euler = x - h * 0.5 * beta(1.0) * x + math.sqrt(beta(1.0)) * w  # f - g^2 score = -beta x / 2 + beta x
    again = x - h * 0.5 * beta(1 - h) * euler + math.sqrt(beta(1 - h)) * w
    e = abs(euler - (euler + again) / 2) / max(atol, rtol * max(abs(euler), x))
    assert float(walk.x) == pytest.approx((euler + again) / 2, rel=1e-9) and float(walk.t) == pytest.approx(1 - h)
    assert float(walk.h) == pytest.approx(h * 0.9 * e**-0.9, rel=1e-6) and 0.1 < 0.9 * e**-0.9 < 2
    assert float(walk.before) == pytest.approx(euler, rel=1e-9)


def test_a_step_cut_short_by_a_known_stretch_does_not_shorten_the_next():
    """After a stretch of 1e-12 the step tried is the one wanted before, and not twice 1e-12."""
    walk = solvers.adaptive._Walk(AdaptiveSDE(), gaussian(VP(), 1.0), torch.ones(1, 1, dtype=torch.float64))
    wanted = walk.h.clone()
    walk.paths.increment(torch.full((1,), 1e-12, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    walk.advance(torch.ones(1, 1, dtype=torch.float64))
    assert float(walk.t) == 1 - 1e-12 and torch.equal(walk.h, wanted) and walk.underway()


# The Brownian paths.


def test_the_parts_of_a_step_sum_to_it_and_have_the_variance_of_their_widths():
    """One step of width 1 refused, then 0.3 refused, then 0.1, then all the rest in what widths come."""
    n = 40_000
    paths, number = BrownianPaths(torch.zeros(n, 2, dtype=torch.float64)), iter(range(1, 100))

    def step(h, passed):
        paths.reserve(int(paths.depth.max()) + 1)
        z = Noise(0).normal((n, 2), next(number), dtype=torch.float64)
        found = paths.increment(torch.full((n,), h, dtype=torch.float64), z)
        paths.pass_by(torch.full((n,), passed))
        return found

    (_, whole), (_, third) = step(1.0, False), step(0.3, False)
    taken = [step(h, True) for h in (0.1, 5.0, 0.5, 5.0)]
    assert [float(h[0]) for h, _ in taken] == pytest.approx([0.1, 0.2, 0.5, 0.2])
    assert torch.allclose(sum(w for _, w in taken), whole) and torch.allclose(taken[0][1] + taken[1][1], third)
    assert not paths.depth.any() and float(step(5.0, True)[0][0]) == 5.0
    for i, (h, w) in enumerate(taken):
        assert float(w.var()) == pytest.approx(float(h[0]), rel=0.03)
        for _, other in taken[:i]:
            assert abs(float((w * other).mean())) < 5 * float(w.std() * other.std()) / math.sqrt(2 * n)


def test_paths_differ_from_sample_to_sample_in_depth():
    paths = BrownianPaths(torch.zeros(2, 1, dtype=torch.float64))
    one = torch.ones(2, 1, dtype=torch.float64)
    paths.increment(torch.tensor([1.0, 1.0]).double(), one)
    paths.pass_by(torch.tensor([True, False]))
    paths.reserve(2)
    h, w = paths.increment(torch.tensor([0.25, 0.25]).double(), one)
    bridge = 0.25 + math.sqrt(0.25 * 0.75)
    assert h.tolist() == [0.25, 0.25] and w[:, 0].tolist() == pytest.approx([0.5, bridge])
    assert paths.depth.tolist() == [1, 2]


# The end, other processes, and failure.


@pytest.mark.parametrize("sde", WHOLE, ids=str)
def test_the_last_noise_is_what_final_says(sde):
    """The steps are the same; "mean" is less spread by the noise of the last, and "denoise" is x_0 at t_min."""
    model, arguments = gaussian(sde, 0.25), dict(shape=(200, 1), seed=2, dtype=torch.float64)
    outs = {final: AdaptiveSDE(0.3, 0.05, final=final)(model, **arguments) for final in ("sample", "mean", "denoise")}
    sample, end = outs["sample"], torch.tensor(sde.t_min, dtype=torch.float64)
    assert torch.equal(outs["denoise"].x, model(sample.x, end).x0)
    assert [out.nfe - sample.nfe for out in outs.values()] == [0, 0, 1]
    noise = sample.x - outs["mean"].x
    assert bool((noise != 0).all()) and float(noise.abs().max()) < 3
    assert abs(float(noise.mean())) < 5 * float(noise.std()) / math.sqrt(200)
    assert AdaptiveSDE(final="denoise").needs_pair and not AdaptiveSDE(final="mean").needs_pair


def test_a_process_that_is_not_gaussian():
    """Drift, diffusion and score are enough: mean, variance and share of positive values within 5 standard errors."""
    sde, n = Benes(), 8000
    x = AdaptiveSDE(0.05, 0.01)(exact_model(sde), shape=(n, 1), seed=3, dtype=torch.float64).x[:, 0]
    mean, variance, share = sde.data((1,), sde.t_min).moments()
    fourth = (x - x.mean()).pow(4).mean()
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < 0.01 * variance + 5 * math.sqrt(float(fourth - variance**2) / n)
    assert abs(float((x > 0).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)
    with pytest.raises(TypeError, match="needs the pair"):
        AdaptiveSDE(final="denoise")(exact_model(sde), shape=(2, 1))


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP(), RectifiedFlow()], ids=str)
def test_the_reverse_drift_of_the_pair_is_that_of_the_score(sde):
    model = correlated(sde)
    x, t = CENTRE + Noise(0).normal((5, 2), dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    expected = sde.drift(x, t) - sde.diffusion(t)[:, None] ** 2 * model.score(x, t)
    assert torch.allclose(model.reverse_drift(x, t), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ScoreFunction(sde, model.score).reverse_drift(x, t), expected, rtol=1e-12)
    assert torch.equal(model.score(x, t), model.score(x, t, sde.sigma(t)))


class Broken(ScoreModel):
    """NaN below a time."""

    def __init__(self, inner, below):
        super().__init__(inner.sde)
        self.inner, self.below = inner, below

    def forward(self, x, t):
        bad = torch.where(t.double() < self.below, math.nan, 0.0).expand(len(x))[:, None].to(x)
        return Prediction(*(part + bad for part in self.inner(x, t)))


def test_b32_nan_shrinks_the_step_and_is_an_error_at_the_narrowest():
    """A step is never accepted on an error that is not a number, and the time stays before that of the first NaN."""
    model = Broken(mixture(VP()), 0.5)
    with pytest.raises(SamplingDiverged, match=r"too narrow, was refused, with 3 of 3 samples still at t=0\.5.*finite"):
        AdaptiveSDE(0.3, 0.03)(model, shape=(3, 2))
    with pytest.raises(SamplingDiverged, match="too narrow"):
        AdaptiveSDE()(mixture(VP()), x_T=torch.tensor([[0.0, math.nan], [0.0, 1.0]]))
    assert not model._forward_pre_hooks


def test_b32_the_run_ends_at_t_min_or_not_at_all():
    with pytest.raises(SamplingDiverged, match=r"not at t_min after max_steps=7, with 5 of 5 samples still"):
        AdaptiveSDE(max_steps=7)(mixture(VP()), shape=(5, 2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rtol": 0.0}, "rtol and atol must be positive, found 0.0 and 0.01"),
        ({"atol": math.nan}, "rtol and atol must be positive"),
        ({"atol": math.inf}, "rtol and atol must be positive"),
        ({"max_steps": 0}, "max_steps must be a positive integer, found 0"),
        ({"final": "tweedie"}, "final must be one of mean, sample, denoise, found 'tweedie'"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"AdaptiveSDE: {message}"):
        AdaptiveSDE(**options)
