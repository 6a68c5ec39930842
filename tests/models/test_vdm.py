"""The objective of continuous time against the bound, and the two gradients of a schedule that learns."""

import math

import pytest
import torch
from oracles import correlated, learned, mixture, train
from torch import nn

from models import MLP, DenoisingScoreMatching, ScoreNetwork, VariationalDiffusion
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import (
    EDM,
    VE,
    VP,
    DiscretizedGaussian,
    LearnedSchedule,
    LevelPosterior,
    Noise,
    Prediction,
    RectifiedFlow,
    ScoreModel,
    SubVP,
    TimeChanged,
)
from solvers import continuous_elbo
from solvers.calls import counting


def network(sde, shape=(2,), width=8):
    torch.manual_seed(0)
    model = ScoreNetwork(MLP(shape, width=width, depth=1), sde, "v").double()
    for parameter in model.net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def with_ends(**options):
    sde = LearnedSchedule(hidden=6, log_snr_max=6.0, log_snr_min=-5.0, learn_ends=True, **options).double()
    with torch.no_grad():
        for i, parameter in enumerate((sde.centres, sde.slopes, sde.weights)):
            parameter += (1.0, 3.0, 1.5)[i] * Noise(i).normal((1, 6))[0]
        sde.shifts.copy_(torch.tensor([0.4, -0.2]))
    return sde


INTERIOR = ("centres", "slopes", "weights")


# The value.


PROCESSES = [
    VP(t_min=0.1),
    SubVP(t_min=0.2, t_max=2.0),
    VE(sigma_min=0.1),
    EDM(t_min=1.0, t_max=20.0),
    RectifiedFlow(t_min=0.1, t_max=0.95),
    TimeChanged(VP(t_min=0.1), torch.square),
    learned(log_snr_max=5.0),
    with_ends(),
]
"""Not as close to the data as else: there uniform times cost the estimate its precision."""


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("decoder", [None, LevelPosterior(9, -3.0, 3.0), DiscretizedGaussian(9, -3.0, 3.0)])
def test_its_mean_is_minus_the_bound(sde, decoder):
    """To 5 standard errors of at most 0.05 nats per dimension."""
    model, n = mixture(sde), 400
    x0 = model.sample(8, seed=1)
    x0 = x0 if decoder is None else decoder.centres(((x0 + 3) / decoder.width).long().clamp(0, 8), x0.dtype)
    x0 = x0.repeat_interleave(n, 0)[torch.randperm(8 * n, generator=torch.Generator().manual_seed(0))]
    objective, generator = VariationalDiffusion(decoder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        values = torch.stack([objective(model, x0, generator).value.mean() for _ in range(8)])
    found = continuous_elbo(model, x0, decoder, points=8, draws=2, seed=3)
    within = float(found.stderr.square().sum().sqrt() / len(x0)) / 2
    stderr = math.hypot(float(values.std()) / 8**0.5, within)
    assert float(values.mean()) == pytest.approx(-found.mean()[0] / 2, abs=5 * stderr), stderr
    assert stderr < 0.05


def test_the_integrand_is_that_of_the_definition(monkeypatch):
    """-lambda' |eps - eps_hat|^2 / 2 for VE, whose coordinates are not those of the objective."""
    sde = VE()
    model, x0, eps = mixture(sde), Noise(0).normal((6, 2), dtype=torch.float64), Noise(1).normal((6, 2), 1)
    eps, u = eps.double(), torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.99], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
    monkeypatch.setattr("models.vdm.spread", lambda *_: u)
    found = VariationalDiffusion()(model, x0)
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    t, rate = first + (last - first) * u, 2 * math.log(sde.sigma_max / sde.sigma_min)
    between = 0.5 * rate * (last - first) * (eps - model(sde.perturb(x0, t, eps), t).eps).square().sum(1)
    sigma, mean = sde.sigma(first), model(sde.perturb(x0, first, eps), first).x0
    end = 0.5 * ((x0 - mean) / sigma).square().sum(1) + 2 * torch.log(sigma * math.sqrt(2 * math.pi))
    prior = 0.5 * x0.square().sum(1) / sde.sigma_max**2
    assert torch.allclose(found.value, (between + end + prior) / 2, rtol=1e-9)
    assert torch.allclose(found.log_snr, sde.log_snr(t)) and not found.log_snr.requires_grad


def test_calls_of_the_model():
    model, x0 = network(VP()), torch.full((4, 2), 0.5, dtype=torch.float64)
    for decoder, calls in ((None, 2), (DiscretizedGaussian(2), 2), (LevelPosterior(2), 1)):
        with counting(model) as counted:
            VariationalDiffusion(decoder)(model, x0)
        assert counted.n == calls, decoder


@pytest.mark.parametrize("shape", [(4,), (2, 6), (3, 2, 2)], ids=str)
def test_any_rank_and_float32(shape):
    decoder = LevelPosterior(5)
    x0 = decoder.centres(torch.arange(3 * math.prod(shape)).reshape(3, *shape) % 5)
    model = ScoreNetwork(MLP(shape, width=8, depth=1), LearnedSchedule(learn_ends=True))
    losses = VariationalDiffusion(decoder)(model, x0)
    losses.value.mean().backward()
    assert losses.value.shape == losses.log_snr.shape == (3,) and losses.value.dtype == torch.float32
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# The gradients.


def by_brute_force(model, x0, eps, u):
    """The integrand with a graph through everything: process, coefficients and network at the times themselves."""
    sde = model.sde
    t = sde.t_min + (sde.t_max - sde.t_min) * u
    at = sde.coefficients(t)
    eps_hat = model(sde.perturb(x0, t, eps), t).eps
    weight = at.diffusion_squared / (2 * at.sigma.square()) * (sde.t_max - sde.t_min)
    return weight * (eps - eps_hat).square().mean(1)


def test_the_interior_follows_the_squared_loss_and_all_else_the_bound(monkeypatch):
    model, n = network(with_ends()), 7
    sde, x0, eps = model.sde, Noise(0).normal((n, 2), 0, dtype=torch.float64), Noise(0).normal((n, 2), 1).double()
    u = (torch.arange(n, dtype=torch.float64) + 0.3) / n
    monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
    monkeypatch.setattr("models.vdm.spread", lambda *_: u)
    found = VariationalDiffusion()(model, x0).value
    found.mean().backward()
    assert all(p.requires_grad for p in model.parameters())
    brute = by_brute_force(model, x0, eps, u)
    span = sde.t_max - sde.t_min
    interior = [getattr(sde, name) for name in INTERIOR]
    squared = torch.autograd.grad((brute.square() / span).mean(), interior, retain_graph=True)
    for name, expected in zip(INTERIOR, squared, strict=True):
        gradient = getattr(sde, name).grad
        assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max())), name
        assert expected.abs().max() > 1e-6
    # The ends and the network: of the whole bound, with the last step and the prior by the definition.
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    share = sde._share(first).detach()
    high, low = sde._ends(first)
    log_snr = high - (high - low) * share
    pair = Held(model, log_snr)(x0, eps)
    end = 0.5 * (log_snr.exp() * (x0 - pair).square() - log_snr + math.log(2 * math.pi)).sum(1)
    alpha, sigma = sde.alpha(last), sde.sigma(last)
    prior = 0.5 * (alpha.square() * x0.square() + sigma.square() - 1 - 2 * sigma.log()).sum(1)
    total = brute + (end + prior) / 2
    assert torch.allclose(found, total, rtol=1e-9)
    others = [p for name, p in model.named_parameters() if name.removeprefix("sde.") not in INTERIOR]
    for parameter, expected in zip(others, torch.autograd.grad(total.mean(), others), strict=True):
        scale = 1e-9 * float(expected.abs().max())
        assert torch.allclose(parameter.grad, expected, rtol=1e-8, atol=scale), (parameter.shape, expected)


class Held:
    """x_0_hat of a network at a log-SNR with a graph, by the formulas of the v row."""

    def __init__(self, model, log_snr):
        self.net, self.log_snr = model.net, log_snr

    def __call__(self, x0, eps):
        alpha, sigma = torch.sigmoid(self.log_snr).sqrt(), torch.sigmoid(-self.log_snr).sqrt()
        x = alpha * x0 + sigma * eps
        return alpha * x - sigma * self.net(x, (-0.5 * self.log_snr).expand(len(x)))


def test_the_gradient_of_the_ends_is_that_of_finite_differences():
    """Of the mean over a batch at the same times and noise: the times are fixed, so that lambda moves under them."""
    model, x0 = network(with_ends()), Noise(0).normal((400, 2), dtype=torch.float64)
    objective = VariationalDiffusion()

    def value():
        return objective(model, x0, torch.Generator().manual_seed(0)).value.mean()

    value().backward()
    for i in (0, 1):
        found = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                model.sde.shifts[i] += h
                found.append(float(value()))
                model.sde.shifts[i] -= h
        assert float(model.sde.shifts.grad[i]) == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-6), i


@pytest.mark.parametrize("high, low, end, sign", [(1.0, -8.0, 0, -1), (6.0, -1.0, 1, 1)])
def test_the_ends_move_to_where_the_bound_is_better(high, low, end, sign):
    """With the exact score: too much noise at t_min, then too little at t_max; descent goes against the gradient."""
    sde = LearnedSchedule(high, low, hidden=4, learn_ends=True).double()
    model = correlated(sde)
    VariationalDiffusion()(model, model.sample(4000), torch.Generator().manual_seed(0)).value.mean().backward()
    assert sign * float(sde.shifts.grad[end]) > 0.02


class Profile(ScoreModel):
    """Of data at 0, eps_hat = (1 - e(lambda)) eps: an error of e |eps| that depends on the log-SNR alone."""

    def __init__(self, sde):
        super().__init__(sde)
        self.parametrization = PARAMETRIZATIONS["noise"]()

    @staticmethod
    def error(log_snr):
        return 0.3 + torch.exp(-0.5 * ((log_snr - 2) / 1.5).square())

    def forward(self, x, t):
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        eps = (1 - self.error(2 * torch.log(alpha / sigma))) * x / sigma
        return Prediction((x - sigma * eps) / alpha, eps)


def integrands(monkeypatch, sde, n=4001):
    """The integrand at evenly spaced times, for noise of unit length."""
    x0 = torch.zeros(n, 1, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones_like(x0))
    monkeypatch.setattr("models.vdm.spread", lambda *_: (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    t = sde.t_min + (sde.t_max - sde.t_min) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return VariationalDiffusion()._integrand(Profile(sde), x0, t, None, {})[0]


def test_the_interior_leaves_the_integral_and_training_flattens_it(monkeypatch):
    """The least mean square is where -lambda' e^2 is the same at all times: then it is the square of the integral."""
    sde = LearnedSchedule(log_snr_max=8.0, log_snr_min=-6.0, hidden=16).double()
    log_snr = torch.linspace(-6, 8, 20001, dtype=torch.float64)
    integral = float(torch.trapezoid(0.5 * Profile.error(log_snr).square(), log_snr))
    moved = learned(log_snr_max=8.0, log_snr_min=-6.0).double()
    for one in (sde, moved):
        assert float(integrands(monkeypatch, one).detach().mean()) == pytest.approx(integral, rel=2e-3)
    before = integrands(monkeypatch, sde).detach()
    optimizer = torch.optim.Adam(sde.parameters(), lr=0.1)
    for _ in range(250):
        optimizer.zero_grad()
        integrands(monkeypatch, sde, 200).mean().backward()
        optimizer.step()
    after = integrands(monkeypatch, sde).detach()
    assert float(after.mean()) == pytest.approx(integral, rel=2e-3)
    assert float(before.std() / before.mean()) > 1
    assert float(after.var() / before.var()) < 0.03  # 0.017; sixteen sigmoids are not any curve


@pytest.mark.slow
def test_training_reaches_the_entropy_and_a_schedule_that_learns_has_less_noise():
    """Two modes, 1500 steps, 35 s: .029 +- .017 nats/dim above the entropy, and .83 of the noise of a line."""
    exact, spread = mixture(VP(), torch.float32), []
    x0 = exact.sample(2000, seed=2)
    for sde in (LearnedSchedule(10.0, -8.0, learn_ends=True), LearnedSchedule(10.0, -8.0).requires_grad_(False)):
        torch.manual_seed(0)
        model = ScoreNetwork(MLP((2,), width=64, depth=2), sde, "v")
        losses = train(VariationalDiffusion(), model, exact.sample(20000, seed=1), 1500)
        spread.append(float(losses.mean(1).std()))
        found = continuous_elbo(model, x0, points=16, draws=4)
        gap = (exact.log_prob(x0) - found.log_prob) / 2
        assert float(gap.mean()) < 0.03 + 3 * float(gap.std()) / len(x0) ** 0.5, gap.mean()
    assert spread[0] < 0.9 * spread[1], spread


def test_evaluation_uses_the_ends_that_were_learned():
    sde = with_ends()
    low, high = sde.log_snr_range
    assert (low, high) == pytest.approx((-5.2, 6.4), abs=1e-3)
    times = sde.time(torch.tensor([high, 0.0, low], dtype=torch.float64))
    assert torch.allclose(sde.log_snr(times).detach(), torch.tensor([high, 0.0, low]).double(), atol=1e-6)
    assert sde.learns_ends and not LearnedSchedule().learns_ends and not sde.requires_grad_(False).learns_ends
    curve = sde.curve(times)
    assert curve.interior == () and torch.allclose(curve.log_snr, sde.log_snr(times))
    at = sde.coefficients(times)
    assert torch.allclose(-curve.slope, at.diffusion_squared / at.sigma.square(), rtol=1e-9)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), LearnedSchedule(learn_ends=True))
    assert "sde.shifts" in model.state_dict() and "sde.shifts" not in network(learned()).state_dict()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: VariationalDiffusion("levels"), TypeError, "decoder must be a Decoder or None, found 'levels'"),
        (lambda: LearnedSchedule(learn_ends=1), ValueError, "learn_ends must be True or False, found 1"),
        (
            lambda: DenoisingScoreMatching("likelihood").check(network(with_ends())),
            ValueError,
            "the ends of the schedule learn.*VariationalDiffusion",
        ),
        (
            lambda: VariationalDiffusion(LevelPosterior(4))(network(VP()), torch.ones(2, 2).double()),
            ValueError,
            "x0: expected the centres of 4 bins",
        ),
    ],
)
def test_what_can_not_work_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
