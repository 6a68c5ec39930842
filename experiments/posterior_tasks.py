"""The tasks that sample given something: a part of the examples, a linear observation of them, or their class.

``inpaint`` and ``restore`` take examples of a split, observe them through ``condition`` with noise, and draw samples of
the posterior of each by ``guidance``; ``conditional`` draws samples of classes, and asks a classifier what they are.
All samples are drawn in one call of the solver, each with the observation or the class of its own.
"""

import sys
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments import pictures, posterior_figures
from experiments.build import NOT_NEGATIVE, POSITIVE, ConfigError, Limit, build, require_limits, takes
from experiments.classes import number_of
from experiments.dataset import SPLITS
from experiments.draw import draw
from experiments.features import Trained
from experiments.guidances import ON_CLASSES, ON_DATA, Guidance, offered_by
from experiments.noisy_classifier import trained_classifier
from experiments.posteriors import Posteriors
from experiments.run import Run
from experiments.session import Session, load_model
from experiments.told import Told
from models import LinearOperator, Mask
from solvers import Solver
from solvers.base import Output

_LIMITS = {
    "noise_std": NOT_NEGATIVE,
    "examples": POSITIVE,
    "first": NOT_NEGATIVE,
    "samples": Limit(lambda value: value >= 2, "be at least 2"),
    "split": Limit(lambda value: value in SPLITS, f"be one of {', '.join(SPLITS)}"),
}


def check_settings(settings: DictConfig) -> None:
    """Raise ``ConfigError`` with all settings of ``posterior`` that can't work whatever the data are."""
    require_limits("posterior.", settings, _LIMITS)


def inpaint(config: DictConfig, run: Run) -> None:
    """Sample what a mask hides of examples."""
    _observed(config, run, "inpaint")


def restore(config: DictConfig, run: Run) -> None:
    """Sample what examples may have been, of a linear observation with noise."""
    _observed(config, run, "restore")


def conditional(config: DictConfig, run: Run) -> None:
    """Draw samples of classes, and ask a classifier of clean data what they are."""
    session = Session(config, run)
    settings, problem = config.posterior, session.problem
    classes = number_of(problem.data, "task=conditional")
    solver = build(config.solver, where="solver")
    chosen = condition(config, "conditional", "classes")(classes, settings.labels)
    rows = {"label": chosen.repeat_interleave(settings.samples)}
    offered = rows | {"log_prob": torch.nn.Identity()}  # trained for the process of the model, which is not there yet
    guidance = Guidance(config.guidance, offered, ON_CLASSES, "conditional", solver)
    judge = Trained(problem)
    model = load_model(session, told=not guidance.asks_without_class)
    more = {}
    if guidance.takes_log_prob:
        more["log_prob"] = trained_classifier(problem, model.sde, settings.classifier_path, seed=config.seed)
    out = _drawn(session, solver, guidance(model, **more), len(rows["label"]))
    predicted = torch.cat([judge.classifier(part.float()).argmax(dim=1) for part in out.x.split(500)])
    told = Told(chosen, out.x.unflatten(0, (len(chosen), -1)), predicted.view(len(chosen), -1), judge.accuracy)
    _report_classes(session, told, _how(guidance, solver, out))
    session.close()


def condition(config: DictConfig, task: str, on: str) -> Any:
    """The function that ``condition`` describes, of ``on``: of the shape of data, or of the number of classes.

    Raises ``ConfigError`` for a condition on something else, and for none.
    """
    fitting = "condition=label" if on == "classes" else "condition=half, box, random, mask_file or another on data"
    if config.condition is None:
        raise ConfigError(f"task={task} needs a condition, found none; use {fitting}")
    make = build(config.condition, where="condition", _partial_=True)
    if not takes(make.func, on):
        raise ConfigError(
            f"task={task} needs a condition on {'classes' if on == 'classes' else 'data'}, found "
            f"{config.condition['_target_']}; use {fitting}"
        )
    return make


def observe(config: DictConfig, task: str, shape: tuple[int, ...]) -> LinearOperator:
    """The operator that ``condition`` describes for data of ``shape``; of ``task=inpaint`` a mask."""
    make = condition(config, task, "shape")
    try:
        operator = make(shape=shape)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"condition: {error}") from error
    if task == "inpaint" and not isinstance(operator, Mask):
        raise ConfigError(
            f"task=inpaint needs a mask, found {type(operator).__name__}; use condition=half, box, random or "
            "mask_file, or task=restore"
        )
    return operator


def examples(session: Session) -> Tensor:
    """The configured examples x_0 in the convention of the model, ``(N, *shape)``; ``ConfigError`` beyond the split."""
    settings, problem = session.config.posterior, session.problem
    values, end = getattr(problem.data, settings.split), settings.first + settings.examples
    if end > len(values):
        raise ConfigError(
            f"posterior.first={settings.first} and posterior.examples={settings.examples} need {end} examples, found "
            f"{len(values)} in the {settings.split} split; take fewer"
        )
    # From the first example on, so that an example's own noise does not depend on which is the first.
    return problem.x(values[:end], torch.Generator().manual_seed(session.config.seed)).float()[settings.first :]


def _observed(config: DictConfig, run: Run, task: str) -> None:
    session = Session(config, run)
    settings, data = config.posterior, session.problem.data
    solver = build(config.solver, where="solver")
    operator, truth = observe(config, task, tuple(data.shape)), examples(session)
    observation = operator.simulate(truth, settings.noise_std, config.seed, settings.first)
    rows = observation.repeat_interleave(settings.samples, dim=0)
    offered = offered_by(operator, rows, settings.noise_std)
    guidance = Guidance(config.guidance, offered, ON_DATA, task, solver, settings.noise_std)
    model = load_model(session, observed=guidance.learned)
    out = _drawn(session, solver, guidance(model), len(rows))
    samples, average = out.x.unflatten(0, (len(truth), -1)), session.problem.x(data.train).double().mean(dim=0)
    operator = operator.cpu()  # with the model it went to its device
    found = Posteriors(operator, settings.noise_std, truth, observation, samples, average, data.density)
    _report(session, task, found, _how(guidance, solver, out))
    session.close()


def _drawn(session: Session, solver: Solver, model: torch.nn.Module, count: int) -> Output:
    model, config = model.to(session.device).eval(), session.config
    solver.check_model(model)
    shape, shown = (count, *session.problem.data.shape), sys.stderr.isatty()
    return draw(solver, model, shape, config.seed, session.device, config.compare.batch_size, shown)


def _how(guidance: Guidance, solver: Solver, out: Output) -> dict[str, Any]:
    return {"guidance": guidance.title, "solver": str(solver), "nfe": out.nfe, "passes_back": out.backward}


def _calls(how: dict[str, Any]) -> str:
    back = f" and {how['passes_back']} passes back" if how["passes_back"] else ""
    return f"{how['guidance']}, {how['solver']}: {how['nfe']} calls{back} for each sample"


def _report(session: Session, task: str, found: Posteriors, how: dict[str, Any]) -> None:
    """The file, the picture, the summary and the text of posteriors."""
    run, operator, settings = session.run, found.operator, session.config.posterior
    arrays = {name: getattr(found, name) for name in ("observation", "truth", "samples", "mean", "std")}
    np.savez(run.path("samples", "posterior.npz"), **{name: x.numpy() for name, x in arrays.items()})
    about = {"task": task, "condition": f"{type(operator).__name__}({operator.extra_repr()})"} | how
    run.note(posterior=about | {"split": settings.split, "first": settings.first} | found.summary())
    path = run.path("figures", "posterior.png")
    if pictures.is_image(session.problem):
        session.figures.append(posterior_figures.posterior_images(found, path))
    elif pictures.is_plane(session.problem):
        session.figures.append(posterior_figures.posterior_points(found, session.problem.data.test, path))
    where = "the values hidden" if bool((~found.hidden).any()) else "all values"
    session.say(
        f"{found.samples.shape[1]} samples for each of {len(found.truth)} examples of the {settings.split} split, "
        f"given {about['condition']} with noise_std {found.noise_std:g}\n{_calls(how)}\n{found}\n"
        f"errors and share: {where} ({int(found.hidden.sum())} of each example); standard errors over the examples"
    )


def _report_classes(session: Session, told: Told, how: dict[str, Any]) -> None:
    """The file, the picture, the summary and the text of samples of classes."""
    run, problem = session.run, session.problem
    arrays = {name: getattr(told, name).numpy() for name in ("labels", "samples", "predicted")}
    np.savez(run.path("samples", "conditional.npz"), **arrays)
    run.note(conditional=how | told.summary())
    path = run.path("figures", "conditional.png")
    if pictures.is_image(problem):
        session.figures.append(posterior_figures.class_images(told.samples, told.labels, path, str(told.agreement)))
    elif pictures.is_plane(problem):
        session.figures.append(posterior_figures.class_points(told.samples, told.labels, problem.data.test, path))
    session.say(f"{told}\n{_calls(how)}")
