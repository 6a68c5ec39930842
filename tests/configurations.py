"""Configurations as the command line composes them."""

from copy import deepcopy
from functools import lru_cache

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from experiments import schema
from experiments.callbacks import RefuseTakenFolders


def configuration(*overrides: str) -> DictConfig:
    """What ``score-sde`` makes of the overrides; each caller's own."""
    return deepcopy(_composed(overrides))


def before_a_run(folder, resume: str | None = None) -> None:
    """What happens on the command line before Hydra writes anything into the folder."""
    config = configuration()
    OmegaConf.set_struct(config, False)
    RefuseTakenFolders().on_run_start(
        OmegaConf.merge(config, {"resume": resume, "hydra": {"run": {"dir": str(folder)}}})
    )


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))
