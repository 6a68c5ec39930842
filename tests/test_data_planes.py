"""Densities in the plane against their closed moments, supports and densities; what all data sets share."""

import math

import pytest
import torch
from refusals import refused

from experiments.data import Data, checkerboard, mixture2d, moons, swiss_roll
from experiments.dataset import cut, hold_out, permutation, sizes

PLANES = (checkerboard, mixture2d, moons, swiss_roll)
N = 100_000


@pytest.mark.parametrize("plane", PLANES)
def test_zero_mean_unit_variance_of_float32(plane):
    data = plane(train=N)
    assert (data.name, data.shape, data.levels, data.train.dtype) == (plane.__name__, (2,), None, torch.float32)
    x, slack = data.train.double(), 0.05 if plane is mixture2d else 0.0
    assert x.mean(0).abs().max() < slack + 5 / N**0.5
    assert (x.var(0) - 1).abs().max() < slack + 5 * (2 / N) ** 0.5


@pytest.mark.parametrize("plane", PLANES)
def test_the_test_split_depends_on_its_size_and_the_seed_alone(plane):
    few, many = plane(train=10, validation=3), plane(train=1000, validation=30)
    assert torch.equal(few.test, many.test) and len(few.validation) == 3
    assert not torch.equal(few.test, plane(train=10, seed=1).test)
    everything = torch.cat((many.train, many.validation, many.test))
    assert len(everything.unique(dim=0)) == len(everything)
    for split in ("train", "validation", "test"):
        refused(lambda split=split: plane(**{split: 0}), f"data.{split}", "found 0")


def test_the_checkerboard_is_uniform_on_its_eight_dark_squares():
    x = checkerboard(train=N).train.double() * (4 / 3) ** 0.5 + 2
    assert x.min() >= -1e-6 and x.max() <= 4 + 1e-6
    inside, square = x - x.floor(), x.clamp(1e-6, 4 - 1e-6).floor().long()
    edge = (inside.minimum(1 - inside) < 1e-5).any(1)  # where float32 may round a point to the neighbour
    assert edge.double().mean() < 1e-3 and (square[~edge].sum(1) % 2 == 0).all()
    counts = (4 * square[:, 0] + square[:, 1])[~edge].bincount(minlength=16)
    assert (counts > 0).sum() == 8
    assert ((counts[counts > 0] - N / 8) / (N * 7 / 64) ** 0.5).abs().max() < 5
    places = inside[~edge].mul(4).floor().long()
    assert ((places[:, 0] * 4 + places[:, 1]).bincount() - N / 16).abs().max() < 5 * (N / 16) ** 0.5
    assert math.isclose(8 * 3 / 4, 6), "the area that the documented log-density is of"


def test_moons_and_the_roll_are_their_curves_with_their_noise():
    """The mean squared distance from the curve, in the units before standardization, is one dimension of the noise."""
    variance = torch.tensor([0.76, 0.5725 - 1 / math.pi])
    x = moons(train=20000).train * variance.sqrt() + torch.tensor([0.5, 0.25])
    a = torch.linspace(0, math.pi, 2000)
    arcs = torch.stack((torch.cat((a.cos(), 1 - a.cos())), torch.cat((a.sin(), 0.5 - a.sin()))), dim=1)
    assert torch.cdist(x[:4000], arcs).amin(1).square().mean().sqrt() == pytest.approx(0.1, rel=0.08)
    a = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 4000, dtype=torch.float64)
    curve = a[:, None] * torch.stack((a.cos(), a.sin()), dim=1)
    mean, squares = curve.mean(0), curve.square().mean(0)  # by quadrature
    scale = (squares - mean**2 + 0.25).sqrt()
    x = swiss_roll(train=20000).train[:4000].double() * scale + mean
    assert torch.cdist(x, curve).amin(1).square().mean().sqrt() == pytest.approx(0.5, rel=0.08)


def test_the_roll_is_standardized_by_its_moments():
    """Its draws, repeated here, standardized by moments that are found by quadrature."""
    a, w = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 20001, dtype=torch.float64), torch.ones(20001, 1).double()
    w[1:-1:2], w[2:-1:2] = 4, 2  # Simpson's rule
    curve = a[:, None] * torch.stack((a.cos(), a.sin()), dim=1)
    mean, squares = ((w * values).sum(0) / w.sum() for values in (curve, curve.square()))
    draws = torch.Generator().manual_seed(3)
    at = math.pi * (1.5 + 3 * torch.rand(50, generator=draws, dtype=torch.float64))
    points = at[:, None] * torch.stack((at.cos(), at.sin()), dim=1)
    points = points + 0.5 * torch.randn(50, 2, generator=draws, dtype=torch.float64)
    found = swiss_roll(train=1, test=50, seed=3).test.double()
    assert torch.allclose(found, (points - mean) / (squares - mean**2 + 0.25).sqrt(), atol=1e-6)


# --- what all data sets share


@pytest.mark.parametrize(
    ("validation", "test", "expected"), [(0.1, 0.2, (7, 1, 2)), (3, 4, (3, 3, 4)), (0.01, 1, (8, 1, 1))]
)
def test_sizes_are_fractions_or_numbers(validation, test, expected):
    found = sizes(10, validation, test)
    assert tuple(found[name] for name in ("train", "validation", "test")) == expected


@pytest.mark.parametrize("wrong", [0, -1, 1.5, math.nan, math.inf, True, "many", None])
def test_sizes_refuse_what_is_neither(wrong):
    refused(lambda: sizes(10, wrong, 1), "data.validation", wrong)
    refused(lambda: sizes(10, 1, wrong), "data.test", wrong)


def test_sizes_leave_something_to_train_on():
    refused(lambda: sizes(10, 5, 5), "left to train on", "10 examples")
    refused(lambda: sizes(1, 0.1, 0.1), "left to train on")


def test_the_splits_take_everything_once_and_the_test_split_ignores_the_others():
    values = torch.arange(50).view(50, 1).repeat(1, 3)
    whole = hold_out(values.clone(), sizes(50, 7, 11), seed=3)
    assert sorted(torch.cat(tuple(whole.values()))[:, 0].tolist()) == list(range(50))
    assert torch.equal(whole["test"], hold_out(values.clone(), sizes(50, 20, 11), seed=3)["test"])
    assert not torch.equal(whole["test"], hold_out(values.clone(), sizes(50, 7, 11), seed=4)["test"])
    drawn = cut(values[permutation(50, 3)], sizes(50, 7, 11))
    assert all(torch.equal(drawn[name], whole[name]) for name in ("test", "validation"))
    assert drawn["train"][:, 0].sort().values.tolist() == whole["train"][:, 0].sort().values.tolist()


def test_training_stays_a_view_of_the_values_in_their_order_but_for_the_holes():
    values = torch.arange(1000)
    train = hold_out(values, sizes(1000, 10, 10), seed=0)["train"]
    assert train.data_ptr() == values.data_ptr()
    assert (train != torch.arange(980)).sum() <= 20


def test_splits_that_differ_in_shape_or_are_empty_are_refused():
    x = torch.zeros(3, 2)
    refused(lambda: Data("odd", x, x, torch.zeros(3, 3)), "odd", "one shape", "(3, 3)")
    refused(lambda: Data("odd", x, x[:0], x), "odd", "(0, 2)")
