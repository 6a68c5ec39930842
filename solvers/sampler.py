"""The only loop over steps, and what a sampler knows in each.

A ``Sampler`` states one ``step`` and nothing else. All that depends on time alone is computed for the whole grid, in
float64, before the loop.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sde import SDE, GaussianSDE, Noise, Prediction, ScoreField
from sde.base import require_count
from solvers.base import SamplingDiverged, Solver
from solvers.grids import GRIDS, time_grid

FINALS = ("mean", "sample", "denoise")


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time ``t`` to the earlier time ``s``.

    Tensors of shape ``()`` in the dtype and on the device of the samples, but for ``index``, ``draw`` and ``fresh``.
    Under a process that is not Gaussian alpha is 1, and sigma the noise that its diffusion has added since time 0.
    """

    model: ScoreField
    t: Tensor
    s: Tensor
    alpha_t: Tensor
    alpha_s: Tensor
    sigma_t: Tensor
    sigma_s: Tensor
    log_snr_change: Tensor
    """lambda_t - lambda_s, negative."""
    draw: Callable[[Tensor], Tensor]
    """Fresh standard normal noise in the shape of its argument; zeros in the last step when ``final`` is "mean"."""
    fresh: Callable[[Tensor], Tensor]
    """The same, in the last step too."""
    index: int = 0
    """Number of the step, from 0."""

    def predict(self, x: Tensor) -> Prediction:
        """The model's pair at time ``t``."""
        return self.model(x, self.t)


class Sampler(Solver):
    """A solver with a fixed number of steps over a grid of times."""

    steps: int
    final: str

    @abstractmethod
    def times(self, sde: SDE) -> Tensor:
        """The ``steps + 1`` times from the first to t_min, in float64 on the CPU."""

    @property
    @abstractmethod
    def calls_per_step(self) -> int:
        """Calls of the model in one step."""

    @abstractmethod
    def with_steps(self, steps: int) -> Self:
        """The same sampler with another number of steps."""

    @abstractmethod
    def step(self, x: Tensor, step: Step) -> Tensor:
        """The state at ``step.s`` from the state ``x`` at ``step.t``."""

    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        plan, draws, finite = self._plan(model.sde, x), Draws(noise, x), []
        visit(0, plan["t"][0], x)
        for i in range(self.steps):
            last = i == self.steps - 1
            draws.silent = self.final == "mean" and last
            now = {name: values[i] for name, values in plan.items()}
            x = self.step(x, Step(model, draw=draws, fresh=draws.fresh, index=i, **now))
            if self.final == "denoise" and last:
                x = model(x, now["s"]).x0
            finite.append(torch.isfinite(x).all())  # looked at after the loop, which never waits for a GPU
            visit(i + 1, now["s"], x)
        self._check(x, torch.stack(finite), plan["s"])
        return x

    def _plan(self, sde: SDE, x: Tensor) -> dict[str, Tensor]:
        times = self.times(sde)
        alpha, sigma = levels(sde, times)
        log_snr = 2 * (alpha.log() - sigma.log())
        columns = {"t": times[:-1], "s": times[1:], "log_snr_change": log_snr[:-1] - log_snr[1:]}
        for name, values in {"alpha": alpha, "sigma": sigma}.items():
            columns[f"{name}_t"], columns[f"{name}_s"] = values[:-1], values[1:]
        return {name: column.detach().to(x) for name, column in columns.items()}

    def _check(self, x: Tensor, finite: Tensor, times: Tensor):
        if not bool(finite.all()):
            first, bad = int(finite.int().argmin()), int((~torch.isfinite(x).flatten(1).all(1)).sum())
            raise SamplingDiverged(
                f"{self}: step {first + 1} of {len(finite)}, at t={float(times[first]):.3g}, gave values that are not "
                f"finite ({bad} of {len(x)} samples in the end); use more steps or another grid, and check the weights "
                "of the network and that it was trained under this SDE"
            )


@dataclass(frozen=True)
class GridSampler(Sampler):
    """A sampler that has its own number of steps and grid.

    Parameters
    ----------
    steps: number of steps.
    grid: "uniform", "log_snr" or "karras" (see ``solvers.grids``).
    final: "mean" - the last step adds no noise; "sample" - it does; "denoise" - the posterior mean of x_0 at t_min in
        place of the sample, for one more call of the model.
    """

    steps: int = 100
    grid: str = "uniform"
    final: str = "mean"

    @property
    def needs_pair(self) -> bool:
        return True

    def times(self, sde: SDE) -> Tensor:
        return time_grid(self.grid, sde, self.steps)

    def __post_init__(self):
        name = type(self).__name__
        require_count(self.steps, f"{name}: steps")
        if self.grid not in GRIDS:
            raise ValueError(f"{name}: grid must be one of {', '.join(GRIDS)}, found {self.grid!r}")
        if self.final not in FINALS:
            raise ValueError(f"{name}: final must be one of {', '.join(FINALS)}, found {self.final!r}")

    def with_steps(self, steps: int) -> Self:
        return replace(self, steps=steps)


class Draws:
    """Numbered draws of standard normal noise; number 0 belongs to the prior."""

    def __init__(self, noise: Noise, x: Tensor):
        self.noise, self.number, self.silent = noise, 0, False

    def __call__(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.silent else self.fresh(like)

    def fresh(self, like: Tensor) -> Tensor:
        self.number += 1
        return self.noise.normal(tuple(like.shape), self.number, like.device, like.dtype)


def levels(sde: SDE, times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the ``times``; for a process that is not Gaussian 1 and sqrt(integral of g^2 from 0)."""
    if isinstance(sde, GaussianSDE):
        return sde.alpha(times), sde.sigma(times)
    fine = torch.linspace(sde.t_min, sde.t_max, 4097, dtype=times.dtype)
    rate = sde.diffusion(fine).square()
    added = torch.cat((rate[:1] * sde.t_min, 0.5 * (rate[1:] + rate[:-1]) * fine.diff())).cumsum(0)
    nearest = ((times - sde.t_min) / (sde.t_max - sde.t_min) * 4096).round().long()
    return torch.ones_like(times), added[nearest].sqrt()
