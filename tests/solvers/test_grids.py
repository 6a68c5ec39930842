"""Grids: exact ends, decreasing, and equally spaced in their coordinate or in equal parts of their density."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import ALL_SDES, SDES

from sde import VE, VP, Cosine, RectifiedFlow
from sde.base import last_time
from solvers import GRIDS, time_grid

STEPS = (1, 2, 3, 4, 5, 7, 10, 50, 1000)
COORDINATES = {
    "uniform": lambda sde, t: t,
    "log_snr": lambda sde, t: sde.log_snr(t),
    "karras": lambda sde, t: (sde.sigma(t) / sde.alpha(t)) ** (1 / 7),
}


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
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
        spacing = COORDINATES[name](sde, time_grid(name, sde, steps)).diff()
        assert torch.allclose(spacing, spacing.mean(), rtol=1e-6, atol=0), steps


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("name", COORDINATES)
def test_twice_the_steps_contain_the_grid(sde, name):
    coarse, fine = time_grid(name, sde, 25), time_grid(name, sde, 50)
    assert torch.allclose(fine[::2], coarse, rtol=1e-9, atol=1e-15)


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
    """At .0308 (N / 20)^-.74, and never below 1.5 times the least level."""
    for steps in (2, 3, 20, 50, 250):
        times = time_grid("balanced", sde, steps)
        found = float(torch.exp(-0.5 * sde.log_snr(times[-2]).detach()))
        _, end = ends(sde)
        assert found == pytest.approx(max(0.0308 * (steps / 20) ** -0.74, 1.5 * end), rel=1e-9), steps


@pytest.mark.parametrize("sde, steps", [(VE(), 60), (VP(t_min=0.01), 20)], ids=str)
def test_the_least_level_keeps_the_last_node_away(sde, steps):
    """The two cases of the test above are both met."""
    _, end = ends(sde)
    assert 1.5 * end > 0.0308 * (steps / 20) ** -0.74
