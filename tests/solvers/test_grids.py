"""Grids: exact ends, decreasing, and equally spaced in their coordinate or in equal parts of their density."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import ALL_SDES, SDES, mixture, quick

import solvers.grids
from sde import VE, VP, Cosine, Noise, RectifiedFlow
from sde.base import last_time
from solvers import DDIM, GRIDS, DPMSolver, Heun, RungeKutta4, UniPC, time_grid

STEPS = (1, 2, 3, 4, 5, 7, 10, 50, 1000)
COORDINATES = {
    "uniform": lambda sde, t: t,
    "log_snr": lambda sde, t: sde.log_snr(t),
    "karras": lambda sde, t: (sde.sigma(t) / sde.alpha(t)) ** (1 / 7),
    "angle": lambda sde, t: torch.atan2(sde.sigma(t), sde.alpha(t)),
}


def jumps(name, sde, steps):
    """Whether the first step is not one of the equal ones: from sigma / alpha = e^7, under pure noise, to 80 or 2 N."""
    return name in ("log_snr", "karras") and last_time(sde) < sde.t_max and 5 <= steps <= 150


@pytest.mark.parametrize("sde", quick(ALL_SDES), ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_grids_run_from_t_max_to_t_min(sde, name):
    for steps in STEPS:
        t = time_grid(name, sde, steps)
        assert t.dtype == torch.float64 and t.shape == (steps + 1,), steps
        assert (float(t[0]), float(t[-1])) == (last_time(sde), sde.t_min), steps
        assert bool((t.diff() < 0).all()), steps
        assert float(-t.diff().sum()) == pytest.approx(last_time(sde) - sde.t_min, abs=1e-12), steps


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("name", COORDINATES)
def test_grids_are_equally_spaced_in_their_coordinate(sde, name):
    for steps in STEPS:
        spacing = COORDINATES[name](sde, time_grid(name, sde, steps)).diff()[jumps(name, sde, steps) :]
        assert torch.allclose(spacing, spacing.mean(), rtol=1e-6, atol=0), steps


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("name", COORDINATES)
def test_twice_the_steps_contain_the_grid(sde, name):
    steps = 600 if jumps(name, sde, 50) else 25
    coarse, fine = time_grid(name, sde, steps), time_grid(name, sde, 2 * steps)
    assert torch.allclose(fine[::2], coarse, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("name", ["log_snr", "karras"])
def test_pure_noise_is_left_in_one_step(sde, name):
    """To sigma / alpha = 80, or 2 N if that is more; where there is none, and below 5 steps, no step stands out."""
    for steps, level in ((5, 80.0), (40, 80.0), (50, 100.0), (150, 300.0)):
        t = time_grid(name, sde, steps)[1]
        found = float(sde.sigma(t) / sde.alpha(t))
        assert (found == pytest.approx(level, rel=1e-6)) == (last_time(sde) < sde.t_max), (steps, found)
    for steps in (1, 2, 3, 4, 151, 600):
        assert not jumps(name, sde, steps)


@pytest.mark.parametrize("sde", quick([Cosine(), RectifiedFlow()]), ids=str)
@pytest.mark.parametrize("name", ["log_snr", "karras"])
@pytest.mark.parametrize("sampler", [Heun(), DDIM(), DPMSolver(order=2), UniPC(order=2)], ids=str)
def test_the_jump_pays(monkeypatch, sde, name, sampler):
    """Against equal steps from the first time on, on a mixture: at no budget from 10 to 100 calls much worse, and over
    all better."""
    model = mixture(sde)
    first = torch.tensor(last_time(sde), dtype=torch.float64)
    x_T = torch.hypot(sde.alpha(first), sde.sigma(first)) * Noise(0).normal((128, 2), 0, dtype=torch.float64)
    exact = RungeKutta4(500)(model, x_T=x_T).x

    def errors():
        counts = (n // sampler.calls_per_step for n in (10, 20, 40, 100))
        found = [replace(sampler, steps=n, grid=name)(model, x_T=x_T).x for n in counts]
        return torch.stack([(x - exact).square().mean().sqrt() for x in found])

    with_jump = errors()
    monkeypatch.setattr(solvers.grids, "_FEWEST", 10**9)
    ratio = with_jump / errors()
    assert ratio.max() < 1.2 and ratio.log().mean().exp() < 0.97, ratio


@pytest.mark.parametrize("sde", [sde for sde in ALL_SDES if not isinstance(sde, (Cosine, RectifiedFlow))], ids=str)
def test_the_last_time_is_t_max_where_drift_and_diffusion_are_finite(sde):
    assert last_time(sde) == sde.t_max


@pytest.mark.parametrize("sde", [Cosine(), RectifiedFlow(t_max=3.0)], ids=str)
def test_a_singular_end_is_left_out(sde):
    end = torch.tensor(sde.t_max, dtype=torch.float64)
    assert not bool(torch.isfinite(sde.diffusion(end)))
    assert float(sde.log_snr(torch.tensor(last_time(sde), dtype=torch.float64))) == pytest.approx(-14, abs=1e-9)


def test_every_grid_has_a_coordinate_here():
    assert COORDINATES.keys() | {"balanced"} == GRIDS.keys()


# Equal parts of a density.


def ends(sde):
    """The largest and the least sigma / alpha of a grid."""
    return (math.exp(-0.5 * end) for end in sde.log_snr_range)


def density(z, first, steps):
    """Of the nodes of "balanced" in z = ln(sigma / alpha)."""
    bump = np.exp(-0.5 * ((z + 0.12) / np.where(z < -0.12, 2.4, 1.15)) ** 2)
    start = 2 * min(1.0, steps / 40) ** 2 * min(1.0, 50 / first) ** 4
    return 1 + 1.1 * bump + start * np.exp(-(math.log(first) - z) / 0.3)


@pytest.mark.parametrize("sde", [*ALL_SDES, RectifiedFlow(t_min=0.0)], ids=str)
@pytest.mark.parametrize("steps", [3, 4, 7, 20, 60, 300])
def test_a_balanced_grid_is_in_equal_parts_of_its_density(sde, steps):
    """Between the first node and the last before t_min, by a quadrature of its own."""
    times = time_grid("balanced", sde, steps)[:-1]
    z = -0.5 * sde.log_snr(times).detach().numpy()
    first, _ = ends(sde)
    x, w = np.polynomial.legendre.leggauss(20)
    parts = []
    for high, low in itertools.pairwise(z):
        edges = np.unique(np.clip([low, *np.linspace(low, high, 9), -0.12], low, high))
        middle, half = (edges[1:] + edges[:-1])[:, None] / 2, np.diff(edges)[:, None] / 2
        parts.append(float((half * w * density(middle + half * x, first, steps)).sum()))
    assert np.allclose(parts, np.mean(parts), rtol=2e-4, atol=0)


@pytest.mark.parametrize("sde", [*ALL_SDES, RectifiedFlow(t_min=0.0)], ids=str)
def test_the_last_node_of_a_balanced_grid(sde):
    """At .036 (N / 20)^-.9, and never below 1.5 times the least level."""
    for steps in (2, 3, 20, 50, 250):
        times = time_grid("balanced", sde, steps)
        found = float(torch.exp(-0.5 * sde.log_snr(times[-2]).detach()))
        _, end = ends(sde)
        assert found == pytest.approx(max(0.036 * (steps / 20) ** -0.9, 1.5 * end), rel=1e-9), steps


@pytest.mark.parametrize("sde, steps", [(VE(), 60), (VP(t_min=0.01), 20)], ids=str)
def test_the_least_level_keeps_the_last_node_away(sde, steps):
    """The two cases of the test above are both met."""
    _, end = ends(sde)
    assert 1.5 * end > 0.036 * (steps / 20) ** -0.9
