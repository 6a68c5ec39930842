"""The order of the data: a function of (seed, epoch, position), whatever the batches, workers and processes are."""

import pytest
import torch
from configurations import configuration

from experiments.data import digits, mixture2d
from experiments.order import Batches, Order, batches, flipped, mirrored, permutation
from experiments.problem import Problem

CPU = torch.device("cpu")


def numbers(order, first, count):
    """The indices of ``count`` batches from sample ``first`` on."""
    return torch.cat([order.batch(first + i * order.batch_size)[0] for i in range(count)])


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 64])
def test_each_epoch_holds_each_example_once_in_an_order_of_its_own(batch_size):
    found = numbers(Order(5, 10, batch_size), 0, 60 // batch_size + 2)[:60].view(6, 10)
    assert torch.equal(found.sort(1).values, torch.arange(10).expand(6, 10))
    assert len({tuple(row.tolist()) for row in found}) == 6


def test_the_batch_size_plays_no_part_and_any_sample_can_be_the_first():
    whole = numbers(Order(1, 13, 1), 0, 100)
    for size, first in ((4, 0), (30, 9), (50, 50)):
        assert torch.equal(numbers(Order(1, 13, size), first, 1), whole[first : first + size])
    assert not torch.equal(numbers(Order(2, 13, 1), 0, 100), whole)
    assert Order(1, 13, 4).place(27) == (2, 1)


def test_permutations_are_uniform():
    """Each example at each position equally often: chi-squared with (n - 1)^2 degrees of freedom."""
    n, epochs = 6, 3000
    counts = torch.zeros(n, n)
    for epoch in range(epochs):
        counts[torch.arange(n), permutation(0, epoch, n)] += 1
    statistic = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert abs(statistic - 25) < 4 * 50**0.5


def test_half_of_the_positions_are_mirrored_independently_of_the_order():
    coins = torch.stack([mirrored(0, epoch, 1000) for epoch in range(20)]).float()
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / 20000**0.5
    places = torch.stack([permutation(0, epoch, 1000) for epoch in range(20)]).float()
    for other in (places, places % 2):
        assert abs(torch.corrcoef(torch.stack([coins.flatten(), other.flatten()]))[0, 1]) < 4 / 20000**0.5


def test_mirrored_images_are_reversed_along_their_width():
    images = torch.arange(2 * 1 * 2 * 3).view(2, 1, 2, 3)
    found = flipped(images, torch.tensor([True, False]))
    assert torch.equal(found[1], images[1]) and found[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert flipped(images, None) is images


@pytest.mark.parametrize("flips", [False, True])
def test_workers_make_the_same_batches(flips):
    values, order = digits().train[:50], Order(3, 50, 16, flips)
    alone, helped = (Batches(values, order, first=32).stream(workers) for workers in (0, 2))
    for _ in range(9):
        assert torch.equal(next(alone), next(helped))


def test_workers_leave_the_random_numbers_of_the_training_alone():
    before = torch.get_rng_state()
    next(Batches(torch.arange(20), Order(0, 20, 4)).stream(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_goes_on_in_the_middle_of_an_epoch():
    problem = Problem.of(mixture2d(train=50, validation=5, test=5))
    config = configuration("train.batch_size=8", "data=mixture2d", "seed=4")

    def first(count, start):
        stream = batches(problem, config, CPU, torch.Generator().manual_seed(0), start)
        return [next(stream) for _ in range(count)]

    for one, two in zip(first(20, 0)[7:], first(13, 56), strict=True):
        assert torch.equal(one, two)
