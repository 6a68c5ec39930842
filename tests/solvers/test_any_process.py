"""Processes that are not affine: forward simulation, and every solver that needs drift, diffusion and score alone."""

import math

import pytest
import torch
from oracles import CORE_SDES, SDES, correlated, marginal
from tanh_process import Benes, exact_model

from models import GaussianMixture
from sde import VP, Noise, ScoreFunction
from sde.base import last_time
from solvers import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Exact,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    SamplingDiverged,
    log_likelihood,
    simulate,
    time_grid,
)
from solvers.path import Path

SDE_ = Benes()


def check(x, distribution, bias=0.0):
    """Mean, variance and share of positive values within ``bias`` and five standard errors."""
    x, (mean, variance, share) = x.flatten(), distribution.moments()
    n = len(x)
    fourth = (x - x.mean()).pow(4).mean()
    assert abs(float(x.mean()) - mean) < bias * math.sqrt(variance) + 5 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < bias * variance + 5 * float((fourth - variance**2).sqrt()) / math.sqrt(n)
    assert abs(float((x > 0).double().mean()) - share) < bias + 5 * math.sqrt(share * (1 - share) / n)


def test_the_closed_form_solves_the_fokker_planck_equation():
    """d_t p = -div(f p) + g^2 / 2 Laplace p, for the log-density that all tests here rest on."""
    t = torch.tensor(0.7, dtype=torch.float64)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None].requires_grad_()
    h = 1e-5
    d_t = (SDE_.data(x.shape, float(t) + h).log_prob(x) - SDE_.data(x.shape, float(t) - h).log_prob(x)) / (2 * h)
    (score,) = torch.autograd.grad(SDE_.data(x.shape, float(t)).log_prob(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(score.sum(), x)
    f = SDE_.drift(x, t)
    (divergence,) = torch.autograd.grad(f.sum(), x)
    right = -divergence - f * score + 0.5 * SDE_.diffusion(t) ** 2 * (curvature + score**2)
    assert torch.allclose(d_t, right[:, 0], atol=1e-8)
    assert torch.allclose(exact_model(SDE_).score(x, t), score, atol=1e-12)


def test_simulation_carries_the_data_to_the_prior():
    x0 = SDE_.data((20_000, 2), SDE_.t_min).sample(1, dtype=torch.float64)
    check(x0, SDE_.data((1,), SDE_.t_min))
    out = simulate(SDE_, x0, steps=300, seed=2, trajectory=100)
    check(out.x, SDE_.prior((1,)), bias=0.003)
    assert out.nfe == 0 and out.trajectory.shape == (4, 20_000, 2)
    for t, x in zip(out.times, out.trajectory, strict=True):
        check(x, SDE_.data((1,), float(t)), bias=0.003)


@pytest.mark.parametrize(
    "sampler, bias",
    [
        (EulerMaruyama(400), 0.01),
        (EulerMaruyama(400, final="sample"), 0.01),
        (PredictorCorrector(EulerMaruyama(200), Langevin(snr=0.1)), 0.05),
    ],
    ids=str,
)
def test_samplers_carry_the_prior_to_the_data(sampler, bias):
    out = sampler(exact_model(SDE_), shape=(20_000, 1), seed=3, dtype=torch.float64)
    check(out.x, SDE_.data((1,), SDE_.t_min), bias)
    assert out.nfe == sampler.calls_per_step * sampler.steps


def test_the_noise_level_of_a_process_without_one_is_what_its_diffusion_has_added():
    """sqrt(t + t^2 / 2), the integral of g^2 from time 0; the level that bounds a Langevin step."""
    times = time_grid("uniform", SDE_, 7)
    alpha, sigma = (lambda path: (path.alpha, path.sigma))(Path(SDE_, times))
    assert torch.equal(alpha, torch.ones_like(times))
    assert torch.allclose(sigma**2, times + times**2 / 2, rtol=1e-3)


def test_annealed_langevin_moves_towards_the_data():
    """Of its own, from the prior to p at t_min = 0.5: within the bias of its finite steps."""
    sde, sampler = Benes(t_min=0.5), Langevin(60, corrections=20)
    out = sampler(exact_model(sde), shape=(4000, 1), seed=3, dtype=torch.float64)
    check(out.x, sde.data((1,), sde.t_min), bias=0.1)


@pytest.mark.parametrize("coordinates", ["auto", "time"])
def test_the_probability_flow_and_its_likelihood_are_exact(coordinates):
    model, shape = exact_model(SDE_), (64, 2)
    x = SDE_.data(shape, SDE_.t_min).sample(4, dtype=torch.float64)
    expected = SDE_.data(shape, SDE_.t_min).log_prob(x)
    found = log_likelihood(model, x, Exact(), rtol=1e-8, atol=1e-8, coordinates=coordinates)
    assert (found.log_prob - expected).abs().max() < 1e-6
    flow = ProbabilityFlow(1e-8, 1e-8, coordinates=coordinates)
    assert torch.allclose(flow.encode(model, x), found.latent, atol=1e-6)
    assert torch.allclose(flow(model, x_T=found.latent).x, x, atol=1e-6)


def test_a_score_function_under_a_gaussian_process_is_that_of_the_pair():
    """f - g^2 / 2 score and the pair's velocity are the same field, and Euler-Maruyama the same path."""
    for sde in CORE_SDES:
        exact = correlated(sde)
        model = ScoreFunction(sde, exact.score)
        t, x = torch.tensor(0.3, dtype=torch.float64), Noise(0).normal((5, 2), dtype=torch.float64)
        assert torch.allclose(model.velocity(x, t), exact.velocity(x, t), rtol=1e-10, atol=1e-12), sde
        paths = (EulerMaruyama(7)(m, x_T=x, seed=1).x for m in (model, exact))
        assert torch.allclose(*paths, rtol=1e-10, atol=1e-12), sde
        found, expected = (
            log_likelihood(m, x, rtol=1e-7, atol=1e-7, coordinates=c) for m, c in ((model, "auto"), (exact, "time"))
        )
        assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-9), sde


@pytest.mark.parametrize(
    "solver",
    [
        DDIM(5),
        Ancestral(5),
        Heun(5),
        EulerMaruyama(5, final="denoise"),
        PredictorCorrector(DDIM(5), Langevin()),
        ProbabilityFlow(coordinates="angle"),
    ],
    ids=str,
)
def test_what_needs_the_pair_is_refused_before_the_first_call(solver):
    model = exact_model(SDE_)
    model.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(TypeError, match=r"needs the pair .* found ScoreFunction; under other processes use Euler"):
        solver(model, shape=(2, 1))


def test_encoding_that_needs_the_pair_is_refused():
    with pytest.raises(TypeError, match="needs the pair"):
        ProbabilityFlow(coordinates="angle").encode(exact_model(SDE_), torch.zeros(2, 1))


@pytest.mark.parametrize("options", [{"coordinates": "angle"}, {"endpoint_correction": True}], ids=str)
def test_likelihoods_that_need_the_pair_are_refused(options):
    with pytest.raises(TypeError, match="needs a ScoreModel under a GaussianSDE, found ScoreFunction"):
        log_likelihood(exact_model(SDE_), torch.zeros(2, 1), **options)


@pytest.mark.parametrize("grid", ["log_snr", "karras"])
def test_a_grid_of_noise_levels_needs_noise_levels(grid):
    with pytest.raises(ValueError, match=f"grid='{grid}' needs a GaussianSDE"):
        EulerMaruyama(5, grid)(exact_model(SDE_), shape=(2, 1))
    with pytest.raises(ValueError, match=f"grid='{grid}' needs a GaussianSDE"):
        simulate(SDE_, torch.zeros(2, 1), 5, grid=grid)


def test_a_pair_needs_a_gaussian_process():
    one = torch.ones(1)
    with pytest.raises(TypeError, match=r"expected a GaussianSDE such as VP.., found Benes; .* use ScoreFunction"):
        GaussianMixture(one, one[None], one[None, None], SDE_)
    with pytest.raises(TypeError, match=r"expected an SDE such as VP.., found str"):
        ScoreFunction("VP", torch.tanh)


# Forward simulation of Gaussian processes, by the recursion of mean and variance that Euler-Maruyama obeys.


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_simulation_obeys_its_recursion_and_tends_to_the_kernel(sde):
    """m <- m + dt f m, v <- (1 + dt f)^2 v + dt g^2 are the moments of the samples, and tend to the kernel's as 1/N."""

    def recursion(steps):
        mean, variance = 1.0, 0.0
        times = time_grid("log_snr", sde, steps).flip(0)
        f, g = sde.drift(torch.ones(steps, 1).double(), times[:-1])[:, 0], sde.diffusion(times[:-1])
        for dt, rate, noise in zip(times.diff().tolist(), f.tolist(), g.tolist(), strict=True):
            mean, variance = (1 + dt * rate) * mean, (1 + dt * rate) ** 2 * variance + dt * noise**2
        return mean, variance

    n = 20_000
    x = simulate(sde, torch.ones(n, 1, dtype=torch.float64), 60, seed=5, grid="log_snr").x
    mean, variance = recursion(60)
    assert abs(float(x.mean() - mean)) < 5 * math.sqrt(variance / n)
    assert float(x.var() / variance) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    _, std = sde.kernel(*(torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, last_time(sde))))
    coarse, fine = (recursion(steps)[1] / std**2 - 1 for steps in (800, 1600))
    assert abs(float(coarse)) < 0.1 and (float(coarse / fine) == pytest.approx(2, abs=0.2) or abs(float(coarse)) < 1e-9)


def test_a_path_depends_on_its_seed_and_number_alone():
    x0 = torch.zeros(5, 2, 3)
    whole = simulate(VP(), x0, 20, seed=1).x
    assert torch.equal(whole[:2], simulate(VP(), x0[:2], 20, seed=1).x)
    assert not torch.equal(whole, simulate(VP(), x0, 20, seed=2).x) and not x0.any()


def test_a_trajectory_begins_with_the_data_and_ends_at_the_end():
    seen, x0 = [], torch.ones(2, 1)
    out = simulate(VP(), x0, 10, trajectory=4, callback=lambda i, x: seen.append(i))
    assert seen == list(range(11)) and out.trajectory.shape == (4, 2, 1)
    assert torch.equal(out.trajectory[0], x0) and torch.equal(out.trajectory[-1], out.x)
    assert out.times.tolist() == pytest.approx([1e-5, 0.4, 0.8, 1.0], abs=1e-5)
    assert simulate(VP(), x0, 3).trajectory is None


class Exploding(Benes):
    def drift(self, x, t):
        return torch.where(t > 0.7, math.inf, 0.0) * torch.ones_like(x)


def test_a_simulation_never_returns_nan():
    with pytest.raises(SamplingDiverged, match=r"step 5[0-9] of 100, to t=0\.7.*not finite; use more steps"):
        simulate(Exploding(t_max=1.4), torch.zeros(2, 1), 100)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"steps": 0}, "steps must be a positive integer, found 0"),
        ({"steps": 2.0}, "steps must be a positive integer, found 2.0"),
        ({"grid": "linear"}, "grid must be one of uniform, log_snr, karras, angle, balanced, found 'linear'"),
    ],
)
def test_what_is_no_simulation_is_refused(arguments, words):
    with pytest.raises(ValueError, match=f"simulate: {words}"):
        simulate(VP(), torch.zeros(2, 1), **arguments)


def test_simulated_data_have_the_marginal():
    """From correlated data, through 2000 small steps, to the closed form of p_T."""
    sde = VP()
    model = correlated(sde)
    start = sde.perturb(model.sample(4000, 1), torch.tensor(sde.t_min).double(), Noise(9).normal((4000, 2)).double())
    x = simulate(sde, start, 500, grid="log_snr").x
    mean, covariance = marginal(model, sde.t_max)
    assert (x.mean(0) - mean).abs().max() < 5 / math.sqrt(4000)
    assert (torch.cov(x.T) - covariance).abs().max() < 0.02 + 5 * math.sqrt(2 / 4000)
