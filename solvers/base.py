"""What all solvers share: the call, the only loop over steps, and the count of network calls.

A ``Solver`` turns noise into data. A ``Sampler`` is a solver with a fixed number of steps: it states one ``step`` and
nothing else. All that depends on time alone is computed for the whole grid, in float64, before the loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Self

import torch
from torch import Tensor

from sde import SDE, Noise, Prediction, ScoreModel
from solvers.grids import GRIDS, time_grid

FINALS = ("mean", "sample", "denoise")


@dataclass(frozen=True)
class Output:
    """``x``: samples, ``(B, ...)``. ``nfe``: calls of the model. ``trajectory``: the states at ``times``, if kept."""

    x: Tensor
    nfe: int
    trajectory: Tensor | None = None
    times: Tensor | None = None


class SamplingDiverged(RuntimeError):
    """A sampler met a value that is not finite."""


@contextmanager
def counting(model: torch.nn.Module) -> Iterator[SimpleNamespace]:
    """Count the forward calls of a module while the context is open: ``with counting(model) as calls: calls.n``."""
    calls = SimpleNamespace(n=0)

    def count(*_):
        calls.n += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class Solver(ABC):
    """Anything that turns noise at t_max into data at t_min."""

    def __call__(
        self,
        model: ScoreModel,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
        x_T: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trajectory: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Output:
        """Draw samples.

        Parameters
        ----------
        model: score model; its ``sde`` is the one that is reversed.
        shape: ``(B, ...)``, to start from the SDE's prior; or
        x_T: ``(B, ...)``, to start from given noise.
        seed: of all random numbers. Sample i depends on ``seed`` and i, and neither on B nor on the device.
        device, dtype: of the samples; those of ``x_T`` or of the model's parameters by default.
        trajectory: keep every k-th state, and the last; 0 for none.
        callback: called as ``callback(i, x)`` after step i.

        Raises
        ------
        SamplingDiverged (or ``ODEError``): a value is not finite.
        """
        if (shape is None) == (x_T is None):
            raise ValueError("give either shape, to start from the prior, or x_T, to start from given noise")
        if x_T is None:
            like = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), torch.empty(()))
            x_T = model.sde.prior(tuple(shape)).sample(seed, device or like.device, dtype or like.dtype)
        kept = _Trajectory(trajectory, callback)
        with torch.no_grad(), counting(model) as calls:
            x = self._solve(model, x_T.to(device=device, dtype=dtype), Noise(seed), kept)
        return Output(x, calls.n, *kept.stacked())

    @abstractmethod
    def _solve(
        self, model: ScoreModel, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        """Carry ``x`` from t_max to t_min, telling ``visit(i, t, x)`` of each state on the way."""


@dataclass
class _Trajectory:
    every: int
    callback: Callable[[int, Tensor], None] | None
    states: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, i: int, t: Tensor, x: Tensor):
        if self.callback:
            self.callback(i, x)
        if self.every:
            if self.states and self.states[-1][0] % self.every:
                self.states.pop()  # it was kept as the last so far
            self.states.append((i, t, x))

    def stacked(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.states:
            return None, None
        return torch.stack([x for _, _, x in self.states]), torch.stack([t for _, t, _ in self.states])


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time ``t`` to the earlier time ``s``.

    Tensors of shape ``()`` in the dtype and on the device of the samples, but for ``draw`` and ``fresh``.
    """

    model: ScoreModel
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

    def predict(self, x: Tensor) -> Prediction:
        """The model's pair at time ``t``."""
        return self.model(x, self.t)


class Sampler(Solver):
    """A solver with a fixed number of steps over a grid of times (see ``solvers.grids``)."""

    steps: int
    grid: str
    final: str

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
        self, model: ScoreModel, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        plan, draws, finite = self._plan(model.sde, x), _Draws(noise, x), []
        visit(0, plan["t"][0], x)
        for i in range(self.steps):
            last = i == self.steps - 1
            draws.silent = self.final == "mean" and last
            now = {name: values[i] for name, values in plan.items()}
            x = self.step(x, Step(model, draw=draws, fresh=draws.fresh, **now))
            if self.final == "denoise" and last:
                x = model(x, now["s"]).x0
            finite.append(torch.isfinite(x).all())  # looked at after the loop, which never waits for a GPU
            visit(i + 1, now["s"], x)
        self._check(x, torch.stack(finite), plan["s"])
        return x

    def _plan(self, sde: SDE, x: Tensor) -> dict[str, Tensor]:
        times = time_grid(self.grid, sde, self.steps)
        alpha, sigma, log_snr = sde.alpha(times), sde.sigma(times), sde.log_snr(times)
        columns = {"t": times[:-1], "s": times[1:], "log_snr_change": log_snr[:-1] - log_snr[1:]}
        for name, values in {"alpha": alpha, "sigma": sigma}.items():
            columns[f"{name}_t"], columns[f"{name}_s"] = values[:-1], values[1:]
        return {name: column.to(x) for name, column in columns.items()}

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

    def __post_init__(self):
        name = type(self).__name__
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{name}: steps must be a positive integer, found {self.steps!r}")
        if self.grid not in GRIDS:
            raise ValueError(f"{name}: grid must be one of {', '.join(GRIDS)}, found {self.grid!r}")
        if self.final not in FINALS:
            raise ValueError(f"{name}: final must be one of {', '.join(FINALS)}, found {self.final!r}")

    def with_steps(self, steps: int) -> Self:
        return replace(self, steps=steps)


class _Draws:
    """Numbered draws of standard normal noise; number 0 belongs to the prior."""

    def __init__(self, noise: Noise, x: Tensor):
        self.noise, self.number, self.silent = noise, 0, False

    def __call__(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.silent else self.fresh(like)

    def fresh(self, like: Tensor) -> Tensor:
        self.number += 1
        return self.noise.normal(tuple(like.shape), self.number, like.device, like.dtype)
