"""DDPM and annealed Langevin over discrete levels, driven by models in continuous time: against exact recursions."""

import itertools
import math

import pytest
import torch
from oracles import ROWS, SDES, ExactNet, correlated, gaussian, marginal, mixture, one_step, quick, response

from models import MLP, GaussianMixture, ScoreNetwork, denoising_score_matching
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import (
    EDM,
    VE,
    VP,
    DDPMChain,
    NCSNLevels,
    Prediction,
    ScoreFunction,
    ScoreModel,
    cosine_betas,
    geometric_sigmas,
    linear_betas,
    sde_betas,
)
from sde.levels import level_times
from solvers import DDIM, DDPM, AnnealedLangevin, EulerMaruyama, Langevin, PredictorCorrector
from solvers.base import SamplingDiverged

FEW = AnnealedLangevin(NCSNLevels(geometric_sigmas(10.0, 0.01, 12)), steps_per_level=3, step_size=1e-5)
SAMPLERS = [
    DDPM(DDPMChain(linear_betas(30))),
    DDPM(DDPMChain(linear_betas(30)), "beta", "sample"),
    DDPM(DDPMChain(cosine_betas(30)), 0.3),
    DDPM(NCSNLevels(geometric_sigmas(levels=30)), "beta"),
    FEW,
]


class Cheap(ScoreModel):
    """A model of no cost, which keeps the times that it is asked at."""

    def __init__(self, sde):
        super().__init__(sde)
        self.seen = []

    def forward(self, x, t):
        self.seen.append(float(t))
        return Prediction(0 * x, x / self.sde.sigma(t))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 64, 999, 1000, 5000])
def test_b2_indices_are_a_permutation(monkeypatch, n):
    """Level N, N - 1, ..., 1, each once, and the network is asked at the time of that level, to rounding."""
    chain, model, seen = DDPMChain(sde_betas(VP(), n)), Cheap(VP()), []
    reverse = DDPMChain.reverse
    monkeypatch.setattr(DDPMChain, "reverse", lambda self, p, k, v: seen.append(k) or reverse(self, p, k, v))
    DDPM(chain)(model, x_T=torch.zeros(1, 1, dtype=torch.float64))
    assert seen == list(range(n, 0, -1))
    assert model.seen == pytest.approx([k / n for k in seen], abs=1e-9)


# The coefficients of each step, from the papers.


def ancestral_recursion(alphas, sigmas, v, choice):
    """Ho et al., eq. 11 and algorithm 2, and Song et al. (2021), eq. 47: start and noises of x_0, on N(0, v) data."""
    start, noise = 1.0, []
    for (a, s), (b, r) in itertools.pairwise(zip(alphas, sigmas, strict=True)):  # from level k to k - 1
        step, total = (a / b) ** 2, a**2 * v + s**2
        beta = s**2 - step * r**2
        mean = (1 - beta / s * s / total) / math.sqrt(step)  # eps_hat = s x / total
        variance = {"beta": beta, "beta_tilde": beta * r**2 / s**2}[choice]
        start, noise = mean * start, [mean * n for n in noise] + [math.sqrt(variance)]
    return start, noise


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
@pytest.mark.parametrize("chain", [DDPMChain(linear_betas(40)), NCSNLevels(geometric_sigmas(20.0, 0.05, 40))], ids=str)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_every_coefficient_of_ddpm_is_that_of_the_recursion(monkeypatch, sde, chain, variance):
    """At levels inside the process's range, where the model in continuous time is exact on the chain."""
    chain = chain.subset(range(1, 31))
    assert float(chain.sigma(30) / chain.alpha(30)) < 50
    alphas, sigmas = (c.flip(0).tolist() for c in chain.levels())
    end = {name: float(getattr(sde, name)(torch.tensor(sde.t_max).double())) for name in ("alpha", "sigma")}
    first = math.hypot(alphas[0], sigmas[0]) / math.hypot(*end.values())
    last = float(sde.alpha(torch.tensor(sde.t_min).double()))
    for v in (1.0, 0.25, 1e-4):
        start, noise = ancestral_recursion(alphas, sigmas, v, variance)
        for final in ("mean", "sample"):
            found = response(monkeypatch, DDPM(chain, variance, final), gaussian(sde, v))
            assert float(found.start) == pytest.approx(last * first * start, rel=1e-9)
            expected = torch.tensor(noise, dtype=torch.float64) * last
            expected[-1] *= final == "sample"
            assert torch.allclose(found.noise[:, 0, 0], expected, rtol=1e-9, atol=1e-12), (v, final)


class OnTimes(DDIM):
    """DDIM over the times of a chain's levels."""

    def times(self, sde):
        return torch.cat([level_times(sde, self.grid).flip(0), torch.tensor([sde.t_min], dtype=torch.float64)])

    def __post_init__(self):
        pass


@pytest.mark.parametrize("steps", [5, 50])
def test_ddpm_over_the_levels_of_vp_is_ancestral_and_ddim(steps):
    """The same random numbers, the same states, at all levels; below level 1 one goes to t_min, the other to x_0."""
    model = mixture(VP())
    chain = DDPMChain(sde_betas(VP(), steps))
    arguments = dict(shape=(16, 2), seed=3, dtype=torch.float64, trajectory=1)
    found = DDPM(chain, "beta_tilde")(model, **arguments).trajectory
    expected = OnTimes(steps, chain, eta=1.0)(model, **arguments).trajectory
    assert (found[:-1] - expected[:-1]).abs().max() < 1e-12 * 10
    assert not torch.equal(found[1], found[2]) and len(found) == steps + 1
    assert torch.allclose(found[-1], expected[-1], atol=0.05)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_a_step_is_euler_maruyama_to_second_order(variance):
    """The difference of the means falls by 4 when the step is halved."""
    model, x = gaussian(VP(), 0.25, 0.3), torch.ones(1, 1, dtype=torch.float64)

    def difference(steps):
        chain, t = DDPMChain(sde_betas(VP(), steps)), 0.5
        index = steps - steps // 2  # at level steps / 2
        one = one_step(DDPM(chain, variance), model, t, t - 1 / steps, x, index)
        return float(one - one_step(EulerMaruyama(), model, t, t - 1 / steps, x))

    assert difference(2000) / difference(4000) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("kind", ["ddpm", "ncsn"])
def test_the_variance_of_the_samples_converges_as_one_over_n(monkeypatch, variance, kind):
    """To that of the data, 0.25. Ratio 2 when N doubles; with beta_tilde it is 1.93 at DDPM's 1600, and rising."""
    sizes = (800, 1600) if (kind, variance) == ("ddpm", "beta_tilde") else (200, 400)
    errors = []
    for n in sizes:
        betas = linear_betas(n)
        chain, sde = (DDPMChain(betas), VP()) if kind == "ddpm" else (NCSNLevels(geometric_sigmas(levels=n)), VE())
        model = gaussian(sde, 0.25)
        moments = response(monkeypatch, DDPM(chain, variance, "sample"), model).moments(*marginal(model, sde.t_max))
        errors.append(float(moments[1]) - 0.25)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1), errors
    assert abs(errors[0]) < 0.02


# Annealed Langevin dynamics.


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
def test_one_level_is_proposition_3(monkeypatch, sde):
    """A point as data, noise g s at the start: s_T^2 / s^2 in the form that is printed, to 1e-10."""
    point = torch.tensor([[0.3]], dtype=torch.float64)
    model = GaussianMixture(torch.ones(1), point, torch.zeros(1, 1, 1, dtype=torch.float64), sde)
    s, epsilon, ratio, number = 0.7, 0.05, 1.2, 4
    sampler = AnnealedLangevin(NCSNLevels((ratio * s, s)), number, epsilon, "sample")
    found = response(monkeypatch, sampler, model, draws=number)
    last = found.noise[-number:, 0, 0].square().sum() / float(level_alpha(sde, s)) ** 2
    kept = (1 - epsilon / s**2) ** (2 * number)
    printed = 2 * epsilon / (s**2 - s**2 * (1 - epsilon / s**2) ** 2)
    # (1 - u)^2T (g^2 - c) + c is what is left of the start, and the noise of the level's own steps, (1 - (1 - u)^2T) c.
    assert float(last / s**2) == pytest.approx(float((1 - kept) * printed), abs=1e-10)
    decay = float(found.noise[number - 1, 0, 0] / (math.sqrt(2 * epsilon * ratio**2) * level_alpha(sde, s)))
    assert decay**2 == pytest.approx(kept, abs=1e-10)


def level_alpha(sde, sigma):
    return sde.alpha(sde.time(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)))


def langevin_recursion(sigmas, v, number, epsilon):
    """In y = x / alpha: y <- y - a y / (v + s^2) + sqrt(2 a) z, a = epsilon s^2 / s_L^2."""
    start, noise = 1.0, []
    for s in sigmas:
        a = epsilon * s**2 / sigmas[-1] ** 2
        for _ in range(number):
            keep = 1 - a / (v + s**2)
            start, noise = keep * start, [keep * n for n in noise] + [math.sqrt(2 * a)]
    return start, noise


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
@pytest.mark.parametrize("final", ["sample", "denoise"])
def test_every_coefficient_of_annealed_langevin_is_that_of_the_recursion(monkeypatch, sde, final):
    sigmas, number, epsilon = geometric_sigmas(20.0, 0.05, 15), 3, 2e-4
    sampler = AnnealedLangevin(NCSNLevels(sigmas), number, epsilon, final)
    end = torch.tensor(sde.t_max, dtype=torch.float64)
    first = math.hypot(1, sigmas[0]) / float(torch.hypot(sde.alpha(end), sde.sigma(end)))
    for v in (1.0, 0.25, 1e-4):
        start, noise = langevin_recursion(sigmas, v, number, epsilon)
        scale = v / (v + sigmas[-1] ** 2) if final == "denoise" else float(level_alpha(sde, sigmas[-1]))
        found = response(monkeypatch, sampler, gaussian(sde, v), draws=number)
        assert float(found.start) == pytest.approx(scale * first * start, rel=1e-8), v
        assert torch.allclose(found.noise[:, 0, 0], scale * torch.tensor(noise, dtype=torch.float64), rtol=1e-8), v


def test_annealed_langevin_reaches_a_correlated_gaussian(monkeypatch):
    """Too wide where a level's steps are too few to follow it; then by the size of the steps, u / 2 = 5 %."""
    target = correlated(VP())
    covariance = (target.axes[0] * target.variances[0]) @ target.axes[0].T
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    errors = []
    for number, epsilon in ((2, 2e-5), (10, 1e-5), (40, 1e-5)):
        sampler = AnnealedLangevin(NCSNLevels(geometric_sigmas(20.0, 0.01, 40)), number, epsilon)
        prior = torch.zeros(2).double(), torch.eye(2).double()
        mean, found = response(monkeypatch, sampler, target, 2, draws=number).moments(*prior)
        errors.append(float((root @ found @ root.T - torch.eye(2)).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.15, errors
    assert torch.allclose(mean, target.means[0], atol=0.02)


# Networks.


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_networks_of_all_parametrizations_sample_alike(sde, name):
    exact = correlated(sde)
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
    for sampler in (DDPM(DDPMChain(linear_betas(30))), FEW):
        x_T = sde.prior((4, 2)).sample(0, dtype=torch.float64)
        found, expected = (sampler(m, x_T=x_T).x for m in (model, exact))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), sampler


@pytest.mark.parametrize("sde", quick([VP(), VE()], VE), ids=str)
def test_one_trained_network_drives_both_chains(sde):
    """Two modes at (+-1.5, 0.5) of deviation 0.2; a small network, trained in continuous time for two seconds."""
    torch.manual_seed(0)
    centre = torch.tensor([1.5, 0.0])

    def data(n):
        return 0.2 * torch.randn(n, 2) + torch.tensor([0.0, 0.5]) + centre * (2 * torch.randint(2, (n, 1)) - 1)

    model = ScoreNetwork(MLP((2,), width=64, depth=2), sde, "noise")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        denoising_score_matching(model, data(256)).mean().backward()
        optimizer.step()
    levels = NCSNLevels(geometric_sigmas(10.0, 0.02, 60))
    for sampler in (DDPM(DDPMChain(linear_betas(200))), DDPM(levels, "beta"), AnnealedLangevin(levels, 5, 2.5e-5)):
        x = sampler(model, shape=(1000, 2), seed=1).x
        side = (x[:, 0] > 0).float().mean()
        folded = torch.stack([x[:, 0].abs(), x[:, 1]], 1)
        assert 0.35 < float(side) < 0.65, (sampler, side)
        assert torch.allclose(folded.mean(0), torch.tensor([1.5, 0.5]), atol=0.15), (sampler, folded.mean(0))
        assert bool((folded.std(0) > 0.1).all() and (folded.std(0) < 0.4).all()), (sampler, folded.std(0))


# The contract of samplers.


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samples_are_finite_counted_and_independent_of_the_batch(sampler):
    for sde in SDES:
        sampler = sampler.with_steps(min(sampler.steps, 12))
        model = mixture(sde)
        whole = sampler(model, shape=(8, 2), seed=5, dtype=torch.float64, trajectory=1)
        alone = sampler(model, shape=(1, 2), seed=5, dtype=torch.float64).x
        assert torch.allclose(alone, whole.x[:1], rtol=1e-12, atol=1e-12), sde
        assert whole.nfe == sampler.steps * sampler.calls_per_step + (sampler.final == "denoise"), sde
        assert bool(torch.isfinite(whole.trajectory).all()) and len(whole.trajectory) == sampler.steps + 1, sde
        times = sampler.times(sde)
        assert bool((times.diff() <= 0).all()) and times.dtype == torch.float64, sde
        assert float(times[-1]) >= sde.t_min, sde
        single = sampler(mixture(sde, torch.float32), shape=(8, 2), seed=5).x
        assert single.dtype == torch.float32 and torch.allclose(single.double(), whole.x, atol=2e-2), sde


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 6), (3, 2, 2, 2)], ids=str)
def test_data_of_any_rank(sampler, shape):
    model = ScoreNetwork(MLP(shape[1:], width=8, depth=1), VP())
    assert sampler.with_steps(3)(model, shape=shape).x.shape == shape


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_fewer_steps_are_a_subset_of_the_levels(sampler):
    for n in (1, 2, 11):
        fewer = sampler.with_steps(n)
        assert fewer.steps == n and type(fewer) is type(sampler)
        assert fewer(mixture(VP()), shape=(4, 2)).x.shape == (4, 2)
    assert sampler.with_steps(sampler.steps) == sampler
    with pytest.raises(ValueError, match="respaced steps must be an integer in"):
        sampler.with_steps(sampler.steps + 1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_corrector_can_follow(sampler):
    model = mixture(VP())
    arguments = dict(shape=(64, 2), seed=2, dtype=torch.float64)
    plain = sampler(model, **arguments)
    assert torch.equal(PredictorCorrector(sampler, Langevin(corrections=0))(model, **arguments).x, plain.x)
    corrected = PredictorCorrector(sampler, Langevin(corrections=2))(model, **arguments)
    assert corrected.nfe == plain.nfe + 2 * sampler.steps and bool(torch.isfinite(corrected.x).all())


def test_the_last_noise_is_what_final_says(monkeypatch):
    model, chain = gaussian(VP(), 0.25), DDPMChain(linear_betas(30))
    for variance in ("beta", "beta_tilde", 0.5):
        mean, sample = (response(monkeypatch, DDPM(chain, variance, final), model) for final in ("mean", "sample"))
        assert torch.equal(mean.start, sample.start) and torch.equal(mean.noise[:-1], sample.noise[:-1])
        assert not mean.noise[-1].any() and bool(sample.noise[-1].any()) == (variance != "beta_tilde")


def test_a_sampler_never_returns_nan():
    class Broken(Cheap):
        def forward(self, x, t):
            x0, eps = super().forward(x, t)
            return Prediction(x0 if float(t) > 0.55 else x0 * math.nan, eps)

    with pytest.raises(SamplingDiverged, match=r"step 6 of 10, at t=0.4, .* not finite"):
        DDPM(DDPMChain(sde_betas(VP(), 10)))(Broken(VP()), shape=(3, 2))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: DDPM(VP()), TypeError, "DDPM: chain must be a GaussianChain, found VP"),
        (lambda: DDPM(variance="fixed"), ValueError, "DDPM: variance must be 'beta', 'beta_tilde' or a weight"),
        (lambda: DDPM(variance=1.5), ValueError, "found 1.5"),
        (lambda: DDPM(variance=True), ValueError, "found True"),
        (lambda: DDPM(final="denoise"), ValueError, "DDPM: final must be 'mean' or 'sample', found 'denoise'"),
        (lambda: AnnealedLangevin(DDPMChain()), TypeError, "levels must be a NCSNLevels, found DDPMChain"),
        (
            lambda: AnnealedLangevin(steps_per_level=0),
            ValueError,
            "steps_per_level must be a positive integer",
        ),
        (lambda: AnnealedLangevin(steps_per_level=2.0), ValueError, "steps_per_level must be a positive integer"),
        (
            lambda: AnnealedLangevin(step_size=2e-4),
            ValueError,
            "step_size must lie between 0 and 0.0002.* found",
        ),
        (lambda: AnnealedLangevin(step_size=0.0), ValueError, "step_size must lie between"),
        (lambda: AnnealedLangevin(final="mean"), ValueError, "final must be 'sample' or 'denoise', found 'mean'"),
        (
            lambda: DDPM(NCSNLevels((1.0, 0.001)))(mixture(VE()), shape=(1, 2)),
            ValueError,
            "level 1 of NCSNLevels.* has less noise than VE.* at t_min, sigma/alpha = 0.001 and not 0.01 or more",
        ),
        (
            lambda: AnnealedLangevin(NCSNLevels((100.0, 0.1)), 1, 1e-3)(mixture(VE()), shape=(1, 2)),
            ValueError,
            "the largest of NCSNLevels.* is more noise than VE.* sigma/alpha = 50 at t_max; take smaller levels",
        ),
        (
            lambda: DDPM()(ScoreFunction(VP(), lambda x, t: -x), shape=(1, 2)),
            TypeError,
            "needs the pair .* of a ScoreModel",
        ),
    ],
)
def test_what_can_not_work_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_default_chains_fit_the_default_processes():
    """NCSN's least level 0.01 and VE's at t_min, DDPM's first level, differ by less than 1e-4 in log-SNR."""
    for sde in (VP(), VE()):
        for chain in (DDPMChain(), NCSNLevels()):
            times = level_times(sde, chain)
            assert sde.t_min <= float(times[0]) < float(times[1]) and float(times[-1]) <= sde.t_max
