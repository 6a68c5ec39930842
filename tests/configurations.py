"""Configurations as the command line composes them."""

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from experiments import schema


def configuration(*overrides: str) -> DictConfig:
    """What ``score-sde`` makes of the overrides."""
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))
