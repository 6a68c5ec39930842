r"""Resampling: a sampler's steps back and forth, for models of which a part is replaced (Lugmayr et al., 2022).

Where the known part of x_t is noised known data (``models.Replacement``), a step from t to s moves the unknown part for
a known part that is replaced right after, and the two don't fit. Noised back to t by the process itself,

    x_t = (alpha_t / alpha_s) x_s + std z,        std^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,

and stepped to s again, with the known part noised afresh, the parts come to terms: each round is a step of a Markov
chain at time t ("RePaint", algorithm 1; section 4.2 for stretches of several steps).

The chain is as good as the sampler's step, whose errors many rounds add up. Ancestral steps, whose noise is a little
too small, leave samples too narrow: on a Gaussian, with 100 of them, 20 rounds took the bias of the mean away and left
.56 of the variance. More steps, or stretches of several, keep it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sde import SDE, of_samples
from sde.base import require_count
from solvers.path import Path
from solvers.sampler import Sampler, Step


class Stretch(NamedTuple):
    """The ``jump`` steps of a stretch: their levels, and rows of the sampler's plan; the kernel from end to start."""

    levels: tuple[tuple[Tensor, ...], ...]
    own: tuple[Any, ...]
    scale: Tensor
    std: Tensor


@dataclass(frozen=True)
class RePaint(Sampler):
    """Each stretch of a sampler's steps ``rounds`` times over, noised back in between.

    Parameters
    ----------
    sampler: any that takes each step from the state before alone; its grid and ``final`` are those of the whole.
    rounds: how often each stretch is gone; 1 is the sampler itself.
    jump: steps in a stretch, a divisor of ``sampler.steps``. The paper has 10 rounds of stretches of 10 of 250 steps.

    >>> from solvers import Ancestral
    >>> RePaint(Ancestral(steps=50), rounds=4).calls
    200
    """

    sampler: Sampler
    rounds: int = 10
    jump: int = 1
    compile: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"RePaint: sampler must be a Sampler such as Ancestral(), found {self.sampler!r}")
        require_count(self.rounds, "RePaint: rounds")
        require_count(self.jump, "RePaint: jump")
        name = type(self.sampler).__name__
        if self.sampler.looks_back:
            raise ValueError(
                f"RePaint: a step of {name} starts from earlier states, which resampling leaves; take a sampler such "
                "as Ancestral, EulerMaruyama, DDIM or Heun"
            )
        if self.sampler.compile:
            raise ValueError(
                f"RePaint: a compiled model has one noise for all rounds; leave out compile=True of {name}"
            )
        if self.sampler.steps % self.jump:
            raise ValueError(f"RePaint: jump must divide the {self.sampler.steps} steps of {name}, found {self.jump}")

    @property
    def steps(self) -> int:
        return self.sampler.steps // self.jump

    @property
    def order(self) -> int:
        return self.sampler.order

    @property
    def final(self) -> str:
        return self.sampler.final

    @property
    def stochastic(self) -> bool:
        return self.rounds > 1 or self.sampler.stochastic

    @property
    def needs_pair(self) -> bool:
        return True

    @property
    def calls_per_step(self) -> int:
        return self.jump * self.rounds * self.sampler.calls_per_step

    def times(self, sde: SDE) -> Tensor:
        return self.sampler.times(sde)[:: self.jump]

    def with_steps(self, steps: int) -> "RePaint":
        return replace(self, sampler=self.sampler.with_steps(steps * self.jump))

    def plan(self, path: Path) -> Stretch:
        fine = Path(path.sde, self.sampler.times(path.sde))
        levels = [part for column in (fine.times, fine.alpha, fine.sigma) for part in (column[:-1], column[1:])]
        own, numbers = self.sampler.plan(fine), range(self.jump)
        kernel = path.sde.kernel(path.times[1:], path.times[:-1])
        stretch = tuple(tuple(_every(column, k, self.jump) for column in levels) for k in numbers)
        return Stretch(stretch, tuple(_every(own, k, self.jump) for k in numbers), *(c.detach() for c in kernel))

    def step(self, x: Tensor, step: Step, carry: Any) -> tuple[Tensor, Any]:
        stretch: Stretch = step.own
        for i in range(self.rounds):
            if i:
                x = stretch.scale * x + stretch.std * step.fresh(x)
            noise = step.noise.other(i)
            model = of_samples(step.model, noise, len(x))
            for k, (levels, own) in enumerate(zip(stretch.levels, stretch.own, strict=True)):
                last = i == self.rounds - 1 and k == self.jump - 1
                draw: Callable[[Tensor], Tensor] = step.draw if last else step.fresh
                number = step.index * self.jump + k
                x, _ = self.sampler.step(x, Step(model, *levels, draw, step.fresh, own, number, noise), None)
        return x, None


def _every(plan: Any, first: int, period: int) -> Any:
    """The rows ``first``, ``first + period``, ... of a plan."""
    if isinstance(plan, Tensor):
        return plan[first::period]
    return getattr(plan, "_make", tuple)(_every(part, first, period) for part in plan) if plan else plan
