r"""Observations in training: with each example x_0 goes y = A x_0 + s_y n, and the network learns p(x_0 | y) itself.

``observe`` names the operator A, ``observe_noise_std`` s_y in the units of x, [-1, 1] for data of known levels; the
noise n is new for every batch, from the generator of the training. The network sees y beside x_t (``models.observed``).

Such a model answers for the A and s_y of its training and for no others, and nothing in its output would tell. So its
checkpoint says which they are, as data that nothing is built from: the operator's name and parameters, to be read by
people, and what A gives for one fixed x in four fixed directions, which almost no other linear operator gives. Whoever
samples it has to say the same A and s_y.
"""

import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.build import NOT_NEGATIVE, ConfigError, build, locate, require_limits, takes
from experiments.problem import Problem
from models import Conditioned, LinearOperator
from models.objective import noise_like
from models.posterior import observation_rows
from models.share import Source
from sde import Around, Noise, Prediction, ScoreModel

OBSERVATION = "observation"
"""What a network is told, what a condition is called, and where a convention says of what kind it is."""

_DIRECTIONS = 4


def operator_of(config: DictConfig, shape: tuple[int, ...]) -> LinearOperator | None:
    """The operator that ``observe`` names, for samples of ``shape``; None for none. Raises ``ConfigError``."""
    if config.observe is None:
        return None
    operator = build(config.observe, where="observe", shape=shape)
    if not isinstance(operator, LinearOperator) or operator.shape != tuple(shape):
        found = getattr(operator, "shape", type(operator).__name__)
        raise ConfigError(
            f"observe: expected a linear operator on data of shape {tuple(shape)}, found {config.observe._target_} of "
            f"{found}: choose another condition@observe="
        )
    return operator


def convention(config: DictConfig, problem: Problem) -> dict[str, Any]:
    """The data's convention, and with ``observe`` what was observed of them: what a checkpoint says of both."""
    operator = operator_of(config, problem.data.shape)
    if operator is None:
        return problem.convention()
    described = {
        "operator": OmegaConf.to_container(config.observe, resolve=True),
        "noise_std": float(config.observe_noise_std),
        "shape": list(operator.observed),
        "response": response(operator),
    }
    described["operator"] = _named(described["operator"])
    return problem.convention() | {OBSERVATION: described}


def _named(node: Any) -> Any:
    """A node as a name and parameters, as checkpoints say it."""
    if isinstance(node, dict):
        parts = {key: _named(value) for key, value in node.items() if key != "_target_"}
        return {"name": node["_target_"], "parameters": parts} if "_target_" in node else parts
    return [_named(child) for child in node] if isinstance(node, list) else node


@torch.no_grad()
def response(operator: LinearOperator) -> list[float]:
    """(A x) v of a fixed x in fixed directions v, all standard normal: other numbers for almost every other A."""
    x = Noise(0).normal((1, *operator.shape), dtype=torch.float64)
    v = Noise(0).normal((_DIRECTIONS, math.prod(operator.observed)), 1, dtype=torch.float64)
    return (v @ operator.double().cpu()(x).flatten()).tolist()


def refuse(config: DictConfig) -> None:
    """Refuse ``observe`` where a model is used without observations: raises ``ConfigError``."""
    if config.observe is not None:
        raise ConfigError(
            "observe= trains a model of x given y, and this task asks for x without y: use task=train, then sample its "
            "checkpoint by a task that observes; or leave observe out"
        )


def refuse_observed(about: dict[str, Any] | None, path: str) -> None:
    """Refuse a checkpoint's model that must be told what its training observed: raises ``ConfigError``."""
    if about is not None:
        raise ConfigError(
            f"checkpoint={path}: its model was trained to be told {told(about)}, and this task asks for x without any: "
            "use a task that observes with guidance=learned, or a checkpoint that was trained without observe="
        )


def check(config: DictConfig, problem: Problem) -> None:
    """Refuse observations that can't be trained on, before a network is built: raises ``ConfigError``."""
    if config.net.get(OBSERVATION) is not None:
        raise ConfigError(
            "net.observation follows from what is observed: leave it out, and say condition@observe=blur or so"
        )
    if config.observe is None:
        return
    require_limits("", config, {"observe_noise_std": NOT_NEGATIVE})
    operator_of(config, problem.data.shape)
    target = config.net._target_
    if not takes(locate("net", target), OBSERVATION):
        raise ConfigError(f"observe: {target} takes no observation= when it is built: use another net=")
    if config.train.watch_every:
        raise ConfigError("train.watch_every looks at samples without an observation: use train.watch_every=0")


class Observing:
    """The observations of a training: ``observing(x, source)`` is what the network is told of clean data ``x``.

    That is "observation", ``(B, *observed)`` in the type of ``x``, with new noise from ``source`` on the device of x;
    or nothing, and no number drawn, without ``observe``.
    """

    def __init__(self, config: DictConfig, problem: Problem):
        operator = operator_of(config, problem.data.shape)
        self.operator, self.noise_std = operator and operator.float(), config.observe_noise_std

    def __call__(self, x: Tensor, source: Source) -> dict[str, Tensor]:
        if self.operator is None:
            return {}
        y = self.operator(x)
        return {OBSERVATION: y + self.noise_std * noise_like(y, source)}


class ObservedModel(Around):
    """A checkpoint's model that must be told an observation, with what its training observed; see ``observed_model``.

    Parameters
    ----------
    about: of its convention: "operator", "noise_std", "shape" and "response".
    """

    def __init__(self, model: ScoreModel, about: dict[str, Any]):
        super().__init__(model.sde)
        self.model, self.about = model, about
        self.predicts_variance, self.classes = model.predicts_variance, model.classes

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if OBSERVATION not in condition:
            raise ConfigError(
                f"the checkpoint's model was trained to be told {told(self.about)}, and knows nothing without: use "
                "guidance=learned, or a checkpoint that was trained without observe="
            )
        return self.model(x, t, **condition)


def observed_model(model: ScoreModel, operator: LinearOperator, observation: Tensor, noise_std: float) -> Conditioned:
    """The posterior of x_0 given y = A x_0 + s_y n as a network learned it: ``model`` told y, one call.

    Parameters
    ----------
    model: an ``ObservedModel``, as ``load_model(session, observed=True)`` gives it.
    operator, noise_std: A and s_y, which must be those of the training.
    observation: y, ``operator.observed``, or ``(N, *operator.observed)``, one for each sample.

    Raises ``ConfigError`` for a model without observations and for another A or s_y than its own.
    """
    if not isinstance(model, ObservedModel):
        raise ConfigError(
            "guidance=learned needs a model that was trained on observations, and this one was not: train one with "
            "task=train condition@observe=blur or so, or use guidance=mmps"
        )
    require_same(model.about, operator, noise_std)
    return Conditioned(model, observation=observation_rows(observation, operator))


def require_same(about: dict[str, Any], operator: LinearOperator, noise_std: float) -> None:
    """Raise ``ConfigError`` unless a training that observed ``about`` observed by this operator and noise level."""
    if tuple(about["shape"]) == operator.observed and len(about["response"]) == _DIRECTIONS:
        there, here = (torch.tensor(one, dtype=torch.float64) for one in (about["response"], response(operator)))
        same = bool((there - here).abs().max() <= 1e-6 * here.abs().max().clamp_min(1))
    else:
        same = False
    if not same or not math.isclose(about["noise_std"], noise_std, rel_tol=1e-6):
        raise ConfigError(
            f"the checkpoint's model was trained to be told {told(about)}, and this run observes by {operator!r} with "
            f"noise of {noise_std:g}: ask for the same, or use guidance=mmps with a model that was trained without"
        )


def told(about: dict[str, Any]) -> str:
    """What a training observed, in words."""
    operator, shape, noise = _call(about["operator"]), tuple(about["shape"]), about["noise_std"]
    return f"observations by {operator} of shape {shape} with noise of {noise:g}"


def _call(node: Any) -> str:
    if not isinstance(node, dict):
        return str(node)
    given = node.get("parameters")
    pairs = given.items() if isinstance(given, dict) else ()
    return f"{node.get('name')}({', '.join(f'{key}={_call(value)}' for key, value in pairs if value is not None)})"


def separated(convention: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The convention of the data alone, and what was observed of them, None for nothing."""
    return {name: value for name, value in convention.items() if name != OBSERVATION}, convention.get(OBSERVATION)
