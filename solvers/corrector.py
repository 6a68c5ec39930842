"""Correctors, which move a state at a fixed time, and their combination with any sampler's step.

A predictor carries the state to the next time with an error; a corrector there pulls it towards p_t, which it leaves as
it is (Song et al., 2021, algorithm 1).
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from sde import SDE
from solvers.path import Path
from solvers.sampler import GridSampler, Sampler, Step


class Corrector(GridSampler):
    """A sampler that can move a state at one time, and leaves the distribution there as it is."""

    order: ClassVar[int] = 0

    @abstractmethod
    def correct(self, x: Tensor, step: Step) -> Tensor:
        """The state moved at ``step.s``; ``step.own`` is a row of the corrector's own ``plan``."""


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Any sampler's step, then a corrector's at the time it reached (Song et al., 2021, algorithm 1).

    ``steps``, times and ``final`` are the predictor's; so is ``compile``, unless it is given here.

    >>> from solvers import EulerMaruyama, Langevin
    >>> PredictorCorrector(EulerMaruyama(steps=50), Langevin(snr=0.1)).steps
    50
    """

    predictor: Sampler
    corrector: Corrector
    compile: bool = False

    def __post_init__(self):
        for role, kind in (("predictor", Sampler), ("corrector", Corrector)):
            if not isinstance(getattr(self, role), kind):
                found = getattr(self, role)
                raise TypeError(f"PredictorCorrector: {role} must be a {kind.__name__}, found {found!r}")
        if self.predictor.looks_back:
            raise ValueError(
                f"PredictorCorrector: a step of {type(self.predictor).__name__} starts from earlier states, which a "
                "corrector would have moved; take a predictor such as EulerMaruyama, Ancestral, DDIM or "
                "ExponentialAdams(corrected=False)"
            )
        object.__setattr__(self, "compile", self.compile or self.predictor.compile)
        if self.compile and self.corrector.needs_density:
            raise ValueError(
                "PredictorCorrector: a compiled model has no density, which the adjusted corrector needs; leave out "
                "compile=True or adjusted=True of the corrector"
            )

    @property
    def steps(self) -> int:
        return self.predictor.steps

    @property
    def order(self) -> int:
        return self.predictor.order

    @property
    def stochastic(self) -> bool:
        return self.predictor.stochastic or self.corrector.stochastic

    @property
    def needs_pair(self) -> bool:
        return self.predictor.needs_pair or self.corrector.needs_pair

    @property
    def needs_density(self) -> bool:
        return self.predictor.needs_density or self.corrector.needs_density

    @property
    def final(self) -> str:
        return self.predictor.final

    @property
    def calls_per_step(self) -> int:
        return self.predictor.calls_per_step + self.corrector.calls_per_step

    def times(self, sde: SDE) -> Tensor:
        return self.predictor.times(sde)

    def with_steps(self, steps: int) -> "PredictorCorrector":
        return replace(self, predictor=self.predictor.with_steps(steps))

    def plan(self, path: Path) -> tuple[Any, Any]:
        return self.predictor.plan(path), self.corrector.plan(path)

    def step(self, x: Tensor, step: Step, carry: Any) -> tuple[Tensor, Any]:
        mine, other = step.own
        x, carry = self.predictor.step(x, replace(step, own=mine), carry)
        return self.corrector.correct(x, replace(step, own=other)), carry
