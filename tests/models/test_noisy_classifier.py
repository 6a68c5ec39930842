"""Classifiers of noised data: finite and smooth everywhere, and what they learn is the posterior of the class."""

import pytest
import torch
from oracles import SDES
from torch import nn

from models import ClassifierNet, GaussianMixture, NoisyClassifier, SingleTime, UniformLogSNR, noisy_cross_entropy
from sde import VE, VP, RectifiedFlow

SHAPES = [(5,), (2, 9), (1, 8, 8), (3, 5, 12), (1, 1, 3)]
MEANS, SHARES = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([0.3, 0.7])
COVARIANCES = torch.tensor([[[0.3, 0.2], [0.2, 0.4]], [[0.2, 0.0], [0.0, 0.5]]])


def random_(net):
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return net


class Exact(nn.Module):
    """log w_k p_t(x | k) of the mixture, as if it were a network's logits: of x over its scale, and the noise level."""

    def __init__(self, sde, shift=0.0, gain=1.0):
        super().__init__()
        parts = zip(MEANS.double(), COVARIANCES.double(), strict=True)
        self.parts = nn.ModuleList(GaussianMixture(torch.ones(1), m[None], c[None], sde) for m, c in parts)
        self.sde, self.shift, self.gain = sde, shift, gain

    def forward(self, x, label):
        t = self.sde.time(-2 * label)
        scale = torch.hypot(self.sde.alpha(t), self.sde.sigma(t))[:, None]
        joint = torch.stack([part.log_prob(scale * x, t) for part in self.parts], 1) + SHARES.log()
        return self.gain * joint + torch.tensor([0.0, self.shift])


def drawn(n, seed=0):
    """Points of the mixture and their components."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    noise = torch.randn(n, 2, generator=generator)
    return MEANS[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(COVARIANCES)[k], noise), k


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_logits_and_gradients_are_finite_at_both_ends_of_every_process(sde):
    classifier = NoisyClassifier(random_(ClassifierNet((3,), 4, width=8)), sde)
    for t in (sde.t_min, sde.t_max, 0.5 * (sde.t_min + sde.t_max)):
        t = torch.tensor(t)
        x = sde.perturb(torch.randn(6, 3), t, torch.randn(6, 3)).requires_grad_()
        found = classifier.log_prob(x, t)
        gradient = torch.autograd.grad(found[:, 1].sum(), x)[0]
        assert found.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() > 0
        assert torch.allclose(found.exp().sum(1), torch.ones(6)) and found.shape == (6, 4)
        assert torch.allclose(classifier.log_prob(x, t.expand(6)), found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_networks_of_any_shape_start_undecided_and_know_the_noise_level(shape):
    net = ClassifierNet(shape, 3, width=8, blocks=2)
    x, label = torch.randn(4, *shape), torch.linspace(-3, 3, 4)
    assert torch.equal(net(x, label), torch.zeros(4, 3))
    random_(net)
    one, same = net(x, label), net(x.flip(0), label.flip(0)).flip(0)
    assert one.shape == (4, 3) and torch.allclose(one, same, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(net(x, label + 1), one, rtol=1e-2) and not torch.allclose(net(2 * x, label), one)


@pytest.mark.parametrize("shape", [(2,), (1, 12), (1, 6, 6)], ids=str)
def test_gradients_are_smooth(shape):
    """Along any line the largest second difference of the gradient falls by 4 with half of the step, at a kink by 1."""
    net = random_(ClassifierNet(shape, 2, width=8)).double()
    for i in range(5):
        start, way = 2 * torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        x = start + torch.linspace(-1, 1, 2001).double().reshape(-1, *[1] * len(shape)) * way
        x.requires_grad_()
        gradient = torch.autograd.grad(net(x, torch.zeros(2001).double())[:, 0].sum(), x)[0].flatten(1)
        bends = (gradient[step:-step] * 2 - gradient[: -2 * step] - gradient[2 * step :] for step in (1, 2))
        half, whole = (bend.norm(dim=1).max() for bend in bends)
        assert whole > 3.5 * half > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_can_be_taken_where_samples_are_drawn(shape):
    """By a transformed function, without gradients around it, and of each sample by itself."""
    classifier, x, t = NoisyClassifier(random_(ClassifierNet(shape, 3, width=8)), VP()), torch.randn(4, *shape), 0.3
    x, t = x.requires_grad_(), torch.tensor(t)
    expected = torch.autograd.grad(classifier.log_prob(x, t)[:, 1].sum(), x)[0]
    with torch.no_grad():
        found = torch.func.grad(lambda at: classifier.log_prob(at, t)[:, 1].sum())(x.detach())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6) and expected.abs().max() > 0
    alone = torch.autograd.grad(classifier.log_prob(x[:1], t)[:, 1].sum(), x)[0][:1]
    assert torch.allclose(alone, expected[:1], rtol=1e-3, atol=1e-5)


def test_processes_of_one_level_are_one_problem():
    net, x, log_snr = random_(ClassifierNet((2,), 3, width=8)), torch.randn(5, 2), torch.tensor(0.7)
    found = []
    for sde in (VP(), VE(), RectifiedFlow()):
        t = sde.time(log_snr)
        found.append(NoisyClassifier(net, sde)(torch.hypot(sde.alpha(t), sde.sigma(t)) * x, t))
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_the_posterior_has_the_least_loss(sde):
    """And that is the entropy of the class given x_t; any other logits cost more of the same draws."""
    x0, k = (part.double() if part.is_floating_point() else part for part in drawn(40000))

    def loss(shift=0.0, gain=1.0, times=None):
        classifier = NoisyClassifier(Exact(sde, shift, gain), sde)
        return noisy_cross_entropy(classifier, x0, k, times, torch.Generator().manual_seed(1))

    least = loss()
    assert least.shape == (40000,) and least.mean() > 0.1
    for other in ({"shift": 0.3}, {"shift": -0.3}, {"gain": 1.3}, {"gain": 0.7}):
        assert loss(**other).mean() > least.mean() + 0.002, other
    # Where all is noise it is the entropy of the classes, where there is none that of the class given x_0.
    prior = -(SHARES * SHARES.log()).sum().item()
    assert loss(times=SingleTime(sde.t_max)).mean().item() == pytest.approx(prior, abs=0.03)
    joint = torch.stack([part.log_prob(x0, None) for part in Exact(sde).parts], 1) + SHARES.log()
    clean = -joint.log_softmax(1).gather(1, k[:, None]).mean().item()
    assert loss(times=SingleTime()).mean().item() == pytest.approx(clean, abs=0.02)
    assert not torch.equal(loss(times=UniformLogSNR()), least)


def test_what_can_not_be_learned_is_refused():
    classifier = NoisyClassifier(ClassifierNet((2,), 2), VP())
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels: expected one int64 for each of 4 examples, found torch"):
            noisy_cross_entropy(classifier, torch.zeros(4, 2), labels)
    with pytest.raises(TypeError, match="expected a GaussianSDE"):
        NoisyClassifier(ClassifierNet((2,), 2), "vp")
    for arguments, words in (
        (((2, 3, 4, 5), 2), r"shape \(D,\), \(C, L\) or \(C, H, W\), found"),
        (((), 2), "takes samples of shape"),
        (((2,), 1), "nothing to tell apart among 1 classes"),
        (((2,), 3, 0), "ClassifierNet: width must be a positive integer, found 0"),
        (((2,), 3, 8, 1.5), "ClassifierNet: blocks must be"),
    ):
        with pytest.raises(ValueError, match=words):
            ClassifierNet(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("sde", [VP(), RectifiedFlow()], ids=str)
def test_the_gradient_that_is_learned_is_that_of_the_posterior(sde):
    """The gradient for each draw's own component, as guidance by it meets: (E |g - g*|^2 / E |g*|^2)^(1/2)."""
    torch.manual_seed(0)
    classifier, exact = NoisyClassifier(ClassifierNet((2,), 2, blocks=3), sde), NoisyClassifier(Exact(sde), sde)
    optimizer = torch.optim.Adam(classifier.net.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for i in range(3000):
        x0, k = drawn(512, seed=i)
        optimizer.zero_grad()
        noisy_cross_entropy(classifier, x0, k, UniformLogSNR()).mean().backward()
        optimizer.step()
        schedule.step()
    x0, k = drawn(4000, seed=10**6)
    for log_snr in (4.0, 2.0, 0.0, -2.0, -4.0):
        t = sde.time(torch.tensor(log_snr))
        x = sde.perturb(x0, t, torch.randn(4000, 2)).requires_grad_()
        found, true = (
            torch.autograd.grad(c.log_prob(x.to(kind), t.to(kind)).gather(1, k[:, None]).sum(), x)[0]
            for c, kind in ((classifier, torch.float32), (exact, torch.float64))
        )
        error = ((found - true).square().sum() / true.square().sum()).sqrt().item()
        assert error < 0.25, log_snr  # measured: 0.09 to 0.13 of VP, 0.09 to 0.20 of rectified flow
