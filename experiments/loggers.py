"""Where a training can be watched besides its own files: nowhere, TensorBoard, or Weights & Biases.

``metrics.csv`` and ``loss_by_log_snr.csv`` hold every number in any case; a logger shows the same elsewhere, and a
training never depends on it. What can't work is refused before the first step, by ``ConfigError``: a package that is
not installed, a login that is not there. What fails later - a full disk, a lost network - is warned of once, and the
training goes on. No logger draws random numbers, asks a question, or reads anything but what it is given.

A resumed training passes the step it goes on from, and the id that ``start`` returned: what an interrupted run had
logged beyond that step is not shown twice.
"""

import json
import logging
import os
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.build import ConfigError

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")
Bin = tuple[float, float, float, int]
"""Low and high end in log-SNR, the mean, and how many it is of."""


@dataclass
class Logger(ABC):
    """What a training tells; after ``start`` no call raises but for wrong arguments."""

    _warned: bool = field(default=False, init=False, repr=False)

    @abstractmethod
    def start(self, folder: Path, config: dict[str, Any], step: int = 0, run_id: str | None = None) -> str | None:
        """Begin, or go on after ``step`` steps of the run ``run_id``.

        Parameters
        ----------
        folder: of the run; files go into a folder of their own in it. config: plain values, to be read by people.

        Returns the id to go on with, None where none is needed. Raises ``ConfigError`` or ``OSError`` where it can't.
        """

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, after ``step`` steps."""
        self._try(lambda: self._scalars(step, values))

    def bins(self, step: int, name: str, rows: Iterable[Bin]) -> None:
        """A number for each bin of log-SNR, in order of the bins; those that hold nothing are left out."""
        named = ((f"{name}/{i:02d}_{low:.1f}_to_{high:.1f}", mean, n) for i, (low, high, mean, n) in enumerate(rows))
        self.scalars(step, {title: mean for title, mean, count in named if count})

    def images(self, step: int, name: str, grid: Tensor) -> None:
        """A picture, uint8 ``(H, W, 1 or 3)``. Raises ``ValueError`` for another type or shape."""
        if grid.dtype != torch.uint8 or grid.ndim != 3 or grid.shape[2] not in (1, 3):
            raise ValueError(f"{name}: expected uint8 (H, W, 1 or 3), found {grid.dtype} {tuple(grid.shape)}")
        self._try(lambda: self._image(step, name, grid.cpu()))

    def flush(self) -> None:
        """Write what is still on its way, as before a checkpoint."""
        self._try(self._flush)

    def close(self) -> None:
        """Write all that is left; nothing can be logged after it."""
        self._try(self._close)

    @abstractmethod
    def _scalars(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def _image(self, step: int, name: str, grid: Tensor) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of another's library: whatever it is, the training is worth more
            if not self._warned:
                found = f"{type(error).__name__}: {error}"
                log.warning("%s failed (%s); training goes on, metrics.csv has all", type(self).__name__, found)
            self._warned = True


@dataclass
class NoLogger(Logger):
    """Nothing beyond the run's own files."""

    def start(self, folder: Path, config: dict[str, Any], step: int = 0, run_id: str | None = None) -> None:
        """Nothing to begin."""

    def _scalars(self, step: int, values: dict[str, float]) -> None: ...

    def _image(self, step: int, name: str, grid: Tensor) -> None: ...

    def _flush(self) -> None: ...

    def _close(self) -> None: ...


@dataclass
class TensorBoard(Logger):
    """Event files in the run's folder ``tensorboard``; ``tensorboard --logdir`` shows them, for many runs at once.

    Raises ``ConfigError`` where the package is not installed.
    """

    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self):
        _ = self._type

    def start(self, folder: Path, config: dict[str, Any], step: int = 0, run_id: str | None = None) -> None:
        # Readers drop what an earlier run of this folder had logged from the step to purge on.
        self._writer = self._type(str(folder / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("configuration", f"```\n{json.dumps(config, indent=2)}\n```", step)

    @property
    def _type(self) -> Any:
        with _needed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _image(self, step: int, name: str, grid: Tensor) -> None:
        self._writer.add_image(name, grid, step, dataformats="HWC")

    def _flush(self) -> None:
        self._writer.flush()

    def _close(self) -> None:
        self._writer.close()


@dataclass
class WandB(Logger):
    """A run of Weights & Biases. Raises ``ConfigError`` for a bad mode, or where the package is not installed.

    Parameters
    ----------
    project, entity: where the run belongs; entity None for your own.
    mode: "offline" - into the run's folder ``wandb``, for ``wandb sync`` to send; "online"; "disabled".
    """

    project: str = "score-sde"
    entity: str | None = None
    mode: str = "offline"
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"logger.mode must be one of {', '.join(MODES)}, found {self.mode!r}")
        _ = self._package

    def start(self, folder: Path, config: dict[str, Any], step: int = 0, run_id: str | None = None) -> str:
        run_id = run_id or uuid.uuid4().hex[:8]
        settings = self._package.Settings(console="off")  # the terminal's lines are in run.log
        try:
            with _without_questions():
                self._run = self._package.init(**self._where(folder, run_id), config=config, settings=settings)
        except Exception as error:  # no login, no network, an unknown entity: none of its types is of all versions
            cure = "use logger.mode=offline, or log in once by `wandb login`"
            raise ConfigError(f"logger: wandb can't start ({type(error).__name__}: {error}); {cure}") from error
        return run_id

    @property
    def _package(self) -> Any:
        with _needed("wandb"):
            import wandb
        return wandb

    def _where(self, folder: Path, run_id: str) -> dict[str, Any]:
        # Only a server knows what a run had logged, and takes no step twice.
        resume = {"resume": "allow"} if self.mode == "online" else {}
        place = {"project": self.project, "entity": self.entity, "mode": self.mode, "dir": str(folder)}
        return place | {"id": run_id, "name": folder.name} | resume

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def _image(self, step: int, name: str, grid: Tensor) -> None:
        self._run.log({name: self._package.Image(grid.numpy())}, step=step)

    def _flush(self) -> None: ...

    def _close(self) -> None:
        self._run.finish()


@contextmanager
def _needed(package: str) -> Iterator[None]:
    """What to say where a package that this needs is missing, or can't be imported."""
    try:
        yield
    except ImportError as error:
        cure = f'pip install "unified-score-sde[{package}]", or use logger=none'
        raise ConfigError(f"logger={package} needs the package {package} ({error}); {cure}") from error


@contextmanager
def _without_questions() -> Iterator[None]:
    """No terminal to read from: who would ask for a login fails instead of waiting for an answer."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
