"""The console script ``score-sde``.

Nothing heavy is imported here: ``--help`` and tab completion answer at once.
"""

import logging
import math
import os
import sys
import tempfile
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments import cells, schema, sweep

if TYPE_CHECKING:
    from experiments.run import Run

# Threads that soon sleep while they wait: ones that spin on, the default of libgomp, make a run a hundred times slower
# as soon as another job shares the processor. On an idle machine it costs about 5 %.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

_begun: list[bool] = []  # whether a job has begun

log, failure = logging.getLogger(__name__), logging.getLogger("experiments.failure")
schema.register()
cells.register()


def main() -> None:
    """One job, or a sweep of them; of several processes that were started together, the first one speaks and writes."""
    if {"RANK", "SLURM_PROCID"} & os.environ.keys():  # else nothing so heavy need be imported yet
        from experiments.processes import launched

        try:
            first = launched().processes.is_first
        except ValueError as error:
            return _give_up(error)
        if not first:
            return _beside()
    code = _rounds()
    if code == 1 and not _begun:  # Hydra refused the command line
        suggest(sys.argv[1:])
        code = 2
    if code:
        sys.exit(code)


def _rounds() -> int:
    """Hydra's work, once; for a sweep whose processes broke, as often as it gets on. Returns the exit code."""
    code, left = _round(), math.inf
    while (now := sweep.current()) is not None:
        if not (rows := now.rows()) and code == 1:
            sweep.drop()
            return code
        _begun.append(True)
        left = sweep.again(code, left)
        if left is None or not rows:
            return sweep.finish(code)
        log.warning("the launcher gave up; %d cells were not begun, and are now", left)
        sys.argv.append(f"hydra.sweep.dir={quoted(str(now.folder))}")
        code = _round()
    return code


def _round() -> int:
    try:
        _hydra_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt as interrupt:
        if sweep.current() is None:
            raise
        return getattr(interrupt, "exit_code", 130)
    return 0


def quoted(text: str) -> str:
    """A value for Hydra's command line, whatever signs it has."""
    return "'" + text.replace("'", "\\'") + "'"


_EXTRAS = {
    "hydra/launcher=joblib": ("sweep", "hydra_joblib_launcher"),
    "hydra/launcher=submitit": ("slurm", "hydra_submitit_launcher"),
    "hparams_search=": ("hpo", "hydra_optuna_sweeper"),
}


def suggest(overrides: list[str]) -> None:
    """Say which extra is missing, or what keys there are that are like a misspelt one."""
    for beginning, (extra, module) in _EXTRAS.items():
        if any(one.startswith(beginning) for one in overrides) and not _installed(module):
            print(f'{beginning}... needs an extra: pip install "unified-score-sde[{extra}]"', file=sys.stderr)
            return
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    groups = [one for one in overrides if "." not in one.partition("=")[0] and not one.startswith(("+", "~", "-"))]
    try:
        with initialize_config_module("conf", version_base="1.3"):
            known = _keys(OmegaConf.to_container(compose("config", overrides=groups)))
    except HydraException:  # a choice that there is not: Hydra has listed the others
        return
    for key in (one.partition("=")[0] for one in overrides if not one.startswith(("+", "~", "-", "hydra."))):
        near = get_close_matches(key, known, n=2, cutoff=0.75) if key not in known else []
        if near:
            print(f"{key}: do you mean {' or '.join(near)}?", file=sys.stderr)


def _installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def _keys(tree: dict, above: str = "") -> list[str]:
    """The dotted names of nested settings, those of groups too."""
    inner = [key for name, value in tree.items() if isinstance(value, dict) for key in _keys(value, f"{above}{name}.")]
    return [f"{above}{name}" for name in tree] + inner


def _beside() -> None:
    """One of the other processes: it does the same work, and what it would write goes into a folder of no one's."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        sys.argv += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
        _hydra_main()


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    """Run one job: a task in a folder of its own, whose end is recorded whatever happens."""
    from experiments.run import Run, RunFolderTaken
    from experiments.signals import handled

    _begun.append(True)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        from experiments.jobs import work

        return work(config, hydra_config, _job)
    try:
        run = Run(hydra_config.runtime.output_dir, hydra_config.runtime.choices.task, config.resume == "auto")
    except (RunFolderTaken, OSError) as error:
        return _give_up(error)
    with handled():
        _job(config, run)


def _job(config: DictConfig, run: "Run") -> None:
    """The task, and how it ended."""
    from experiments.build import build, trust
    from experiments.jobs import check, note_value
    from experiments.processes import joined

    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check(config, run) if sweeping else trust(config.plugins, sys.argv[1:])
        with joined(config.device):
            build(config.task, where="task")(config, run)
        note_value(config, run)
        run.end("done")
    except KeyboardInterrupt as interrupt:
        run.end("interrupted")
        cure = f"; the same command line with resume=auto hydra.run.dir={run.folder} goes on from there"
        log.error("interrupted; what was finished is in %s%s", run.folder, cure * (run.can_go_on and not sweeping))
        sys.exit(getattr(interrupt, "exit_code", 130))
    except Exception as error:
        run.end("failed", f"{type(error).__name__}: {error}")
        failure.exception("the job failed")  # into the job's own log file; see conf/config.yaml
        _give_up(error)


def _give_up(error: Exception) -> None:
    """In a sweep the others go on, and its table tells the reason; a single run ends here, in one line."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        log.error("job failed: %s", error)
        return
    if isinstance(error, ValueError):  # what the user can mend: bad settings, files, data
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    # By its name, which the processes of a launcher can import.
    from experiments.cli import main as _named

    _named()
