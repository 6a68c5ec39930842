"""Where a sampler with a fixed number of steps evaluates the model.

A process that ends in pure noise begins at sigma / alpha = e^7 (see ``sde.base.last_time``), and a model has little to
say before 80, where EDM begins (Karras et al., 2022). There "log_snr" and "karras" take that stretch in one step: up to
fifty steps the error of ODE samplers falls, by half for Heun's method. The jump ends at 2 N if that is more, so that
its error falls with the number N of steps too, as 1 / N^2; below 5 steps none can be spared for it, and above 150 none
need be.
"""

import math

import torch
from torch import Tensor

from sde import SDE, GaussianSDE
from sde.base import last_time

_PEAK = -0.12  # ln(sigma / alpha) where the nodes are densest
_JUMP, _JUMP_PER_STEP, _FEWEST, _MOST = 80.0, 2.0, 5, 150


def uniform(sde: SDE, u: Tensor) -> Tensor:
    """Equal steps in time (Song et al., 2021)."""
    first = last_time(sde)
    return first + (sde.t_min - first) * u


def span(sde: GaussianSDE, u: Tensor) -> tuple[float, float, Tensor]:
    """The log-SNR at the first and at the last of the equal steps, and ``u`` as a share of the way between them.

    Where the log-SNR is -infinity at t_max and there are at least 5 steps, the first step is a jump, and the equal ones
    begin at its end.
    """
    (first, last), steps = sde.log_snr_range, len(u) - 1
    begin = -2 * math.log(max(_JUMP, _JUMP_PER_STEP * steps))
    if begin <= first or not _FEWEST <= steps <= _MOST or last_time(sde) == sde.t_max:
        return first, last, u
    return begin, last, (steps * u - 1) / (steps - 1)


def log_snr(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in the log signal-to-noise ratio (Lu et al., "DPM-Solver", 2022)."""
    first, last, u = span(sde, u)
    return sde.time(first + (last - first) * u)


def karras(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in (sigma / alpha)^(1/7) (Karras et al., "Elucidating the design space", 2022, eq. 5)."""
    *ends, u = span(sde, u)
    first, last = (math.exp(-0.5 * end / 7) for end in ends)
    return sde.time(-14 * torch.log(first + (last - first) * u))


def balanced(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal parts of a density of nodes in z = ln(sigma / alpha), and one step from the last of them to t_min.

    Twice as dense where sigma / alpha is of the size of the data, and with many nodes denser at a start near 50 too.
    The last of N nodes is at .036 (N / 20)^-.9, for methods that end as ``ExponentialAdams`` does.
    """
    steps = len(u) - 1
    first, end = (math.exp(-0.5 * log_snr) for log_snr in sde.log_snr_range)
    last = max(0.036 * (steps / 20) ** -0.9, 1.5 * end)
    z = torch.linspace(math.log(first), math.log(last), 4001, dtype=u.dtype)
    width = torch.where(z < _PEAK, 2.4, 1.15)
    start = 2 * min(1.0, steps / 40) ** 2 * min(1.0, 50 / first) ** 4
    density = 1 + 1.1 * torch.exp(-0.5 * ((z - _PEAK) / width).square()) + start * torch.exp((z - z[0]) / 0.3)
    share = torch.nn.functional.pad(torch.cumulative_trapezoid(density), (1, 0))
    return torch.nn.functional.pad(sde.time(-2 * _inverse(share / share[-1], z, steps)), (0, 1), value=sde.t_min)


def _inverse(share: Tensor, z: Tensor, count: int) -> Tensor:
    """``z`` at ``count`` equal parts of an increasing ``share`` from 0 to 1, by linear interpolation."""
    wanted = torch.linspace(0, 1, count, dtype=z.dtype)
    above = torch.searchsorted(share, wanted).clamp(min=1)
    part = (wanted - share[above - 1]) / (share[above] - share[above - 1])
    return torch.lerp(z[above - 1], z[above], part)


def angle(sde: GaussianSDE, u: Tensor) -> Tensor:
    """Equal steps in atan(sigma / alpha), the clock of ``solvers.flow``."""
    first, last = (math.atan(math.exp(-0.5 * end)) for end in sde.log_snr_range)
    return sde.time(-2 * torch.log(torch.tan(first + (last - first) * u)))


GRIDS = {"uniform": uniform, "log_snr": log_snr, "karras": karras, "angle": angle, "balanced": balanced}


def time_grid(name: str, sde: SDE, steps: int) -> Tensor:
    """``steps + 1`` strictly decreasing times to t_min, exactly, in float64 on the CPU.

    The first is exactly t_max, or where drift and diffusion are infinite there, ``sde.base.last_time``.
    """
    if name != "uniform" and not isinstance(sde, GaussianSDE):
        raise ValueError(f"grid={name!r} needs a GaussianSDE, which has a log-SNR; for {sde} use grid='uniform'")
    times = GRIDS[name](sde, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    times[0], times[-1] = last_time(sde), sde.t_min
    return times
