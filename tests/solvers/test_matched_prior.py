"""The matched prior: against PyTorch's Gaussian, and as what makes the likelihood of a Gaussian exact."""

import math
from importlib import import_module

import pytest
import torch
from oracles import CENTRE, CORE_SDES, CORRELATED, SDES, correlated, mixture, quick
from torch.distributions import MultivariateNormal

from sde import EDM, SDE, VE, VP, Cosine, Noise, RectifiedFlow
from solvers import log_likelihood, matched_prior

WIDE = VP(beta_max=5.0)
"""Enough of the data left at t_max, alpha = 0.28, that every part of the moments tells."""


def data(n=50, size=6, dtype=torch.float64):
    """Correlated, off the origin, not Gaussian."""
    a = torch.linalg.qr(Noise(9).normal((size, size), dtype=dtype)).Q * torch.logspace(1, -1, size, dtype=dtype)
    z = Noise(0).normal((n, size), dtype=dtype)
    return (z + 0.3 * z**2) @ a.T + torch.linspace(-3, 3, size, dtype=dtype)


def expected(sde, mean, covariance, x):
    """log N(x; alpha m, alpha^2 C + sigma^2 I) by PyTorch."""
    t = torch.tensor(sde.t_max, dtype=torch.float64)
    alpha, sigma = sde.alpha(t).detach(), sde.sigma(t).detach()
    whole = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
    return MultivariateNormal(alpha * mean.flatten(), whole).log_prob(x.flatten(1))


def principal(covariance, rank):
    """The covariance of probabilistic PCA."""
    values, axes = torch.linalg.eigh(covariance)
    values[:-rank] = values[:-rank].mean()
    return axes * values @ axes.T


COVARIANCES = {
    "diagonal": ({}, lambda c: c.diagonal().diag()),
    "full": ({}, lambda c: c),
    "low_rank": ({"rank": 2}, lambda c: principal(c, 2)),
}


@pytest.mark.parametrize("sde", [WIDE, *SDES], ids=str)
@pytest.mark.parametrize("name", COVARIANCES)
def test_it_is_the_gaussian_of_the_moments(sde, name):
    values, (options, of) = data(), COVARIANCES[name]
    prior = matched_prior(values, sde, name, **options)
    x = 2 * Noise(3).normal((7, 6), dtype=torch.float64)
    covariance = torch.cov(values.T, correction=0)
    assert torch.allclose(prior(x), expected(sde, values.mean(0), of(covariance), x), rtol=1e-10)


@pytest.mark.parametrize("covariance", [CORRELATED, CORRELATED.diagonal()], ids=["full", "diagonal"])
def test_given_moments(covariance):
    x = Noise(3).normal((7, 2), dtype=torch.float64)
    found = matched_prior(sde=WIDE, mean=CENTRE, covariance=covariance)(x)
    matrix = covariance if covariance.dim() == 2 else covariance.diag()
    assert torch.allclose(found, expected(WIDE, CENTRE, matrix, x), rtol=1e-12)


@pytest.mark.parametrize("sde", quick(SDES, VP, VE, RectifiedFlow, Cosine), ids=str)
def test_with_the_exact_moments_the_likelihood_of_a_gaussian_is_exact(sde):
    """To the solver's error: with the SDE's own prior it is wrong by the mismatch."""
    model = correlated(sde)
    x = model.sample(8, seed=1)
    exact = model.log_prob(x, torch.tensor(sde.t_min, dtype=torch.float64))
    prior = matched_prior(None, sde, CORRELATED, mean=CENTRE)
    found = log_likelihood(model, x, rtol=1e-8, atol=1e-8, prior=prior)
    assert (found.log_prob - exact).abs().max() < 1e-6
    assert torch.equal(found.prior, prior(found.latent))


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_it_is_nearer_to_a_mixture_than_the_prior_of_the_process(sde):
    """The third moments are left of the mismatch: alpha^3 against alpha for the process's own prior."""
    model = mixture(sde)
    weights, covariances = model.log_weights.exp(), (model.axes * model.variances[:, None]) @ model.axes.mT
    mean = weights @ model.means
    spread = model.means - mean
    covariance = torch.einsum("k,kij->ij", weights, covariances + spread[:, :, None] * spread[:, None])
    t = torch.tensor(sde.t_max, dtype=torch.float64)
    x_T = sde.perturb(model.sample(64, seed=2), t, Noise(5).normal((64, 2), dtype=torch.float64))
    matched = [matched_prior(None, sde, c, mean=mean) for c in (covariance.diagonal(), covariance)]
    errors = [float((p(x_T) - model.log_prob(x_T, t)).abs().mean()) for p in (sde.prior(x_T.shape).log_prob, *matched)]
    assert errors[1] < 0.05 * errors[0] and errors[2] < 0.1 * errors[1], errors


@pytest.mark.parametrize("sde", [Cosine(), RectifiedFlow()], ids=str)
@pytest.mark.parametrize("name", COVARIANCES)
def test_where_no_signal_is_left_it_is_the_noise(sde, name):
    x = Noise(3).normal((7, 6), dtype=torch.float64)
    prior = matched_prior(data(), sde, name, **COVARIANCES[name][0])
    assert torch.allclose(prior(x), sde.prior(x.shape).log_prob(x), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", COVARIANCES)
def test_data_of_any_rank_and_type(name, shape):
    values, options = data(), COVARIANCES[name][0]
    x = Noise(3).normal((7, 6), dtype=torch.float64)
    flat = matched_prior(values, WIDE, name, **options)(x)
    shaped = matched_prior(values.reshape(-1, *shape), WIDE, name, **options)
    assert torch.allclose(shaped(x.reshape(7, *shape)), flat, rtol=1e-12)
    single = shaped(x.reshape(7, *shape).float())
    assert single.dtype == torch.float32 and torch.allclose(single, flat.float(), rtol=1e-6)
    assert shaped(x.reshape(7, *shape)[:1]).shape == (1,)
    levels = (10 * values).round()
    whole = [matched_prior(v.reshape(-1, *shape), WIDE, name, **options) for v in (levels, levels.to(torch.int16))]
    assert torch.equal(*(prior(x.reshape(7, *shape)) for prior in whole))


def test_it_is_differentiable():
    x = Noise(3).normal((4, 2), dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(matched_prior(None, WIDE, CORRELATED, mean=CENTRE)(x).sum(), x)
    (wanted,) = torch.autograd.grad(expected(WIDE, CENTRE, CORRELATED, x).sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-10)


def test_a_singular_covariance_is_no_obstacle():
    """Fewer samples than dimensions, and dimensions that are constant."""
    values = data(4)
    values[:, 2] = 1.0
    x = Noise(3).normal((7, 6), dtype=torch.float64)
    full = torch.cov(values.T, correction=0)
    assert torch.allclose(matched_prior(values, WIDE, "full")(x), expected(WIDE, values.mean(0), full, x), rtol=1e-10)
    same = torch.ones(3, 6)
    for name, (options, _) in COVARIANCES.items():
        found = matched_prior(same, WIDE, name, **options)(x)
        nothing = torch.zeros(6, 6, dtype=torch.float64)
        assert torch.allclose(found, expected(WIDE, same[0].double(), nothing, x), rtol=1e-10), name


@pytest.mark.parametrize("count, size", [(40, 90), (90, 40)])
def test_the_leading_axes_of_large_data_are_those_of_small(monkeypatch, count, size):
    """By iteration and directly, with more samples than dimensions and with fewer."""
    values, x = data(count, size), Noise(3).normal((7, size), dtype=torch.float64)
    few = matched_prior(values, WIDE, "low_rank", rank=5)
    monkeypatch.setattr(import_module("solvers.matched_prior"), "LARGEST_SVD", 1)
    many, again = (matched_prior(values, WIDE, "low_rank", rank=5) for _ in range(2))
    assert torch.allclose(many(x), few(x), rtol=1e-8) and torch.equal(many(x), again(x))
    assert not torch.equal(many(x), few(x))
    covariance = principal(torch.cov(values.T, correction=0), 5)
    assert torch.allclose(few(x), expected(WIDE, values.mean(0), covariance, x), rtol=1e-8)


def test_many_dimensions_need_no_matrix_of_their_square():
    """A matrix of 10^5 x 10^5 would be 80 GB."""
    size = 100_000
    values = Noise(0).normal((4, size)) + 3
    prior = matched_prior(values, WIDE, "low_rank", rank=2)
    assert prior.axes.shape == (size, 2)
    assert bool(torch.isfinite(prior(values)).all())


class Cubic(SDE):
    t_min, t_max = 0.0, 1.0

    def drift(self, x, t):
        return -(x**3)

    def diffusion(self, t):
        return torch.ones_like(t)

    def prior(self, shape):
        raise NotImplementedError


GIVEN = dict(data=None, mean=CENTRE)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sde": Cubic()}, TypeError, "sde must be a GaussianSDE such as .*, found Cubic"),
        ({"sde": None}, TypeError, "sde must be a GaussianSDE such as .*, found NoneType"),
        ({"data": None}, ValueError, "give either data, or mean and covariance as tensors, found neither"),
        ({"mean": torch.zeros(6)}, ValueError, "found both"),
        ({"covariance": "spherical"}, ValueError, "must be one of diagonal, full, low_rank, found 'spherical'"),
        ({"covariance": torch.eye(6)}, ValueError, "must be one of diagonal, full, low_rank, found a Tensor"),
        ({"rank": 2}, ValueError, "covariance='low_rank', and no other, takes a rank, found rank=2"),
        ({"covariance": "low_rank"}, ValueError, "takes a rank, found rank=None"),
        ({"covariance": "low_rank", "rank": 0}, ValueError, "rank must be a positive integer, found 0"),
        ({"covariance": "low_rank", "rank": 6}, ValueError, "rank must be less than the 50 samples and the 6 dim"),
        ({"data": torch.zeros(1, 6)}, ValueError, r"at least two samples, found shape \(1, 6\)"),
        ({"data": torch.zeros(5)}, ValueError, r"\(N, ...\) of at least two samples, found shape \(5,\)"),
        ({"data": [1.0]}, ValueError, "found list"),
        ({"data": torch.full((3, 2), math.nan)}, ValueError, "data must be finite, found 6 of 6 values that are not"),
        ({"data": torch.zeros(2, 5000), "covariance": "full"}, ValueError, "at most 4096 dimensions, found 5000"),
        (GIVEN, ValueError, "mean and covariance must be tensors and rank None, found mean=Tensor, covariance=str"),
        (GIVEN | {"covariance": torch.eye(2), "rank": 1}, ValueError, "rank=1"),
        (GIVEN | {"covariance": torch.eye(3)}, ValueError, r"shape \(2,\) or \(2, 2\) for .* 2 values, found \(3, 3\)"),
        (GIVEN | {"covariance": torch.tensor([1.0, math.inf])}, ValueError, "covariance must be finite, found 1 of 2"),
        (GIVEN | {"covariance": torch.tensor([1.0, -1.0])}, ValueError, "semi-definite, found the variance -1"),
        (GIVEN | {"covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, ValueError, "found the variance -1"),
        (GIVEN | {"covariance": torch.tensor([[1.0, 0.0], [2.0, 1.0]])}, ValueError, "must be symmetric"),
    ],
)
def test_what_can_not_be_matched_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        matched_prior(**(dict(data=data(), sde=VP()) | arguments))


def test_samples_of_another_shape_are_refused():
    prior = matched_prior(data(), EDM())
    with pytest.raises(ValueError, match=r"samples of shape \(6,\), found a batch of shape \(7, 2, 3\)"):
        prior(torch.zeros(7, 2, 3))
