"""Training: the loop over steps, what is measured on the way, and the checkpoints that it goes on from after any end.

Each step is that of ``experiments.stepper``. The host reads what steps measured every ``train.log_every`` of them, and
waits for the device then and only then. A row of ``metrics.csv`` and the rows of ``loss_by_log_snr.csv`` are means over
the steps since the last ones. Validation has the averaged weights, the same noise each time, float32 whatever the
precision of the training, and the model and the objective in evaluation mode, so that nothing learns from it.

A training that was ended by a signal or by force goes on from its last checkpoint with ``resume``: the same steps, to
the last bit on the same machine. Each checkpoint that ``train.save_every`` asks for is judged by its validation loss:
that of the lowest is best.pt, and ``train.early_stop`` of them in a row that are no better end the training.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments import checkpoint, classes, observing, processes, signals
from experiments.build import NOT_NEGATIVE, POSITIVE, ConfigError, Limit, build, require_all, require_limits
from experiments.nan_report import TrainingDiverged, nan_report
from experiments.order import batches
from experiments.parallel import in_parts
from experiments.problem import Problem, build_model
from experiments.records import Records
from experiments.retention import BEST, Kept
from experiments.run import Run
from experiments.stepper import Stepper, StepSettings
from experiments.tally import Tallied
from experiments.training_state import Progress, State, require_same_training, seed_everything
from experiments.watch import Watch
from models import Objective, ScoreNetwork

log = logging.getLogger(__name__)
_AGREE_EVERY = 10  # steps
_HELD_OUT = 512  # examples whose loss validates


class OutOfMemory(RuntimeError):
    """A step of the training needs more memory than there is."""


_LIMITS = {
    **dict.fromkeys(("steps", "learning_rate", "log_every", "save_every", "max_bad_steps"), POSITIVE),
    **dict.fromkeys(("warmup", "workers", "keep_every", "watch_every", "watch_examples"), NOT_NEGATIVE),
    "label_dropout": Limit(lambda value: 0 <= value < 1, "be a probability in [0, 1)"),
    "early_stop": Limit(lambda value: value is None or value > 0, "be at least 1, or null for none"),
    "data_on_device": Limit(lambda value: value in ("auto", True, False), "be auto, true or false"),
}


def check_settings(settings: DictConfig) -> None:
    """Refuse training settings that can't work anywhere: raises one ``ConfigError`` for all of them."""
    require_all((partial(require_limits, "train.", settings, _LIMITS), partial(StepSettings.of, settings)))


def check(settings: DictConfig, device: torch.device, shape: tuple[int, ...], learned: bool = False) -> None:
    """Refuse training settings that can't work: on this device, for samples of this shape, for such a schedule."""
    check_settings(settings)
    StepSettings.of(settings).require(device, shape, learned)


def build_objective(config: DictConfig, model: ScoreNetwork) -> Objective:
    """The configured objective, refused where it can't train this model."""
    objective = build(config.objective, where="objective", allowed=("models.", "sde."))
    if not isinstance(objective, Objective):
        raise ConfigError(f"objective must be an Objective, found {config.objective._target_}")
    try:
        objective.check(model)
    except ValueError as error:
        fit = "vdm" if model.sde.learns_ends else "bound"
        cure = f"; as a configuration: objective={fit}" if model.sde.learned else ""
        raise ConfigError(f"objective: {error}{cure}") from None
    return objective


def learning_rate(step: int, settings: DictConfig) -> float:
    """Linear warm-up, then a half cosine to zero; ``step`` counts from 0."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def train(config: DictConfig, problem: Problem, device: torch.device, run: Run) -> ScoreNetwork:
    """Train the configured score network and save it; returns it with the averaged weights.

    After an early stop they are those of the lowest validation loss.
    With ``resume`` the training goes on from a checkpoint. Raises ``signals.Interrupted`` after a signal, once the step
    at hand is finished and saved; ``TrainingDiverged``; ``OutOfMemory``; ``OSError`` where nothing can be written.
    """
    settings, group = config.train, processes.current()
    observing.check(config, problem)
    convention = observing.convention(config, problem)
    seed_everything(config.seed)
    model = build_model(config, convention, problem.data.train).to(device)
    check(settings, device, problem.data.shape, model.sde.learned)
    classes.check(config, problem.data, model.net)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("training %s parameters for %d steps on %s", f"{parameters:,}", settings.steps, device)
    torch.manual_seed(config.seed + group.rank)  # of dropout: each process has other samples
    with signals.deferred(), explaining_memory():
        loop = _Loop(config, problem, device, model, run)
        loop.begin(config.resume)
        loop.go()
    if signals.requested():
        raise signals.Interrupted(signals.requested())
    run.note(training={"parameters": parameters} | loop.summary())
    if any(in_parts(p) for p in model.parameters()):  # it is made anew, on the host: it may be too large for a device
        model = build_model(config, convention, problem.data.train)
    model.load_state_dict(loop.final())
    return model.eval()


@contextmanager
def explaining_memory() -> Iterator[None]:
    """Out of memory becomes one sentence with the cures; to change the batch silently would change the training."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"a step of the training does not fit into the memory ({str(error).splitlines()[0]}): raise "
            "train.accumulate, which gives the same gradient from smaller parts; or use train.precision=bfloat16, or a "
            "smaller train.batch_size or network, which is another training"
        ) from error


class _Loop:
    """The steps of one training, from its beginning or from a checkpoint."""

    def __init__(self, config: DictConfig, problem: Problem, device: torch.device, model: ScoreNetwork, run: Run):
        self.config, self.settings, self.problem, self.device = config, config.train, problem, device
        self.model, self.run, self.group, self.progress = model, run, processes.current(), Progress()
        self.objective, step = build_objective(config, model).to(device), StepSettings.of(config.train)
        generator = torch.Generator(device).manual_seed(config.seed)
        self.source = self.group.share(generator, step.accumulate)
        self.stepper = Stepper(model, self.objective, step, generator, self.group)
        labels = classes.labels(config, problem.data, "train")
        self.state = State(self.stepper, problem.data.train, self.group, labels)
        held_out = torch.Generator().manual_seed(config.seed)
        self.observing = observing.Observing(config, problem)
        x = problem.x(problem.data.validation[:_HELD_OUT], held_out)
        observed = {name: y.to(device) for name, y in self.observing(x, held_out).items()}
        self.validation, self.told = x.to(device), classes.held_out(config, problem.data, _HELD_OUT, device) | observed
        self.about = checkpoint.about(config, observing.convention(config, problem))
        self.kept = Kept(Path(self.group.broadcast(str(run.folder))))
        self.watch = Watch(config, problem, device, run.folder)
        self.saved, self.resumed = None, None

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def begin(self, resume: str | None) -> None:
        """At the first step, or where the checkpoint that ``resume`` names was made."""
        file, content = self.kept.find(resume, self.group)
        if file is not None:
            require_same_training(file, content, self.config, self.problem.data)
            self.progress = self.state.restore(content)
            self.resumed = {"file": str(file), "step": self.step}
            self.saved = self.step if file.parent == self.kept.folder else None
            if self.group.is_first:
                self.kept.adopt(file)
        source = file.parent.parent if file else self.run.folder
        step = self.step if resume else None
        self.records = Records(self.config, self.run, step, source, self.progress.logger_id, self.group)
        self.progress.logger_id = self.records.logger_id

    def go(self) -> None:
        """All steps that are left, with rows of metrics every ``log_every``, and checkpoints."""
        self.model.train()
        stream = batches(self.problem, self.config, self.device, self.source, self.progress.samples)
        told = classes.conditions(self.config, self.problem.data, self.device, self.progress.samples)
        with self.records:
            since = time.time()
            while not self._over():
                x, rate = next(stream), learning_rate(self.step, self.settings)
                self.stepper(x, rate, **next(told), **self.observing(x, self.source))
                self.progress.step += 1
                self.progress.samples += self.settings.batch_size
                self.records.bar.update()
                if self._due("log_every"):
                    self._look(time.time() - since)
                    since = time.time()
            if self.saved != self.step:
                self._save()

    def final(self) -> dict[str, Tensor]:
        """The weights that the training comes to: the average, or the best one after an early stop."""
        best = self.kept.folder / BEST
        if not self._stopped_early() or not best.is_file():
            return self.stepper.weights()[1]
        log.info("stopped early, at step %d: taking the weights of step %d", self.step, self.progress.best_step)
        return checkpoint.read(best)["ema"]

    def summary(self) -> dict[str, Any]:
        """What there is to say of the training as a whole."""
        found = {"steps": self.step, "seconds": self.progress.seconds, "loss": self.progress.loss}
        if self.progress.best_step:
            found["best"] = {"step": self.progress.best_step, "validation_loss": self.progress.best}
        return found | {"stopped_early": self._stopped_early(), "resumed_from": self.resumed}

    def _over(self) -> bool:
        if self.step >= self.settings.steps or self._stopped_early():
            return True
        if self.group.count == 1:
            return signals.requested() is not None
        # Processes that hear of a signal one after the other must end after the same step.
        return self.step % _AGREE_EVERY == 0 and any(self.group.gather(signals.requested() is not None))

    def _stopped_early(self) -> bool:
        return self.settings.early_stop is not None and self.progress.stale >= self.settings.early_stop

    def _due(self, name: str) -> bool:
        """Whether it is time, after a step whose metrics are due, for what comes every so many steps."""
        every, last = self.settings[name], self.step - (self.step - 1) % self.settings.log_every - 1
        return every > 0 and (self.step // every > last // every or self.step == self.settings.steps)

    def _look(self, seconds: float) -> None:
        """Read and record what the steps since the last time measured, and save what is due."""
        self.progress.seconds += seconds
        found, self.progress.validation_loss = self._read(), self._validate()
        seen = self._watch() if self._due("watch_every") else {}
        if found.good:  # or else nothing happened, nothing was measured
            self._record(found, seconds, seen)
        if self._due("save_every"):
            self._save(regular=True)

    def _read(self) -> Tallied:
        """What the steps since the last time measured; raises ``TrainingDiverged`` after too many bad ones in a row."""
        found = self.stepper.tally.read()
        if found.first is None:
            return found
        bad = self.step - found.steps + found.first
        low, high = found.levels or (None, None)
        where = f"at log-SNR {low:.3g} to {high:.3g}" if found.levels else "in the gradient alone"
        if found.run >= self.settings.max_bad_steps:
            path = self.run.path("nan_report.json")
            nan_report(path, self.stepper, found, self.problem.data.train, self.step, bad)
            raise TrainingDiverged(
                f"the loss or its gradient stopped being finite in step {bad} ({where}), {found.run} steps in a row, "
                "which changed nothing, nor is the last checkpoint of them: lower train.learning_rate, or check the "
                f"data; more is in {path}"
            )
        log.warning("step %d was not finite (%s) and changed nothing", bad, where)
        return found

    def _record(self, found: Tallied, seconds: float, seen: dict[str, float]) -> None:
        self.progress.loss = found.loss
        values = {
            "loss": found.loss,
            "validation_loss": self.progress.validation_loss,
            "gradient_norm": found.norm,
            "learning_rate": learning_rate(self.step - 1, self.settings),
            "samples_per_second": found.steps * self.settings.batch_size / seconds,
            "seconds": seconds,
        }
        bins = zip(self.stepper.tally.bins(), found.means, found.counts, strict=True)
        self.records.add(self.step, values | seen, [(low, high, mean, n) for (low, high), mean, n in bins])

    def _watch(self) -> dict[str, float]:
        """Samples and the likelihood of held-out data."""
        with self.stepper.average.applied(self.model):
            look = self.watch.look(self.model, self.step)
        if look.grid is not None:
            self.records.picture(self.step, "samples", look.grid)
        return look.scalars

    @torch.no_grad()
    def _validate(self) -> float:
        """The loss of held-out data."""
        modules = (self.model, self.objective)
        try:
            for module in modules:
                module.eval()
            with self.stepper.average.applied(self.model):
                noise = torch.Generator(self.device).manual_seed(0)
                return self.objective(self.model, self.validation, noise, **self.told).value.mean().item()
        finally:
            for module in modules:
                module.train()

    def _save(self, regular: bool = False) -> None:
        """Write a checkpoint; a ``regular`` one is judged, and kept where it is due."""
        best = regular and self.progress.judge()
        state, weights = self.state.content(self.progress), self.stepper.weights()
        keep = regular and self._due("keep_every")
        self.records.flush()
        if self.group.is_first:
            content = self.about, self.step, *weights, state
            file = self.kept.save(lambda path: checkpoint.save(path, *content), self.step, best, keep)
            on_the_way = regular and self.step < self.settings.steps
            log.log(logging.DEBUG if on_the_way else logging.INFO, "step %d is saved in %s", self.step, file)
        self.saved = self.step
