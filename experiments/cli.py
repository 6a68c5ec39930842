"""The console script ``score-sde``.

Nothing heavy is imported here: ``--help`` and tab completion answer at once.
"""

import logging
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments import schema

# Threads that soon sleep while they wait: ones that spin on, the default of libgomp, make a run a hundred times slower
# as soon as another job shares the processor. On an idle machine it costs about 5 %.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

log, failure = logging.getLogger(__name__), logging.getLogger("experiments.failure")
schema.register()


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Run one job: a task in a folder of its own, whose end is recorded whatever happens."""
    from experiments.build import build, trust
    from experiments.run import Run, RunFolderTaken

    hydra_config = HydraConfig.get()
    try:
        run = Run(hydra_config.runtime.output_dir, hydra_config.runtime.choices.task, config.resume == "auto")
    except (RunFolderTaken, OSError) as error:
        return _give_up(error)
    try:
        trust(config.plugins, sys.argv[1:])
        build(config.task, where="task")(config, run)
        run.end("done")
    except KeyboardInterrupt:
        run.end("interrupted")
        cure = f"; the same command line with resume=auto hydra.run.dir={run.folder} goes on from there"
        log.error("interrupted; what was finished is in %s%s", run.folder, cure * run.partial.is_file())
        sys.exit(130)
    except Exception as error:
        run.end("failed", f"{type(error).__name__}: {error}")
        failure.exception("the job failed")  # into the job's own log file; see conf/config.yaml
        _give_up(error)


def _give_up(error: Exception) -> None:
    """In a sweep the others go on, and Hydra reports this error at the end; a single run ends here, in one line."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        log.error("job failed: %s", error)
        raise error
    if isinstance(error, ValueError):  # what the user can mend: bad settings, files, data
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
