"""Bounds on a discrete distribution of known entropy, under models whose density at t_min is known, right and wrong."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from experiments.centres import DiscreteDecoder, TruncatedNormal
from experiments.dequantization import Uniform, importance_weighted
from experiments.variational import Variational
from models import GaussianMixture
from sde import VP, Noise
from solvers import log_likelihood

LEVELS, LOW, HIGH, DRAWS = 256, -1.0, 1.0, 64
WIDTH = (HIGH - LOW) / LEVELS
SDE = VP(t_min=1e-4)  # noise of 0.4 bins, which makes the estimators differ
T = torch.tensor(SDE.t_min, dtype=torch.float64)
ALPHA, SIGMA = float(SDE.alpha(T)), float(SDE.sigma(T))
EDGES = ALPHA * torch.linspace(LOW, HIGH, LEVELS + 1, dtype=torch.float64)
CENTRES = LOW + (torch.arange(LEVELS).double() + 0.5) * WIDTH
K = torch.arange(LEVELS)[:, None]


def rough(seed):
    """A distribution whose neighbouring levels differ by factors."""
    return torch.softmax(2 * Noise(seed).normal((LEVELS,), 0, dtype=torch.float64), 0)


RIGHT, WRONG = rough(1), rough(2)
MIXTURES = {q is RIGHT: GaussianMixture(q, CENTRES[:, None], torch.zeros(LEVELS, 1, 1), SDE) for q in (RIGHT, WRONG)}
MODELS = pytest.mark.parametrize("q", [RIGHT, WRONG], ids=["right", "wrong"])


def smeared(q, x):
    """Log-density at t_min of levels ``q`` that are uniform in their bins; x ``(N, 1)``."""
    mass = -torch.special.ndtr((x - EDGES) / SIGMA).diff(dim=1)
    return torch.log((q * mass).sum(1) / (ALPHA * WIDTH))


def peaked(q, x):
    """The same of levels at the centres of their bins."""
    return MIXTURES[q is RIGHT].log_prob(x, T)


def in_bins(density):
    """The integral of a density over each bin, (LEVELS,)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    panels = (torch.arange(8)[:, None] + 0.5 + 0.5 * nodes).flatten() / 8
    lower = LOW + WIDTH * torch.arange(LEVELS).double()[:, None]
    values = density((lower + WIDTH * panels).reshape(-1, 1)).exp().reshape(LEVELS, -1)
    return (values * weights.repeat(8)).sum(1) * WIDTH / 16


def in_scaled_bins(q):
    """P(k) of ``peaked`` over the bins as they are at t_min, in closed form."""
    tails = torch.special.ndtr((EDGES[:, None] - ALPHA * CENTRES) / SIGMA)
    return (tails.diff(dim=0) * q).sum(1)


def decoded(q):
    """P(k) of ``peaked`` through the posterior over levels, by the trapezoidal rule over 10 standard deviations."""
    x = torch.linspace(ALPHA * LOW - 10 * SIGMA, ALPHA * HIGH + 10 * SIGMA, 4001, dtype=torch.float64)[:, None]
    posterior = torch.softmax(-0.5 * ((x - ALPHA * CENTRES) / SIGMA).square(), 1)
    return (peaked(q, x).exp()[:, None] * posterior).sum(0) * (x[1] - x[0])


@functools.cache
def untrained_flow():
    """A dequantizing flow with parameters as they might become."""
    torch.manual_seed(0)
    flow = Variational(LEVELS, LOW, HIGH, (1,), _Wave)
    return flow.eval()


class _Wave(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.line = torch.nn.Linear(math.prod(shape), math.prod(shape))

    def forward(self, x, label):
        return 0.4 * torch.sin(3 * self.line(x))


CASES = {
    "uniform": (lambda: Uniform(LEVELS, LOW, HIGH), smeared, lambda q: in_bins(functools.partial(smeared, q))),
    "truncated normal": (lambda: TruncatedNormal.of(SDE, LEVELS, LOW, HIGH), peaked, in_scaled_bins),
    "decoder": (lambda: DiscreteDecoder.of(SDE, LEVELS, LOW, HIGH), peaked, decoded),
    "variational": (untrained_flow, smeared, lambda q: in_bins(functools.partial(smeared, q))),
}
EVERY = pytest.mark.parametrize("case", CASES)


@functools.cache
def evaluated(case, right):
    """Log-weights with the model's density ``(DRAWS, LEVELS)``, and what their exponentials must average to."""
    dequantizer, log_density, mass = CASES[case]
    q = RIGHT if right else WRONG
    draws = (dequantizer().draw(K, seed=3, number=number) for number in range(DRAWS))
    return torch.stack([log_density(q, d.x.double()) + d.log_weight for d in draws]), mass(q)


def bits(log_probs, p=RIGHT):
    """-E log2 of the mean over draws ``(draws, LEVELS)``, and its standard error over them."""
    per_level = -log_probs / math.log(2)
    error = (p.square() * per_level.var(0) / len(per_level)).sum().sqrt()
    return float((p * per_level.mean(0)).sum()), float(error)


def cross_entropy(mass):
    return -float((RIGHT * mass.log2()).sum())


@EVERY
@MODELS
def test_the_weights_average_to_the_probability_of_each_level(case, q):
    log_weights, mass = evaluated(case, q is RIGHT)
    # Sums over all levels with random signs: near normal, which a single level's few draws are not.
    signs = Noise(5).rademacher((16, LEVELS), dtype=torch.float64)
    weights = log_weights.exp()
    error = (signs.square() @ weights.var(0) / DRAWS).sqrt()
    assert ((signs @ (weights.mean(0) - mass)).abs() < 4 * error).all(), case
    assert mass.sum() == pytest.approx(1.0, abs=1e-3)  # the outermost bins lose what the noise carries beyond


@EVERY
@MODELS
def test_every_estimator_is_on_the_right_side_of_the_entropy(case, q):
    log_weights, mass = evaluated(case, q is RIGHT)
    entropy = -float((RIGHT * RIGHT.log2()).sum())
    found, error = bits(log_weights)
    assert found > entropy - 4 * error, case
    assert found > cross_entropy(mass) - 4 * error, case
    assert cross_entropy(mass) > entropy + (0 if q is RIGHT else 1), case
    assert q is RIGHT or found > entropy + 1  # 1 bit is less than the divergence of the two


@EVERY
@MODELS
def test_importance_weighting_improves_monotonically_to_the_cross_entropy(case, q):
    log_weights, mass = evaluated(case, q is RIGHT)
    found = [bits(log_weights)[0]]
    for k in (2, 4, 16, 64):
        groups = log_weights.unflatten(0, (-1, k)).transpose(0, 1).flatten(1)
        averaged = importance_weighted(groups).unflatten(0, (-1, LEVELS))
        found.append(float((RIGHT * -averaged.mean(0)).sum() / math.log(2)))
    # Groups of twice the size hold the same draws, so that this is no matter of chance.
    assert all(more <= less for less, more in itertools.pairwise(found)), found
    # Of the logarithm of a mean of many weights: its bias and standard error to first order.
    spread = log_weights.exp().var(0) / mass.square() / DRAWS
    bias, error = (
        float((RIGHT * spread).sum()) / math.log(4),
        float((RIGHT.square() * spread).sum().sqrt()) / math.log(2),
    )
    gap = found[-1] - cross_entropy(mass)
    assert -4 * error < gap < 1.5 * bias + 4 * error, (case, gap, bias, error)
    assert abs(gap) < 0.5 * (found[0] - cross_entropy(mass)), (case, found)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 100, 4096])
def test_equal_draws_give_exactly_the_value_of_one(k):
    one = 1e4 * Noise(0).normal((1, 50), dtype=torch.float64) - 2e4
    assert torch.equal(importance_weighted(one.expand(k, -1)), one[0])
    assert torch.equal(importance_weighted(one.float().expand(k, -1)), one[0].float().double())


def test_the_mean_is_of_the_weights():
    weights = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]], dtype=torch.float64)
    found = importance_weighted(weights.log())
    assert torch.allclose(found[:2], torch.tensor(2.0).double().log(), rtol=0, atol=1e-15)
    assert found[2] == -math.inf
    assert importance_weighted(torch.tensor([[-1e5], [0.0]]))[0] == pytest.approx(-math.log(2), abs=1e-15)


@pytest.mark.parametrize(
    ("log_weights", "words"),
    [
        (torch.zeros(3), r"\(K, B\).*found \(3,\)"),
        (torch.zeros(0, 3), r"K >= 1, found \(0, 3\)"),
        (torch.tensor([[0.0, math.nan]]), "found 1 NaN"),
    ],
)
def test_refuses_what_has_no_mean(log_weights, words):
    with pytest.raises(ValueError, match=words):
        importance_weighted(log_weights)


@pytest.mark.parametrize("kind", [TruncatedNormal, DiscreteDecoder], ids=lambda kind: kind.__name__)
def test_the_ode_gives_the_weights_of_the_closed_form(kind):
    """The whole way in float32, as a network's likelihood goes it, at a density of narrow peaks."""
    levels, sde = 4, VP()
    dequantizer = kind.of(sde, levels)
    k = torch.arange(levels).repeat(6)[:, None].repeat(1, 2)
    places = dequantizer.centres(torch.cartesian_prod(torch.arange(levels), torch.arange(levels)))
    weights = torch.arange(1.0, levels**2 + 1)
    model = GaussianMixture(weights, places, torch.zeros(levels**2, 2, 2), sde)
    drawn = dequantizer.draw(k)
    prior = functools.partial(model.log_prob, t=torch.tensor(sde.t_max))  # the SDE's own is 0.005 nats away
    found = log_likelihood(model, drawn.x, prior=prior, rtol=1e-6, atol=1e-6).log_prob + drawn.log_weight
    exact = (weights / weights.sum()).log()[(levels + 1) * torch.arange(levels)].repeat(6)
    assert (found - exact).abs().max() < 5e-4, (found - exact).abs().max()
