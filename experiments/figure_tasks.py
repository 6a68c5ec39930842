"""The task that draws all that a checkpoint is enough for: no training, no held-out likelihood, no comparison.

A figure that can't be drawn, because the samples or the flow of a young model diverge or the memory is too small, is
logged and left out; the others are drawn all the same.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from experiments import comparison, likelihood_figures, pictures
from experiments.build import ConfigError
from experiments.draw import draw
from experiments.known import exact_score
from experiments.likelihood_tasks import build_flow, check_settings
from experiments.run import Run
from experiments.session import Session, load_model
from experiments.watch import SURVIVED
from sde import ScoreModel
from solvers import ProbabilityFlow
from solvers.base import Solver

log = logging.getLogger(__name__)
IMAGES, POINTS = 40, 500
_FLOW = ProbabilityFlow(rtol=1e-5, atol=1e-5)  # its error is below what float32 and a picture show
REFERENCE = f"probability flow, rtol {_FLOW.rtol:g}"


def figures(config: DictConfig, run: Run) -> None:
    """Draw all that a checkpoint is enough for, of images and of points in the plane."""
    session = Session(config, run)
    check_settings(config.likelihood)
    comparison.check(config.compare)
    solvers = comparison.build_solvers(config)
    plan = ends(list(comparison.budgeted(solvers, list(config.compare.budgets))))
    model = load_model(session)
    for _, solver in plan:
        solver.check_model(model)
    problem, device = session.problem, session.device
    drawn: dict[str, Callable[[], list[Path]]] = {
        "schedules": partial(pictures.of_process, model.sde, run),
        "noise to data": partial(pictures.of_flow, model, problem, run, device, config.seed),
        "samples": partial(same_noise, session, model, plan),
        "density": partial(density, session, model),
        "interpolation": partial(interpolation, session, model),
    }
    failed = {name: words for name, act in drawn.items() if (words := _tried(session, name, act))}
    run.note(figures=[path.name for path in session.figures], not_drawn=failed)
    if not session.figures:
        raise ConfigError(f"no figure could be drawn: {'; '.join(failed.values())}")
    session.close()


def ends(plan: list[tuple[str, Solver]]) -> list[tuple[str, Solver]]:
    """Of each sampler's budgets the smallest and the largest."""
    by_name: dict[str, list[Solver]] = {}
    for name, solver in plan:
        by_name.setdefault(name, []).append(solver)
    return [(name, solver) for name, some in by_name.items() for solver in dict.fromkeys((some[0], some[-1]))]


def same_noise(session: Session, model: ScoreModel, plan: list[tuple[str, Solver]]) -> list[Path]:
    """Samples of all solvers from one seed: each beside those of the flow itself, and the last beside real data."""
    problem, config = session.problem, session.config
    if not (pictures.is_image(problem) or pictures.is_plane(problem)):
        return []
    shape = (IMAGES if pictures.is_image(problem) else POINTS, *problem.data.shape)

    how = (config.seed, session.device, config.compare.batch_size)
    found = [(name, draw(solver, model, shape, *how)) for name, solver in plan]
    beside = {REFERENCE: draw(_FLOW, model, shape, *how).x}
    beside |= {f"{name}, {out.nfe} calls": out.x for name, out in found}
    real = {name: out.x for name, out in found}  # of several budgets the largest, which is the last
    return [
        *pictures.of_samples(real, problem, session.run),
        *pictures.of_same_noise(beside, REFERENCE, problem, session.run),
    ]


def density(session: Session, model: ScoreModel) -> list[Path]:
    """Scores and log-density in the plane, beside exact ones where they are known."""
    problem = session.problem
    if not pictures.is_plane(problem):
        return []
    if not problem.data.density:
        return pictures.of_learned_density(model, problem, session.run, session.device)
    exact = exact_score(problem.data, model.sde).to(session.device)
    return pictures.of_density(model, exact, session.run, session.device)


def interpolation(session: Session, model: ScoreModel) -> list[Path]:
    """Ways between pairs of test examples, as ``task=interpolate`` draws them."""
    problem, config = session.problem, session.config
    x = problem.x(problem.data.test[: 2 * config.interpolate.pairs], torch.Generator().manual_seed(config.seed))
    count, path = len(x) // 2, session.run.path("figures", "interpolation.png")
    if not count or not (pictures.is_image(problem) or pictures.is_plane(problem)):
        return []
    start, end = x[: 2 * count].to(session.device).unflatten(0, (count, 2)).unbind(1)
    ways = build_flow(config.likelihood).interpolate(model, start, end, config.interpolate.points)
    if pictures.is_image(problem):
        return [likelihood_figures.interpolated_images(ways.clamp(-1, 1), path)]
    return [likelihood_figures.interpolated_points(ways, path, problem.data.test)]


def _tried(session: Session, name: str, act: Callable[[], list[Path]]) -> str | None:
    """What went wrong, in words, if anything did."""
    log.info("drawing: %s", name)
    try:
        session.figures += act()
    except SURVIVED as error:
        words = f"{type(error).__name__}: {error}"
        log.warning("no picture of the %s (%s)", name, words)
        return words
    return None
