"""Training: denoising score matching, Adam, a warm-up with cosine decay, and an average of the weights."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments import checkpoint
from experiments.build import ConfigError, build
from experiments.problem import Problem, build_model
from experiments.run import Metrics, Run
from models import Objective, ScoreNetwork

log = logging.getLogger(__name__)
COLUMNS = ("step", "loss", "validation_loss", "gradient_norm", "learning_rate", "samples_per_second", "seconds")


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite."""


class Average:
    """Exponential moving average of a model's state, by name; one fused operation an update.

    The decay grows as min(decay, (1 + n) / (10 + n)) over the updates n, so that the first steps are soon forgotten.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move towards the model's present state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = model.state_dict()
        torch._foreach_lerp_(list(self.state.values()), [current[name] for name in self.state], 1 - decay)


def check(settings: DictConfig) -> None:
    """Refuse training settings that can't work."""
    for name in ("steps", "batch_size", "learning_rate", "clip", "log_every"):
        if not settings[name] > 0:
            raise ConfigError(f"train.{name} must be positive, found {settings[name]}")
    if not 0 <= settings.ema < 1:
        raise ConfigError(f"train.ema must lie in [0, 1), found {settings.ema}")
    if settings.warmup < 0:
        raise ConfigError(f"train.warmup must be at least 0, found {settings.warmup}")


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


def batches(problem: Problem, size: int, device: torch.device, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of x on the device, in a new order each epoch, with fresh dequantization noise."""
    values = problem.data.train.to(device)
    order = torch.empty(0, dtype=torch.long, device=device)
    while True:
        while len(order) < size:
            order = torch.cat((order, torch.randperm(len(values), generator=generator, device=device)))
        index, order = order[:size], order[size:]
        yield problem.x(values[index], generator)


def train(config: DictConfig, problem: Problem, device: torch.device, run: Run) -> ScoreNetwork:
    """Train the configured score network and save it; returns it with the averaged weights.

    An interrupt saves the weights reached so far before it goes on its way. Raises ``TrainingDiverged``.
    """
    settings = config.train
    check(settings)
    torch.manual_seed(config.seed)
    model = build_model(config, problem.convention(), problem.data.train).to(device)
    average = Average(model, settings.ema)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("training %s parameters for %d steps on %s", f"{parameters:,}", settings.steps, device)
    loop, started = _Loop(config, problem, device, model, average), time.time()
    try:
        with Metrics(run.path("metrics.csv"), COLUMNS) as metrics:
            loop.run(metrics)
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

    def __init__(
        self, config: DictConfig, problem: Problem, device: torch.device, model: ScoreNetwork, average: Average
    ):
        self.settings, self.model, self.average, self.step, self.recent = config.train, model, average, 0, math.nan
        self.device, self.objective = device, build_objective(config, model).to(device)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.batches = batches(problem, config.train.batch_size, device, self.generator)
        held_out = torch.Generator().manual_seed(config.seed)
        self.validation = problem.x(problem.data.validation[:512], held_out).to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate, fused=True)

    def run(self, metrics: Metrics) -> None:
        """All steps, with a row of metrics every ``log_every``."""
        self.model.train()
        losses, since = [], time.time()
        with tqdm(total=self.settings.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
            while self.step < self.settings.steps:
                losses.append(self._update(next(self.batches)))
                self.step += 1
                bar.update()
                if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
                    self._record(metrics, losses, time.time() - since, bar)
                    losses, since = [], time.time()

    def _loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective(self.model, x, generator).value.mean()

    def _update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; loss and gradient norm, which stay on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(x, self.generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.average.update(self.model)
        return loss.detach(), norm

    def _record(self, metrics: Metrics, losses: list[tuple[Tensor, Tensor]], seconds: float, bar: tqdm) -> None:
        loss, norm = torch.stack([torch.stack(pair) for pair in losses]).mean(0).tolist()
        if not math.isfinite(loss + norm):
            raise TrainingDiverged(
                f"the loss or its gradient stopped being finite before step {self.step}; "
                "lower train.learning_rate, or check the data"
            )
        speed = len(losses) * self.settings.batch_size / seconds
        self.recent = loss
        metrics.row(
            step=self.step,
            loss=loss,
            validation_loss=self._validate(),
            gradient_norm=norm,
            seconds=seconds,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            samples_per_second=speed,
        )
        bar.set_postfix_str(f"loss {loss:.4f}")
        if bar.disable and self.step % (10 * self.settings.log_every) == 0:
            log.info("step %d of %d: loss %.4f, %.0f samples/s", self.step, self.settings.steps, loss, speed)

    @torch.no_grad()
    def _validate(self) -> float:
        """The loss of held-out data under the averaged weights, with the same noise each time."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.state)
        try:
            return self._loss(self.validation, torch.Generator(self.device).manual_seed(0)).item()
        finally:
            self.model.load_state_dict(weights)
