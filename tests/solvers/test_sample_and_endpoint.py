"""Samples with their densities from one integration; round trips; the check of the correction at t_min."""

import warnings

import pytest
import torch
from oracles import CORE_SDES, correlated, mixture, quick

from models import MLP, ScoreNetwork
from sde import VE, VP, Noise, Prediction, ScoreFunction, ScoreModel
from solvers import EndpointWarning, Hutchinson, ProbabilityFlow, log_likelihood, sample
from solvers.endpoint import endpoint_bias


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
def test_sampled_densities_are_those_of_the_way_back(sde):
    model = mixture(sde)
    out = sample(model, (16, 2), seed=3, return_log_prob=True, rtol=1e-8, atol=1e-8, dtype=torch.float64)
    again = log_likelihood(model, out.x, rtol=1e-8, atol=1e-8)
    assert torch.allclose(out.log_prob, again.log_prob, atol=2e-5)
    assert torch.allclose(out.likelihood.change, again.change, atol=2e-5)
    assert torch.equal(out.likelihood.latent, sde.prior((16, 2)).sample(3, dtype=torch.float64))
    assert torch.allclose(again.latent, out.likelihood.latent, rtol=1e-5, atol=1e-5)
    assert out.nfe == out.likelihood.nfe and not out.likelihood.stderr.any()


@pytest.mark.parametrize("sde", quick(CORE_SDES, VP), ids=str)
def test_sampled_densities_are_those_of_the_data(sde):
    """With the exact terminal density, whatever the latent: log p at t_min of the sample."""
    model = mixture(sde)
    last, first = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_max, sde.t_min))
    options = dict(return_log_prob=True, rtol=1e-8, atol=1e-8, dtype=torch.float64)
    out = sample(model, (16, 2), prior=lambda x: model.log_prob(x, last), **options)
    assert torch.allclose(out.log_prob, model.log_prob(out.x, first), atol=1e-5)


def test_samples_are_the_same_with_densities_and_without():
    model = mixture(VP())
    plain = sample(model, (8, 2), seed=1)
    flow = ProbabilityFlow()(model, (8, 2), seed=1)
    assert torch.equal(plain.x, flow.x) and plain.nfe == flow.nfe and plain.log_prob is None
    both = sample(model, (8, 2), seed=1, return_log_prob=True)
    assert torch.allclose(both.x, plain.x, atol=1e-3)
    estimated = sample(model, (8, 2), seed=1, return_log_prob=True, divergence=Hutchinson(4))
    assert estimated.likelihood.stderr.shape == (8,) and (estimated.likelihood.stderr > 0).all()
    noise = Noise(5).normal((3, 2))
    assert torch.equal(sample(model, x_T=noise, return_log_prob=True).likelihood.latent, noise)


def test_a_sample_needs_a_shape_or_noise():
    for arguments in ({}, {"shape": (2, 2), "x_T": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="either shape"):
            sample(mixture(VP()), return_log_prob=True, **arguments)
    with pytest.raises(TypeError, match="needs the pair"):
        function = ScoreFunction(VP(), lambda x, t: -x)
        sample(function, (1, 2), return_log_prob=True, coordinates="angle")


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_round_trip_error(sde):
    """Below 1e-5 at tolerance 1e-8, and larger where the tolerance is loose."""
    model = mixture(sde)
    x = model.sample(16)
    fine, loose = (ProbabilityFlow(tol, tol).round_trip_error(model, x) for tol in (1e-8, 1e-4))
    assert fine.shape == (16,) and float(fine.max()) < 1e-5 < float(loose.max())


# The check at t_min.


class Wrong(ScoreModel):
    """An exact score times a factor."""

    def __init__(self, inner, factor):
        super().__init__(inner.sde)
        self.inner, self.factor = inner, factor

    def forward(self, x, t):
        eps = self.factor * self.inner(x, t).eps
        return Prediction((x - self.sde.sigma(t) * eps) / self.sde.alpha(t), eps)


@pytest.mark.parametrize("sde", [VE(sigma_min=0.1), VP(t_min=1e-2)], ids=str)
def test_the_bias_of_an_exact_score_is_chance(sde):
    """And that of f times the score is (f^2 - f) / 2 of the mean squared noise that it predicts."""
    model = correlated(sde)
    x = model.sample(20_000)
    bias = endpoint_bias(model, x)
    assert bias.shape == (20_000,) and abs(float(bias.mean())) < 4 * float(bias.std()) / 20_000**0.5
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    moved = sde.perturb(x, t, Noise(9).normal((20_000, 2), dtype=torch.float64))
    size = float(model(moved, t).eps.square().sum(1).mean())
    wrong = endpoint_bias(Wrong(model, 1.5), x)
    stderr = float(wrong.std()) / 20_000**0.5
    assert abs(float(wrong.mean()) - 0.5 * (1.5**2 - 1.5) * size) < 4 * stderr + 0.02 * size


def test_a_rough_score_at_t_min_is_said():
    model = mixture(VE(sigma_min=0.1))
    x = model.sample(4000)
    options = dict(endpoint_correction=True, method="euler", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = log_likelihood(model, x, **options)
    assert found.endpoint_bias.shape == (4000,) and found.nfe == 1 + 2
    with pytest.warns(EndpointWarning, match=r"its mean should be 0 and is .* leave the correction out"):
        log_likelihood(Wrong(model, 1.5), x, **options)


def test_an_untrained_network_is_said():
    """Its noise is 0 where the data have edges, or whatever its weights say; x_0 = x says that there is none."""
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP(t_min=1e-2))
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.5)
    with pytest.warns(EndpointWarning):
        log_likelihood(model, torch.randn(2000, 2), endpoint_correction=True, method="euler", steps=1)
