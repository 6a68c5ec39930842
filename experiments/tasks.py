"""The tasks of the command line. Each takes the configuration and the run's folder, and leaves its results there.

Everything that a task will need is built and checked before the first long computation.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import checkpoint, classes, comparison, league, networks, observing, pictures, report, verification
from experiments.build import ConfigError, build
from experiments.draw import draw
from experiments.likelihood_tasks import check_likelihood, evaluate_likelihood
from experiments.metrics import classifier_confidence, copy_report
from experiments.problem import Problem
from experiments.run import Run, provenance
from experiments.session import Session, load_model
from sde import ScoreModel

log = logging.getLogger(__name__)


def train(config: DictConfig, run: Run) -> None:
    """Train a score network and save it."""
    session = Session(config, run, resumable=True)
    check_training(session)
    networks.trained(session)
    session.close()


def sample(config: DictConfig, run: Run) -> None:
    """Draw samples from a checkpoint by the configured solver."""
    session = Session(config, run)
    solver = build(config.solver, where="solver")
    model = load_model(session)
    shape = (config.compare.samples, *session.problem.data.shape)
    out = draw(solver, model, shape, config.seed, session.device, config.compare.batch_size, sys.stderr.isatty())
    np.save(run.path("samples", "samples.npy"), out.x.cpu().numpy())
    run.note(sampling={"solver": str(solver), "nfe": out.nfe, "samples": len(out.x)})
    session.say(f"{len(out.x)} samples by {solver} in {out.nfe} network calls: {run.path('samples', 'samples.npy')}")
    session.figures += pictures.of_samples({"samples": out.x.cpu()}, session.problem, run)
    session.figures += pictures.of_flow(model, session.problem, run, session.device, config.seed)
    session.close()


def compare(config: DictConfig, run: Run) -> None:
    """Compare samplers on a checkpoint."""
    session = Session(config, run)
    check_comparison(session)
    compare_samplers(session, load_model(session))
    session.close()


def everything(config: DictConfig, run: Run) -> None:
    """Train, compare samplers, evaluate the likelihood, and draw the pictures."""
    observing.refuse(config)
    session = Session(config, run, resumable=True)
    check_training(session)
    check_comparison(session)
    check_likelihood(session, build(config.sde, where="sde", allowed=("sde.",)))
    classes.warn_without_class(config)
    model = networks.trained(session).to(session.device)
    log.info("comparing samplers")
    compare_samplers(session, model)
    session.figures += pictures.of_flow(model, session.problem, run, session.device, config.seed)
    log.info("evaluating the likelihood of held-out data")
    evaluate_likelihood(session, model)
    session.close()


def verify(config: DictConfig, run: Run) -> None:
    """Measure everything that must hold of the configured process; raises ``VerificationFailed`` where it does not."""
    process = build(config.sde, where="sde", allowed=("sde.",))
    run.note(seed=config.seed, **provenance())
    found = verification.verify(process, config.seed)
    run.note(verification=found.summary())
    run.path("report.txt").write_text(f"{found}\n")
    # What is not defined everywhere can't be drawn; a schedule that rises where it should fall can, and is of help.
    drawn = [] if {"times", "shapes", "finite", "log_snr"} & {*found.failed} else pictures.of_process(process, run)
    where = f"{report.pictures(drawn)}\n\n" if drawn else ""
    print(f"\n{found}\n\n{where}All results: {run.folder}", flush=True)
    if not found.ok:
        raise verification.VerificationFailed(f"{type(process).__name__} fails: {', '.join(found.failed)}")


def check_training(session: Session) -> None:
    """Build what training needs, to refuse what can't work before any time is spent."""
    if session.config.under is not None:
        raise ConfigError("sde@under= is for a trained model (task=sample, likelihood, compare); train under sde=")
    networks.check(session)


def check_comparison(session: Session) -> None:
    """Build the solvers and the metrics, likewise."""
    comparison.Measures(session.config, session.problem)
    list(comparison.budgeted(comparison.build_solvers(session.config), list(session.config.compare.budgets)))


def compare_samplers(session: Session, model: ScoreModel) -> None:
    """The league table, its page and pictures, and for images whether samples are copies."""
    problem, run = session.problem, session.run
    result = comparison.compare(model, problem, session.config, session.device, session.about_model)
    run.note(comparison=result.content)
    for name, x in result.samples.items():
        np.save(run.path("samples", f"{name}.npy"), x.numpy())
    session.say(league.text(result.content))
    drawn = pictures.of_comparison(result, problem, run)
    session.figures += drawn
    write_page(session, drawn)
    if problem.dequantizer:
        quality = image_quality(problem, result.samples[result.chosen])
        run.note(image_quality=quality | {"sampler": result.chosen})
        session.say(report.quality(quality, result.chosen))


def write_page(session: Session, drawn: list[Path]) -> None:
    """``report.html`` and ``league.csv`` of the comparison in the run's summary, with these pictures."""
    run, told = session.run, checkpoint.resolved(session.config)
    page = league.comparison_page(run.summary, OmegaConf.to_yaml(OmegaConf.create(told)), drawn)
    run.path("report.html").write_text(page, encoding="utf-8")
    run.path("league.csv").write_text(league.as_csv(run.summary["comparison"]), encoding="utf-8")


def image_quality(problem: Problem, samples: torch.Tensor) -> dict[str, dict[str, float]]:
    """Distance to the nearest training image, and a classifier's confidence, beside those of real test images."""
    data, levels = problem.data, problem.dequantizer.quantize(samples)
    found = {"nearest_training_image": copy_report(levels, data.train, data.test)}
    if data.labels:
        confidence = classifier_confidence(data.train, data.labels["train"], levels, data.test, data.labels["test"])
        found["classifier_confidence"] = confidence
    return found
