"""The diffusion transformer against its paper's sizes, and its symmetries."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import DiT, ScoreNetwork
from models.dit import positions
from sde import VP
from solvers import Exact, Hutchinson, log_likelihood

PUBLISHED = {  # table 1 and 4 of the paper, for latents of 4 x 32 x 32 and patches of 2: parameters, multiply-adds
    "DiT-S/2": (dict(width=384, depth=12, heads=6), 33e6, 6.06e9),
    "DiT-B/2": (dict(width=768, depth=12, heads=12), 130e6, 23.01e9),
    "DiT-L/2": (dict(width=1024, depth=24, heads=16), 458e6, 80.71e9),
    "DiT-XL/2": (dict(width=1152, depth=28, heads=16), 675e6, 118.64e9),
}


def opened(shape=(2, 6, 4), dtype=torch.float64, **arguments) -> DiT:
    """A small one with random weights everywhere."""
    net = DiT(shape, **{"width": 16, "depth": 2, "heads": 2, "embedding_features": 16, **arguments}).to(dtype)
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return net.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_the_published_parameters_and_cost(name):
    """Without memory: on the meta device. The published ones give a mean and a variance of 4 channels each."""
    size, parameters, multiplications = PUBLISHED[name]
    with torch.device("meta"):
        net, x, label = DiT((4, 32, 32), outputs=2, classes=1000, **size), torch.empty(1, 4, 32, 32), torch.empty(1)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        assert net(x, label).shape == (1, 8, 32, 32)
    assert counter.get_total_flops() / 2 == pytest.approx(multiplications, rel=0.01)


@pytest.mark.parametrize("shape, patch", [((2, 6, 4), 2), ((1, 4, 4), 1), ((3, 12), 3)], ids=str)
def test_patches_permuted_with_their_positions_permute_the_output(shape, patch):
    """Nothing but the positions tells one patch from another."""
    net, moved = (opened(shape, patch=patch, outputs=2) for _ in range(2))
    order = torch.randperm(len(net.positions), generator=torch.Generator().manual_seed(0))
    moved.positions.copy_(net.positions[order])
    x, label = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([-5.0, 0.0, 2.0], dtype=torch.float64)

    def permuted(y: torch.Tensor) -> torch.Tensor:
        tokens = patches(y, patch)[..., order]
        return unpatched(tokens, y, patch)

    expected = permuted(net(x, label))
    assert torch.allclose(moved(permuted(x), label), expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(net(permuted(x), label), expected, rtol=1e-2)


def patches(x, patch):
    """``(B, C, ...)`` to ``(B, C p^d, N)``: by torch's own unfold, 1-D data as images of one row."""
    if x.dim() == 3:
        return nn.functional.unfold(x[:, :, None], (1, patch), stride=(1, patch))
    return nn.functional.unfold(x, patch, stride=patch)


def unpatched(tokens, like, patch):
    if like.dim() == 3:
        size = (1, like.shape[-1])
        return nn.functional.fold(tokens, size, (1, patch), stride=(1, patch))[:, :, 0]
    return nn.functional.fold(tokens, like.shape[-2:], patch, stride=patch)


@pytest.mark.parametrize("shape", [(2, 6, 4), (3, 12)], ids=str)
def test_a_patch_of_the_input_is_the_same_patch_of_the_output(shape):
    """Without attention each token sees itself alone, and the output must lie where its input lay."""
    net = opened(shape, patch=2, outputs=3)
    for block in net.blocks:
        nn.init.zeros_(block.attention.out.weight)
    x, label = torch.randn(1, *shape, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    where = torch.zeros(len(net.positions), dtype=torch.float64)
    for token in range(len(where)):
        one = where.clone()
        one[token] = 1
        bump = unpatched(one.expand(1, shape[0] * 2 ** (len(shape) - 1), -1), x, 2)
        change = (net(x + bump, label) - net(x, label)).abs() > 1e-12
        assert torch.equal(change, bump[:, :1].expand_as(change) > 0), token


def test_positions_are_those_of_the_axes():
    """Row and column each have half of the features; the dot product of two places depends on their distance alone."""
    grid = positions((5, 7), 24).reshape(5, 7, 24).double()
    assert torch.equal(grid[:, :1, :12].expand(5, 7, 12), grid[..., :12])
    assert torch.equal(grid[:1, :, 12:].expand(5, 7, 12), grid[..., 12:])
    line = positions((7,), 12).double()
    assert torch.allclose(grid[0, :, 12:], line)
    inner = line @ line.T
    for distance in range(7):
        assert torch.allclose(inner.diagonal(distance), inner[0, distance], atol=1e-5), distance
    rates = 10000.0 ** (-torch.arange(6) / 6)
    assert torch.allclose(line[3], torch.cat(((3 * rates).sin(), (3 * rates).cos())).double(), atol=1e-6)


def test_every_block_starts_as_the_identity():
    net = DiT((1, 8, 8), width=16, depth=3, heads=2)
    h, embedding = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in net.blocks:
        assert torch.equal(block(h, embedding), h)


def test_a_block_is_adaln_zero_as_written_out():
    """Peebles and Xie, 2023, figure 3: scale and shift after each norm, a gate at each end."""
    block = opened().blocks[0]
    h, embedding = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        block.modulation.linear(embedding)[:, None].unflatten(2, (6, 16)).unbind(2)
    )
    middle = h + gate1 * block.attention(nn.functional.layer_norm(h, (16,), eps=1e-6) * (1 + scale1) + shift1)
    expected = middle + gate2 * block.mlp(nn.functional.layer_norm(middle, (16,), eps=1e-6) * (1 + scale2) + shift2)
    assert torch.allclose(block(h, embedding), expected, rtol=1e-10)


def test_dropout_acts_in_training_alone():
    net = opened(dropout=0.5)
    x, label = torch.randn(2, 2, 6, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert torch.equal(net(x, label), net(x, label))
    assert not torch.equal(net.train()(x, label), net(x, label))


def test_its_likelihood_is_exact_up_to_the_probes():
    """Derivatives pass through its attention, one by one and as products."""
    torch.manual_seed(0)
    net = opened((1, 2, 2), patch=1, width=8)
    model = ScoreNetwork(net, VP(t_min=1e-2)).double()
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    exact = log_likelihood(model, x, divergence=Exact(), method="rk4", steps=5, rtol=None, atol=None)
    probed = log_likelihood(
        model, x, divergence=Hutchinson(4, "orthogonal"), method="rk4", steps=5, rtol=None, atol=None
    )
    assert torch.allclose(exact.log_prob, probed.log_prob, rtol=1e-9)  # as many orthogonal probes as dimensions


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(shape=(2,)), r"takes samples of shape \(C, L\) or \(C, H, W\), found \(2,\); for flat data use MLP"),
        (dict(shape=(1, 4, 4, 4)), "takes samples of shape"),
        (dict(shape=(1, 9, 8)), r"the sizes \(9, 8\) must be divisible by patch=2; change it or pad"),
        (dict(shape=(1, 8, 8), width=20, heads=3), "width=20 must be divisible by heads=3 and by 4"),
        (dict(shape=(1, 8, 8), width=18, heads=3), "width=18 must be divisible by heads=3 and by 4"),
        (dict(shape=(1, 8, 8), depth=0), "DiT needs positive sizes, found .* depth=0"),
        (dict(shape=(1, 8, 8), mlp_ratio=0), "DiT needs positive sizes, found .* mlp_ratio=0"),
        (dict(shape=(1, 0, 8)), "DiT needs positive sizes"),
        (dict(shape=(1, 8, 8), embedding="cosine"), "embedding must be one of sinusoidal, fourier, found 'cosine'"),
        (dict(shape=(1, 8, 8), dropout=2.0), "between 0 and 1, but got 2.0"),
    ],
)
def test_a_transformer_that_can_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiT(**arguments)
