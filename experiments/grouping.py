"""Runs side by side: which settings differ, which runs differ in their seed alone, and which must not meet at all.

Runs that differ in nothing but ``seed`` are one group: with k seeds its value is their mean, its standard error their
standard deviation divided by sqrt(k), which contains the chance of training and of measuring. A single seed keeps the
standard error of its own measurement. Numbers that were measured differently - another number of samples, reference
set, split, or setting of a metric - never stand in one table.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, TypeVar

from experiments.collection import StoredRun

T = TypeVar("T")
_OF_POSTERIORS = ("condition", "guidance", "posterior")
OF_TRAINING = ("solver", "compare", "likelihood", "ood", "interpolate", *_OF_POSTERIORS, "under", "checkpoint")
OF_LIKELIHOOD = ("solver", "compare", "ood", "interpolate", *_OF_POSTERIORS)
OF_SAMPLERS = ("likelihood", "ood", "interpolate", *_OF_POSTERIORS)
"""Parts of the configuration that have no say in a loss, a likelihood, or a row of a comparison."""
SOLVERS = ("solver", "compare.solvers")  # which a row of a comparison says itself
_FREE = tuple(f"compare.{name}" for name in ("names", "budgets", "solvers", "seeds", "batch_size", "samples"))
"""Settings of a comparison that don't change what a number in it means; ``samples`` is noted as it came out."""
NOTED = "device"  # what a run finds out: one that did not come so far is no other for that
_PLACE = ("data.path",)  # where examples lie, not which they are


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. ``settings``: key -> value, of the settings that differ between groups."""

    settings: dict[str, Any]
    runs: tuple[StoredRun, ...]

    @property
    def seeds(self) -> int:
        """How many different seeds there are."""
        return len({_word(run.seed) for run in self.runs})


def by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Items that share a key, in the order in which the keys appear first."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def groups(runs: Sequence[StoredRun], without: Sequence[str] = ()) -> list[Group]:
    """The runs by all settings but the seed, and but those of the parts ``without``, which have no say in a result."""
    keys = [key for key in varying([run.settings for run in runs]) if key != "seed" and not _within(key, without)]
    parted = by(runs, lambda run: tuple(_word(run.settings.get(key, _ABSENT)) for key in keys))
    return [
        Group({key: some[0].settings[key] for key in keys if key in some[0].settings}, tuple(some))
        for some in parted.values()
    ]


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values differ, in the order of the configuration.

    Where two runs have different classes at a place, these tell them apart: parameters are compared only between runs
    of the same class.
    """
    found = []
    for key in dict.fromkeys(key for one in settings for key in one):
        known = [one for one in settings if key in one] if key == NOTED else settings
        parted = by(known, lambda one, key=key: _classes(one, key))
        if any(len({_word(one.get(key, _ABSENT)) for one in same}) > 1 for same in parted.values()):
            found.append(key)
    return [key for key in found if f"{key}._target_" not in found]  # null beside a class: the class says it


_ABSENT = "\0absent"  # no value of a configuration


def _classes(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The classes of the parts that a setting lies in."""
    parts = key.split(".")
    places = (".".join([*parts[:i], "_target_"]) for i in range(1, len(parts)))
    return tuple(_word(settings.get(place)) for place in places if place != key)


def heading(key: str) -> str:
    """What a setting is called in a table: a class, by the place it is at."""
    return key.removesuffix("._target_")


def shown(key: str, value: Any) -> str:
    """A setting as a table says it: of a class its own name."""
    if isinstance(value, list):
        return ", ".join(shown("", one) for one in value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.rpartition(".")[2] if key.endswith("._target_") else text


def over_seeds(values: Sequence[tuple[Any, float | None, float | None]]) -> tuple[float | None, float | None]:
    """Mean and standard error of triples (seed, value, its own standard error); those without a value don't count.

    Values of one seed are averaged first: to repeat a seed adds no knowledge.
    """
    known = [one for one in values if one[1] is not None]
    if not known:
        return None, None
    parted = [[(value, stderr) for _, value, stderr in same] for same in by(known, lambda one: _word(one[0])).values()]
    means = [mean(value for value, _ in same) for same in parted]
    if len(means) > 1:
        return mean(means), stdev(means) / len(means) ** 0.5
    return means[0], parted[0][0][1]


def measured(run: StoredRun) -> dict[str, Any]:
    """What must agree for two comparisons to stand in one table."""
    comparison = run.summary["comparison"]
    found = {name: comparison["settings"].get(name) for name in ("samples", "reference", "features")}
    found["metrics"] = {name: [metric["title"], metric["best"]] for name, metric in comparison["metrics"].items()}
    return found | {key: value for key, value in run.settings.items() if _of_metrics(key)} | _data(run)


def without(described: bool) -> tuple[str, ...]:
    """What has no say in rows of comparisons that were measured alike; ``described``: which name their solvers."""
    free = tuple(part for part in _FREE if part not in SOLVERS)
    return (*OF_SAMPLERS, *free, *(SOLVERS if described else ()))


def _of_metrics(key: str) -> bool:
    return key.startswith("compare.") and not _within(key, _FREE)


def _within(key: str, parts: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{part}.") for part in parts)


def evaluated(run: StoredRun) -> dict[str, Any]:
    """What must agree for two likelihoods to stand in one table: all of their protocol but the seed."""
    likelihood = run.summary["likelihood"]
    found = {name: likelihood.get(name) for name in ("unit", "n", "split", "dimensions")}
    protocol = likelihood.get("protocol") or {}
    return found | {name: value for name, value in protocol.items() if name != "seed"} | _data(run)


def trained(run: StoredRun) -> dict[str, Any]:
    """What must agree for two losses to stand in one table."""
    names = ("objective", "dequantization")
    return {key: value for key, value in run.settings.items() if key.split(".")[0] in names} | _data(run)


def _data(run: StoredRun) -> dict[str, Any]:
    """Which examples there are, and how they become x."""
    chosen = {key: value for key, value in run.settings.items() if key.startswith("data.") and key not in _PLACE}
    return {"data": run.summary.get("data")} | chosen


def apart(runs: Sequence[StoredRun], measure: Callable[[StoredRun], dict[str, Any]]) -> list[list[StoredRun]]:
    """The runs by what must agree, in the order in which it appears first."""
    return list(by(runs, lambda run: _word(measure(run))).values())


def differences(runs: Sequence[StoredRun], measure: Callable[[StoredRun], dict[str, Any]]) -> str:
    """What of it does not agree, by name."""
    found = [measure(run) for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    return ", ".join(name for name in names if len({_word(one.get(name)) for one in found}) > 1)


def _word(value: Any) -> str:
    """A plain value as words that are equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
