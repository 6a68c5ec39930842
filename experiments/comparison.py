"""Samplers side by side: one model, the same noise, and real data as the yardstick."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments.build import POSITIVE, ConfigError, Limit, build, require_limits
from experiments.draw import draw
from experiments.metrics import Floor, noise_floor, sliced_w2
from experiments.problem import Problem
from experiments.processes import current
from models import ScoreNetwork
from solvers import Sampler, Solver


@dataclass(frozen=True)
class Row:
    """One sampler at one budget: network calls and seconds per seed, mean and deviation of the distance over seeds."""

    sampler: str
    nfe: float
    seconds: float
    distance: float
    distance_std: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The rows, the noise floor, and each sampler's samples at its largest budget from the first seed.

    ``chosen`` is the name of the solver that ``solver=`` stands for.
    """

    rows: list[Row]
    floor: Floor
    samples: dict[str, Tensor]
    chosen: str


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
}


def check(settings: DictConfig) -> None:
    """Refuse comparison settings that can't work."""
    require_limits("compare.", settings, _LIMITS)


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


def compare(model: ScoreNetwork, problem: Problem, config: DictConfig, device: torch.device) -> Comparison:
    """Draw samples by every solver and measure their sliced Wasserstein distance to the test split."""
    settings, rows, samples = config.compare, [], {}
    check(settings)
    test = problem.x(problem.data.test, torch.Generator().manual_seed(config.seed))
    pool = torch.cat((problem.data.train, problem.data.validation))
    n = min(settings.samples, len(pool))
    floor = noise_floor(problem.x(pool, torch.Generator().manual_seed(config.seed + 1)), test, n)
    solvers, wanted = build_solvers(config), build(config.solver, where="solver")
    plan = list(budgeted(solvers, list(settings.budgets)))
    for name, solver in tqdm(plan, desc="samplers", disable=current().hides(None), leave=False):
        row, drawn = _measure(name, solver, model, (n, *problem.data.shape), test, config.seed, settings, device)
        rows.append(row)
        samples[name] = drawn
    return Comparison(rows, floor, samples, next(name for name, solver in solvers.items() if solver == wanted))


def _measure(name, solver, model, shape, test, seed, settings, device) -> tuple[Row, Tensor]:
    distances, nfe, seconds, first, seeds = [], 0.0, 0.0, None, settings.seeds
    for i in range(seeds):
        started = time.perf_counter()
        out = draw(solver, model, shape, seed + i, device, settings.batch_size)
        x = out.x.cpu()  # waits for a GPU
        nfe, seconds = nfe + out.nfe / seeds, seconds + (time.perf_counter() - started) / seeds
        first = x if first is None else first
        distances.append(sliced_w2(x, test))
    spread = torch.tensor(distances, dtype=torch.float64)
    return Row(name, nfe, seconds, spread.mean().item(), spread.std().item() if seeds > 1 else 0.0), first
