"""Where the numbers of a training go: ``metrics.csv``, ``loss_by_log_snr.csv``, a logger, and the terminal."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments import tally
from experiments.build import ConfigError, build
from experiments.checkpoint import resolved
from experiments.loggers import Bin, Logger
from experiments.processes import Processes
from experiments.run import Metrics, Run
from experiments.tally import NOISE_LEVELS

log = logging.getLogger(__name__)
METRICS = "metrics.csv"
COLUMNS = ("step", "loss", "validation_loss", "gradient_norm", "learning_rate", "samples_per_second", "seconds")
SEEN = ("bits_per_dim", "bits_per_dim_stderr", "log_likelihood", "log_likelihood_stderr")
"""What a look in between may find."""


def build_logger(config: DictConfig) -> Logger:
    """The configured logger."""
    logger = build(config.logger, where="logger", allowed=("experiments.loggers.",))
    if not isinstance(logger, Logger):
        raise ConfigError(f"logger must be a Logger, found {config.logger._target_}")
    return logger


class Records:
    """Rows, bars and pictures of one training; a context, which ends with everything written.

    Parameters
    ----------
    step: to go on from; None for a new training. source: the run folder whose rows up to it are kept.
    logger_id: what the logger's ``start`` gave before. group: of the processes only the first has a bar and a logger.
    """

    def __init__(
        self, config: DictConfig, run: Run, step: int | None, source: Path, logger_id: str | None, group: Processes
    ):
        self.settings, columns = config.train, COLUMNS + (SEEN if config.train.watch_every else ())
        self._rows = Metrics(run.path(METRICS), columns, step, source / METRICS)
        self._levels = Metrics(run.path(NOISE_LEVELS), tally.COLUMNS, step, source / NOISE_LEVELS)
        self.logger, self.logger_id = build_logger(config) if group.is_first else None, None
        if self.logger:
            self.logger_id = self.logger.start(run.folder, resolved(config), step or 0, logger_id)
        options = {"unit": "step", "dynamic_ncols": True, "disable": group.hides(None)}
        self.bar = tqdm(total=self.settings.steps, initial=step or 0, **options)

    def add(self, step: int, values: dict[str, Any], levels: list[Bin]) -> None:
        """What was measured up to a step: numbers by name, and the loss in each bin of log-SNR."""
        self._rows.row(step=step, **values)
        for low, high, mean, count in levels:  # where there was none, it stays empty
            self._levels.row(step=step, low=low, high=high, count=count, **({"mean": mean} if count else {}))
        if self.logger:
            self.logger.scalars(step, values)
            self.logger.bins(step, "loss_by_log_snr", levels)
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}")
        if self.bar.disable and step % (10 * self.settings.log_every) == 0:
            words = (step, self.settings.steps, values["loss"], values["samples_per_second"])
            log.info("step %d of %d: loss %.4f, %.0f samples/s", *words)

    def picture(self, step: int, name: str, grid: Tensor) -> None:
        """A picture, uint8 ``(H, W, 3)``, for the logger."""
        if self.logger:
            self.logger.images(step, name, grid)

    def flush(self) -> None:
        """What is told so far is written, as before a checkpoint, from which nothing is told again."""
        if self.logger:
            self.logger.flush()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for rows in (self._rows, self._levels):
            rows.close()
        if self.logger:
            self.logger.close()
