"""What is to be modelled: data, their map to continuous x, and the score model that fits both."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.baselines import histogram_log_marginals
from experiments.build import ConfigError, build
from experiments.data import Data
from experiments.dequantization import Uniform
from models import EDMRow, LevelHead, ScoreNetwork
from models.parametrization import ROWS, Parametrization


@dataclass(frozen=True, eq=False)
class Problem:
    """Data with the convention in which training, sampling and likelihood all see them."""

    data: Data
    dequantizer: Uniform | None

    @classmethod
    def of(cls, data: Data) -> "Problem":
        """Discrete data are dequantized uniformly onto [-1, 1]; continuous data are taken as they are."""
        return cls(data, Uniform(data.levels) if data.levels else None)

    @property
    def dimensions(self) -> int:
        """Values in one sample."""
        return math.prod(self.data.shape)

    def x(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Continuous x of data values, with fresh dequantization noise for discrete ones."""
        return self.dequantizer.dequantize(values, generator) if self.dequantizer else values

    def convention(self) -> dict[str, Any]:
        """What a checkpoint must share with the data that it is evaluated on."""
        range_ = [self.dequantizer.low, self.dequantizer.high] if self.dequantizer else None
        return {"name": self.data.name, "shape": list(self.data.shape), "levels": self.data.levels, "range": range_}


def load_problem(config: DictConfig) -> Problem:
    """The data set that the configuration names."""
    return Problem.of(build(config.data, where="data"))


def device_of(name: str) -> torch.device:
    """The device by its name; "auto" is the first GPU, or the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={name}: {str(error).splitlines()[0]}; use device=auto, cpu, cuda or cuda:N"
        ) from None
    return torch.device(name)


def level_head(shape: tuple[int, ...], levels: int | None, train: Tensor | None = None) -> LevelHead:
    """The level head of data with known levels; its marginals from ``train``, or to be loaded from a checkpoint."""
    if not levels:
        raise ConfigError(
            f"parametrization=levels needs data of known levels; these are continuous: use one of {', '.join(ROWS)}"
        )
    marginals = histogram_log_marginals(train, levels) if train is not None else torch.zeros(levels, *shape)
    return LevelHead(marginals)


def row(name: str, shape: tuple[int, ...], levels: int | None, train: Tensor | None = None) -> Parametrization:
    """A parametrization by a row, by its name; the data play no part."""
    return ROWS[name]()


def edm_row(data_std: float, shape: tuple[int, ...], levels: int | None, train: Tensor | None = None) -> EDMRow:
    """EDM's preconditioning for data of the standard deviation ``data_std``."""
    return EDMRow(data_std)


def build_model(config: DictConfig | dict, convention: dict[str, Any], train: Tensor | None = None) -> ScoreNetwork:
    """The score network of a configuration's ``sde``, ``net`` and ``parametrization`` for data of a convention."""
    config = OmegaConf.create(config) if isinstance(config, dict) else config
    shape, levels = tuple(convention["shape"]), convention["levels"]
    head = build(
        config.parametrization,
        where="parametrization",
        allowed=("experiments.problem.",),
        shape=shape,
        levels=levels,
        train=train,
    )
    net = build(config.net, where="net", allowed=("models.",), shape=shape, outputs=head.outputs)
    return ScoreNetwork(net, build(config.sde, where="sde", allowed=("sde.",)), head)
