"""One job of a sweep: it claims its cell, works there as a run alone would, and never ends the sweep.

Whatever fails is recorded in the cell's folder, where the sweep looks for it. A job gives back what a search wants to
know (``optimize``), or None.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import sweep
from experiments.cells import cell_hash, claim, invocation, state_of
from experiments.run import Run, RunFolderTaken, read_json
from experiments.signals import handled

log = logging.getLogger(__name__)


def work(config: DictConfig, about: Any, job: Callable[[DictConfig, Run], None]) -> float | None:
    """Do ``job(config, run)`` where there is something to do; ``about``: Hydra's part of the configuration."""
    from experiments.fresh import fresh

    folder = Path(about.runtime.output_dir)
    try:
        run = claim(folder, about.runtime.choices.task, cell_hash(config), invocation())
    except (RunFolderTaken, OSError) as error:
        log.error("job failed: %s", error)
        return None
    if run is None:
        print(f"{folder}: {state_of(folder)}; there is nothing to do", flush=True)
    else:
        with handled(), fresh(config.seed):
            job(config, run)
    return _value(config, folder)


def check(config: DictConfig, run: Run) -> None:
    """What a single run is checked for before its folder is made; settings that are each job's own are put in."""
    from experiments.gpus import device_for
    from experiments.preflight import preflight

    preflight(config, sweep.command_line())
    about = HydraConfig.get()
    OmegaConf.set_readonly(config, False)
    with open_dict(config):
        config.device = device_for(config.device, Path(about.sweep.dir), about.job.num)
        if run.partial.is_file():
            config.resume = "auto"
        elif config.resume == "auto":  # each cell goes on by itself
            config.resume = None


def note_value(config: DictConfig, run: Run) -> None:
    """Note the number that a search wants; raises ``ValueError`` where the task has not found it."""
    if config.optimize is not None:
        run.note(optimized={"path": config.optimize, "value": sweep.objective(run.summary, config.optimize)})


def _value(config: DictConfig, folder: Path) -> float | None:
    if config.optimize is None or state_of(folder) != sweep.DONE:
        return None
    try:
        return sweep.objective(read_json(folder / "summary.json"), config.optimize)
    except ValueError as error:  # it was done without
        log.error("%s: %s", folder, error)
        return None
