"""Where a sampler with a fixed number of steps evaluates the model."""

import math

import torch
from torch import Tensor

from sde import SDE, GaussianSDE
from sde.base import last_time


def uniform(sde: SDE, u: Tensor) -> Tensor:
    """Equal steps in time (Song et al., 2021)."""
    first = last_time(sde)
    return first + (sde.t_min - first) * u


def log_snr(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in the log signal-to-noise ratio (Lu et al., "DPM-Solver", 2022)."""
    first, last = sde.log_snr_range
    return sde.time(first + (last - first) * u)


def karras(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in (sigma / alpha)^(1/7) (Karras et al., "Elucidating the design space", 2022, eq. 5)."""
    first, last = (math.exp(-0.5 * end / 7) for end in sde.log_snr_range)
    return sde.time(-14 * torch.log(first + (last - first) * u))


GRIDS = {"uniform": uniform, "log_snr": log_snr, "karras": karras}


def time_grid(name: str, sde: SDE, steps: int) -> Tensor:
    """``steps + 1`` strictly decreasing times to t_min, exactly, in float64 on the CPU.

    The first is exactly t_max, or where drift and diffusion are infinite there, ``sde.base.last_time``.
    """
    if name != "uniform" and not isinstance(sde, GaussianSDE):
        raise ValueError(f"grid={name!r} needs a GaussianSDE, which has a log-SNR; for {sde} use grid='uniform'")
    times = GRIDS[name](sde, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    times[0], times[-1] = last_time(sde), sde.t_min
    return times
