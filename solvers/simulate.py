"""The way forward: Euler-Maruyama on dx = f(x, t) dt + g(t) dw (Kloeden and Platen, 1992), for any SDE."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sde import SDE, Noise
from sde.base import require_count
from solvers.base import Output, SamplingDiverged, Trajectory
from solvers.grids import GRIDS, time_grid


def simulate(
    sde: SDE,
    x0: Tensor,
    steps: int = 1000,
    seed: int = 0,
    grid: str = "uniform",
    trajectory: int = 0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Output:
    """Carry data through the forward process by its drift and diffusion alone; strong order 1.

    Parameters
    ----------
    x0: states at t_min, ``(B, ...)``.
    steps: number of steps, over the times of a ``grid`` (see ``solvers.grids``).
    seed: of the Brownian motion. Path i depends on ``seed`` and i alone.
    trajectory: keep every k-th state, and the last, with their times; 0 for none.
    callback: called as ``callback(i, x)`` after step i.

    Returns ``Output``: ``x`` at t_max, or at ``sde.base.last_time`` where the process is singular there; ``nfe`` is 0.
    Raises ``SamplingDiverged`` where a state is not finite.
    """
    require_count(steps, "simulate: steps")
    if grid not in GRIDS:
        raise ValueError(f"simulate: grid must be one of {', '.join(GRIDS)}, found {grid!r}")
    times, noise, x = time_grid(grid, sde, steps).flip(0).to(x0), Noise(seed), x0
    kept, finite = Trajectory(trajectory, callback), []
    kept(0, times[0], x)
    with torch.no_grad():
        for i, (s, t) in enumerate(pairwise(times), 1):
            z = noise.normal(tuple(x.shape), i, x.device, x.dtype)
            x = x + (t - s) * sde.drift(x, s) + sde.diffusion(s) * (t - s).sqrt() * z
            finite.append(torch.isfinite(x).all())
            kept(i, t, x)
    if not bool(torch.stack(finite).all()):
        first = int(torch.stack(finite).int().argmin())
        raise SamplingDiverged(
            f"simulating {sde}: step {first + 1} of {steps}, to t={float(times[first + 1]):.3g}, gave values that are "
            "not finite; use more steps or another grid, and check drift and diffusion"
        )
    return Output(x, 0, *kept.stacked())
