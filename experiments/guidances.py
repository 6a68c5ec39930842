"""How a model is told what is known, for ``guidance=``: which guidance fits which condition, checked before it is used.

A node of ``conf/guidance`` names a model around a model and sets its own parameters; what is known comes from the task.
What fits is read off the parameters: one that needs ``label`` can't be given a mask, one that needs ``known`` and
``mask`` can't be given a blur. That, and whatever the constructor itself refuses, is found by a rehearsal around a
model that is never asked, before a checkpoint is read.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.build import ConfigError, build
from experiments.observing import observed_model
from models import LinearOperator, Mask
from sde import VP, Prediction, ScoreModel
from solvers import Solver

ON_DATA, ON_CLASSES = ("operator", "known"), ("label",)
"""Of which a guidance must take one, to be led by an observation or by a class at all."""
_CHOICES = {"mask": "mmps, pigdm, dps, learned or replacement", "operator": "mmps, pigdm, dps or learned"}
_OF_CLASSES = "classifier_free, classifier or conditioned"


class _Rehearsal(ScoreModel):
    """In the place of a model that is not there yet."""

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        raise NotImplementedError("it is never asked")


class Guidance:
    """The configured ``guidance`` for what is known of all samples, by name: ``offered``.

    Parameters
    ----------
    leading: parameters of which it must take one; ``task``: who asks, for messages.
    noise_std: of the observation; None where there is none. solver: what it will be sampled by.

    Raises ``ConfigError`` for a guidance that the condition, the noise or the solver doesn't fit.
    """

    def __init__(
        self,
        node: DictConfig | None,
        offered: Mapping[str, Any],
        leading: tuple[str, ...],
        task: str,
        solver: Solver,
        noise_std: float | None = None,
    ):
        choices = next((words for name, words in _CHOICES.items() if name in offered), _OF_CLASSES)
        self.cure, self.node, self.task = f"use guidance={choices}", node, task
        if node is None:
            raise ConfigError(f"task={task} needs a guidance, found none; {self.cure}")
        self.title = str(node["_target_"]).rpartition(".")[2]
        self.make = build(OmegaConf.to_container(node, resolve=True) | {"_partial_": True}, where="guidance")
        self.takes = inspect.signature(self.make.func).parameters
        self.given = {name: value for name, value in offered.items() if name in self.takes}
        self._check(offered, leading)
        self._check_noise(noise_std)
        self._check_solver(solver)
        if not self.learned:  # which asks the network what it was trained for
            self(_Rehearsal(VP()))

    def __call__(self, model: ScoreModel, **more: Any) -> ScoreModel:
        """``model`` guided; ``more`` in place of what was offered under these names."""
        try:
            return self.make(model=model, **self.given | more)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"guidance: {error}") from error

    @property
    def learned(self) -> bool:
        """Whether it is for a network that learned to be told observations."""
        return self.make.func is observed_model

    @property
    def takes_log_prob(self) -> bool:
        """Whether it asks a classifier of noised data."""
        return "log_prob" in self.takes

    @property
    def asks_without_class(self) -> bool:
        """Whether it asks the model for all classes together, too."""
        return self.takes_log_prob or self.node.get("scale", 1) != 1

    def _check(self, offered: Mapping[str, Any], leading: tuple[str, ...]) -> None:
        empty = inspect.Parameter.empty
        needed = [name for name, p in self.takes.items() if p.default is empty and name not in ("model", *self.node)]
        missing = [name for name in needed if name not in offered]
        if missing or not any(name in self.given for name in leading):
            known = "classes" if "label" in offered else f"a condition by {type(offered['operator']).__name__}"
            lacks = f"needs {' and '.join(missing)}" if missing else f"takes no {' or '.join(leading)}"
            raise ConfigError(f"task={self.task} has {known}: guidance={self.title} {lacks}; {self.cure}")

    def _check_noise(self, noise_std: float | None) -> None:
        if noise_std and "noise_std" not in self.takes:
            raise ConfigError(
                f"posterior.noise_std={noise_std:g}: {self.title} takes what is known for free of noise; use "
                "posterior.noise_std=0, or for noisy observations guidance=mmps"
            )

    def _check_solver(self, solver: Solver) -> None:
        if self.node.get("fresh") and solver.calls is None:
            raise ConfigError(
                f"guidance.fresh=true draws anew at each time, which {type(solver).__name__} with steps of its own "
                "takes for its error; use a solver of fixed steps (solver=exponential_adams) or guidance.fresh=false"
            )


def offered_by(operator: LinearOperator, observation: Tensor, noise_std: float) -> dict[str, Any]:
    """What is known of x from observations ``(N, *observed)``, by the names of the parameters that take it."""
    found = {"operator": operator, "observation": observation, "noise_std": noise_std}
    if not isinstance(operator, Mask) or bool(operator.mask.all()):
        return found
    return found | {"known": observation, "mask": operator.mask}
