"""What a model is made of, as data: names from closed tables and plain parameters, never code to import.

A configuration says ``_target_: sde.VP``, which names code, and is trusted as the person who wrote it. A stored
description says ``{"name": "VP", "parameters": {"beta_min": 0.1, ...}}``; it may come from anyone, hence the name is
looked up in the table of its place, so that nothing else can stand there, and nothing is imported. The class of a
person's own is stored as "my_module.MyClass" and is found only where the command line trusts ``my_module``.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

import models
import sde
from experiments import build, problem
from experiments.archive import shown
from experiments.build import ConfigError
from models import ScoreNetwork

_BASES = {"sde": sde.GaussianSDE, "net": nn.Module, "parametrization": models.Parametrization}
PLACES = tuple(_BASES)
_LARGEST = 1 << 24  # a stored integer beyond this is no size of anything


def _exported(package: Any, fits: Callable[[Any], bool]) -> dict[str, Callable]:
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: part for name, part in found.items() if inspect.isclass(part) and fits(part)}


def _is_process(kind: type) -> bool:
    return issubclass(kind, sde.GaussianSDE) and not inspect.isabstract(kind)


def _is_net(kind: type) -> bool:
    """A network is a module made for a shape and a number of outputs."""
    return issubclass(kind, nn.Module) and {"shape", "outputs"} <= inspect.signature(kind).parameters.keys()


TABLES: dict[str, dict[str, Callable]] = {
    "sde": _exported(sde, _is_process) | {"exploding": sde.exploding, "preserving": sde.preserving},
    "net": _exported(models, _is_net),
    "parametrization": {
        part.__name__: part for part in (problem.row, problem.level_head, problem.learned_variance, problem.edm_row)
    },
}
"""What may stand in each place, by name."""

_TARGETS = {
    place: {f"{package}.{name}": name for name in TABLES[place]}
    for place, package in zip(PLACES, ("sde", "models", "experiments.problem"), strict=True)
}


def describe_model(config: DictConfig) -> dict[str, Any]:
    """The components to store of a trusted configuration: its parts and its label. Raises ``ConfigError``."""
    return {place: describe(config[place], place) for place in PLACES} | {"label": config.label}


def describe(node: DictConfig | dict, place: str) -> dict[str, Any]:
    """The description to store of what a node of a trusted configuration builds. Raises ``ConfigError``.

    ``place``: "sde", "net" or "parametrization".
    """
    node = OmegaConf.create(node) if isinstance(node, dict) else node
    values = OmegaConf.to_container(node, resolve=True)
    target = values.pop("_target_", None)
    if odd := [name for name in values if str(name).startswith("_")]:
        raise ConfigError(f"{place}.{odd[0]}: a checkpoint can't hold it; give _target_ and plain parameters only")
    parameters = {name: _stored(node[name], values[name], place) for name in values}
    return {"name": _name_of(target, place), "parameters": parameters}


def _stored(node: Any, value: Any, place: str) -> Any:
    if isinstance(node, DictConfig):
        return describe(node, place)
    return [_stored(child, value[i], place) for i, child in enumerate(node)] if isinstance(node, ListConfig) else value


def _name_of(target: Any, place: str) -> str:
    if isinstance(target, str) and build.is_plugin(target):
        return target
    own = isinstance(target, str) and target.startswith(build.ALLOWED)
    part = build.locate(place, target) if own else None
    for name, known in TABLES[place].items():
        if part is known:
            return name
    known = ", ".join(TABLES[place])
    cure = "for a class of your own add plugins=[ITS_MODULE] to the command line"
    raise ConfigError(f"{place}._target_: a checkpoint can hold {known}, found {target!r}; {cure}")


def migrate(stored: dict[str, Any]) -> dict[str, Any]:
    """The descriptions for the ``_target_`` texts of schema 1: by a table of texts, nothing is imported."""
    # Those that don't say so are of the first label that there was.
    return {place: _migrated(stored[place], place) for place in PLACES} | {"label": stored.get("label", "log_snr")}


def _migrated(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_migrated(child, place) for child in value]
    if not isinstance(value, dict):
        return value
    parameters = {name: _migrated(child, place) for name, child in value.items() if name != "_target_"}
    target = value.get("_target_")
    return {"name": _TARGETS[place].get(target, target) if isinstance(target, str) else target} | {
        "parameters": parameters
    }


def construct(description: Any, place: str, **more: Any) -> Any:
    """What a stored description describes; ``more`` are further keyword arguments of it. Raises ``ConfigError``."""
    if not isinstance(description, dict) or description.keys() != {"name", "parameters"}:
        raise ConfigError(f"{place}: expected a name and parameters, found {shown(description)}")
    name, parameters = description["name"], description["parameters"]
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise ConfigError(f"{place}: expected a name and a table of parameters, found {shown(description)}")
    part = TABLES[place].get(name) or _plugin(name, place)
    build.check_parameters(place, name, part, parameters)
    return part(**{key: _value(value, place, key) for key, value in parameters.items()} | more)


def _value(value: Any, place: str, key: str) -> Any:
    if isinstance(value, dict):
        return construct(value, place)
    if isinstance(value, list):
        return [_value(child, place, key) for child in value]
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{place}.{key}: expected at most {_LARGEST:,}, found {shown(value)}")
    return value


def _plugin(name: str, place: str) -> Callable:
    """A class or function that a module which the command line trusts defines itself."""
    module = name.rpartition(".")[0]
    if not re.fullmatch(r"[A-Za-z_][\w.]*\.\w+", name) or module.split(".")[0] in build.OWN:
        raise ConfigError(f"{place}: there is no {shown(name)}; known are {', '.join(TABLES[place])}")
    if not build.is_plugin(name):
        cure = f"if it is your own and you trust it, add plugins=[{module}] to the command line"
        raise ConfigError(f"{place}: {shown(name)} is not of this project; {cure}")
    part = getattr(sys.modules.get(module), name.rpartition(".")[2], None)
    if not callable(part) or not build.is_plugin(f"{getattr(part, '__module__', None)}."):
        raise ConfigError(f"{place}: {module} defines no {shown(name)}")
    return part


def build_stored(components: dict[str, Any], convention: dict[str, Any], weights: dict[str, Tensor]) -> ScoreNetwork:
    """The score network of stored descriptions for a convention, with random weights in the place of those stored.

    Raises ``ConfigError``, also for descriptions of a network that is much larger than its ``weights``.
    """
    if not isinstance(components, dict) or components.keys() != {*PLACES, "label"}:
        raise ConfigError(f"components: expected {', '.join(PLACES)} and label, found {shown(components)}")

    def part(place: str, **more: Any) -> Any:
        made = construct(components[place], place, **more)
        if not isinstance(made, _BASES[place]):
            raise ConfigError(f"{place}: expected a {_BASES[place].__name__}, found a {type(made).__name__}")
        return made

    with _no_larger_than(weights):
        return problem.assemble(part, components["label"], convention)


@contextmanager
def _no_larger_than(weights: dict[str, Tensor]) -> Iterator[None]:
    """Within, modules are refused as soon as they have far more parameters and buffers than there are weights."""
    # Twice, for what a constructor makes again, and some more for buffers that no checkpoint holds.
    numbers = 2 * sum(value.numel() for value in weights.values()) + (1 << 22)
    count = 2 * len(weights) + 64

    def register(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal numbers, count
        numbers, count = numbers - (0 if value is None else value.numel()), count - 1
        if numbers < 0 or count < 0:
            raise ConfigError("they describe a network much larger than the weights that are stored for it")

    hooks = (
        nn.modules.module.register_module_parameter_registration_hook(register),
        nn.modules.module.register_module_buffer_registration_hook(register),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
