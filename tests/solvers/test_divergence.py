"""Divergences: exact against the Jacobian, estimates against their variances in closed form, and honest errors.

Isotropic and diagonal Jacobians would hide errors: random signs have no variance there.
"""

import math

import pytest
import torch
from oracles import SDES, correlated, marginal, signs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import GaussianMixture, ScoreNetwork, UNet
from sde import VP, Noise
from sde.base import last_time
from solvers import Exact, Hutchinson, HutchPlusPlus, default_divergence, log_likelihood, matched_prior

EVERY = [Exact(), Hutchinson(probes=3), Hutchinson(2, "gaussian"), Hutchinson(2, "orthogonal"), HutchPlusPlus(4)]
"""Divergences that three dimensions suffice for."""


def field(x):
    """A field of three dimensions whose Jacobian is full and not symmetric."""
    a = torch.tensor([[1.0, -0.5, 0.2], [0.7, -2.0, 0.3], [0.1, 0.9, 0.4]], dtype=x.dtype)
    return torch.sin(x @ a) + 0.1 * x**2 * x.roll(1, dims=-1)


def jacobians(x):
    return torch.stack([torch.autograd.functional.jacobian(field, one) for one in x])


def linear(jacobian):
    return lambda x: x @ jacobian.T


def rotation(size, seed=0):
    return torch.linalg.qr(Noise(seed).normal((size, size), dtype=torch.float64)).Q


def symmetric(eigenvalues, seed=0):
    """A matrix of the given eigenvalues in a random basis, and a part that is not symmetric."""
    u = rotation(len(eigenvalues), seed)
    return u * eigenvalues @ u.T


def estimates(divergence, jacobian, copies, first=0):
    """(copies, E): one sample many times, in place of many seeds."""
    x = torch.zeros(copies, len(jacobian), dtype=torch.float64)
    return divergence.along(linear(jacobian), x, divergence.directions(x, first))[1]


# The trace.


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_the_exact_divergence_is_the_trace(chunk):
    x, exact = Noise(0).normal((5, 3), dtype=torch.float64), Exact(chunk)
    value, found = exact.along(field, x, exact.directions(x))
    assert torch.equal(value, field(x))
    expected = jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(found[:, 0], expected, rtol=1e-12)
    mean, stderr = exact.summary(found)
    assert torch.equal(mean, found[:, 0]) and not stderr.any()


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_divergence_of_a_gaussians_velocity(sde):
    """f D - g^2 / 2 (-tr V^-1), with V the covariance at t."""
    model = correlated(sde)
    for t in (sde.t_min, 0.3 * sde.t_max, last_time(sde)):
        time = torch.tensor(t, dtype=torch.float64)
        x = model.sample(4)
        velocity, found = Exact().along(lambda y, s=time: model.velocity(y, s), x, Exact().directions(x))
        f = sde.drift(torch.ones(1, 1, dtype=time.dtype), time)[0, 0]
        trace = torch.linalg.inv(marginal(model, t)[1]).trace()
        expected = 2 * f + 0.5 * sde.diffusion(time) ** 2 * trace
        assert torch.allclose(found[:, 0], expected.expand(4), rtol=1e-9), t
        assert torch.allclose(velocity, model.velocity(x, time), rtol=1e-12)


def unet():
    """Convolutions, group norms and attention on (1, 4, 4); no branch that starts as nothing."""
    net = UNet((1, 4, 4), channels=8, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2)
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return ScoreNetwork(net, VP()).double()


# PyTorch scripts its forward-mode formulas, and warns about its own scripting.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_the_exact_divergence_of_a_network_is_the_trace_by_forward_mode():
    model, x, t = unet(), Noise(1).normal((2, 1, 4, 4), dtype=torch.float64), torch.tensor(0.3).double()
    basis = torch.eye(16, dtype=x.dtype).reshape(16, 1, 1, 4, 4)

    def noise(y):
        return model(y, t).eps

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
        pushed = [torch.func.jvp(noise, (x,), (z.expand_as(x),))[1] for z in basis]
    expected = sum((p * z).flatten(1).sum(1) for p, z in zip(pushed, basis, strict=True))
    for exact in (Exact(), Exact(chunk=10)):
        found = exact.along(noise, x, exact.directions(x))[1][:, 0]
        assert torch.allclose(found, expected, rtol=1e-10), exact
    for divergence in (Hutchinson(16, "orthogonal"), Hutchinson(8), HutchPlusPlus(16)):
        found = divergence.along(noise, x, divergence.directions(x))[1]
        mean, stderr = divergence.summary(found)
        assert mean.shape == stderr.shape == (2,) and found.shape == (2, divergence.count(x))
        assert ((mean - expected).abs() < 4 * stderr + 1e-9 * expected.abs()).all(), divergence


def test_the_mean_over_all_signs_is_the_trace():
    x = Noise(0).normal((5, 3), dtype=torch.float64)
    directions = signs(3)[:, None].expand(8, 5, 3)
    _, found = Hutchinson().along(field, x, directions)
    jacobian = jacobians(x)
    assert torch.allclose(found.mean(1), jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-13)
    half = 0.5 * (jacobian + jacobian.mT)
    off = half.square().sum((1, 2)) - half.diagonal(dim1=1, dim2=2).square().sum(1)
    assert torch.allclose(found.var(1, correction=0), 2 * off, rtol=1e-12)


# The variance of the estimates.

COPIES = 40_000
JACOBIAN = (
    symmetric(torch.tensor([4.0, 2.0, 1.0, 0.5, -1.0, 0.3]).double()) + torch.triu(torch.full((6, 6), 0.2)).double()
)


def variance(divergence):
    """Of the mean of the probes, in closed form."""
    d, k, s = len(JACOBIAN), divergence.probes, 0.5 * (JACOBIAN + JACOBIAN.T)
    whole, traceless = s.square().sum(), s.square().sum() - s.trace().square() / d
    return {
        "rademacher": 2 * (whole - s.diagonal().square().sum()) / k,
        "gaussian": 2 * whole / k,
        "orthogonal": 2 * d / (d + 2) * traceless / k * (d - k) / (d - 1),
    }[divergence.distribution]


@pytest.mark.parametrize("probes", [1, 2, 4])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_the_variance_is_what_theory_says_and_what_the_standard_error_says(distribution, probes):
    """For one probe, and falling as 1 / k (times (D - k) / (D - 1) for orthogonal ones)."""
    divergence = Hutchinson(probes, distribution)
    mean, stderr = divergence.summary(estimates(divergence, JACOBIAN, COPIES))
    expected = float(variance(divergence))
    assert abs(float(mean.mean() - JACOBIAN.trace())) < 4 * math.sqrt(expected / COPIES)
    assert float(mean.var()) == pytest.approx(expected, rel=0.05)
    assert mean.shape == (COPIES,)
    if probes == 1:
        assert stderr is None
    else:
        assert float(stderr.square().mean()) == pytest.approx(expected, rel=0.05)


def test_as_many_orthogonal_probes_as_dimensions_are_exact():
    divergence = Hutchinson(6, "orthogonal")
    mean, stderr = divergence.summary(estimates(divergence, JACOBIAN, 20))
    assert torch.allclose(mean, JACOBIAN.trace().expand(20), rtol=1e-12)
    assert (stderr < 1e-12).all()


def test_orthogonal_probes_are_orthogonal():
    x = torch.zeros(3, 2, 4)
    probes = Hutchinson(5, "orthogonal").directions(x)
    assert probes.shape == (5, 3, 2, 4) and probes.dtype == x.dtype
    flat = probes.flatten(2).transpose(0, 1)
    assert torch.allclose(flat @ flat.mT, 8 * torch.eye(5).expand(3, 5, 5), atol=1e-5)
    assert abs(float(Hutchinson(1, "orthogonal").directions(torch.zeros(4000, 2)).mean())) < 0.05  # no sign preferred


def test_orthogonal_probes_beat_independent_ones():
    """By (D - k) / (D - 1) in the variance, and by the trace; at 12 of 16 dimensions 3.75 times and more."""
    jacobian = symmetric(torch.linspace(0.2, 3.0, 16).double())
    of = {
        d: estimates(Hutchinson(12, d), jacobian, 4000).mean(1).var() for d in ("orthogonal", "rademacher", "gaussian")
    }
    assert of["orthogonal"] < of["rademacher"] / 3 and of["orthogonal"] < of["gaussian"] / 6


# Hutch++.


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_hutch_plus_plus_is_exact_up_to_the_rank_of_its_sketch(rank):
    u, v = (Noise(i).normal((rank, 9), dtype=torch.float64) for i in (0, 1))
    divergence = HutchPlusPlus(probes=9)
    found = estimates(divergence, u.T @ v, 5)
    assert found.shape == (5, 3)
    assert torch.allclose(found, (u * v).sum().expand(5, 3), rtol=1e-10)
    assert not torch.allclose(estimates(Hutchinson(9), u.T @ v, 5).mean(1), (u * v).sum(), rtol=1e-2)


def test_hutch_plus_plus_is_exact_for_multiples_of_the_identity():
    found = estimates(HutchPlusPlus(probes=6), 3 * torch.eye(5, dtype=torch.float64), 7)
    assert torch.allclose(found, torch.tensor(15.0, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("probes", [3, 4, 5, 6, 8])
def test_hutch_plus_plus_has_the_trace_for_its_mean(probes):
    divergence = HutchPlusPlus(probes)
    mean, stderr = divergence.summary(estimates(divergence, JACOBIAN, 20_000))
    assert abs(float(mean.mean() - JACOBIAN.trace())) < 4 * float(mean.std()) / math.sqrt(20_000)
    if probes == 3:
        assert stderr is None
    else:
        assert float(stderr.square().mean()) == pytest.approx(float(mean.var()), rel=0.06)


def test_hutch_plus_plus_beats_hutchinson_on_a_nearly_low_rank_jacobian_at_the_same_number_of_products():
    eigenvalues = torch.cat([torch.tensor([10.0, 6.0, 3.0]), torch.full((29,), 0.05)]).double()
    jacobian, others = symmetric(eigenvalues), [Hutchinson(12, d) for d in ("rademacher", "gaussian", "orthogonal")]
    found = HutchPlusPlus(12)
    error = float(found.summary(estimates(found, jacobian, 500))[0].std())
    for other in others:
        assert 10 * error < float(other.summary(estimates(other, jacobian, 500))[0].std()), other


def test_hutch_plus_plus_is_a_function_of_the_state_alone():
    """The same along a path, and continuous, though its basis turns with the Jacobian."""
    divergence, x = HutchPlusPlus(4), Noise(0).normal((5, 3), dtype=torch.float64)
    directions = divergence.directions(x)
    once, again, near = (divergence.along(field, y, directions)[1] for y in (x, x, x + 1e-7))
    assert torch.equal(once, again)
    assert torch.allclose(once, near, atol=1e-4) and not torch.equal(once, near)


# Seeds, counts, gradients.


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_probes_depend_on_seed_and_sample_alone(distribution):
    x = torch.zeros(6, 2, 3)
    whole = Hutchinson(3, distribution, seed=4).directions(x)
    assert torch.equal(Hutchinson(3, distribution, seed=4).directions(x[:2]), whole[:, :2])
    assert torch.equal(Hutchinson(3, distribution, seed=4).directions(x[2:], first=2), whole[:, 2:])
    assert torch.allclose(Hutchinson(2, distribution, seed=4).directions(x), whole[:2], atol=1e-6)
    assert not torch.equal(Hutchinson(3, distribution, seed=5).directions(x), whole)


def test_the_probes_of_hutch_plus_plus_depend_on_seed_and_sample_alone():
    x = torch.zeros(6, 2, 3)
    whole = HutchPlusPlus(6, seed=4).directions(x)
    assert torch.equal(HutchPlusPlus(6, seed=4).directions(x[2:], first=2), whole[:, 2:])
    assert not torch.equal(HutchPlusPlus(6, seed=5).directions(x), whole)


@pytest.mark.parametrize("number", range(4))
def test_probes_are_not_the_noise_that_made_the_samples(number):
    """Under one seed, or the likelihood of a model's own samples would be biased."""
    x = torch.zeros(500, 4)
    probes = Hutchinson(4, "gaussian").directions(x)
    made = Noise(0).normal((500, 4), number)
    assert all(abs(float((probe * made).mean())) < 4 / math.sqrt(2000) for probe in probes)


@pytest.mark.parametrize("divergence, products", [*zip(EVERY, (3, 3, 2, 2, 4), strict=True)], ids=str)
def test_one_forward_pass_and_a_backward_pass_for_each_product(divergence, products):
    forwards, backwards = [], []

    def watched(x):
        forwards.append(1)
        value = field(x)
        value.register_hook(lambda _: backwards.append(1))
        return value

    x = Noise(0).normal((5, 3), dtype=torch.float64)
    _, found = divergence.along(watched, x, divergence.directions(x))
    assert len(forwards) == 1 and len(backwards) == products
    assert found.shape == (5, divergence.count(x))


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_a_graph_is_kept_where_it_is_asked_for(divergence):
    """Gradients of the divergence, inside no_grad as well, to a state that has a history and to parameters."""
    start = Noise(0).normal((5, 3), dtype=torch.float64).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = 1.5 * start
    directions = divergence.directions(x)
    with torch.no_grad():
        value, found = divergence.along(lambda y: scale * field(y), x, directions, graph=True)
        plain, without = divergence.along(lambda y: scale * field(y), x, directions)
    assert not plain.requires_grad and not without.requires_grad
    assert torch.equal(value, plain) and torch.equal(found, without)
    by_scale, by_start = torch.autograd.grad(found.sum(), (scale, start))
    assert torch.allclose(by_scale, found.sum() / 2, rtol=1e-10)
    assert by_start.abs().min() > 0


def test_the_gradient_of_the_exact_divergence_is_that_of_the_trace():
    x = Noise(0).normal((4, 3), dtype=torch.float64).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda y: field(y).sum(0), x, create_graph=True)
    (expected,) = torch.autograd.grad(torch.einsum("ibi->", jacobian), x)
    for exact in (Exact(), Exact(chunk=2)):
        found = exact.along(field, x, exact.directions(x), graph=True)[1]
        assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], expected, rtol=1e-10), exact


@pytest.mark.parametrize("divergence", [*EVERY[1:], HutchPlusPlus(3)], ids=str)
def test_the_mean_gradient_of_an_estimate_is_that_of_the_trace(divergence):
    one, copies = Noise(0).normal((1, 3), dtype=torch.float64), 20_000
    gradients = []
    for way in (divergence, Exact()):
        x = one.repeat(copies, 1).requires_grad_()
        found = way.along(field, x, way.directions(x), graph=True)[1]
        gradients.append(torch.autograd.grad(found.mean(1).sum(), x)[0])
    found, expected = gradients
    error = found.std(0) / math.sqrt(copies)
    assert (error > 0).all() and ((found.mean(0) - expected[0]).abs() < 4 * error).all()


def test_a_graph_to_parameters_needs_no_gradient_of_the_state():
    scale, x = torch.tensor(2.0, requires_grad=True), torch.ones(2, 3)
    _, found = Exact().along(lambda y: scale * y**2, x, Exact().directions(x), graph=True)
    assert torch.autograd.grad(found.sum(), scale)[0] == 12 and not x.requires_grad


def test_the_default_is_exact_in_few_dimensions_and_has_an_error_in_many():
    assert default_divergence(torch.zeros(3, 8)) == default_divergence(torch.zeros(3, 2, 4)) == Exact()
    many = torch.zeros(3, 1, 3, 3)
    assert default_divergence(many) == Hutchinson(probes=2)
    assert default_divergence(many).summary(torch.ones(3, 2))[1] is not None


# Integrated.


def test_the_standard_error_is_that_of_the_probes():
    model = correlated(VP(t_min=1e-3))
    x = model.sample(4, seed=1)
    truth = log_likelihood(model, x, Exact())
    assert torch.equal(truth.stderr, torch.zeros_like(x[:, 0]))
    assert log_likelihood(model, x, Hutchinson()).stderr is None
    # The same sample four hundred times: independent probes for each copy.
    copies = x[:1].expand(400, 2)
    found = log_likelihood(model, copies, Hutchinson(probes=8), rtol=1e-4, atol=1e-4)
    spread = float(found.log_prob.std())
    assert float(found.stderr.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)
    assert abs(float(found.log_prob.mean() - truth.log_prob[0])) < 4 * spread / 20 + 1e-3
    assert found.log_prob.shape == found.stderr.shape == (400,)


def covariance_of(size):
    """Correlated, condition number 100."""
    return symmetric(torch.logspace(-2, 0, size).double(), seed=3)


@pytest.mark.parametrize(
    "divergence, quantile",
    [
        (Hutchinson(16), 2.131),
        (Hutchinson(16, "gaussian"), 2.131),
        (Hutchinson(8, "orthogonal"), 2.365),
        (HutchPlusPlus(12), 3.182),
    ],
    ids=str,
)
def test_the_interval_of_95_percent_covers_the_truth(divergence, quantile):
    """In 90 to 99 of 100: Student's t of E - 1 degrees of freedom times the standard error, a Gaussian of 16 values."""
    sde, covariance, mean = VP(t_min=1e-3), covariance_of(16), torch.linspace(-1, 1, 16).double()
    model = GaussianMixture(torch.ones(1).double(), mean[None], covariance[None], sde)
    x = model.sample(1, seed=5).expand(100, 16)
    truth = model.log_prob(x, torch.tensor(sde.t_min).double())
    prior = matched_prior(None, sde, covariance, mean=mean)
    found = log_likelihood(model, x, divergence, rtol=1e-6, atol=1e-6, prior=prior)
    error = (found.log_prob - truth).abs()
    assert float(error.mean()) > 0.05  # the solver's error is nothing beside it
    assert 90 <= int((error < quantile * found.stderr).sum()) <= 99


# Refusals.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"probes": 0}, "probes must be a positive integer, found 0"),
        ({"probes": 1.0}, "probes must be a positive integer"),
        ({"probes": True}, "probes must be a positive integer"),
        ({"distribution": "uniform"}, "distribution must be one of rademacher, gaussian, orthogonal, found 'uniform'"),
    ],
)
def test_what_is_no_probe_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"Hutchinson: {message}"):
        Hutchinson(**arguments)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Exact(chunk=0), "Exact: chunk must be a positive integer, found 0"),
        (lambda: HutchPlusPlus(0), r"HutchPlusPlus: probes must be a positive integer, found 0"),
        (lambda: HutchPlusPlus(2), r"probes must be at least 3, found 2; see Hutchinson"),
        (lambda: HutchPlusPlus(9).directions(torch.zeros(2, 3)), "probes=9 sketch 3 directions, found data of 3 dim"),
        (lambda: Hutchinson(4, "orthogonal").directions(torch.zeros(2, 3)), r"found probes=4 for data of D=3"),
    ],
)
def test_what_can_not_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_divergence_has_a_gradient_through_attention():
    """The fused kernels of attention have none of the second order: there the graph is of others."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), channels=8, heads=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, label = torch.randn(2, 1, 8, 8, requires_grad=True), torch.zeros(2)
    probes = Hutchinson(1).directions(x)
    _, found = Hutchinson(1).along(lambda x: net(x, label), x, probes, graph=True)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert bool(torch.isfinite(slope).all()) and slope.abs().max() > 0
