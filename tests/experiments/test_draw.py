"""Samples and likelihoods in pieces: numbered samples, and batches that don't fit into the memory."""

import logging

import pytest
import torch
from oracles import correlated, mixture

from experiments.draw import Fitting, draw
from experiments.estimator import Estimator, Examples, evaluate
from sde import VP
from solvers import (
    DDIM,
    AdaptiveSDE,
    EulerMaruyama,
    ExponentialAdams,
    Hutchinson,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
)

SOLVERS = [
    EulerMaruyama(steps=5),
    DDIM(steps=4),
    ExponentialAdams(steps=4),
    PredictorCorrector(EulerMaruyama(steps=4), Langevin(snr=0.16)),
    ProbabilityFlow(steps=4, method="rk4"),
    ProbabilityFlow(rtol=1e-8, atol=1e-8),
    AdaptiveSDE(rtol=0.5, atol=0.5),
]


def tight(model, most, error=torch.OutOfMemoryError):
    """The model on a device that holds ``most`` samples; returns the sizes that it was asked for."""
    sizes = []

    def refuse(module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise error("tried to allocate too much")

    model.register_forward_pre_hook(refuse)
    return sizes


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_samples_from_a_number_on_are_those_of_the_whole(solver):
    model = mixture(VP())
    whole, tail = solver(model, (7, 2), seed=3), solver(model, (4, 2), seed=3, first=3)
    assert torch.allclose(whole.x[3:], tail.x, rtol=0, atol=1e-6 if isinstance(solver, ProbabilityFlow) else 1e-12)
    assert (whole.x[:4] - tail.x).abs().max() > 0.01
    again = solver(model, (4, 2), seed=3, first=3, batch_size=3)
    assert torch.allclose(again.x, tail.x, rtol=0, atol=1e-6 if isinstance(solver, ProbabilityFlow) else 1e-12)


@pytest.mark.parametrize("first", [-1, 1.0, True])
def test_a_first_sample_without_a_number_is_refused(first):
    with pytest.raises(ValueError, match="first must be an integer of at least 0, found"):
        DDIM(steps=2)(mixture(VP()), (2, 2), first=first)


@pytest.mark.parametrize("most", [1, 3, 5])
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=str)
def test_samples_that_do_not_fit_are_drawn_in_smaller_batches_and_are_the_same(solver, most, caplog):
    model, small = mixture(VP()), mixture(VP())
    sizes = tight(small, most)
    with caplog.at_level(logging.WARNING):
        found = draw(solver, small, (11, 2), seed=2)
    expected = solver(model, (11, 2), seed=2)
    assert torch.allclose(found.x, expected.x, rtol=0, atol=1e-12) and found.nfe == expected.nfe
    (said,) = caplog.messages
    assert said.startswith("11 samples do not fit into the memory") and "compare.batch_size=5" in said
    assert max(sizes[sizes.index(5) :]) == 5 and len(found.x) == 11


def test_the_batches_stay_small_once_they_had_to(caplog):
    small = mixture(VP())
    sizes = tight(small, 2)
    assert len(draw(DDIM(steps=1), small, (16, 2), batch_size=8).x) == 16
    assert sizes == [8, 4, *[2] * 8] and len(caplog.messages) == 1


def test_one_sample_too_large_is_an_error_with_advice():
    model = mixture(VP())
    sizes = tight(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"a single sample does not fit .* smaller network or device=cpu"):
        draw(DDIM(steps=2), model, (5, 2))
    assert sizes == [5, 2, 1]


def test_other_errors_are_passed_on():
    model = mixture(VP())
    sizes = tight(model, 2, RuntimeError)
    with pytest.raises(RuntimeError, match="tried to allocate too much"):
        draw(DDIM(steps=2), model, (5, 2))
    assert sizes == [5]


def test_an_evaluation_that_does_not_fit_is_halved_with_the_same_result(caplog):
    model, small = correlated(VP()), correlated(VP())
    x = model.sample(10, seed=0)
    estimator = Estimator(divergence=Hutchinson(3), method="rk4", steps=4)
    sizes = tight(small, 3)
    found, expected = evaluate(small, x, estimator, batch_size=8, first=5), evaluate(model, x, estimator, first=5)
    assert max(sizes) == 8 and min(sizes[2:]) == 2 and len(found) == 10
    for a, b in zip(found.arrays().values(), expected.arrays().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-12)
    assert len(caplog.messages) == 1 and "likelihood.batch_size=4" in caplog.messages[0]


def test_what_was_done_before_the_memory_ran_out_is_kept():
    kept, fit = [], Fitting("n")
    assert fit(lambda start, size: kept.append((start, size)) or start, 2, 5) == [2]
    fit.most = 2
    assert fit(lambda start, size: (start, size), 7, 5) == [(7, 2), (9, 2), (11, 1)] and kept == [(2, 5)]


@pytest.mark.parametrize("n, size", [(0, None), (5, 0), (5, 2.5)])
def test_numbers_that_are_none_are_refused(n, size):
    with pytest.raises(ValueError, match="must be a positive integer, found"):
        draw(DDIM(steps=1), mixture(VP()), (n, 2), batch_size=size)


class Kept:
    """A keeper that begins from ``n`` examples of a result."""

    def __init__(self, result, n):
        self.found, self.saved = result.head(n), []

    def load(self):
        return self.found

    def save(self, done: Examples):
        self.saved.append(len(done))


def test_an_evaluation_goes_on_from_what_was_kept():
    model, estimator = correlated(VP()), Estimator(divergence=Hutchinson(2), method="rk4", steps=4)
    x = model.sample(9, seed=0)
    whole = evaluate(model, x, estimator)
    keeper, sizes = Kept(whole, 2), tight(model, 9)
    found = evaluate(model, x, estimator, batch_size=3, keeper=keeper)
    assert keeper.saved == [5, 8, 9] and set(sizes) == {3, 1}
    assert torch.allclose(found.log_prob, whole.log_prob, atol=1e-10)
