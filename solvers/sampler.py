"""The only loop over steps, and what a sampler knows in each.

A ``Sampler`` states a ``plan``, all that depends on time alone, for the whole grid at once; and one ``step``. What a
step leaves for later ones is handed from step to step, and never kept on the sampler.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sde import SDE, Noise, Prediction, ScoreField
from sde.base import require_count
from solvers.base import SamplingDiverged, Solver
from solvers.grids import GRIDS, time_grid
from solvers.path import Path, rows

FINALS = ("mean", "sample", "denoise")
_UNNUMBERED = Noise(0)  # of a step that is taken by itself
_AHEAD = 2**15  # numbers to draw at a time
_APART = 2**24  # draws of one shape before the numbers of the next


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time ``t`` to time ``s``.

    Tensors of shape ``()`` in the dtype and on the device of the samples, but for the last four.
    """

    model: ScoreField
    t: Tensor
    s: Tensor
    alpha_t: Tensor
    alpha_s: Tensor
    sigma_t: Tensor
    sigma_s: Tensor
    draw: Callable[[Tensor], Tensor]
    """Fresh standard normal noise in the shape of its argument; zeros in the last step when ``final`` is "mean"."""
    fresh: Callable[[Tensor], Tensor]
    """The same, in the last step too."""
    own: Any = ()
    """This step's row of the sampler's ``plan``."""
    index: int = 0
    """Number of the step, from 0."""
    noise: Noise = _UNNUMBERED
    """The streams of the samples, of which ``draw`` and ``fresh`` take theirs."""

    def predict(self, x: Tensor) -> Prediction:
        """The model's pair at time ``t``."""
        return self.model(x, self.t)


class Sampler(Solver):
    """A solver with a fixed number of steps over a grid of times."""

    steps: int
    final: str
    order: int
    """Order of convergence: weak, of the mean and the covariance, where noise is added."""

    @abstractmethod
    def times(self, sde: SDE) -> Tensor:
        """The ``steps + 1`` times from the first to t_min, in float64 on the CPU."""

    @property
    @abstractmethod
    def calls_per_step(self) -> int:
        """Calls of the model in one step."""

    @property
    def looks_back(self) -> bool:
        """Whether a step starts from earlier states too: then no corrector may move them in between."""
        return False

    @abstractmethod
    def with_steps(self, steps: int) -> Self:
        """The same sampler with another number of steps."""

    @abstractmethod
    def plan(self, path: Path) -> Any:
        """What depends on time alone: tensors of shape ``(steps,)`` in a (named) tuple, that may hold others."""

    @abstractmethod
    def step(self, x: Tensor, step: Step, carry: Any) -> tuple[Tensor, Any]:
        """The state at ``step.s`` from the state ``x`` at ``step.t``, and what the next step is given as ``carry``.

        The first step is given None.
        """

    @property
    def calls(self) -> int:
        return self.steps * self.calls_per_step + (self.final == "denoise")

    def encode(self, model: ScoreField, x: Tensor) -> Tensor:
        """The latent of data ``x`` of shape ``(B, ...)`` by the same steps taken from t_min to the first time.

        Raises ``ValueError`` where a step adds noise.
        """
        if self.stochastic:
            raise ValueError(f"{self} adds noise, so its data have no latent; encode by DDIM, Heun or ProbabilityFlow")
        self.check_model(model)
        with torch.no_grad():
            return self.follow(model, x, Path(model.sde, self.times(model.sde).flip(0)))

    def follow(self, model: ScoreField, x: Tensor, path: Path) -> Tensor:
        """The state at the end of ``path`` from ``x`` at its start, by the steps between its times; without noise."""
        return self._walk(model, x, path, Draws(Noise(0), x), lambda *_: None, denoise=False)

    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        path = Path(model.sde, self.times(model.sde))
        return self._walk(model, x, path, Draws(noise, x), visit, denoise=self.final == "denoise")

    def _walk(self, model: ScoreField, x: Tensor, path: Path, draws: "Draws", visit: Callable, denoise: bool) -> Tensor:
        own, columns, carry, sums = rows(self.plan(path), x), _columns(path, x), None, []
        visit(0, columns[0][0], x)
        for i, (t, s, *levels, mine) in enumerate(zip(*columns, own, strict=False)):
            last = i == self.steps - 1
            draws.silent = self.final == "mean" and last
            x, carry = self.step(x, Step(model, t, s, *levels, draws, draws.fresh, mine, i, draws.noise), carry)
            if denoise and last:
                x = model(x, s).x0
            sums.append(x.sum())  # looked at after the loop, which never waits for a GPU
            visit(i + 1, s, x)
        self._check(x, torch.stack(sums).isfinite(), path.times)
        return x

    def _check(self, x: Tensor, finite: Tensor, times: Tensor):
        if not bool(finite.all()):
            first, bad = int(finite.int().argmin()), int((~torch.isfinite(x).flatten(1).all(1)).sum())
            raise SamplingDiverged(
                f"{self}: step {first + 1} of {len(finite)}, at t={float(times[first + 1]):.3g}, gave values that are "
                f"not finite ({bad} of {len(x)} samples in the end); use more steps or another grid, and check the "
                "weights of the network and that it was trained under this SDE"
            )


@dataclass(frozen=True)
class GridSampler(Sampler):
    """A sampler that has its own number of steps and grid.

    Parameters
    ----------
    steps: number of steps.
    grid: one of ``solvers.GRIDS`` (see ``solvers.grids``).
    final: "mean" - the last step adds no noise; "sample" - it does; "denoise" - the posterior mean of x_0 at t_min in
        place of the sample, for one more call of the model.
    compile: compile the model (``torch.compile``; on a GPU its kernels then replay as a CUDA graph).
    """

    steps: int = 100
    grid: str = "uniform"
    final: str = "mean"
    compile: bool = False

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
    """Numbered draws of standard normal noise; number 0 belongs to the prior. Each shape has numbers of its own.

    They are drawn ahead, for many small draws cost as much as one: a draw depends on how many of its shape went before
    it, and not on how many were drawn at a time.
    """

    def __init__(self, noise: Noise, x: Tensor):
        self.noise, self.silent = noise, False
        self.streams: dict[tuple[int, ...], Iterator[Tensor]] = {}

    def __call__(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.silent else self.fresh(like)

    def fresh(self, like: Tensor) -> Tensor:
        shape = tuple(like.shape)
        if shape not in self.streams:
            self.streams[shape] = self._stream(like, len(self.streams) * _APART)
        return next(self.streams[shape])

    def _stream(self, like: Tensor, number: int) -> Iterator[Tensor]:
        ahead = max(1, min(64, _AHEAD // max(1, like.numel())))
        while True:
            numbers = torch.arange(number + 1, number + 1 + ahead, device=like.device)
            yield from self.noise.normal(tuple(like.shape), numbers, like.device, like.dtype).unbind()
            number += ahead


def _columns(path: Path, x: Tensor) -> list[tuple[Tensor, ...]]:
    """t, s, alpha_t, alpha_s, sigma_t, sigma_s of all steps."""
    columns = (column.to(x).unbind() for column in (path.times, path.alpha, path.sigma))
    return [part for column in columns for part in (column[:-1], column[1:])]
