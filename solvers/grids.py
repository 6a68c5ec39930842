"""Where a sampler with a fixed number of steps evaluates the model."""

import torch
from torch import Tensor

from sde import SDE, GaussianSDE


def uniform(sde: SDE, u: Tensor) -> Tensor:
    """Equal steps in time (Song et al., 2021)."""
    return sde.t_max + (sde.t_min - sde.t_max) * u


def log_snr(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in the log signal-to-noise ratio (Lu et al., "DPM-Solver", 2022)."""
    last, first = sde.log_snr_ends(u)
    return sde.time(first + (last - first) * u)


def karras(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in (sigma / alpha)^(1/7) (Karras et al., "Elucidating the design space", 2022, eq. 5)."""
    last, first = (torch.exp(-0.5 * end / 7) for end in sde.log_snr_ends(u))
    return sde.time(-14 * torch.log(first + (last - first) * u))


GRIDS = {"uniform": uniform, "log_snr": log_snr, "karras": karras}


def time_grid(name: str, sde: SDE, steps: int) -> Tensor:
    """``steps + 1`` strictly decreasing times from t_max to t_min, both exact, in float64 on the CPU."""
    times = GRIDS[name](sde, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    times[0], times[-1] = sde.t_max, sde.t_min
    return times
