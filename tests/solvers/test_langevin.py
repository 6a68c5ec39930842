"""The Langevin corrector at a fixed time: what it leaves as it is, and by how much it is wrong."""

import math

import pytest
import torch
from oracles import SDES, gaussian

from sde import VE, VP, Noise, Prediction, ScoreModel
from solvers import Langevin, Step


class Isotropic(ScoreModel):
    """Data N(0, variance I) in any dimension."""

    def __init__(self, sde, variance):
        super().__init__(sde)
        self.variance = variance

    def total(self, t):
        return self.sde.alpha(t) ** 2 * self.variance + self.sde.sigma(t) ** 2

    def forward(self, x, t):
        scaled = x / self.total(t)
        return Prediction(self.sde.alpha(t) * self.variance * scaled, self.sde.sigma(t) * scaled)


def at(model, time, draw):
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    return Step(model, t, t, alpha, alpha, sigma, sigma, torch.zeros_like, draw)


def stationary(corrector, model, time, shape, steps, burn):
    """Variance of a chain that starts from the marginal, relative to it; averaged after ``burn`` steps."""
    t = torch.tensor(time, dtype=torch.float64)
    variance = model.total(t)
    number = iter(range(1, 10**6))
    step = at(model, time, lambda x: Noise(0).normal(tuple(x.shape), next(number), dtype=x.dtype))
    x, found = variance.sqrt() * Noise(0).normal(shape, dtype=torch.float64), []
    for i in range(steps):
        x = corrector.correct(x, step)
        found += [x.square().mean() / variance] * (i >= burn)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("snr", [0.05, 0.16])
def test_the_step_is_that_of_the_paper_in_high_dimension(snr):
    """x <- x + e s + sqrt(2 e) z with e = 2 (snr |z| / |s|)^2, |z|^2 = D, where sigma |s| is near |z|."""
    dimension, sde = 20_000, VE()
    model = Isotropic(sde, 1e-4)
    x = sde.sigma(torch.tensor(0.5)) * Noise(1).normal((3, dimension), dtype=torch.float64)
    z = Noise(2).normal((3, dimension), dtype=torch.float64)
    found = Langevin(snr=snr).correct(x, at(model, 0.5, lambda _: z))
    score = -x / model.total(torch.tensor(0.5, dtype=torch.float64))
    size = 2 * snr**2 * dimension / score.square().sum(1, keepdim=True)
    assert torch.allclose(found, x + size * score + (2 * size).sqrt() * z, rtol=1e-3, atol=1e-4 * float(x.std()))


@pytest.mark.parametrize("snr", [0.16, 0.3])
def test_stationary_variance_in_high_dimension(snr):
    """1 + snr^2: the chain has V' = V / (1 - e / (2 V)), and e = 2 snr^2 V^2 / V' by the score at V'."""
    found = stationary(Langevin(snr=snr), Isotropic(VP(), 1.0), 0.5, (40, 2000), int(6 / snr**2), int(2 / snr**2))
    assert found == pytest.approx(1 + snr**2, abs=0.004)


@pytest.mark.parametrize("dimension", [1, 2, 8])
def test_stationary_variance_in_low_dimension(dimension):
    """1 + 2 / (D + 32) for the step's dependence on the place, and 1 + snr^2 or a little more."""
    model, n = Isotropic(VE(), 1e-6), 4000 // dimension
    found = stationary(Langevin(snr=0.16), model, 0.5, (n, dimension), 600, 150)
    expected = (1 + 2 / (dimension + 32)) * (1 + 0.16**2)
    assert expected - 0.02 < found < expected + 0.03


def test_one_correction_of_the_exact_marginal_moves_it_by_the_square_of_the_step():
    """In one dimension by quadrature: E x^2 after less before is O(snr^2), and falls by 4 when snr halves."""
    sde, nodes = VP(), torch.linspace(-9, 9, 20001, dtype=torch.float64)
    model = gaussian(sde, 1.0)
    weights = torch.exp(-0.5 * nodes**2) / torch.exp(-0.5 * nodes**2).sum()

    def moved(snr):
        corrector = Langevin(snr=snr)
        moved = corrector.correct(nodes[:, None], at(model, 0.5, torch.zeros_like))[:, 0]
        noise = corrector.correct(nodes[:, None], at(model, 0.5, torch.ones_like))[:, 0] - moved
        return float((weights * (moved**2 + noise**2)).sum()) - 1

    assert moved(0.1) / moved(0.05) == pytest.approx(4, abs=0.5)
    # 2 E[e (1 - u)] with u = x^2 / V, whose variance is 2, and e = 2 snr^2 33 / (32 + u); and the square of the step.
    assert 0 < moved(0.16) < 4 * 0.16**2 * 2 / 33 + 4 * 0.16**4


def test_noise_is_added_in_the_last_step_too():
    """Without it the last corrections would shrink the variance by 4 snr^2 each."""
    for sde in SDES:
        v = float(sde.sigma(torch.tensor(sde.t_min, dtype=torch.float64)) ** 2)
        model, arguments = gaussian(sde, v), dict(shape=(50, 1), seed=0, dtype=torch.float64)
        mean, sample = (Langevin(5, "log_snr", f)(model, **arguments).x for f in ("mean", "sample"))
        assert torch.equal(mean, sample), sde


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_step_is_bounded_where_the_score_vanishes(sde):
    model, z = gaussian(sde, 0.25), torch.ones(1, 1, dtype=torch.float64)
    for time in (sde.t_min, sde.t_max):
        for snr in (0.16, 10.0):
            found = Langevin(snr=snr).correct(0 * z, at(model, time, lambda _: z))
            sigma = sde.sigma(torch.tensor(time, dtype=torch.float64))
            assert 0 < float(found) <= float(sigma) * math.sqrt(0.5) * (1 + 1e-9), (time, snr)
