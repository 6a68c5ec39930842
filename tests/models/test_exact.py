"""Mixtures of Gaussians: score, Tweedie's formula, the Fokker-Planck equation, and sampling."""

import math

import pytest
import torch
from oracles import ALL_SDES, SDES, at_ends, correlated, mixture
from torch.func import jacrev, vmap

from models import GaussianMixture
from sde import VP, Noise


def points(sde, t, n=8):
    """Points at and away from the mass of the mixture at time t."""
    return sde.perturb(mixture(sde).sample(n, seed=3), t, 1.5 * Noise(4).normal((n, 2), dtype=torch.float64))


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_score_is_the_gradient_of_the_log_density(sde):
    model = mixture(sde)
    for t in at_ends(sde):
        x = points(sde, t).requires_grad_()
        (expected,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
        assert torch.allclose(model.score(x, t), expected, rtol=1e-9, atol=1e-10 * expected.abs().max()), (sde, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_log_density_of_one_gaussian(sde):
    """Against torch's multivariate normal, at alpha mu and alpha^2 S + sigma^2 I."""
    model = correlated(sde)
    mean, covariance = model.means[0], (model.axes[0] * model.variances[0]) @ model.axes[0].T
    for t in at_ends(sde):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        blurred = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=t.dtype)
        expected = torch.distributions.MultivariateNormal(alpha * mean, blurred).log_prob(points(sde, t))
        assert torch.allclose(model.log_prob(points(sde, t), t), expected, rtol=1e-10), (sde, t)
    x = model.sample(5)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-10), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_posterior_mean_is_tweedies(sde):
    """E[x_0 | x_t] = (x_t + sigma^2 score) / alpha, against Bayes' rule written out with matrix inverses."""
    model = mixture(sde)
    covariances = (model.axes * model.variances[:, None]) @ model.axes.mT
    for t in at_ends(sde):
        x, alpha, sigma = points(sde, t), sde.alpha(t), sde.sigma(t)
        shares, means = [], []
        for w, m, s in zip(model.log_weights, model.means, covariances, strict=True):
            blurred = alpha**2 * s + sigma**2 * torch.eye(2, dtype=t.dtype)
            shares.append(w + torch.distributions.MultivariateNormal(alpha * m, blurred).log_prob(x))
            means.append(m + alpha * torch.linalg.solve(blurred, (x - alpha * m).T).T @ s)
        share = torch.softmax(torch.stack(shares), 0)
        expected = (share[..., None] * torch.stack(means)).sum(0)
        assert torch.allclose(model(x, t).x0, expected, rtol=1e-9, atol=1e-10), (sde, t)
        tweedie = (x + sigma**2 * model.score(x, t)) / alpha
        assert torch.allclose(model(x, t).x0, tweedie, rtol=1e-9, atol=1e-10 / float(alpha)), (sde, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_posterior_covariance_is_that_of_the_hessian(sde):
    """Cov[x_0 | x_t] = (sigma^2 I + sigma^4 Hessian of log p_t) / alpha^2, against the mixture of the posteriors."""
    model = mixture(sde)
    covariances = (model.axes * model.variances[:, None]) @ model.axes.mT
    for t in at_ends(sde)[1:]:
        alpha, sigma, eye = sde.alpha(t), sde.sigma(t), torch.eye(2, dtype=t.dtype)
        x = points(sde, t)[:4]
        second = torch.zeros(len(x), 2, 2, dtype=t.dtype)
        shares, log_weights = [], []
        for w, m, s in zip(model.log_weights, model.means, covariances, strict=True):
            blurred = alpha**2 * s + sigma**2 * eye
            gain = alpha * torch.linalg.solve(blurred, s).T
            mean = m + (x - alpha * m) @ gain.T
            log_weights.append(w + torch.distributions.MultivariateNormal(alpha * m, blurred).log_prob(x))
            shares.append(s - alpha * gain @ s + mean[:, :, None] * mean[:, None])
        weights = torch.softmax(torch.stack(log_weights), 0)
        for weight, part in zip(weights, shares, strict=True):
            second = second + weight[:, None, None] * part
        x0 = model(x, t).x0
        expected = second - x0[:, :, None] * x0[:, None]
        hessian = vmap(jacrev(lambda y, s=t: model.score(y[None], s)[0]))(x)
        found = (sigma**2 * eye + sigma**4 * hessian) / alpha**2
        # Towards the prior the two terms cancel by SNR: what is left of float64 is as much.
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-13 * float((sigma / alpha) ** 4) + 1e-9), (sde, t)


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_densities_solve_the_fokker_planck_equation(sde):
    """d log p / dt + div f + f . s - g^2 / 2 (laplacian log p + |s|^2) = 0."""
    model = mixture(sde)

    def log_prob(x, t):
        return model.log_prob(x[None], t)[0]

    for fraction in (0.01, 0.3, 0.9):
        t = torch.tensor(fraction * sde.t_max, dtype=torch.float64)
        x = points(sde, t)
        in_time = vmap(jacrev(log_prob, argnums=1), (0, None))(x, t)
        laplacian = vmap(jacrev(jacrev(log_prob)), (0, None))(x, t).diagonal(dim1=1, dim2=2).sum(1)
        score, drift = model.score(x, t), sde.drift(x, t)
        rate = sde.drift(torch.ones(1, 1, dtype=t.dtype), t)[0, 0]
        pull, squared = (drift * score).sum(1), score.square().sum(1)
        spread = 0.5 * sde.diffusion(t) ** 2
        residual = in_time + 2 * rate + pull - spread * (laplacian + squared)
        size = in_time.abs() + pull.abs() + spread * (laplacian.abs() + squared)
        assert (residual.abs() / size).max() < 1e-10, (sde, fraction)


def tilted(sde):
    """One Gaussian in three dimensions whose axes are no symmetric matrix, as those in the plane may be."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [-0.4, 0.9, 0.5]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, torch.zeros(1, 3, dtype=torch.float64), (root @ root.T)[None], sde), root @ root.T


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_a_tilted_gaussian_in_three_dimensions(sde):
    model, covariance = tilted(sde)
    assert not torch.allclose(model.axes, model.axes.mT, atol=0.1)
    for t in at_ends(sde):
        x = model.sample(5)
        blurred = sde.alpha(t) ** 2 * covariance + sde.sigma(t) ** 2 * torch.eye(3, dtype=t.dtype)
        expected = -torch.linalg.solve(blurred, x.T).T
        assert torch.allclose(model.score(x, t), expected, rtol=1e-8, atol=1e-8 * expected.abs().max()), t
    x, n = model.sample(20_000), 20_000
    products = x[:, :, None] * x[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_samples_have_the_moments_of_the_mixture():
    model, n = mixture(VP()), 40_000
    x = model.sample(n, seed=1)
    w = model.log_weights.exp()
    covariances = (model.axes * model.variances[:, None]) @ model.axes.mT
    mean = w @ model.means
    spread = model.means - mean
    covariance = torch.einsum("k,kde->de", w, covariances + spread[:, :, None] * spread[:, None, :])
    assert ((x.mean(0) - mean) / (covariance.diagonal() / n).sqrt()).abs().max() < 4
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert ((products.mean(0) - covariance) / (products.std(0) / math.sqrt(n))).abs().max() < 4
    near_first = (x - model.means[0]).norm(dim=1) < (x - model.means[1]).norm(dim=1)
    assert abs(float(near_first.double().mean()) - 0.3) < 0.01


def test_sample_i_depends_on_the_seed_and_i_alone():
    model = mixture(VP())
    assert torch.equal(model.sample(3, seed=2), model.sample(100, seed=2)[:3])
    assert not torch.equal(model.sample(3, seed=2), model.sample(3, seed=3))


def test_weights_are_normalized_and_data_of_any_shape_are_flattened():
    one = torch.ones(2, dtype=torch.float64)
    means, covariances = torch.randn(2, 4, dtype=one.dtype), torch.eye(4, dtype=one.dtype).expand(2, 4, 4)
    a, b = (GaussianMixture(w, means, covariances, VP()) for w in (one, 10 * one))
    x, t = torch.randn(3, 1, 2, 2, dtype=one.dtype), torch.tensor(0.2, dtype=one.dtype)
    assert torch.allclose(a.log_prob(x, t), b.log_prob(x.flatten(1), t), rtol=1e-13)
    assert a(x, t).x0.shape == x.shape


def test_a_point_mass_is_a_mixture_too():
    model = GaussianMixture(torch.ones(1), torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2, 2), VP())
    for t in at_ends(VP(), torch.float32):
        x0 = model(torch.randn(4, 2), t).x0
        assert torch.allclose(x0, torch.tensor([2.0, -1.0]).expand(4, 2)), t


EYE = torch.eye(2)[None]


@pytest.mark.parametrize(
    "weights, means, covariances, message",
    [
        (torch.ones(2), torch.zeros(1, 2), EYE, r"must have shapes \(K,\), \(K, D\), \(K, D, D\), found \(2,\)"),
        (torch.ones(1), torch.zeros(2), EYE, "must have shapes"),
        (torch.ones(1), torch.zeros(1, 3), EYE, "must have shapes"),
        (torch.zeros(1), torch.zeros(1, 2), EYE, "the weights must be positive"),
        (torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (torch.ones(1), torch.zeros(1, 2), -EYE, "positive semi-definite"),
    ],
)
def test_what_is_not_a_mixture_is_refused(weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances, VP())
