"""Dequantizers by name: for a process, whose t_min decides some of them, and for the bins of a data convention."""

from collections.abc import Callable
from typing import Any

from experiments.build import ConfigError
from experiments.centres import DiscreteDecoder, TruncatedNormal
from experiments.dequantization import Dequantizer, Uniform
from sde import GaussianSDE

Make = Callable[[GaussianSDE, int, float, float], Dequantizer]


def uniform(sde: GaussianSDE, levels: int, low: float, high: float) -> Dequantizer:
    """Uniform noise in the bins; the process plays no part."""
    return Uniform(levels, low, high)


def truncated_normal(sde: GaussianSDE, levels: int, low: float, high: float) -> Dequantizer:
    """The process's own noise at t_min about the centres, cut off at the bins' edges."""
    return TruncatedNormal.of(sde, levels, low, high)


def discrete_decoder(sde: GaussianSDE, levels: int, low: float, high: float) -> Dequantizer:
    """The process's own noise at t_min about the centres, and the probability of the level given that."""
    return DiscreteDecoder.of(sde, levels, low, high)


OF_TRAINING: dict[str, Make] = {"uniform": uniform, "centres": truncated_normal}
"""The one to take unless another is asked for, by what the model was trained on."""


def of_convention(convention: dict[str, Any], sde: GaussianSDE) -> Dequantizer | None:
    """The one to take for a data convention, for a model under ``sde``; None for continuous data."""
    if not convention["levels"]:
        return None
    return OF_TRAINING[convention.get("dequantization", "uniform")](sde, convention["levels"], *convention["range"])


def check_convention(convention: dict[str, Any], dequantizer: Dequantizer, shape: tuple[int, ...]) -> None:
    """Refuse data and a dequantizer that a model of this convention was not trained on, with ``ConfigError``."""
    trained = {name: convention.get(name) for name in ("shape", "levels", "range")}
    trained["dequantization"] = convention.get("dequantization", "uniform")
    here = {"shape": list(shape), "levels": dequantizer.levels, "range": [dequantizer.low, dequantizer.high]}
    here["dequantization"] = dequantizer.trained_on
    wrong = [f"{name} {trained[name]}, and not {here[name]}" for name in here if trained[name] != here[name]]
    if wrong:
        raise ConfigError(
            f"{type(dequantizer).__name__}: the model was trained on data of {'; '.join(wrong)}: bits/dim hold for the "
            "convention of the training alone; choose its data and a dequantizer for it"
        )
