"""What is to be modelled: data, their map to continuous x, and the score model that fits both."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.baselines import histogram_log_marginals
from experiments.build import ConfigError, build
from experiments.data import Data
from experiments.dequantization import Uniform
from models import EDMRow, LearnedVariance, LevelHead, ScoreNetwork
from models.parametrization import ROWS, Parametrization
from models.share import Source

TRAINED_ON: dict[str, Callable[[Uniform, Tensor, Source], Tensor]] = {
    "uniform": Uniform.dequantize,
    "centres": lambda bins, k, generator: bins.centres(k),
}
"""How levels become the x that a model is trained on, by name."""
_ALLOWED = {"parametrization": ("experiments.problem.",), "net": ("models.",), "sde": ("sde.",)}


@dataclass(frozen=True, eq=False)
class Problem:
    """Data with the convention in which training, sampling and likelihood all see them.

    dequantizer: the bins of discrete data. trained_on: what is made of them for training, "uniform" or "centres".
    Both are None for continuous data.
    """

    data: Data
    dequantizer: Uniform | None
    trained_on: str | None

    @classmethod
    def of(cls, data: Data, dequantization: str = "uniform") -> "Problem":
        """Discrete data are mapped onto [-1, 1], uniformly or to their bins' centres; continuous ones stay as they are.

        Raises ``ConfigError`` for another name, and for centres of continuous data.
        """
        if dequantization not in TRAINED_ON:
            raise ConfigError(f"dequantization must be one of {', '.join(TRAINED_ON)}, found {dequantization!r}")
        if data.levels:
            return cls(data, Uniform(data.levels), dequantization)
        if dequantization != Uniform.trained_on:
            raise ConfigError(
                f"dequantization={dequantization} needs data of known levels; {data.name} are continuous: "
                f"use dequantization={Uniform.trained_on}"
            )
        return cls(data, None, None)

    @property
    def dimensions(self) -> int:
        """Values in one sample."""
        return math.prod(self.data.shape)

    def x(self, values: Tensor, generator: Source = None) -> Tensor:
        """Continuous x of data values as training sees them: of discrete ones with fresh noise, or their centres."""
        return TRAINED_ON[self.trained_on](self.dequantizer, values, generator) if self.dequantizer else values

    @property
    def noise_width(self) -> float | None:
        """The width of the uniform noise in x, None where there is none."""
        return self.dequantizer.bin_width if self.trained_on == Uniform.trained_on else None

    def convention(self) -> dict[str, Any]:
        """What a checkpoint must share with the data that it is evaluated on."""
        range_ = [self.dequantizer.low, self.dequantizer.high] if self.dequantizer else None
        data = {"name": self.data.name, "shape": list(self.data.shape), "levels": self.data.levels}
        found = data | {"range": range_, "dequantization": self.trained_on}
        return found | ({"standardization": self.data.standardization} if self.data.standardization else {})


def load_problem(config: DictConfig) -> Problem:
    """The data set that the configuration names, in its convention."""
    return Problem.of(build(config.data, where="data"), config.dequantization)


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


def level_head(
    shape: tuple[int, ...], levels: int | None, train: Tensor | None = None, dequantization: str | None = None
) -> LevelHead:
    """The level head of data with known levels; its marginals from ``train``, or to be loaded from a checkpoint."""
    if not levels:
        raise ConfigError(
            f"parametrization=levels needs data of known levels; these are continuous: use one of {', '.join(ROWS)}"
        )
    if dequantization not in (None, Uniform.trained_on):
        raise ConfigError(
            f"parametrization=levels is the score of uniform bins, found dequantization={dequantization}: use "
            f"dequantization={Uniform.trained_on}, or parametrization=v"
        )
    marginals = histogram_log_marginals(train, levels) if train is not None else torch.zeros(levels, *shape)
    return LevelHead(marginals)


def row(
    name: str,
    shape: tuple[int, ...],
    levels: int | None,
    train: Tensor | None = None,
    dequantization: str | None = None,
) -> Parametrization:
    """A parametrization by a row, by its name; the data play no part."""
    return ROWS[name]()


def learned_variance(
    name: str,
    shape: tuple[int, ...],
    levels: int | None,
    train: Tensor | None = None,
    dequantization: str | None = None,
) -> LearnedVariance:
    """A row by its name, and the variance of a chain's steps back."""
    return LearnedVariance(ROWS[name]())


def edm_row(
    data_std: float,
    shape: tuple[int, ...],
    levels: int | None,
    train: Tensor | None = None,
    dequantization: str | None = None,
) -> EDMRow:
    """EDM's preconditioning for data of the standard deviation ``data_std``."""
    return EDMRow(data_std)


def build_model(config: DictConfig | dict, convention: dict[str, Any], train: Tensor | None = None) -> ScoreNetwork:
    """The score network of a configuration's ``sde``, ``net``, ``parametrization`` and ``label`` for a convention."""
    config = OmegaConf.create(config) if isinstance(config, dict) else config

    def part(place: str, **more: Any) -> Any:
        return build(config[place], where=place, allowed=_ALLOWED[place], **more)

    return assemble(part, config.get("label", "log_snr"), convention, train)


def assemble(
    part: Callable[..., Any], label: str, convention: dict[str, Any], train: Tensor | None = None
) -> ScoreNetwork:
    """The score network of the parts that ``part(place, **more)`` makes, wherever it has their descriptions from."""
    shape, levels = tuple(convention["shape"]), convention["levels"]
    dequantization = convention.get("dequantization")
    head = part("parametrization", shape=shape, levels=levels, train=train, dequantization=dequantization)
    observed = convention.get("observation")
    told = {} if observed is None else {"observation": tuple(observed["shape"])}
    net = part("net", shape=shape, outputs=head.outputs, **told)
    return ScoreNetwork(net, part("sde"), head, label)
