"""Learned dequantization: it starts at the uniform, its density is its Jacobian, and training can only improve it."""

import functools
import math

import numpy as np
import pytest
import torch

from experiments.dequantization import Uniform, importance_weighted, uniforms
from experiments.variational import Variational, surrogate, train_dequantizer
from models import MLP, GaussianMixture, UNet
from sde import VP, Noise, RectifiedFlow

SMALL = functools.partial(MLP, width=32, depth=2, embedding=8)
LEVELS = 8
SDE = VP(t_min=1e-3)
T = torch.tensor(SDE.t_min, dtype=torch.float64)


def disturbed(flow, size=0.1):
    """With parameters as training might leave them."""
    for i, parameter in enumerate(flow.parameters()):
        parameter.data += size * Noise(i).normal((1, parameter.numel())).reshape(parameter.shape)
    return flow.eval()


def tilted(dtype=torch.float64):
    """A correlated density that is far from flat inside the bins."""
    means = torch.tensor([[-0.4, 0.3], [0.5, -0.2]], dtype=dtype)
    covariances = 0.01 * torch.tensor([[[1.0, 0.9], [0.9, 1.0]], [[1.0, -0.8], [-0.8, 1.5]]], dtype=dtype)
    return GaussianMixture(torch.tensor([0.6, 0.4], dtype=dtype), means, covariances, SDE)


@pytest.mark.parametrize(
    ("shape", "net"),
    [((3,), MLP), ((2, 5), SMALL), ((1, 4, 4), SMALL), ((2, 4, 4), functools.partial(UNet, channels=8))],
    ids=str,
)
def test_it_starts_at_the_uniform(shape, net):
    k = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8))
    flow, uniform = Variational(256, -1.0, 1.0, shape, net), Uniform(256)
    mine, yours = flow.draw(k, seed=1, number=2, first=3), uniform.draw(k, seed=1, number=2, first=3)
    assert torch.equal(mine.log_weight, yours.log_weight)
    assert torch.allclose(mine.x, yours.x, rtol=0, atol=1.2e-7)
    learned = disturbed(flow).draw(k, seed=1, number=2, first=3)
    assert (learned.log_weight - yours.log_weight).abs().min() > 1e-4
    assert torch.equal(uniform.quantize(learned.x), k)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_its_density_is_that_of_its_jacobian(layers):
    flow = disturbed(Variational(LEVELS, -1.0, 1.0, (2, 2), SMALL, layers).double(), 0.3)
    k = torch.tensor([[[1, 7], [0, 4]], [[3, 3], [2, 6]]])
    v = uniforms(k, 0, 0, 0)
    u, log_q = flow(k, v)
    assert ((u > 0) & (u < 1)).all() and not torch.isclose(u, v).all()
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda one, i=i: flow(k[i : i + 1], one[None])[0][0], v[i])
        expected = -torch.linalg.slogdet(jacobian.reshape(4, 4))[1]
        assert log_q[i].item() == pytest.approx(expected.item(), abs=1e-10)
        assert jacobian.reshape(4, 4).fill_diagonal_(0).abs().max() > 1e-3  # no product of densities


def test_the_surrogate_has_the_gradient_of_the_bound():
    """Through the closed form of log p at t_min, which no network has."""
    model, flow = tilted(), disturbed(Variational(LEVELS, -1.0, 1.0, (2,), SMALL).double())
    k = torch.tensor([[2, 5], [3, 4], [6, 3], [1, 1]])
    v = uniforms(k, 0, 0, 0)
    found = torch.autograd.grad(surrogate(flow, model, k, v, T).sum(), list(flow.parameters()))
    u, log_q = flow(k, v)
    bound = model.log_prob(flow.place(k, u), T) - log_q
    expected = torch.autograd.grad(-bound.sum(), list(flow.parameters()))
    assert max(float(part.abs().max()) for part in expected) > 0.1
    for mine, yours in zip(found, expected, strict=True):
        assert torch.allclose(mine, yours, rtol=1e-9, atol=1e-10)


def exact_log_prob(k):
    """log of the integral of ``tilted`` over the bins of ``k``, (B,)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    width = 2 / LEVELS
    place = torch.cartesian_prod(0.5 + 0.5 * nodes, 0.5 + 0.5 * nodes)
    x = -1 + width * (k[:, None].double() + place)
    values = tilted().log_prob(x.reshape(-1, 2), T).exp().reshape(len(k), -1)
    return (values @ torch.outer(weights, weights).flatten() * width**2 / 4).log()


@functools.cache
def trained(seed=0):
    """A trained flow, the model's weights before and after, and the levels it was trained on."""
    torch.manual_seed(seed)
    model = tilted(torch.float32)
    images = Uniform(LEVELS).quantize(model.sample(2000, seed=1))
    flow = Variational(LEVELS, -1.0, 1.0, (2,), SMALL)
    assert train_dequantizer(flow, model, images, steps=120, batch_size=64, learning_rate=1e-2) is flow
    return flow, images


def test_training_tightens_the_bound_and_does_not_break_it():
    flow, images = trained()
    k, model, exact = images[:300], tilted(), exact_log_prob(images[:300])
    bounds = []
    for dequantizer in (Uniform(LEVELS), flow):
        draws = [dequantizer.draw(k, seed=7, number=number) for number in range(32)]
        bounds.append(torch.stack([model.log_prob(d.x.double(), T) + d.log_weight for d in draws]))
    gaps = [exact - bound.mean(0) for bound in bounds]
    gain = gaps[0] - gaps[1]
    assert gain.mean() > 10 * gain.std() / math.sqrt(len(k))
    assert gaps[1].mean() < 0.5 * gaps[0].mean(), gaps
    for bound in bounds:
        error = bound.std(0) / math.sqrt(len(bound))
        assert (exact - bound.mean(0)).mean() > -4 * error.square().mean().sqrt() / math.sqrt(len(k))
        weighted = exact - importance_weighted(bound)
        assert abs(weighted.mean()) < 0.2 * (exact - bound.mean(0)).mean()


def test_training_is_reproducible_and_leaves_the_model_alone():
    model = tilted(torch.float32).requires_grad_(True)
    model.offset = torch.nn.Parameter(torch.ones(2))
    images, results = torch.randint(0, LEVELS, (50, 2), generator=torch.Generator().manual_seed(0)), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        torch.manual_seed(3)
        flow = Variational(LEVELS, -1.0, 1.0, (2,), SMALL)
        torch.manual_seed(len(results))
        results.append(train_dequantizer(flow, model, images, steps=3, batch_size=16, seed=5).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.offset.grad is None and not flow.training
    for name, value in results[0].items():
        assert value == results[1][name] if isinstance(value, dict) else torch.equal(value, results[1][name])


def test_it_is_saved_with_its_bins(tmp_path):
    flow, images = trained()
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    state = torch.load(tmp_path / "flow.pt", weights_only=True)
    again = Variational(LEVELS, -1.0, 1.0, (2,), SMALL)
    again.load_state_dict(state)
    one, other = flow.draw(images[:5]), again.eval().draw(images[:5])
    assert torch.equal(one.x, other.x) and torch.equal(one.log_weight, other.log_weight)
    with pytest.raises(ValueError, match=r"expected weights for .*'high': 2.0.*found .*'high': 1.0.*as it was saved"):
        Variational(LEVELS, -1.0, 2.0, (2,), SMALL).load_state_dict(state)


def test_what_can_t_work_is_refused():
    flow, k = Variational(LEVELS, -1.0, 1.0, (2,), SMALL), torch.zeros(3, 2, dtype=torch.long)
    still = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None], RectifiedFlow(t_min=0.0))
    with pytest.raises(ValueError, match=r"noise at t_min.*raise t_min"):
        train_dequantizer(flow, still, k, steps=1)
    with pytest.raises(ValueError, match="steps must be"):
        train_dequantizer(flow, tilted(), k, steps=0)
    with pytest.raises(ValueError, match=r"expected the shape \(B, 2\), found \(3, 5\)"):
        flow.draw(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"levels 0\.\.7, found 0\.\.8"):
        flow.draw(k + torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"levels 0\.\.7, found 0\.\.8"):
        train_dequantizer(flow, tilted(), k + torch.tensor([0, 8]), steps=1)
    with pytest.raises(ValueError, match="layers must be"):
        Variational(LEVELS, -1.0, 1.0, (2,), SMALL, layers=0)
    with pytest.raises(ValueError, match=r"shape: expected that of one sample.*found \(\)"):
        Variational(LEVELS, -1.0, 1.0, (), SMALL)
    with pytest.raises(ValueError, match="levels: expected"):
        Variational(1, -1.0, 1.0, (2,), SMALL)
    with pytest.raises(RuntimeError, match="lower learning_rate"):
        train_dequantizer(flow, tilted(torch.float32), k, steps=3, learning_rate=math.inf)
