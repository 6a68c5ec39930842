"""Configurations as the command line composes them."""

from copy import deepcopy
from functools import lru_cache

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from experiments import schema


def configuration(*overrides: str) -> DictConfig:
    """What ``score-sde`` makes of the overrides; each caller's own."""
    return deepcopy(_composed(overrides))


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))
