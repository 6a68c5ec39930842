"""All that can be wrong with a configuration itself, found before a folder is made or data are read, and at once."""

from collections.abc import Iterable
from functools import partial

from omegaconf import DictConfig

from experiments import comparison, likelihood_tasks, posterior_tasks, training
from experiments.build import NOT_NEGATIVE, POSITIVE, Limit, build, require_all, require_limits, trust
from experiments.problem import TRAINED_ON
from experiments.records import build_logger
from models.labels import LABELS

_LIMITS = {
    "seed": NOT_NEGATIVE,
    "dequantization": Limit(lambda value: value in TRAINED_ON, f"be one of {', '.join(TRAINED_ON)}"),
    "label": Limit(lambda value: value in LABELS, f"be one of {', '.join(LABELS)}"),
}
_INTERPOLATE = {"pairs": POSITIVE, "points": Limit(lambda value: value >= 2, "be at least 2")}


def preflight(config: DictConfig, command_line: Iterable[str]) -> None:
    """Raise one ``ConfigError`` for every setting that can't work whatever the data are, each with its key."""
    trust(config.plugins, command_line)
    nodes = {"sde": config.sde, "under": config.under, "solver": config.solver, "objective": config.objective}
    parts = [partial(build, node, where=where) for where, node in nodes.items() if node is not None]
    require_all(
        [
            partial(require_limits, "", config, _LIMITS),
            partial(training.check_settings, config.train),
            partial(likelihood_tasks.check_settings, config.likelihood),
            partial(comparison.check, config.compare),
            partial(require_limits, "interpolate.", config.interpolate, _INTERPOLATE),
            partial(posterior_tasks.check_settings, config.posterior),
            partial(build_logger, config),
            *parts,
            *(partial(comparison.build_solver, config, name) for name in config.compare.names),
        ]
    )
