"""What a training looks at in between: samples, and the likelihood of held-out data, both of the averaged weights.

Samples start from the same noise at every look, and the likelihood takes the same examples, draws and probes: what
changes from one look to the next is the model. Both are those of the configuration, so that the last look is what
``task=sample`` and ``task=likelihood`` find, for fewer examples; but a likelihood that is left to its defaults takes
``STEPS`` steps, at half the cost: for 64 of the digits that changed 2.062 bits/dim to 2.059, a tenth of their standard
error.

A look leaves no trace in the training: random number generators, modes, gradients and weights are afterwards what they
were before. And it never ends one: a young model whose samples or flow diverge, and a device that is too small for
both, are logged, and that value is left out.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments import figures
from experiments.audit import audit
from experiments.build import ConfigError, build
from experiments.likelihood_tasks import check_settings, prepared
from experiments.pictures import is_image, is_plane
from experiments.problem import Problem
from experiments.processes import current
from experiments.training_state import random_states, restore_random_states
from models import ScoreNetwork
from solvers import SamplingDiverged
from solvers.base import Solver
from solvers.ode import ODEError

log = logging.getLogger(__name__)
IMAGES, POINTS, STEPS = 64, 1000, 50
SURVIVED = (SamplingDiverged, ODEError, torch.OutOfMemoryError, MemoryError, OSError)


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen: numbers by name, and the picture, uint8 ``(H, W, 3)``; what failed is not there.

    scalars: of discrete data "bits_per_dim", of continuous data "log_likelihood" in nats; each with its standard error
    over the examples, "..._stderr", where there are two.
    """

    scalars: dict[str, float]
    grid: Tensor | None


class Watch:
    """Looks at a model every ``train.watch_every`` steps (0: never), for ``train.watch_examples`` examples (0: none).

    Parameters
    ----------
    config: of the run; ``solver``, ``likelihood`` and ``seed`` say how. folder: of the run, for ``samples/step_*.png``.
    """

    def __init__(self, config: DictConfig, problem: Problem, device: torch.device, folder: Path):
        self.config, self.problem, self.device, self.folder = _cheaper(config), problem, device, folder
        self.every, examples = config.train.watch_every, config.train.watch_examples
        self._held_out = problem.data.validation[:examples]
        self._draw = _drawing(problem)

    def check(self, model: ScoreNetwork) -> None:
        """Refuse, by ``ConfigError``, what could not be looked at, before any time is spent."""
        if not self.every:
            return
        if self.config.train.distributed == "fsdp" and current().count > 1:
            raise ConfigError("train.watch_every looks at a whole network, and train.distributed=fsdp has none: use 0")
        check_settings(self.config.likelihood)
        prepared(self, model)
        try:
            self._solver().check_model(model)
        except TypeError as error:
            raise ConfigError(f"solver: {error}; or look at no samples: train.watch_every=0") from None

    def look(self, model: ScoreNetwork, step: int) -> Look:
        """Samples and likelihood of ``model``, which holds the averaged weights; the picture is written, too."""
        with untouched(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the final evaluation says what is to be said
            grid = self._tried("samples", step, lambda: self._picture(model, step)) if self._draw else None
            found = self._tried("likelihood", step, lambda: self._likelihood(model)) if len(self._held_out) else None
        return Look(found or {}, grid)

    def _tried(self, what: str, step: int, act: Callable) -> Tensor | dict[str, float] | None:
        try:
            return act()
        except SURVIVED as error:
            log.warning("no %s of step %d (%s: %s)", what, step, type(error).__name__, error)
            return None

    def _solver(self) -> Solver:
        return build(self.config.solver, where="solver")

    def _picture(self, model: ScoreNetwork, step: int) -> Tensor:
        shape = (IMAGES if is_image(self.problem) else POINTS, *self.problem.data.shape)
        how = {"seed": self.config.seed, "device": self.device, "batch_size": self.config.compare.batch_size}
        x = self._solver()(model, shape=shape, **how).x.cpu()
        path = self.folder / "samples" / f"step_{step:06d}.png"
        return _pixels(self._draw(x, path, f"step {step}"))

    def _likelihood(self, model: ScoreNetwork) -> dict[str, float]:
        settled, estimator = prepared(self, model)
        batch_size = self.config.likelihood.batch_size
        found = audit(settled, self._held_out, estimator, ode_subset=0, batch_size=batch_size)
        name = "log_likelihood" if found.unit == "nats" else "bits_per_dim"
        return {name: found.value} | ({} if found.stderr is None else {f"{name}_stderr": found.stderr})


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the block; afterwards each module's own mode, and all global randomness."""
    modes, states = [(module, module.training) for module in model.modules()], random_states()
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        restore_random_states(states)


def _cheaper(config: DictConfig) -> DictConfig:
    """The configuration, with fewer steps of the likelihood where it says nothing of them."""
    if any(config.likelihood[name] is not None for name in ("method", "rtol", "atol", "steps")):
        return config
    config = copy.deepcopy(config)
    config.likelihood.steps = STEPS
    return config


def _drawing(problem: Problem) -> Callable[[Tensor, Path, str], Path] | None:
    """How samples are drawn: images in a grid, points in the plane beside held-out data; others are not."""
    if is_image(problem):
        return lambda x, path, title: figures.image_grid(x.clamp(-1, 1), path, 8, title)
    if is_plane(problem):
        return lambda x, path, title: figures.samples_2d({title: x}, path, problem.data.validation)
    return None


def _pixels(path: Path) -> Tensor:
    """A picture that was written, uint8 ``(H, W, 3)``."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(path)[..., :3]).mul(255).round().to(torch.uint8)
