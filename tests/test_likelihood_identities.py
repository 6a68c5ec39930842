"""What must hold of a likelihood whatever the model, the process and the method: identities, and options together."""

import math

import pytest
import torch
from oracles import CENTRE, CORE_SDES, CORRELATED, correlated, gaussian, legendre, marginal, mixture, quick
from torch import nn

from experiments.audit import bits_per_dim
from experiments.data import digits
from experiments.dequantization import Uniform
from models import MLP, GaussianMixture, LevelHead, ScoreNetwork, UNet
from sde import EDM, VE, VP, Cosine, Noise, Prediction, RectifiedFlow, ScoreModel, SubVP
from sde.base import expand
from solvers import Exact, Hutchinson, HutchPlusPlus, ProbabilityFlow, log_likelihood, sample

METHODS = [dict(method="one_pass", steps=60), dict(method="dopri5", rtol=1e-7, atol=1e-7)]
both = pytest.mark.parametrize("method", METHODS, ids=["one_pass", "dopri5"])


def ends(sde):
    """t_min and t_max as tensors."""
    return (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))


def terminal(model):
    """The exact log-density at t_max."""
    return lambda x: model.log_prob(x, torch.tensor(model.sde.t_max, dtype=x.dtype))


def at_t_min(model, n=16, seed=0):
    """Samples of p at t_min, and their log-density."""
    x, t = model.sample(n, seed), torch.tensor(model.sde.t_min, dtype=torch.float64)
    x = model.sde.perturb(x, t, Noise(seed + 1).normal(tuple(x.shape), dtype=x.dtype))
    return x, model.log_prob(x, t)


def network(shape, sde, outputs=1, row="v", seed=1, std=0.3):
    """A small network with random weights."""
    torch.manual_seed(seed)
    net = MLP(shape, outputs, width=16, depth=1)
    nn.init.normal_(net.last[-1].weight, std=std)
    return ScoreNetwork(net, sde, row).double()


# The density of a network.


@pytest.mark.parametrize("name, reach, steps", [("noise", 2000, 200), ("v", 12, 60), ("levels", 12, 60)])
def test_in_one_pass_any_network_gives_a_density(name, reach, steps):
    """It integrates to one on a line with weights that are random, as the flow's own does; with too few steps, to one
    within the error that is stated."""
    levels = name == "levels"
    model = network((1,), VP(t_min=1e-2), 5 if levels else 1, LevelHead(torch.randn(5, 1)) if levels else name)

    def integral(steps, of):
        def integrand(x):
            return of(log_likelihood(model, x[:, None], method="one_pass", steps=steps))

        return legendre(integrand, -reach, reach, panels=60, order=12)

    assert integral(steps, lambda found: found.log_prob.exp()) == pytest.approx(1, abs=1e-4)
    few = integral(steps // 4, lambda found: found.log_prob.exp())
    assert abs(few - 1) < integral(steps // 4, lambda found: found.log_prob.exp() * found.error)


@both
def test_an_untrained_level_head_has_the_density_of_its_histogram(method):
    """In closed form at t_min: each value uniform in bins of the given probabilities, and the noise on top."""
    shares = torch.softmax(torch.tensor([[0.3, 2.0], [1.0, 0.1], [-0.5, 0.7], [0.2, -1.0]]).double(), 0)
    sde = VP(t_min=1e-2)
    model = ScoreNetwork(MLP((2,), 4, width=8, depth=1), sde, LevelHead(shares.log())).double()
    x = torch.linspace(-0.99, 0.98, 48, dtype=torch.float64).reshape(24, 2)

    def log_density(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        z = (x[:, None] - alpha * torch.linspace(-1, 1, 5, dtype=x.dtype)[:, None]) / sigma
        mass = torch.special.ndtr(z[:, :-1]) - torch.special.ndtr(z[:, 1:])
        return torch.log((shares * mass).sum(1) / (0.5 * alpha)).sum(1)

    first, last = ends(sde)
    found = log_likelihood(model, x, prior=lambda y: log_density(y, last), **method)
    assert (found.log_prob - log_density(x, first)).abs().max() < 1e-4


@pytest.mark.parametrize("sde", [RectifiedFlow(t_min=1e-2), Cosine(t_min=1e-2)], ids=str)
def test_in_one_pass_a_network_whose_alpha_ends_at_zero_has_its_flow_s_density(sde):
    model = network((2,), sde)
    x = Noise(3).normal((6, 2), dtype=torch.float64)
    found, flow = log_likelihood(model, x, steps=150), log_likelihood(model, x, rtol=1e-7, atol=1e-7)
    assert float(sde.alpha(torch.tensor(sde.t_max))) < 1e-6
    assert (found.log_prob - flow.log_prob).abs().max() < 1e-5


# Models around models.


class Combined(ScoreModel):
    """Classifier-free guidance: (1 - w) times the pair without the condition, and w times that with it."""

    def __init__(self, without, given, w):
        super().__init__(given.sde)
        self.without, self.given, self.w = without, given, w

    def forward(self, x, t):
        pairs = zip(self.without(x, t), self.given(x, t), strict=True)
        return Prediction(*((1 - self.w) * a + self.w * b for a, b in pairs))


class Steered(ScoreModel):
    """The gradient of ``evidence(x, t)``, a log-likelihood ``(B,)``, added to the score."""

    def __init__(self, inner, evidence):
        super().__init__(inner.sde)
        self.inner, self.evidence = inner, evidence

    def forward(self, x, t):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            (delta,) = torch.autograd.grad(self.evidence(y, t).sum(), y, create_graph=True)
        x0, eps = self.inner(x, t)
        alpha, sigma = (expand(c, x) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        return Prediction(x0 + sigma**2 / alpha * delta, eps - sigma * delta)


def free(sde):
    """Two Gaussians of one covariance: at w = 2.5 it is the Gaussian about the mean extrapolated by as much."""
    shift, one = torch.tensor([0.6, 0.3], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    given, exact = (GaussianMixture(one, (CENTRE + w * shift)[None], CORRELATED[None], sde) for w in (1, 2.5))
    return Combined(correlated(sde), given, 2.5), exact


def classified(sde):
    """The posterior of a mixture's component, by a gradient inside of the model: the component."""
    model = mixture(sde)
    covariance = (model.axes[1] * model.variances[1]) @ model.axes[1].T
    exact = GaussianMixture(torch.ones(1).double(), model.means[1:], covariance[None], sde)
    return Steered(model, lambda x, t: exact.log_prob(x, t) - model.log_prob(x, t)), exact


def measured(sde, noise=0.2):
    """A measurement of one coordinate, with Gaussian noise: the conjugate posterior."""
    model, row, value = correlated(sde), torch.tensor([1.0, -0.5], dtype=torch.float64), 0.9
    gain = CORRELATED @ row / (row @ CORRELATED @ row + noise)
    mean = CENTRE + gain * (value - row @ CENTRE)
    covariance = CORRELATED - gain[:, None] * (row @ CORRELATED)
    exact = GaussianMixture(torch.ones(1).double(), mean[None], covariance[None], sde)

    def evidence(x, t):
        """log N(value; row x_0, noise) averaged over the posterior of x_0 given x_t."""
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        of_x0 = torch.linalg.inv(torch.linalg.inv(CORRELATED) + (alpha / sigma) ** 2 * torch.eye(2).double())
        return -0.5 * (value - model(x, t).x0 @ row) ** 2 / (row @ of_x0 @ row + noise)

    return Steered(model, evidence), exact


@both
@pytest.mark.parametrize("guided", [free, classified, measured])
@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_a_guided_model_has_the_density_it_is_guided_to(sde, guided, method):
    model, exact = guided(sde)
    x, log_prob = at_t_min(exact)
    found = log_likelihood(model, x, prior=terminal(exact), **method)
    assert (found.log_prob - log_prob).abs().max() < 1e-5


# One process as another.


CLOCKED = VP(t_min=1e-3)
LEVELS = tuple(float(CLOCKED.sigma(t) / CLOCKED.alpha(t)) for t in ends(CLOCKED))
PAIRS = [(CLOCKED, EDM(*LEVELS)), (EDM(*LEVELS), CLOCKED), (VE(*LEVELS), CLOCKED), (EDM(*LEVELS), VE(*LEVELS))]


@both
@pytest.mark.parametrize("own, other", PAIRS, ids=lambda sde: type(sde).__name__)
def test_log_densities_under_another_process_differ_by_the_units(own, other, method):
    """Of one model, between the same levels of noise: log p(c x) = log p(x) - D log c, c the ratio of the alphas."""
    model = mixture(own)
    x, log_prob = at_t_min(model)
    c, last = (other.alpha(t) / own.alpha(s) for t, s in zip(ends(other), ends(own), strict=True))
    prior = terminal(model)
    plain = log_likelihood(model, x, prior=prior, **method)
    changed = log_likelihood(model.under(other), c * x, prior=lambda y: prior(y / last) - 2 * last.log(), **method)
    assert (plain.log_prob - log_prob).abs().max() < 1e-5
    assert torch.allclose(changed.log_prob, plain.log_prob - 2 * c.log(), rtol=0, atol=1e-5)
    assert torch.allclose(changed.latent / last, plain.latent, rtol=1e-4, atol=1e-4)


@both
def test_an_affine_change_of_data_and_process_shifts_the_density_by_its_log_determinant(method):
    """log p(a x + b) = log p(x) - D log |a|, with the exact density at t_max in either units."""
    a, b = -3.0, torch.tensor([0.7, -2.0], dtype=torch.float64)
    sde = VE(sigma_max=20.0)
    model, wide = mixture(sde), VE(sigma_min=3 * sde.sigma_min, sigma_max=3 * sde.sigma_max)
    covariances = a**2 * (model.axes * model.variances[:, None]) @ model.axes.mT
    scaled = GaussianMixture(model.log_weights.exp(), a * model.means + b, covariances, wide)
    x, log_prob = at_t_min(model)
    found, expected = (log_likelihood(m, y, prior=terminal(m), **method) for m, y in ((scaled, a * x + b), (model, x)))
    assert (expected.log_prob - log_prob).abs().max() < 1e-5
    assert torch.allclose(found.log_prob, expected.log_prob - 2 * math.log(3), rtol=0, atol=1e-6)


# The flow as a map.


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_the_flow_of_a_correlated_gaussian_is_the_affine_map_between_its_ends(sde):
    """Along each axis by the root of the ratio of the variances: outwards to t_max, and back again."""
    model = correlated(sde)
    x = model.sample(5, seed=3)
    (mean, before), (later, after) = (marginal(model, t) for t in (sde.t_min, sde.t_max))
    axes = model.axes[0]
    growth = torch.sqrt((axes.T @ after @ axes).diagonal() / (axes.T @ before @ axes).diagonal())
    expected = later + (x - mean) @ (axes * growth) @ axes.T
    found = log_likelihood(model, x, method="dopri8", rtol=1e-10, atol=1e-10)
    size = float(after.diagonal().sqrt().max())
    assert (found.latent - expected).abs().max() < 1e-7 * size
    assert (found.change - growth.log().sum()).abs().max() < 1e-7
    assert (ProbabilityFlow(1e-10, 1e-10, "dopri8")(model, x_T=expected).x - x).abs().max() < 1e-7


@pytest.mark.parametrize("sde", quick(CORE_SDES), ids=str)
def test_the_change_on_the_way_there_and_back_is_zero(sde):
    model, options = mixture(sde), dict(method="dopri8", rtol=1e-9, atol=1e-9)
    x, _ = at_t_min(model)
    there = log_likelihood(model, x, **options)
    back = sample(model, x_T=there.latent, return_log_prob=True, **options)
    assert (back.x - x).abs().max() < 1e-5
    assert (back.likelihood.change - there.change).abs().max() < 1e-6
    assert there.change.abs().max() > 0.5


@pytest.mark.parametrize("sde", [VP(beta_max=5.0), SubVP(t_min=1e-2), VE(sigma_max=5.0)], ids=str)
def test_the_error_on_clean_data_is_the_priors_and_that_of_the_noise_at_t_min(sde):
    """Each in closed form, for a Gaussian off the origin; the solver adds nothing."""
    model = gaussian(sde, 0.02, 0.5)
    x, (first, last) = model.sample(8, seed=1), ends(sde)
    found = log_likelihood(model, x, steps=60)
    of_prior = found.prior - model.log_prob(found.latent, last)
    of_noise = model.log_prob(x, first) - model.log_prob(x)
    assert (found.log_prob - model.log_prob(x) - of_prior - of_noise).abs().max() < 1e-6
    assert float(of_prior.abs().max()) > 1e-3 and float(of_noise.abs().max()) > 5e-5


# Bits per dimension.


class Flat(ScoreModel):
    """Uniform data on [low, high] in each dimension, in closed form."""

    def __init__(self, sde, low, high):
        super().__init__(sde)
        self.low, self.high = low, high

    def places(self, x, t):
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        return (alpha, sigma, *((x - alpha * end) / sigma for end in (self.low, self.high)))

    def forward(self, x, t):
        alpha, sigma, a, b = self.places(x.double(), t.double())
        mass = torch.special.ndtr(a) - torch.special.ndtr(b)
        slope = torch.exp(-0.5 * a**2) - torch.exp(-0.5 * b**2)
        eps = -slope / (math.sqrt(2 * math.pi) * mass)
        return Prediction(*(part.to(x) for part in ((x - sigma * eps) / alpha, eps)))

    def log_prob(self, x):
        alpha, _, a, b = self.places(x.double(), torch.tensor(self.sde.t_max, dtype=torch.float64))
        mass = torch.special.ndtr(a) - torch.special.ndtr(b)
        return torch.log(mass / (alpha * (self.high - self.low))).flatten(1).sum(1).to(x)


@pytest.mark.parametrize("levels, low, high", [(256, 0.0, 1.0), (256, -1.0, 1.0), (17, -0.4242, 2.8215)])
@pytest.mark.parametrize("sde", [VE(sigma_min=1e-3, sigma_max=5.0), VP(beta_max=5.0)], ids=str)
@both
def test_uniform_data_have_exactly_log2_levels_bits_through_the_flow(sde, levels, low, high, method):
    """In any units, with the exact density at t_max, for levels that the noise does not take beyond the range."""
    model = Flat(sde, low, high)
    k = torch.arange(levels // 8, levels - levels // 8, max(1, levels // 40), dtype=torch.uint8)[:, None].repeat(1, 2)
    method = method | ({} if "steps" in method else dict(rtol=1e-5, atol=1e-5))
    found = bits_per_dim(
        model, k, Uniform(levels, low, high), prior=model.log_prob, endpoint_correction=True, ode_subset=0, **method
    )
    error = found.per_example()["value"] - math.log2(levels)
    most = 2e-6 if "steps" in method else 1e-4
    assert error.abs().max() < most and found.value == pytest.approx(math.log2(levels), abs=0.1 * most)


# Probes on images.

PROBES = [(Hutchinson(16), 16), (Hutchinson(16, "orthogonal"), 16), (HutchPlusPlus(18), 6)]


def small_mlp():
    """And its last layer."""
    net = MLP((1, 8, 8), width=32, depth=1)
    return net, net.last[-1]


def small_unet():
    """And its last layer."""
    net = UNet((1, 8, 8), channels=8, multipliers=(1,), blocks=1, attention=(False,))
    return net, net.leave[-1].layers[-1]


NETS = [(small_mlp, 256), pytest.param(small_unet, 64, marks=pytest.mark.slow)]


@pytest.mark.parametrize("net, n", NETS, ids=["MLP", "UNet"])
@pytest.mark.parametrize("divergence, values", PROBES, ids=str)
def test_probes_and_the_exact_divergence_agree_within_their_errors_on_digits(net, n, divergence, values):
    """z over the examples: of mean 0 and of the mean square of Student's t of the estimates less one."""
    torch.manual_seed(0)
    layers, last = net()
    model = ScoreNetwork(layers, VP(t_min=1e-3), "v")
    nn.init.normal_(last.weight, std=0.3)
    x, _ = Uniform(17).draw(digits().test[:n])
    exact, found = (log_likelihood(model, x, d, steps=8) for d in (Exact(chunk=16), divergence))
    z = (found.log_prob - exact.log_prob) / found.stderr
    expected = (values - 1) / (values - 3)
    assert abs(float(z.mean())) < 4 * math.sqrt(expected / n)
    assert 0.6 * expected < float(z.square().mean()) < 1.5 * expected
    assert float(found.stderr.median()) > 0.5


# Options together.


@both
@pytest.mark.filterwarnings("ignore:endpoint_correction")
def test_parts_the_correction_and_gradients_together(method):
    model = network((2,), VP(t_min=1e-2))
    method = dict(method="rk4", steps=8) if "rtol" in method else dict(method="one_pass", steps=20)
    x = (0.5 * Noise(2).normal((5, 2), dtype=torch.float64)).requires_grad_()
    weight = model.net.last[-1].weight

    def graded(**options):
        found = log_likelihood(model, x, Hutchinson(2), gradients=True, **method, **options)
        return found, torch.autograd.grad(found.log_prob.sum(), (x, weight))

    for order in (True, 2):
        whole, of_whole = graded(endpoint_correction=order)
        parts, of_parts = graded(endpoint_correction=order, batch_size=2)
        assert torch.allclose(parts.log_prob, whole.log_prob, rtol=1e-10, atol=1e-10)
        assert torch.allclose(parts.endpoint, whole.endpoint, rtol=1e-10, atol=1e-10) and parts.nfe == whole.nfe
        for a, b in zip(of_parts, of_whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-8) and b.abs().max() > 1e-3
        shift, options = 0.5e-5 * torch.sign(of_whole[0]), dict(endpoint_correction=order, **method)
        ends = [log_likelihood(model, y, Hutchinson(2), **options).log_prob for y in (x + shift, x - shift)]
        assert float((ends[0] - ends[1]).sum()) == pytest.approx(1e-5 * float(of_whole[0].abs().sum()), rel=1e-4)


def test_a_bar_of_calls_changes_nothing(capsys):
    model = network((2,), VP(t_min=1e-2))
    x = Noise(3).normal((5, 2), dtype=torch.float64)
    silent = log_likelihood(model, x, steps=10, batch_size=2)
    assert capsys.readouterr().err == ""
    shown = log_likelihood(model, x, steps=10, batch_size=2, progress=True)
    bar = capsys.readouterr().err
    assert "log-likelihood" in bar and "call" in bar
    assert torch.equal(shown.log_prob, silent.log_prob) and shown.nfe == silent.nfe == 10
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.torch.jit.script")  # both the compiler's own
def test_a_compiled_model_has_the_same_likelihood(monkeypatch, backend):
    """ "eager" traces the model and leaves out the slow code generation."""
    torch._dynamo.reset()
    compiler, compiled = torch.compile, []

    def noted(*arguments, **options):
        compiled.append(1)
        return compiler(*arguments, **options, backend=backend)

    monkeypatch.setattr(torch, "compile", noted)
    model, x = network((2,), VP(t_min=1e-2)), Noise(3).normal((4, 2), dtype=torch.float64)
    for options in (dict(steps=12), dict(method="rk4", steps=3, divergence=Hutchinson(2)))[: 1 + (backend != "eager")]:
        plain, found = (log_likelihood(model, x, compile=c, **options) for c in (False, True))
        assert torch.allclose(found.log_prob, plain.log_prob, rtol=1e-6, atol=1e-6) and found.nfe == plain.nfe
    assert compiled and not model._forward_pre_hooks and all(p.requires_grad for p in model.parameters())
