"""Networks that are given an observation: shapes, refusals, and posteriors against their closed forms."""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import conf
from experiments.build import build
from models import (
    MLP,
    Conditioned,
    DenoisingScoreMatching,
    DiT,
    EDMRow,
    GaussianMixture,
    LearnedVariance,
    NoiseRow,
    ScoreNetwork,
    UNet,
    VRow,
)
from sde import VE, VP, LearnedSchedule
from solvers import EulerMaruyama, ExponentialAdams, ProbabilityFlow

# Network, shape of x, shape of y, and whether y goes beside x (None: always at the input).
TAKING = [
    (MLP, (2,), (3,), dict(width=8, depth=2)),
    (MLP, (1, 4, 4), (1, 2, 2), dict(width=8, depth=2, classes=2)),
    (UNet, (1, 8, 8), (2, 8, 8), dict(channels=8, fourier=2, classes=2)),
    (UNet, (1, 8, 8), (1, 4, 4), dict(channels=8)),
    (UNet, (2, 16), (1, 16), dict(channels=8)),
    (UNet, (1, 8, 8), (5,), dict(channels=8, resample="residual", progressive_input=True)),
    (DiT, (1, 8, 8), (2, 8, 8), dict(width=8, depth=2, heads=2, classes=2)),
    (DiT, (2, 6), (6,), dict(width=8, depth=2, heads=2)),
]
NAMES = [f"{kind.__name__} {shape} {observed}" for kind, shape, observed, _ in TAKING]
taking = pytest.mark.parametrize(("kind", "shape", "observed", "sizes"), TAKING, ids=NAMES)
OBJECTIVES = sorted(path.stem for path in Path(conf.__path__[0], "objective").glob("*.yaml"))
HEADS = {"hybrid": LearnedVariance(NoiseRow()), "vlb": LearnedVariance(NoiseRow()), "edm": EDMRow(0.5)}
PROCESSES = {"ncsn": VE, "vdm": lambda: LearnedSchedule(learn_ends=True), "bound": LearnedSchedule}


def filled(net):
    """With all weights random: new networks output zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return net.double().eval()


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))


# Networks


@taking
def test_each_sample_has_the_output_of_its_own_observation(kind, shape, observed, sizes):
    net = filled(kind(shape, outputs=2, observation=observed, **sizes))
    x, label, y = drawn(3, *shape), torch.linspace(-4, 3, 3, dtype=torch.float64), drawn(3, *observed)
    whole = net(x, label, observation=y)
    assert whole.shape == (3, 2 * shape[0], *shape[1:])
    for i in range(3):
        alone = net(x[i : i + 1], label[i : i + 1], observation=y[i : i + 1].float().double())
        assert torch.allclose(alone[0], whole[i], rtol=1e-5, atol=1e-5)
    for j in range(math.prod(observed)):
        other = y.clone()
        other[1].view(-1)[j] += 0.5
        moved = (net(x, label, observation=other) - whole).flatten(1).abs().amax(1)
        assert moved[1] > 1e-4 and moved[0] == moved[2] == 0, j


@taking
def test_a_gradient_reaches_every_parameter(kind, shape, observed, sizes):
    net, generator = kind(shape, observation=observed, **sizes), torch.Generator().manual_seed(0)
    model = ScoreNetwork(net, VP(t_min=1e-2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x0, y = torch.randn(4, *shape, generator=generator), torch.randn(4, *observed, generator=generator)
    for _ in range(3):
        optimizer.zero_grad()
        DenoisingScoreMatching()(model, x0, generator, observation=y).value.mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_an_observation_of_the_same_places_goes_beside_the_channels_and_others_into_the_embedding():
    for kind, shape, observed, sizes in TAKING:
        plain, net = (kind(shape, observation=y, **sizes) for y in (None, observed))
        more = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
        width = net.embed.layers[-1].out_features
        if kind is MLP:
            assert more == width * math.prod(observed)
        elif observed[1:] == shape[1:] and len(observed) == len(shape):
            assert net.embed.observation is None
            kernel = 3 if kind is UNet else 2
            assert more == observed[0] * sizes.get("channels", width) * kernel ** (len(shape) - 1)
        else:
            assert more == (math.prod(observed) + 1) * width + (width + 1) * width
            assert [type(layer) for layer in net.embed.observation] == [nn.Linear, nn.SiLU, nn.Linear]


# The parameters' sums of absolute values from seed 0, as they were before networks could be given observations.
PLAIN = [
    (lambda **more: MLP((2,), classes=3, dropout=0.1, **more), 6667.923613526957),
    (
        lambda **more: UNet((1, 8, 8), fourier=2, classes=2, progressive_input=True, resample="residual", **more),
        19082.246820998596,
    ),
    (lambda **more: DiT((3, 8, 4), patch=4, width=8, depth=2, heads=2, classes=3, **more), 441.75386934672133),
]


@pytest.mark.parametrize(("make", "total"), PLAIN, ids=["MLP", "UNet", "DiT"])
def test_without_an_observation_networks_are_what_they_were(make, total):
    torch.manual_seed(0)
    net = make()
    after = torch.randn(3)
    assert sum(p.double().abs().sum().item() for p in net.parameters()) == pytest.approx(total, rel=1e-7)
    torch.manual_seed(0)
    twin = make(observation=None)
    assert torch.equal(torch.randn(3), after) and list(net.state_dict()) == list(twin.state_dict())
    assert not any("observ" in name for name in net.state_dict())
    shape = net.observed  # of none
    assert (shape.shape, shape.values, shape.channels, shape.apart) == (None, 0, 0, 0)


@taking
def test_a_missing_a_needless_and_a_misshapen_observation_are_refused(kind, shape, observed, sizes):
    net, plain = kind(shape, observation=observed, **sizes), kind(shape, **sizes)
    x, label, name = torch.zeros(2, *shape), torch.zeros(2), kind.__name__
    with pytest.raises(ValueError, match=rf"{name}: expected an observation of shape \(2, .*found none.*Conditioned"):
        net(x, label)
    with pytest.raises(ValueError, match=rf"{name}: this network takes no observation, found one.*build it with"):
        plain(x, label, observation=torch.zeros(2, *observed))
    for wrong in ((2, *observed, 1), observed, (1, *observed), (2, observed[0] + 1, *observed[1:])):
        with pytest.raises(ValueError, match=rf"expected an observation of shape \(2, .*found \({wrong[0]},"):
            net(x, label, observation=torch.zeros(wrong))


@pytest.mark.parametrize("kind", [MLP, UNet, DiT])
@pytest.mark.parametrize("wrong", [(), (0,), (2, -1), (1.5,)])
def test_a_shape_that_is_none_is_refused(kind, wrong):
    with pytest.raises(ValueError, match="expected the shape of one sample"):
        kind((1, 4, 4), observation=wrong, **({"heads": 2, "width": 8} if kind is DiT else {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_gives_each_sample_its_observation(name):
    objective = build(OmegaConf.load(Path(conf.__path__[0], "objective", f"{name}.yaml")), where="objective").double()
    row = HEADS.get(name, VRow())
    net = filled(MLP((2,), width=16, depth=1, outputs=row.outputs, observation=(3,)))
    model, x0, y = (
        ScoreNetwork(net, PROCESSES.get(name, VP)(), row).double(),
        0.5 * drawn(16, 2).clamp(-1, 1),
        drawn(16, 3),
    )

    def loss(y):
        return objective.eval()(model, x0, torch.Generator().manual_seed(3), observation=y).value.detach()

    other = y.clone()
    other[5] += 1
    moved = (loss(y) - loss(other)).abs() > 1e-9
    assert moved[5] and moved.sum() == 1
    with pytest.raises(ValueError, match="expected an observation"):
        objective(model, x0)


def test_a_class_and_an_observation_are_told_together():
    model = ScoreNetwork(filled(UNet((1, 4, 4), channels=8, classes=3, observation=(2,))), VP()).double()
    x, t, y = drawn(5, 1, 4, 4), torch.tensor(0.4, dtype=torch.float64), drawn(5, 2)
    label = torch.tensor([0, 1, 2, 0, 1])
    both = Conditioned(model, label=label, observation=y)(x, t)
    direct = model(x, t, class_label=label, observation=y)
    assert torch.equal(both.x0, direct.x0)
    assert not torch.allclose(both.x0, Conditioned(model, label=0, observation=y)(x, t).x0)
    with pytest.raises(ValueError, match="expected an observation"):
        Conditioned(model, label=label)(x, t)


# Exact posteriors

MATRIX = torch.tensor([[1.0, 0.5, 0.0, -0.3], [0.2, -0.4, 1.0, 0.6]], dtype=torch.float64)
NOISE = 0.3


@cache
def joint(kind="gaussian"):
    """Correlated data in four dimensions: one Gaussian, or two, which the observation hardly tells apart."""
    factor = drawn(4, 4) / 2
    first = factor @ factor.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    mean = torch.tensor([0.5, -0.4, 0.2, 0.3], dtype=torch.float64)
    if kind == "gaussian":
        return GaussianMixture(torch.ones(1), mean[None], first[None], VP())
    apart, second = torch.tensor([0.0, 0.9, 0.2, 0.7], dtype=torch.float64), 0.3 * torch.eye(4, dtype=torch.float64)
    means = torch.stack((mean + apart, mean - apart))
    return GaussianMixture(torch.tensor([0.6, 0.4]), means, torch.stack((0.5 * first, second)), VP())


class ExactObserved(nn.Module):
    """The network that outputs E[x_0 | x_t, y] of Gaussian data, from what any network is given."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x, label, observation):
        sde, found = self.mixture.sde, []
        for at, level, y in zip(x, label, observation, strict=True):
            t = sde.time(-2 * level)
            scale = torch.hypot(sde.alpha(t), sde.sigma(t))
            found.append(self.mixture.given(MATRIX, y, NOISE)((at * scale)[None], t).x0)
        return torch.cat(found)


def posterior(mixture, y):
    """Mean and covariance of x_0 given y, by Gaussian conditioning, and nothing of ``models``."""
    mean, axes = mixture.means[0], mixture.axes[0]
    covariance = axes @ mixture.variances[0].diag() @ axes.mT
    precision = torch.linalg.inv(covariance) + MATRIX.mT @ MATRIX / NOISE**2
    found = torch.linalg.inv(precision)
    return found @ (torch.linalg.solve(covariance, mean) + MATRIX.mT @ y / NOISE**2), found


OBSERVED = torch.tensor([[0.7, -0.2], [-1.5, 1.0], [3.0, 2.0]], dtype=torch.float64)


def affine(model, count):
    """The flow's map x_T -> M x_T + c of each of ``count`` observations: ``(count, 4, 4)``, ``(count, 4)``."""
    starts = torch.cat((torch.zeros(1, 4), torch.eye(4))).double().repeat(count, 1)
    ends = ProbabilityFlow(rtol=1e-6, atol=1e-6)(model, x_T=starts).x.reshape(count, 5, 4)
    return (ends[:, 1:] - ends[:, :1]).mT, ends[:, 0]


def test_the_flow_of_an_exact_network_is_that_of_the_posterior():
    mixture = joint()
    model = ScoreNetwork(ExactObserved(mixture), mixture.sde, "data").double()
    maps, shifts = affine(Conditioned(model, observation=OBSERVED.repeat_interleave(5, 0)), len(OBSERVED))
    end = torch.tensor(mixture.sde.t_max, dtype=torch.float64)
    alpha, sigma = mixture.sde.alpha(end), mixture.sde.sigma(end)
    for y, matrix, shift in zip(OBSERVED, maps, shifts, strict=True):
        mean, covariance = posterior(mixture, y)
        at_end = alpha.square() * covariance + sigma.square() * torch.eye(4)
        assert torch.allclose(matrix @ (alpha * mean) + shift, mean, atol=1e-3)
        assert torch.allclose(matrix @ at_end @ matrix.mT, covariance, atol=1e-3)


def test_parts_of_a_batch_have_their_own_observations():
    mixture = joint()
    model = ScoreNetwork(ExactObserved(mixture), mixture.sde, "data").double()
    each = Conditioned(model, observation=drawn(7, 2))
    for solver in (ExponentialAdams(steps=5), EulerMaruyama(steps=5)):
        options = {"shape": (7, 4), "seed": 3, "dtype": torch.float64}
        whole = solver(each, **options).x
        assert torch.allclose(solver(each, **options, batch_size=3).x, whole, rtol=1e-10, atol=1e-12), solver
        alone = solver(Conditioned(model, observation=drawn(7, 2)[:1]), **options | {"shape": (1, 4)}).x
        assert torch.allclose(alone[0], whole[0], rtol=1e-10, atol=1e-12), solver


# Learned posteriors


def learned(kind, steps, width, depth):
    """A perceptron of p(x_0 | y) after so many steps of denoising score matching on pairs."""
    mixture, generator = joint(kind), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = MLP((4,), width=width, depth=depth, observation=(2,))
    model, objective = ScoreNetwork(net, mixture.sde, "v"), DenoisingScoreMatching()
    optimizer, data = torch.optim.Adam(net.parameters(), fused=True), mixture.sample(200_000, seed=1).float()
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
        x0 = data[torch.randint(len(data), (256,), generator=generator)]
        y = x0 @ MATRIX.float().mT + NOISE * torch.randn(256, 2, generator=generator)
        optimizer.zero_grad()
        objective(model, x0, generator, observation=y).value.mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def samples(model, y, n):
    """``n`` samples of each observation, ``(len(y), n, 4)``."""
    told = Conditioned(model, observation=y.float().repeat_interleave(n, 0))
    return ExponentialAdams(steps=20)(told, shape=(len(y) * n, 4), seed=2).x.double().reshape(len(y), n, 4)


class Errors(NamedTuple):
    """The largest over the observations: of means in posterior standard deviations, covariances, and modes' weights."""

    mean: float
    covariance: float
    weight: float


def errors(kind, model, n=2000):
    """Of samples of ``model`` for eight observations, against the closed forms."""
    mixture = joint(kind)
    y = mixture.sample(8, seed=9) @ MATRIX.mT + NOISE * drawn(8, 2)
    found = []
    for at, x in zip(y, samples(model, y, n), strict=True):
        exact = mixture.given(MATRIX, at, NOISE)
        weights = exact.log_weights.exp()
        mean = weights @ exact.means
        within = torch.einsum("k,kde,ke,kfe->df", weights, exact.axes, exact.variances, exact.axes)
        covariance = within + torch.einsum("k,kd,ke->de", weights, exact.means - mean, exact.means - mean)
        found.append(
            (
                ((x.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max(),
                (x.mT.cov() - covariance).norm() / covariance.norm(),
                (exact.log_class(x).exp().mean(0) - weights).abs().max(),
            )
        )
    return Errors(*torch.tensor(found).amax(0).tolist())


def test_what_is_learned_in_seconds_is_near_the_posterior_of_two_modes():
    """Measured 0.06, 0.08 and 0.02; a network that is not trained has 2.3, 1.7 and 0.54."""
    found = errors("mixture", learned("mixture", steps=800, width=64, depth=2))
    assert found.mean < 0.15 and found.covariance < 0.2 and found.weight < 0.06, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_what_is_learned_longer_is_the_posterior_and_its_ranks_are_uniform(kind):
    """Means, covariances and weights of modes, and simulation-based calibration (Talts et al., 2018).

    For pairs (x_0, y) the rank of x_0 among samples of p(x_0 | y) is uniform, in every coordinate. Of a network that is
    not trained the largest p-value of chi^2 was 4e-10 for the Gaussian and 1e-42 for the mixture.
    """
    from scipy.stats import chi2

    model, mixture, trials, bins = learned(kind, steps=3000, width=128, depth=3), joint(kind), 1000, 16
    found = errors(kind, model, n=5000)
    assert found.mean < 0.15 and found.covariance < 0.25 and found.weight < 0.06, found
    x0 = mixture.sample(trials, seed=11)
    y = x0 @ MATRIX.mT + NOISE * drawn(trials, 2)
    rank = (samples(model, y, 63) < x0[:, None]).sum(1)
    counts = torch.stack([torch.bincount(one // (64 // bins), minlength=bins) for one in rank.mT]).double()
    statistic = (counts - trials / bins).square().sum(1) / (trials / bins)
    assert chi2.sf(statistic.numpy(), bins - 1).min() > 1e-4, (kind, counts)
