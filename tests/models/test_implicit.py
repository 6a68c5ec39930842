"""Implicit and sliced score matching against denoising: equal means, equal gradients, by quadrature and enumeration."""

import math

import numpy as np
import pytest
import torch
from oracles import SOME_SDES, correlated, learned, marginal, signs
from torch.nn import functional as F

import models.implicit
from models import (
    MLP,
    DenoisingScoreMatching,
    ImplicitScoreMatching,
    LogNormal,
    NoiseRow,
    ScoreNetwork,
    SingleTime,
    SlicedScoreMatching,
    UNet,
    UniformTime,
    denoising_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)
from sde import EDM, VP, Prediction, ScoreModel
from sde.base import expand, last_time

WEIGHTINGS = ["simple", "likelihood", "edm", "min_snr"]


class Field(ScoreModel):
    """eps_hat = A x + c x x', x' the other value: not linear, and its Jacobian not symmetric."""

    def __init__(self, sde, matrix=((0.3, 0.5), (-0.2, 0.1)), curve=0.2):
        super().__init__(sde)
        self.matrix = torch.nn.Parameter(torch.tensor(matrix, dtype=torch.float64))
        self.curve = torch.nn.Parameter(torch.tensor(curve, dtype=torch.float64))
        self.parametrization = NoiseRow()

    def forward(self, x, t):
        eps = x @ self.matrix.T + self.curve * x * x.flip(1)
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        return Prediction((x - sigma * eps) / alpha, eps)


class Slope(Field):
    """s = -a x in one dimension."""

    def __init__(self, sde, a):
        super().__init__(sde)
        self.a = a

    def forward(self, x, t):
        eps = self.a * expand(self.sde.sigma(t), x) * x
        return Prediction(x - expand(self.sde.sigma(t), x) * eps, eps)


@pytest.fixture
def every_sign(monkeypatch):
    """All 2^D vectors of signs as the probes of each sample."""

    def every(shape, generator, like):
        vectors = signs(math.prod(shape[2:]), like.dtype)
        assert shape[0] == len(vectors)
        return vectors.reshape(-1, 1, *shape[2:]).expand(shape)

    monkeypatch.setitem(models.implicit.PROBES, "rademacher", every)


def plane(n=8):
    """Quadrature over two independent normal variables: nodes ``(n^2, 2)``, weights ``(n^2,)``."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n))
    pairs = torch.cartesian_prod(nodes, nodes)
    return pairs, torch.outer(weights, weights).flatten() / (2 * math.pi)


def at(objective, model, x0, eps, t):
    """The weighted loss at given times and noise."""
    return objective.weighting(t, model.sde, model) * objective.squared_error(model, x0, eps, t, None)


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (model.matrix, model.curve))])


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_its_mean_over_the_noise_is_that_of_denoising(sde, weighting, every_sign):
    """Also for one x_0, and for every gradient: the polynomial field makes the quadrature exact."""
    eps, weights = plane()
    x0 = torch.tensor([0.6, -0.9], dtype=torch.float64).expand_as(eps)
    t = torch.full((len(eps),), sde.t_min + 0.4 * (last_time(sde) - sde.t_min), dtype=torch.float64)
    model = Field(sde)
    expected = (weights * at(DenoisingScoreMatching(weighting), model, x0, eps, t)).sum()
    slopes = gradients(expected, model)
    for objective in (
        ImplicitScoreMatching(weighting),
        SlicedScoreMatching(weighting, probes=4),
        SlicedScoreMatching(weighting, probes=4, variance_reduced=False),
    ):
        found = (weights * at(objective, model, x0, eps, t)).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-11), (sde, weighting, objective)
        assert torch.allclose(gradients(found, model), slopes, rtol=1e-11, atol=1e-11 * float(slopes.abs().max()))


def test_the_constants_between_denoising_explicit_and_implicit():
    """Data of variance 0.075 under noise of 0.2, s = -a x: 1/2 (1 / 0.2 - 1 / 0.275) and -1/2 / 0.275, for all a."""
    sde, variance = EDM(), 0.075
    t = torch.full((64,), math.sqrt(0.2), dtype=torch.float64)
    nodes, weights = plane()
    x0, eps = math.sqrt(variance) * nodes[:, :1], nodes[:, 1:]
    for a in (-1.0, 0.0, 0.4, 1 / 0.275, 7.0):
        model = Slope(sde, a)
        # The losses are those of eps = -sigma s: of |s - target|^2 / 2 times 2 sigma^2; Hyvarinen's has no constant.
        denoising = (weights * at(DenoisingScoreMatching(), model, x0, eps, t)).sum().item() / (2 * 0.2)
        implicit = (weights * (at(ImplicitScoreMatching(), model, x0, eps, t) - 1)).sum().item() / (2 * 0.2)
        explicit = 0.5 * (1 / 0.275 - a) ** 2 * 0.275
        assert denoising - explicit == pytest.approx(0.681818181818, rel=1e-10), a
        assert implicit - explicit == pytest.approx(-1.818181818182, rel=1e-10), a
        assert implicit == pytest.approx(-a + 0.5 * a**2 * 0.275, abs=1e-12), a


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_all_projections_make_it_implicit(every_sign, variance_reduced):
    """Sample by sample, with its gradients; also in three dimensions and after a network."""
    sde = VP()
    torch.manual_seed(0)
    net = ScoreNetwork(MLP((1, 3), width=16, depth=1), sde, "v").double()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x0, times = torch.randn(5, 1, 3, dtype=torch.float64), UniformTime()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    implicit = implicit_score_matching(net, x0, "min_snr", times, generators[0])
    sliced = sliced_score_matching(
        net, x0, "min_snr", times, generators[1], probes=8, variance_reduced=variance_reduced
    )
    assert torch.allclose(sliced, implicit, rtol=1e-11)
    one, other = (torch.autograd.grad(loss.sum(), list(net.parameters())) for loss in (implicit, sliced))
    for p, q in zip(one, other, strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 3, 7])
def test_chunks_change_nothing(chunk):
    torch.manual_seed(0)
    net = ScoreNetwork(MLP((3,), width=16, depth=1), VP(), "data").double()
    net.net.last[-1].weight.data.normal_()
    x0 = torch.randn(4, 3, dtype=torch.float64)
    values = [ImplicitScoreMatching(chunk=c)(net, x0, torch.Generator().manual_seed(0)).value for c in (1, chunk)]
    assert torch.allclose(*values, rtol=1e-12)
    slopes = [torch.autograd.grad(v.sum(), net.net.first.weight)[0] for v in values]
    assert torch.allclose(*slopes, rtol=1e-10)


def test_reduced_variance_varies_less():
    """At the exact score of N(m, V), P = V^-1, in two dimensions: the mean variance over the signs of a probe.

    v^T M v takes the values tr M +- 2 M_12. With M = -2 sigma^2 P the mean of 4 M_12^2 is 16 sigma^4 P_12^2; with
    eps eps^T added, eps / sigma = P (x - m), it is 4 sigma^4 (P_11 P_22 + 2 P_12^2): more if 2 P_12^2 < P_11 P_22.
    """
    sde, time = VP(), 0.3
    model, (z, weights) = correlated(sde), plane()
    mean, covariance = marginal(model, time)
    x, t = mean + z @ torch.linalg.cholesky(covariance).T, torch.full((len(z),), time, dtype=torch.float64)
    sigma, precision = float(sde.sigma(t[0])), torch.linalg.inv(covariance)
    off, diagonal = float(precision[0, 1] ** 2), float(precision.diagonal().prod())
    expected = {True: 16 * sigma**4 * off, False: 4 * sigma**4 * (diagonal + 2 * off)}
    for reduced, variance in expected.items():
        values = []
        for v in signs(2):
            leaf = x.clone().requires_grad_()
            eps = model(leaf, t).eps
            product = torch.autograd.grad(eps, leaf, v.expand_as(leaf))[0]
            square, divergence = objective_parts(
                SlicedScoreMatching(variance_reduced=reduced), eps.detach(), product, v
            )
            values.append(square - 2 * sigma * divergence)
        found = (weights * torch.stack(values).var(0, correction=0)).sum()
        assert found.item() == pytest.approx(variance, rel=1e-10), reduced
    assert expected[True] < 0.8 * expected[False]


def objective_parts(objective, eps, product, v):
    """``objective.parts`` with the probe of each sample given."""
    probes = models.implicit.PROBES
    kept, probes["rademacher"] = probes["rademacher"], lambda *_: v.expand_as(eps)[None]
    try:
        return objective.parts(eps, lambda _: product, None)
    finally:
        probes["rademacher"] = kept


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_have_the_covariance_of_the_identity(probe):
    v = models.implicit.PROBES[probe]((40_000, 1, 2), torch.Generator().manual_seed(0), torch.zeros(1)).flatten(1)
    assert torch.allclose(v.T @ v / len(v), torch.eye(2), atol=0.03) and float(v.mean(0).abs().max()) < 0.02
    assert not torch.equal(v[:100], v[100:200])


def test_probes_of_gaussian_numbers_give_the_mean():
    model, x0 = Field(VP()), torch.zeros(1, 2, dtype=torch.float64)
    many = dict(weighting="simple", times=SingleTime(0.3))
    exact = implicit_score_matching(model, x0, generator=torch.Generator().manual_seed(0), **many)
    for options in ({}, {"variance_reduced": False}):
        found = sliced_score_matching(
            model, x0, generator=torch.Generator().manual_seed(0), probes=4000, probe="gaussian", **many, **options
        )
        assert found.item() == pytest.approx(exact.item(), abs=0.1), options


def test_the_minimum_of_a_linear_score_is_the_inverse_covariance(monkeypatch, every_sign):
    """Least squares in closed form: at s = -S^-1 x, S the moments of these very samples, the gradient vanishes."""
    sde, t = EDM(), 0.7
    generator = torch.Generator().manual_seed(0)
    noise, x0 = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = x0 @ torch.tensor([[1.0, 0.6], [0.0, 0.4]], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    x = x0 + t * noise
    model = Field(sde, (t * torch.linalg.inv(x.T @ x / 50)).tolist(), 0.0)
    for objective in (ImplicitScoreMatching(times=SingleTime(t)), SlicedScoreMatching(times=SingleTime(t), probes=4)):
        slope = torch.autograd.grad(objective(model, x0).value.mean(), model.matrix)[0]
        assert float(slope.abs().max()) < 1e-12, objective
    wrong = Field(sde, (1.01 * model.matrix.detach()).tolist(), 0.0)
    slope = torch.autograd.grad(ImplicitScoreMatching(times=SingleTime(t))(wrong, x0).value.mean(), wrong.matrix)[0]
    assert float(slope.abs().max()) > 1e-3


@pytest.mark.parametrize("make", [SlicedScoreMatching, ImplicitScoreMatching])
def test_the_gradient_of_a_convolutional_network_is_that_of_its_loss(make):
    """With attention, against central differences along a random direction."""
    torch.manual_seed(0)
    net = UNet((1, 4, 4), channels=8, multipliers=(1,), attention=(True,), heads=1)
    model = ScoreNetwork(net, VP(), "v").double()
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    for parameter, move in zip(parameters, direction, strict=True):
        parameter.data.add_(0.1 * move.roll(1))
    x0 = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def loss():
        return make("likelihood", LogNormal())(model, x0, torch.Generator().manual_seed(2)).value.mean()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), direction, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        for parameter, move in zip(parameters, direction, strict=True):
            parameter.data.add_(step * move)
        with torch.no_grad():
            values.append(loss().item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


class Fused(torch.nn.Module):
    """A network of attention in the layout of the fused kernels, which have no second derivative."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, label):
        q = self.scale * x.reshape(len(x), 1, -1, 4)
        return F.scaled_dot_product_attention(q, q, q).reshape(x.shape)


def test_fused_attention_is_no_obstacle():
    model, x0 = ScoreNetwork(Fused(), VP()), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    q = x0.reshape(3, 1, 2, 4).requires_grad_()
    (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        slope.sum().backward()
    SlicedScoreMatching()(model, x0, torch.Generator().manual_seed(0)).value.mean().backward()
    assert float(model.net.scale.grad.abs()) > 0


def test_without_gradients_the_loss_is_the_same():
    model, x0 = Field(VP()), torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for make in (SlicedScoreMatching, ImplicitScoreMatching):
        with_graph = make()(model, x0, torch.Generator().manual_seed(0)).value
        with torch.no_grad():
            without = make()(model, x0, torch.Generator().manual_seed(0)).value
        assert torch.equal(with_graph, without) and with_graph.requires_grad and not without.requires_grad


def test_what_cannot_work_is_refused():
    x0 = torch.zeros(1, 2)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), learned(hidden=3).requires_grad_(True))
    for make in (SlicedScoreMatching, ImplicitScoreMatching):
        with pytest.raises(ValueError, match=rf"{make.__name__} does not train; use DenoisingScoreMatching"):
            make()(model, x0)
    with pytest.raises(ValueError, match="probe must be one of rademacher, gaussian, found 'sphere'"):
        SlicedScoreMatching(probe="sphere")
    with pytest.raises(ValueError, match="probes must be a positive integer, found 0"):
        SlicedScoreMatching(probes=0)
    with pytest.raises(ValueError, match="chunk must be a positive integer, found 0"):
        ImplicitScoreMatching(chunk=0)
    assert bool(torch.isfinite(denoising_score_matching(model, x0, "likelihood")).all())
