"""Samples of conditional models against closed-form posteriors: which methods are exact, and which are not.

Of Gaussian data the samples of a deterministic solver are an affine function of x_T: run on unit vectors it gives their
mean and covariance without Monte Carlo. Elsewhere simulation-based calibration (Talts et al., 2018): of data from the
prior and draws from the posterior of what is observed of them, the rank of the data among the draws is uniform.
"""

import math

import pytest
import torch
from oracles import correlated, marginal, mixture, quick
from scipy.stats import chi2

from models import (
    DPS,
    MMPS,
    Blur,
    Classifier,
    ClassifierFree,
    Composition,
    Conditioned,
    Downsampling,
    GaussianMixture,
    Guided,
    Matrix,
    PiGDM,
    RandomProjection,
    Replacement,
    Rotated,
    half_mask,
)
from sde import VE, VP, RectifiedFlow
from solvers import DDIM, EulerMaruyama, Exact, ExponentialAdams, ProbabilityFlow, RePaint, log_likelihood

FINE = ProbabilityFlow(rtol=1e-6, atol=1e-6)
SDES = quick([VP(), VE(), RectifiedFlow()], VP)
ROW = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
SEEN = torch.tensor([0.3], dtype=torch.float64)
IMAGE = (1, 4, 4)
OPERATORS = {
    "mask": half_mask(IMAGE),
    "blur": Blur(IMAGE, std=0.7),
    "downsampling": Downsampling(IMAGE, 2),
    "projection": RandomProjection(IMAGE, 5),
    "blur, downsampling": Composition(Downsampling(IMAGE, 2), Blur(IMAGE, std=0.7)),
}


def image(sde):
    """A Gaussian of images of 4 x 4 whose neighbours are alike, off the origin and brighter to one side."""
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    covariance = 0.4 * torch.exp(-torch.cdist(place, place) / 2)
    mean = 0.2 * place[:, 0] - 0.3
    return GaussianMixture(torch.ones(1).double(), mean[None], covariance[None], sde)


def moments(model, start, shape, solver=FINE):
    """Mean and covariance of flat data where the flow of an affine ``model`` ends, from those of ``start``."""
    d, scale = math.prod(shape), float(model.sde.sigma(torch.tensor(model.sde.t_max)))
    units = scale * torch.cat((torch.zeros(1, d), torch.eye(d))).double()
    x = solver(model, x_T=units.reshape(-1, *shape)).x.flatten(1)
    jacobian = (x[1:] - x[0]) / scale
    mean, covariance = start
    return x[0] + mean @ jacobian, jacobian.mT @ covariance @ jacobian


def off(model, posterior, shape=(2,)):
    """By how many standard deviations of the posterior the means are off, and the least and the greatest ratio of
    standard deviations, of the flow from the exact p_T."""
    mean, covariance = moments(model, marginal(posterior, model.sde.t_max), shape)
    true, spread = marginal(posterior, model.sde.t_min)
    root = torch.linalg.inv(torch.linalg.cholesky(spread))
    ratios = torch.linalg.eigvalsh(root @ covariance @ root.mT).clamp_min(0).sqrt()
    return float((root @ (mean - true)).square().mean().sqrt()), float(ratios[0]), float(ratios[-1])


def is_exact(found, tolerance=1e-3):
    return found[0] < tolerance and max(abs(ratio - 1) for ratio in found[1:]) < tolerance


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("noise_std", [0.05, 0.3])
def test_samples_of_moment_matching_are_the_posterior_of_a_gaussian(sde, noise_std):
    model, matrix = correlated(sde), torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    seen = torch.tensor([0.2, -1.0], dtype=torch.float64)
    found = off(MMPS(model, Matrix(matrix), seen, noise_std, 2), model.given(matrix, seen, noise_std))
    assert is_exact(found), found


def test_samples_of_moment_matching_need_their_iterations():
    """One of two leaves .65 of the standard deviation in one direction."""
    model, matrix = correlated(VP()), torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    seen = torch.tensor([0.2, -1.0], dtype=torch.float64)
    few = off(MMPS(model, Matrix(matrix), seen, 0.3, 1), model.given(matrix, seen, 0.3))
    assert few[1] < 0.83, few


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("kind", OPERATORS)
def test_samples_of_moment_matching_are_the_posterior_whatever_is_observed(sde, kind):
    model, operator = image(sde), OPERATORS[kind]
    matrix = operator(torch.eye(16, dtype=torch.float64).reshape(16, *IMAGE)).flatten(1).mT
    seen = operator(model.sample(1, seed=2).reshape(1, *IMAGE)) + 0.1
    rows = matrix.abs().sum(1) > 0
    seen = torch.where(rows, seen.flatten(), 0).reshape(operator.observed)  # y is 0 where a mask hides x
    posterior = model.given(matrix[rows], seen.flatten()[rows], 0.2)
    found = off(MMPS(model, operator, seen, 0.2, iterations=len(matrix[rows])), posterior, IMAGE)
    assert is_exact(found), found


@pytest.mark.parametrize("kind", [MMPS, PiGDM])
@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_what_is_observed_where_a_mask_hides_is_not_read(kind, noise_std):
    """A whole picture as the observation: no x explains its hidden half, which iterations would go after."""
    model, operator = image(VP()), OPERATORS["mask"]
    whole = model.sample(1, seed=2).reshape(1, *IMAGE)
    x, t = model.sample(2, seed=3).reshape(2, *IMAGE), torch.tensor(0.3, dtype=torch.float64)
    found, true = (kind(model, operator, y, noise_std, iterations=12)(x, t) for y in (whole, operator(whole)))
    assert torch.equal(found.x0, true.x0) and found.x0.abs().max() < 10


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_samples_of_pigdm_are_the_posterior_of_isotropic_data_alone(sde):
    one = torch.ones(1, dtype=torch.float64)
    isotropic = GaussianMixture(one, torch.tensor([[0.5, -1.0]]).double(), 0.49 * torch.eye(2).double()[None], sde)
    posterior = isotropic.given(ROW, SEEN, 0.1)
    assert is_exact(off(PiGDM(isotropic, Matrix(ROW), SEEN, 0.1, data_std=0.7, iterations=1), posterior))
    assert not is_exact(off(PiGDM(isotropic, Matrix(ROW), SEEN, 0.1, iterations=1), posterior), 0.03)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_a_rotated_flow_ends_at_rotated_data(sde):
    model, turn = correlated(sde), torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    mean, covariance = marginal(model, sde.t_min)
    start = (turn @ marginal(model, sde.t_max)[0], turn @ marginal(model, sde.t_max)[1] @ turn.mT)
    found = moments(Rotated(model, turn), start, (2,))
    assert torch.allclose(found[0], turn @ mean, atol=1e-4)
    assert torch.allclose(found[1], turn @ covariance @ turn.mT, atol=1e-4)
    x_T = sde.prior((3, 2)).sample(1, dtype=torch.float64)
    back = Rotated(Rotated(model, turn), turn.mT)
    assert torch.allclose(FINE(back, x_T=x_T).x, FINE(model, x_T=x_T).x, atol=1e-5)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("kind", ["classifier", "classifier free"])
def test_samples_of_a_class_are_those_of_its_component(sde, kind):
    """Class 1 of the mixture under its own flow is one Gaussian: the map from x_T is affine."""
    model = mixture(sde)
    model = Classifier(model, model.log_class, label=1) if kind == "classifier" else ClassifierFree(model, 1, 1.0)
    assert is_exact(off(model, component(mixture(sde), 1)))


def component(model, k):
    covariance = model.axes[k] * model.variances[k] @ model.axes[k].mT
    return GaussianMixture(torch.ones(1).double(), model.means[k, None], covariance[None], model.sde)


# ---------------------------------------------------------------------------------------------------------------------
# What is not exact is off by at least half of what was measured, so that what the docs say of it stays true.


BIASED = {  # noise, how far off the mean is, and the ratio of standard deviations from 1 where that is the worst
    "DPS, noise .3": (lambda m: DPS(m, Matrix(ROW), SEEN, 0.3), 0.3, 0.408, 0.939),
    "Guided": (lambda m: Guided(m, lambda x: -0.5 * ((SEEN - x @ ROW.mT) / 0.3).square().sum(1)), 0.3, 0.408, 0.939),
    "PiGDM, noise .05": (lambda m: PiGDM(m, Matrix(ROW), SEEN, 0.05, iterations=1), 0.05, 0.111, 0.159),
    "PiGDM, noise .3": (lambda m: PiGDM(m, Matrix(ROW), SEEN, 0.3, iterations=1), 0.3, 0.079, 0.091),
}


@pytest.mark.parametrize("kind", BIASED)
def test_the_bias_of_approximations_is_what_it_was(kind):
    build, noise_std, mean, spread = BIASED[kind]
    found = off(build(correlated(VP())), correlated(VP()).given(ROW, SEEN, noise_std))
    widest = max(abs(ratio - 1) for ratio in found[1:])
    assert found[0] > mean / 2 and widest > spread / 2, found


KNOWN = torch.tensor([1.0, 0.0], dtype=torch.float64)
HIDDEN = (-0.7, 0.07**0.5)
"""Mean and standard deviation of the second value, given that the first is 1."""


def test_the_bias_of_replacement_is_what_it_was():
    model = Replacement(correlated(VP()), KNOWN, torch.tensor([1, 0]), fresh=False)
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    start = marginal(correlated(VP()).given(one, KNOWN[:1], 1e-4), 1.0)
    mean, covariance = moments(model, start, (2,))
    assert HIDDEN[0] - mean[1] > 0.486 / 2 * HIDDEN[1], mean  # towards the mean without knowing, -1
    assert covariance[1, 1].sqrt() > (1 + 0.374 / 2) * HIDDEN[1], covariance


@pytest.mark.parametrize(("rounds", "bias", "spread"), [(1, 0.443, 1.234), (2, 0.288, 1.097)])
def test_few_rounds_of_resampling_leave_a_bias(rounds, bias, spread):
    model = Replacement(correlated(VP()), KNOWN, torch.tensor([1, 0]))
    x = RePaint(DDIM(steps=100), rounds, 10)(model, shape=(4000, 2), dtype=torch.float64).x[:, 1]
    assert HIDDEN[0] - x.mean() > bias / 2 * HIDDEN[1], x.mean()
    assert x.std() > (1 + spread) / 2 * HIDDEN[1], x.std()


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods.


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_likelihood_of_a_posterior_is_its_density(sde):
    """With the exact p_T(x_T | y) as the prior, which leaves the flow alone."""
    model = correlated(sde)
    posterior = model.given(ROW, SEEN, 0.2)
    x = posterior.sample(5, seed=4)
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    guided = MMPS(model, Matrix(ROW), SEEN, 0.2, iterations=1)
    found = log_likelihood(guided, x, Exact(), rtol=1e-7, atol=1e-7, prior=lambda z: posterior.log_prob(z, high))
    assert torch.allclose(found.log_prob, posterior.log_prob(x, low), atol=1e-4)
    assert (found.log_prob - model.log_prob(x, low)).abs().min() > 0.1


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("kind", [lambda m: ClassifierFree(m, 0, 1.0), lambda m: Conditioned(m, 0)])
def test_the_likelihood_given_a_class_is_the_density_of_its_component(sde, kind):
    exact = component(mixture(sde), 0)
    x = exact.sample(5, seed=4)
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    model = kind(mixture(sde))
    found = log_likelihood(model, x, Exact(), rtol=1e-7, atol=1e-7, prior=lambda z: exact.log_prob(z, high))
    assert torch.allclose(found.log_prob, exact.log_prob(x, low), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration.

N, L = 400, 15


def uniformity(x0, draws):
    """The least p-value of chi^2 tests of the ranks of ``x0``, ``(N, D)``, among ``draws``, ``(N, L, D)``.

    Of each coordinate, and of one fixed projection.
    """
    slant = torch.tensor([[1.0], [0.7]], dtype=x0.dtype)
    x0, draws = (torch.cat((x, x @ slant), dim=-1) for x in (x0, draws))
    ranks = (draws < x0[:, None]).sum(1)
    expected = len(x0) / (L + 1)
    counts = torch.stack([(ranks == rank).sum(0) for rank in range(L + 1)])
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(0), L).min())


def calibration(build, model, solver):
    """The p-value of a method: one solver call for the observations of all data, a row for each of the draws."""
    x0 = model.sample(N, seed=11)
    out = solver(build(model, x0), shape=(N * L, 2), seed=3, dtype=torch.float64)
    return uniformity(x0, out.x.reshape(N, L, 2))


def observed(x0):
    return Matrix(ROW), Matrix(ROW).simulate(x0, 0.3, seed=5).repeat_interleave(L, 0), 0.3


def labels(model, x0):
    """Of the class that the data were drawn from, which is a draw from its posterior; one for each sample."""
    return torch.multinomial(model.log_class(x0).exp(), 1)[:, 0].repeat_interleave(L)


CALIBRATED = {
    "MMPS": (correlated, lambda m, x0: MMPS(m, *observed(x0), iterations=1)),
    "conditioned": (mixture, lambda m, x0: Conditioned(m, labels(m, x0))),
    "classifier free": (mixture, lambda m, x0: ClassifierFree(m, labels(m, x0), 1.0)),
    "classifier": (mixture, lambda m, x0: Classifier(m, m.log_class, label=labels(m, x0))),
}
MISCALIBRATED = {
    "DPS": (correlated, lambda m, x0: DPS(m, *observed(x0))),
    "classifier free, 3": (mixture, lambda m, x0: ClassifierFree(m, labels(m, x0), 3.0)),
}


FLOW, NOISY = ExponentialAdams(steps=20), EulerMaruyama(steps=250)


@pytest.mark.parametrize("kind", CALIBRATED)
def test_ranks_among_exact_methods_are_uniform(kind):
    target, build = CALIBRATED[kind]
    assert calibration(build, target(VP()), FLOW) > 1e-4


@pytest.mark.parametrize("kind", [k if k == "MMPS" else pytest.param(k, marks=pytest.mark.slow) for k in CALIBRATED])
def test_ranks_among_samples_with_noise_are_uniform(kind):
    target, build = CALIBRATED[kind]
    assert calibration(build, target(VP()), NOISY) > 1e-4


@pytest.mark.parametrize("kind", MISCALIBRATED)
def test_ranks_among_biased_methods_are_not(kind):
    """Along the flow, where the same steps leave the ranks of exact methods uniform."""
    target, build = MISCALIBRATED[kind]
    assert calibration(build, target(VP()), FLOW) < 1e-6
