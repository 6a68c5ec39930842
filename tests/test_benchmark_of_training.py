"""The benchmark of training steps: that both do the same, and its ratios and bars."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import training
from models import MLP, ScoreNetwork
from sde import VP


def net():
    made = MLP((4,), width=8, depth=1)
    for i, parameter in enumerate(made.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return made


def test_the_recipe_and_ours_take_the_same_steps():
    ours, recipe = training.ours(net()), training.Recipe(ScoreNetwork(net(), VP()))
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        loss = recipe(x, training.RATE)
        ours(x, training.RATE)
        assert ours.tally.read().loss == pytest.approx(loss, rel=1e-4)
    for a, b in zip(ours.parameters, recipe.parameters, strict=True):
        assert torch.allclose(a, b, atol=2e-6)


def test_the_ends_of_both_steps_alone_are_those_of_the_steps():
    ours, recipe = training.ours(net()), training.Recipe(ScoreNetwork(net(), VP()))
    for one in (ours, recipe):
        for p in one.parameters:
            p.grad = torch.full_like(p, 0.5)
    ours.rate.fill_(1e-3)  # the default of Adam
    ours.rest(), recipe.rest()
    for a, b in zip(ours.parameters, recipe.parameters, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_ratios_are_taken_within_a_round_and_judged_by_their_median():
    values = training._over([2.0, 9.0, 4.0], [2.0, 3.0, 2.0], 0.5)
    assert values == [0.5, 1.5, 1.0]
    assert training.line("case", "what", values, 1.0) == ("case", "what", "1", "0.5 .. 1.5", "<= 1", "yes")
    assert training.line("case", "what", values, 0.9)[-1] == "NO" and training.line("", "", values)[-1] == ""
    assert training.line("case", "what", values, 1.1, least=True)[-2:] == (">= 1.1", "NO")


def test_operations_are_those_of_one_image():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    count = training.operations(training.Identity(), torch.randn(7, 3, 4, 4))
    assert count == 0

    class Net(torch.nn.Module):
        def forward(self, x, label):
            return layer(x)

    assert training.operations(Net(), torch.randn(7, 3, 4, 4)) == 2 * 3 * 5 * 9 * 16
