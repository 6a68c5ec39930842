"""Samplers side by side: one model, the same noise and seeds for all, and real data as the yardstick.

Each solver runs at each budget of network calls, and is measured by every metric of ``compare.metrics`` against one
held-out split, with standard errors (``experiments.quality``) and beside the value that as many real examples have. Its
calls are those that were made, counted at the network; its seconds and memory are measured while it draws. Where the
density of the data is known, samples are held against it, too (``experiments.known``).

All of it is plain values, the "comparison" of a run's ``summary.json``; numbers of different n are not comparable, and
n, the reference set, the weights and what a sampler returns last (``final``) stand beside them.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments import advice
from experiments.build import POSITIVE, ConfigError, Limit, build, require_all, require_limits
from experiments.draw import draw
from experiments.features import FeatureMap, build_features
from experiments.known import Known
from experiments.metrics import Floor
from experiments.problem import Problem
from experiments.processes import current
from experiments.quality import Column, Measured, Yardstick, build_metrics, floors, require_enough
from experiments.usage import peak_of
from sde import ScoreModel
from solvers import Sampler, SamplingDiverged, Solver
from solvers.ode import ODEError

log = logging.getLogger(__name__)
POOLS = {"test": ("train", "validation"), "validation": ("train",)}
"""The real examples that are drawn for the noise floor, by the split that samples are compared with."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """``content``: settings, metrics, rows, fronts and advice, as plain values.

    samples: by the name of each sampler, those at its largest budget from the first seed. chosen: the name that
    ``solver=`` goes by, or the first sampler where that one is left out.
    """

    content: dict[str, Any]
    samples: dict[str, Tensor]
    chosen: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each sampler and budget."""
        return self.content["rows"]

    @property
    def first(self) -> tuple[str, dict[str, Any]]:
        """The name and the description of the metric that decides."""
        return next(iter(self.content["metrics"].items()))

    @property
    def floor(self) -> Floor:
        """Of the metric that decides."""
        return Floor(**self.first[1]["floor"])


def build_solver(config: DictConfig, name: str) -> Solver:
    """The solver of a name in ``compare.names``."""
    known = config.compare.solvers
    if name not in known:
        raise ConfigError(
            f"compare.names: no solver {name!r}; choose from {', '.join(known)}, or add a file solver/{name}.yaml "
            f"of your own by +solver@compare.solvers.{name}={name}"
        )
    return build(known[name], where=f"compare.solvers.{name}")


def build_solvers(config: DictConfig) -> dict[str, Solver]:
    """The solvers that ``compare.names`` lists, by name, and ``solver=``: by that of its class where it is another."""
    solvers = {name: build_solver(config, name) for name in config.compare.names}
    chosen = build(config.solver, where="solver")
    if chosen not in solvers.values():
        own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(chosen).__name__).lower()
        solvers["solver" if own in solvers else own] = chosen
    for name, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise ConfigError(f"compare.solvers.{name} must be a Solver, found {type(solver).__name__}")
    return solvers


_LIMITS = {
    "samples": Limit(lambda value: value >= 2, "be at least 2"),
    "seeds": POSITIVE,
    "batch_size": Limit(lambda value: value is None or value > 0, "be a positive number of samples, or null"),
    "budgets": Limit(lambda value: len(value) and min(value) > 0, "be positive numbers of network calls"),
    "metrics": Limit(lambda value: len(value) > 0, "name at least one metric"),
    "split": Limit(lambda value: value in POOLS, f"be one of {', '.join(POOLS)}"),
}


def check(settings: DictConfig) -> None:
    """Refuse comparison settings that can't work: raises one ``ConfigError`` for all of them."""
    require_all((lambda: require_limits("compare.", settings, _LIMITS), lambda: build_metrics(settings)))


def budgeted(solvers: dict[str, Solver], budgets: list[int]) -> Iterator[tuple[str, Solver]]:
    """Each sampler at the numbers of steps that spend each budget; solvers that choose their own steps, once."""
    for name, solver in solvers.items():
        if not isinstance(solver, Sampler):
            yield name, solver
            continue
        found = dict.fromkeys(filter(None, (_within(solver, budget) for budget in sorted(set(budgets)))))
        if not found:
            raise ConfigError(
                f"compare.budgets={budgets}: {name} needs at least {solver.with_steps(1).calls} network calls"
            )
        yield from ((name, sampler) for sampler in found)


def _within(sampler: Sampler, budget: int) -> Sampler | None:
    """The sampler with as many steps as the budget of calls allows."""
    steps = budget // max(1, sampler.calls_per_step)
    found = (sampler.with_steps(n) for n in (steps, steps - 1) if n > 0)
    return next((one for one in found if one.calls <= budget), None)


class Measures:
    """Every metric with its reference set and noise floors, of which all that no sample changes is computed once.

    Building it refuses, by ``ConfigError``, what can't be measured; the work begins with ``prepare``.
    """

    def __init__(self, config: DictConfig, problem: Problem):
        settings = config.compare
        check(settings)
        self.problem, self.seed, self.split = problem, config.seed, settings.split
        self.metrics, self.features = build_metrics(settings), build_features(settings, problem)
        self.n = min(settings.samples, sum(len(getattr(problem.data, name)) for name in POOLS[self.split]))
        require_enough(self.metrics, self.n, len(self._real))
        self.wanted = settings.samples

    @property
    def _real(self) -> Tensor:
        return getattr(self.problem.data, self.split)

    @property
    def reference(self) -> str:
        """The words for what samples are compared with."""
        return f"{self.problem.data.name}, {self.split} split, {len(self._real)} examples"

    def prepare(self) -> None:
        """The reference set, and what n real examples come to."""
        if self.n < self.wanted:
            log.warning("comparing %d samples, not %d: as many as there are real examples", self.n, self.wanted)
        source = torch.Generator().manual_seed(self.seed)
        reference = self._seen(self.problem.x(self._real, source))
        pool = torch.cat([getattr(self.problem.data, name) for name in POOLS[self.split]])
        real = self._seen(self.problem.x(pool, torch.Generator().manual_seed(self.seed + 1)))
        self._yardsticks, self.floors = [], {}
        for metric in self.metrics.values():
            own = reference[metric.of_features]
            self._yardsticks.append(Yardstick(metric, own))
            self.floors |= floors(metric, real[metric.of_features], own, self.n, seed=self.seed)

    def __call__(self, sets: Sequence[Tensor]) -> dict[str, Measured]:
        """All columns of sets of samples, one per seed."""
        seen = [self._seen(x) for x in sets]
        found: dict[str, Measured] = {}
        for yardstick in self._yardsticks:
            found |= yardstick.measure([x[yardstick.metric.of_features] for x in seen])
        return found

    def columns(self) -> list[Column]:
        """Of all metrics, in their order."""
        return [column for metric in self.metrics.values() for column in metric.columns]

    def _seen(self, x: Tensor) -> dict[bool, Tensor]:
        """x itself, and its features where there are any."""
        return {False: x, True: x if self.features is None else self.features(x)}


def compare(
    model: ScoreModel, problem: Problem, config: DictConfig, device: torch.device, about: str = "the model as given"
) -> Comparison:
    """Draw samples by every solver at every budget, and measure them. ``about``: words for where the model is from.

    A solver that diverges, or does not work with this model, is left out, and said to be. Raises ``SamplingDiverged``
    where all are.
    """
    measures, settings = Measures(config, problem), config.compare
    solvers, wanted = build_solvers(config), build(config.solver, where="solver")
    chosen = next(name for name, solver in solvers.items() if solver == wanted)
    plan = list(budgeted(solvers, list(settings.budgets)))
    measures.prepare()
    known = problem.data.density and Known(problem.data.density, model.sde, problem.data.shape, config.seed)
    rows, samples, failed = [], {}, []
    with torch.no_grad():  # what a first call costs beside is no sampler's
        model(torch.zeros(2, *problem.data.shape, device=device), torch.tensor(model.sde.t_max, device=device))
    for name, solver in tqdm(plan, desc="samplers", disable=current().hides(None), leave=False):
        try:
            sets, row = _drawn(solver, model, (measures.n, *problem.data.shape), config, device)
        except (SamplingDiverged, ODEError, TypeError) as error:
            log.warning("%s is left out (%s: %s)", solver, type(error).__name__, error)
            failed.append({"sampler": name, "solver": str(solver), "reason": f"{type(error).__name__}: {error}"})
            continue
        found = measures(sets) | (known.measure(solver, sets) if known else {})
        budget = next((b for b in sorted(settings.budgets) if row["nfe"] <= b), None) if solver.calls else None
        rows.append({"sampler": name, "budget": budget} | row | {"metrics": _plain(found)})
        samples[name] = sets[0]
    if not rows:
        raise SamplingDiverged(f"no sampler could be measured; the first: {failed[0]['reason']}")
    about = {"model": about, "sde": str(model.sde), "features": _features(measures.features)}
    content = _content(measures, known, rows, chosen, settings, about)
    return Comparison(content | {"failed": failed}, samples, chosen if chosen in samples else next(iter(samples)))


def _drawn(
    solver: Solver, model: ScoreModel, shape: tuple[int, ...], config: DictConfig, device: torch.device
) -> tuple[list[Tensor], dict[str, Any]]:
    """The samples of each seed, and what they took: the mean over the seeds."""
    sets, spent, settings = [], [], config.compare
    if solver.compile:  # compiling is no part of sampling
        draw(solver, model, shape, config.seed, device, settings.batch_size)
    with peak_of(device) as peak:
        for i in range(settings.seeds):
            started = time.perf_counter()
            out = draw(solver, model, shape, config.seed + i, device, settings.batch_size)  # waits for a GPU
            spent.append((out.nfe, out.backward, time.perf_counter() - started))
            sets.append(out.x.float())
        memory = peak()
    about = {name: getattr(solver, name, None) for name in ("steps", "final")}
    nfe, backward, seconds = (sum(column) / len(spent) for column in zip(*spent, strict=True))
    cost = {"nfe": nfe, "backward": backward, "seconds": seconds, "peak_memory_bytes": memory}
    return sets, {"solver": str(solver)} | about | cost


def _content(
    measures: Measures,
    known: Known | None,
    rows: list[dict[str, Any]],
    chosen: str,
    settings: DictConfig,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that there is to say, as plain values."""
    counts = {"samples": measures.n, "seeds": settings.seeds, "batch_size": settings.batch_size}
    floors = {name: floor._asdict() for name, floor in measures.floors.items()}
    columns = [*measures.columns(), *(known.columns if known else ())]
    metrics = {c.name: {"title": c.title, "best": c.best, "floor": floors.get(c.name)} for c in columns}
    first, metric = next(iter(metrics.items()))
    own = [row["metrics"][first]["value"] for row in rows if row["sampler"] == chosen]
    return {
        "settings": counts | {"reference": measures.reference} | dict(about),
        "metrics": metrics,
        "rows": rows,
        "pareto": advice.fronts(rows, first, metric["best"]),
        "recommendation": advice.recommendation(rows, first, metric, settings.seeds),
        "chosen": chosen,
        "objective": sum(own) / len(own) if own else None,
    }


def _plain(found: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    return {name: {"value": one.value, "stderr": one.stderr} for name, one in found.items()}


def _features(features: FeatureMap | None) -> str | None:
    return None if features is None else str(getattr(features.network, "title", type(features.network).__name__))
