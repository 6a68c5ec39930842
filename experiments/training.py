"""Training: batches, a warm-up with cosine decay, what is measured on the way, and a checkpoint at the end.

Each step is that of ``experiments.stepper``. The host reads what steps measured every ``train.log_every`` of them, and
waits for the device then and only then. A row of ``metrics.csv`` and the rows of ``loss_by_log_snr.csv`` are means over
the steps since the last ones. Validation has the averaged weights, the same noise each time, float32 whatever the
precision of the training, and the model and the objective in evaluation mode, so that nothing learns from it.
"""

import logging
import math
import time
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments import checkpoint, tally
from experiments.build import ConfigError, build
from experiments.problem import Problem, build_model
from experiments.run import Metrics, Run
from experiments.stepper import Stepper, StepSettings
from experiments.tally import NOISE_LEVELS, Tallied
from models import Objective, ScoreNetwork

log = logging.getLogger(__name__)
COLUMNS = ("step", "loss", "validation_loss", "gradient_norm", "learning_rate", "samples_per_second", "seconds")


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite."""


def check(settings: DictConfig, device: torch.device, shape: tuple[int, ...], learned: bool = False) -> None:
    """Refuse training settings that can't work: on this device, for samples of this shape, for such a schedule."""
    for name in ("steps", "learning_rate", "log_every"):
        if not settings[name] > 0:
            raise ConfigError(f"train.{name} must be positive, found {settings[name]}")
    if settings.warmup < 0:
        raise ConfigError(f"train.warmup must be at least 0, found {settings.warmup}")
    if settings.data_on_device not in ("auto", True, False):
        raise ConfigError(f"train.data_on_device must be auto, true or false, found {settings.data_on_device!r}")
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


def fits(values: Tensor, device: torch.device) -> bool:
    """Whether data may lie on a device: on a GPU in a quarter of its free memory, on any other always."""
    if device.type != "cuda":
        return True
    return values.nbytes <= torch.cuda.mem_get_info(device)[0] // 4


def batches(
    problem: Problem, size: int, device: torch.device, generator: torch.Generator, on_device: bool | str = "auto"
) -> Iterator[Tensor]:
    """Endless batches of x on the device, in a new order each epoch, with fresh dequantization noise.

    The data lie on the device, where they fit or ``on_device`` is True, or else on the host, which then draws the order
    and sends each batch from pinned memory, without waiting for it.
    """
    values = problem.data.train
    resident = fits(values, device) if on_device == "auto" else on_device
    home = device if resident else values.device
    away = home.type != device.type
    shuffle = torch.Generator(home).manual_seed(generator.initial_seed()) if away else generator
    values, order = values.to(home), torch.empty(0, dtype=torch.long, device=home)
    while True:
        while len(order) < size:
            order = torch.cat((order, torch.randperm(len(values), generator=shuffle, device=home)))
        index, order = order[:size], order[size:]
        batch = values[index].pin_memory() if away else values[index]
        yield problem.x(batch.to(device, non_blocking=True), generator)


def train(config: DictConfig, problem: Problem, device: torch.device, run: Run) -> ScoreNetwork:
    """Train the configured score network and save it; returns it with the averaged weights.

    An interrupt saves the weights reached so far before it goes on its way. Raises ``TrainingDiverged``.
    """
    settings = config.train
    torch.manual_seed(config.seed)
    model = build_model(config, problem.convention(), problem.data.train).to(device)
    check(settings, device, problem.data.shape, model.sde.learned)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("training %s parameters for %d steps on %s", f"{parameters:,}", settings.steps, device)
    loop, started = _Loop(config, problem, device, model), time.time()
    average = loop.stepper.average
    try:
        with Metrics(run.path("metrics.csv"), COLUMNS) as metrics, Metrics(run.path(NOISE_LEVELS), tally.COLUMNS) as at:
            loop.run(metrics, at)
    finally:
        file = run.path("checkpoints", "last.pt")
        checkpoint.save(file, model, average.state, config, problem.convention(), loop.step)
        log.info("step %d is saved in %s", loop.step, file)
    model.load_state_dict(average.state)
    run.note(
        training={"steps": loop.step, "seconds": time.time() - started, "parameters": parameters, "loss": loop.recent}
    )
    return model.eval()


class _Loop:
    """The steps of one training."""

    def __init__(self, config: DictConfig, problem: Problem, device: torch.device, model: ScoreNetwork):
        self.settings, self.model, self.step, self.recent = config.train, model, 0, math.nan
        self.device, self.objective = device, build_objective(config, model).to(device)
        generator = torch.Generator(device).manual_seed(config.seed)
        size, where = config.train.batch_size, config.train.data_on_device
        self.batches = batches(problem, size, device, generator, where)
        held_out = torch.Generator().manual_seed(config.seed)
        self.validation = problem.x(problem.data.validation[:512], held_out).to(device)
        self.stepper = Stepper(model, self.objective, StepSettings.of(config.train), generator)

    def run(self, metrics: Metrics, noise_levels: Metrics) -> None:
        """All steps, with rows of metrics every ``log_every``."""
        self.model.train()
        since = time.time()
        with tqdm(total=self.settings.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
            while self.step < self.settings.steps:
                self.stepper(next(self.batches), learning_rate(self.step, self.settings))
                self.step += 1
                bar.update()
                if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
                    found = self._read()
                    self._record(metrics, found, time.time() - since, bar)
                    self._record_noise_levels(noise_levels, found)
                    since = time.time()

    def _read(self) -> Tallied:
        """What the steps since the last time measured; raises ``TrainingDiverged`` where it is not finite."""
        found = self.stepper.tally.read()
        if found.first is not None and self.stepper.scale.diverged():
            raise TrainingDiverged(
                f"the loss or its gradient stopped being finite in step {self.step - found.steps + found.first}; that "
                "step and any other such one changed nothing. Lower train.learning_rate, or check the data"
            )
        return found

    def _record(self, metrics: Metrics, found: Tallied, seconds: float, bar: tqdm) -> None:
        if not found.good:  # a loss scale that is still too large: nothing happened, nothing was measured
            return
        speed, self.recent = found.steps * self.settings.batch_size / seconds, found.loss
        metrics.row(
            step=self.step,
            loss=found.loss,
            validation_loss=self._validate(),
            gradient_norm=found.norm,
            seconds=seconds,
            learning_rate=learning_rate(self.step - 1, self.settings),
            samples_per_second=speed,
        )
        bar.set_postfix_str(f"loss {found.loss:.4f}")
        if bar.disable and self.step % (10 * self.settings.log_every) == 0:
            log.info("step %d of %d: loss %.4f, %.0f samples/s", self.step, self.settings.steps, found.loss, speed)

    def _record_noise_levels(self, noise_levels: Metrics, found: Tallied) -> None:
        """The loss in each bin of log-SNR; where there was none, it stays empty."""
        for (low, high), mean, count in zip(self.stepper.tally.bins(), found.means, found.counts, strict=True):
            noise_levels.row(step=self.step, low=low, high=high, count=count, **({"mean": mean} if count else {}))

    @torch.no_grad()
    def _validate(self) -> float:
        """The loss of held-out data."""
        modules = (self.model, self.objective)
        try:
            for module in modules:
                module.eval()
            with self.stepper.average.applied(self.model):
                noise = torch.Generator(self.device).manual_seed(0)
                return self.objective(self.model, self.validation, noise).value.mean().item()
        finally:
            for module in modules:
                module.train()
