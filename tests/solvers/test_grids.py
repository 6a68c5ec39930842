"""Grids: exact ends, decreasing, and equally spaced in their coordinate."""

import pytest
import torch
from oracles import ALL_SDES, SDES

from sde import Cosine, RectifiedFlow
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
@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_equally_spaced_in_their_coordinate(sde, name):
    for steps in STEPS:
        spacing = COORDINATES[name](sde, time_grid(name, sde, steps)).diff()
        assert torch.allclose(spacing, spacing.mean(), rtol=1e-6, atol=0), steps


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
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
    assert COORDINATES.keys() == GRIDS.keys()
