"""Precision, recall, density and coverage against brute force, closed forms, and sets whose values are known."""

import math

import pytest
import torch

from experiments import distances
from experiments.neighbours import Neighbours


def normal(n, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(x, y, k):
    """The definitions, over all pairs; distances of integers are exact."""

    def squares(a, b):
        return (a[:, None].double() - b.double()).square().sum(dim=2)

    ours, real = (squares(z, z).fill_diagonal_(math.inf).sort(dim=1).values[:, k - 1] for z in (x, y))
    inside, reached = squares(x, y) <= real, squares(x, y) <= ours[:, None]
    parts = inside.any(1), reached.any(0), inside.sum(1) / k, inside.any(0)
    return dict(
        zip(("precision", "recall", "density", "coverage"), (p.double().mean().item() for p in parts), strict=True)
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_is_what_the_definitions_say(k):
    x, y = 0.7 * normal(60, 3), normal(45, 3, seed=1)
    assert Neighbours(k)(x, y) == pytest.approx(brute(x, y, k))


@pytest.mark.parametrize("scale", [1, 3])
def test_ties_and_duplicates_of_discrete_data_are_counted_exactly(scale):
    levels = torch.Generator().manual_seed(0)
    x, y = (scale * torch.randint(0, 3, (70, 3), generator=levels) + 100 for _ in range(2))
    assert len(x.unique(dim=0)) < 30
    assert Neighbours(4)(x / 16, y / 16) == pytest.approx(brute(x, y, 4))


def test_a_set_and_itself():
    x = normal(40, 3)
    found = {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}
    assert Neighbours()(x, x[torch.randperm(40)]) == pytest.approx(found)


def test_sets_that_are_far_apart_share_nothing():
    x, y = normal(40, 3), normal(30, 3, seed=1) + 100
    assert set(Neighbours()(x, y).values()) == {0.0}


def test_a_sampler_that_only_knows_one_example():
    """All of it is right, and next to nothing of the data is there."""
    y = normal(50, 3)
    found = Neighbours(3)(y[7].expand(40, 3), y)
    assert found["precision"] == 1 and found["recall"] == 1 / 50 and found["coverage"] < 0.2


def test_a_sampler_that_leaves_out_half_of_the_data_lacks_recall_and_coverage():
    y = normal(200, 2) + torch.tensor([8.0, 0]) * (torch.arange(200) % 2)[:, None]
    found = Neighbours()(normal(200, 2, seed=1), y)
    assert found["precision"] > 0.9 and found["density"] > 0.8
    assert 0.4 < found["recall"] <= 0.5 and 0.4 < found["coverage"] <= 0.5


def test_one_outlier_does_not_raise_density_and_coverage():
    """Its ball reaches over all: what is far from all other data is then called right by precision, not by density."""
    y = torch.cat([normal(99, 2), torch.full((1, 2), 60.0)])
    found = Neighbours()(normal(100, 2, seed=1) + 40, y)
    assert found["precision"] == 1 and found["density"] == pytest.approx(1 / 5) and found["coverage"] == 0.01


def test_what_chance_comes_to_for_one_distribution():
    n, m, k = 30, 40, 5
    drawn = [Neighbours(k)(normal(n, 3, 2 * i), normal(m, 3, 2 * i + 1)) for i in range(150)]
    none = math.prod((m - 1 - i) / (m - 1 + n - i) for i in range(k))
    for name, truth in (("density", 1.0), ("coverage", 1 - none)):
        values = torch.tensor([each[name] for each in drawn], dtype=torch.float64)
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(150), name
        assert values.std() / math.sqrt(150) < 0.02


def test_pieces_of_any_size_come_to_the_same(monkeypatch):
    x, y = normal(60, 3), normal(45, 3, seed=1)
    whole = Neighbours()(x, y)
    monkeypatch.setattr(distances, "_NUMBERS", 45 * 7 + 1)
    assert Neighbours()(x, y) == whole


def test_refuses_fewer_examples_than_neighbours():
    with pytest.raises(ValueError, match="x: Neighbours needs at least 6 examples, found 5"):
        Neighbours()(normal(5), normal(9))
    with pytest.raises(ValueError, match="k: expected at least 1 neighbour, found 0"):
        Neighbours(0)
