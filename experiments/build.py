"""From a configuration node to an object: the one place that calls Hydra's ``instantiate``.

A ``_target_`` names code to run. Only this project's own packages are allowed, and the plugins that a person names on
the command line itself, so that a configuration file from elsewhere can't call anything else.
"""

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

OWN = ("sde", "models", "solvers", "experiments")
_TASKS = (
    *("tasks", "likelihood_tasks", "classify_task", "checkpoint_tasks", "figure_tasks", "posterior_tasks"),
    "report_task",
)
_PARTS = (
    *("conditions", "data", "dequantizers", "distances", "features", "known", "loggers", "neighbours", "observing"),
    "problem",
    *_TASKS,
)
ALLOWED = ("sde.", "models.", "solvers.", *(f"experiments.{module}." for module in _PARTS))
_trusted: tuple[str, ...] = ()
_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


class ConfigError(ValueError):
    """A configuration that can't be built: says which key, what was expected, what was found; or several of these."""

    def __init__(self, *problems: str):
        several = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} settings can't work:{several}")
        self.problems = problems


def require_all(checks: Iterable[Callable[[], Any]]) -> None:
    """Make every check, and raise one ``ConfigError`` with what is wrong in any of them."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found += getattr(error, "problems", [str(error)])
    if found:
        raise ConfigError(*dict.fromkeys(found))


class Limit(NamedTuple):
    """What a setting must be: a test of its value, and the words for it."""

    fits: Callable[[Any], bool]
    words: str


POSITIVE = Limit(lambda value: 0 < value < math.inf, "be positive and finite")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < math.inf, "be at least 0 and finite")


def require_limits(where: str, settings: Mapping[str, Any], limits: Mapping[str, Limit]) -> None:
    """Raise ``ConfigError`` with all settings that don't keep to their limits; ``where``: how their keys begin."""
    wrong = {name: limit.words for name, limit in limits.items() if not limit.fits(settings[name])}
    if wrong:
        raise ConfigError(*(f"{where}{name} must {words}, found {settings[name]!r}" for name, words in wrong.items()))


def trust(plugins: Iterable[str], command_line: Iterable[str]) -> None:
    """Let targets name the classes of these packages too, and of none that was trusted before.

    A plugin must be named in a ``plugins=[...]`` of the command line: a configuration file alone can't bring in code.
    With plugins, the current folder becomes the last place that Python looks for modules. Raises ``ConfigError``.
    """
    global _trusted
    _trusted = ()
    said = [argument.partition("=")[2] for argument in command_line if re.match(r"\+*plugins=", argument)]
    allowed = set(re.findall(r"[\w.]+", " ".join(said)))
    for name in plugins:
        if name not in allowed:
            cure = f"if you trust it, say plugins=[{name}] on the command line"
            raise ConfigError(f"plugins: a configuration file names {name!r}, and code needs your word for it; {cure}")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            import_module(name)
        except Exception as error:  # a plugin may raise anything while it is imported
            where = f"looked in {os.getcwd()} and among the installed packages"
            raise ConfigError(
                f"plugins: {name!r} can't be imported ({type(error).__name__}: {error}); {where}"
            ) from error
    _trusted = tuple(f"{name}." for name in plugins)


def build(node: Any, *args: Any, where: str = "", allowed: tuple[str, ...] = ALLOWED, **more: Any) -> Any:
    """The object that ``node`` describes by its ``_target_``; ``more`` are further keyword arguments of it.

    ``where`` is the node's key, for messages; ``allowed`` the prefixes that a target may have. Raises ``ConfigError``
    for another target, an unknown parameter, a value of the wrong type, and whatever value the constructor refuses.
    """
    node = OmegaConf.create(node) if isinstance(node, dict) else node
    for key, part in _targets(node, where):
        _check(key, part, allowed + _trusted)
    try:
        return instantiate(node, *args, **more)
    except InstantiationException as error:
        # Hydra wraps what a constructor says; a person wants the constructor's own words.
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError)):
            raise ConfigError(f"{where}: {cause}" if where else str(cause)) from error
        raise cause or error from error


def is_plugin(target: str) -> bool:
    """Whether a target lies in a module that the command line trusts."""
    return target.startswith(_trusted)


def _targets(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from _targets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, ListConfig):
        for i, child in enumerate(node):
            yield from _targets(child, f"{key}[{i}]")


def _check(key: str, node: DictConfig, allowed: tuple[str, ...]) -> None:
    target = node["_target_"]
    if not isinstance(target, str) or not target.startswith(allowed):
        known = ", ".join(f"{prefix}*" for prefix in allowed)
        cure = "; for a class of your own add plugins=[ITS_MODULE] to the command line"
        raise ConfigError(f"{key}._target_: expected one of {known}, found {target!r}{cure}")
    check_parameters(
        key, target, locate(key, target), {name: value for name, value in node.items() if not name.startswith("_")}
    )


def check_parameters(key: str, target: str, part: Callable, given: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a parameter that ``part``, known as ``target``, doesn't have or of a wrong type."""
    parameters = inspect.signature(part).parameters
    for name, value in given.items():
        if name not in parameters:
            cure = f"~{key}.{name} takes it out where an experiment sets it"
            raise ConfigError(f"{key}.{name}: {target} has no such parameter; it takes {', '.join(parameters)}; {cure}")
        expected = _PLAIN.get(parameters[name].annotation)
        wrong = isinstance(value, bool) and bool not in (expected or ())
        if expected and (wrong or not isinstance(value, expected)):
            wanted = parameters[name].annotation.__name__
            raise ConfigError(f"{key}.{name}: expected {wanted}, found {value!r}")


def takes(function: Callable, name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def locate(key: str, target: str) -> Any:
    """What a target of a trusted configuration names. Raises ``ConfigError`` where there is no such thing."""
    path, _, name = target.rpartition(".")
    try:
        module = import_module(path)
        part = getattr(module, name)
    except (ImportError, AttributeError):
        raise ConfigError(f"{key}._target_: there is no {target}") from None
    if not (is_plugin(target) or _exports(module, name, part)):
        raise ConfigError(f"{key}._target_: {target} is only used there; name it where it is defined")
    return part


def _exports(module: Any, name: str, part: Any) -> bool:
    """Whether a name is a module's own, and not one that it imported for its use, such as ``import_module``."""
    listed = getattr(module, "__all__", None)
    return name in listed if listed is not None else getattr(part, "__module__", None) == module.__name__
