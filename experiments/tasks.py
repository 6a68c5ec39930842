"""The tasks of the command line. Each takes the configuration and the run's folder, and leaves its results there.

Everything that a task will need is built and checked before the first long computation.
"""

import logging
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
from omegaconf import DictConfig

from experiments import checkpoint, comparison, evaluation, pictures, report, training, verification
from experiments.baselines import all_baselines
from experiments.build import ConfigError, build
from experiments.metrics import classifier_confidence, copy_report
from experiments.problem import Problem, build_model, device_of, load_problem
from experiments.run import Run, provenance
from models import GaussianMixture
from models.score_matching import check_objective
from sde import GaussianSDE, ScoreModel, diagnose

log = logging.getLogger(__name__)
_FEW = 2000  # examples that a diagnosis takes the moments of


class Session:
    """One run: its configuration, folder, problem, device, and what it has to say."""

    def __init__(self, config: DictConfig, run: Run):
        self.config, self.run = config, run
        self.device, self.problem = device_of(config.device), load_problem(config)
        self.said, self.figures, self.warned = [], [], set()
        torch.manual_seed(config.seed)
        run.note(seed=config.seed, device=_device_name(self.device), data=self.problem.convention(), **provenance())

    def say(self, text: str) -> None:
        """Print a part of the report."""
        self.said.append(text)
        print(f"\n{text}", flush=True)

    def diagnose(self, sde: GaussianSDE) -> None:
        """Log what the ends of time of ``sde`` cost these data, each warning once, and note the numbers."""
        x = self.problem.x(self.problem.data.train[:_FEW], torch.Generator().manual_seed(self.config.seed))
        found = diagnose(sde, x, self.problem.noise_width, quiet=True)
        for sentence in found.warnings:
            if sentence not in self.warned:
                log.warning(sentence)
        self.warned |= set(found.warnings)
        self.run.note(diagnosis=asdict(found))

    def close(self) -> None:
        """Write the report, and say where all is."""
        if self.figures:
            self.say(report.pictures(self.figures))
        self.say(f"All results: {self.run.folder}")
        self.run.note(seconds=round(time.time() - self.run.started, 1))
        self.run.path("report.txt").write_text("\n\n".join(self.said) + "\n")


def train(config: DictConfig, run: Run) -> None:
    """Train a score network and save it."""
    session = Session(config, run)
    check_training(session)
    training.train(config, session.problem, session.device, run)
    session.figures += pictures.of_training(run)
    session.close()


def sample(config: DictConfig, run: Run) -> None:
    """Draw samples from a checkpoint by the configured solver."""
    session = Session(config, run)
    solver = build(config.solver, where="solver")
    model = load_model(session)
    out = solver(
        model,
        shape=(config.compare.samples, *session.problem.data.shape),
        seed=config.seed,
        device=session.device,
        batch_size=config.compare.batch_size,
        progress=sys.stderr.isatty(),
    )
    np.save(run.path("samples", "samples.npy"), out.x.cpu().numpy())
    run.note(sampling={"solver": str(solver), "nfe": out.nfe, "samples": len(out.x)})
    session.say(f"{len(out.x)} samples by {solver} in {out.nfe} network calls: {run.path('samples', 'samples.npy')}")
    session.figures.append(pictures.of_samples({"samples": out.x.cpu()}, session.problem, run))
    session.figures += pictures.of_flow(model, session.problem, run, session.device, config.seed)
    session.close()


def likelihood(config: DictConfig, run: Run) -> None:
    """Evaluate the log-likelihood of the test split under a checkpoint."""
    session = Session(config, run)
    check_likelihood(session)
    evaluate_likelihood(session, load_model(session))
    session.close()


def compare(config: DictConfig, run: Run) -> None:
    """Compare samplers on a checkpoint."""
    session = Session(config, run)
    check_comparison(session)
    compare_samplers(session, load_model(session))
    session.close()


def everything(config: DictConfig, run: Run) -> None:
    """Train, compare samplers, evaluate the likelihood, and draw the pictures."""
    session = Session(config, run)
    check_training(session)
    check_comparison(session)
    check_likelihood(session)
    model = training.train(config, session.problem, session.device, run)
    session.figures += pictures.of_training(run)
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
    print(f"\n{found}\n\nAll results: {run.folder}", flush=True)
    if not found.ok:
        raise verification.VerificationFailed(f"{type(process).__name__} fails: {', '.join(found.failed)}")


def check_training(session: Session) -> None:
    """Build what training needs, to refuse what can't work before any time is spent."""
    if session.config.under is not None:
        raise ConfigError("sde@under= is for a trained model (task=sample, likelihood, compare); train under sde=")
    training.check(session.config.train)
    times = build(session.config.train.times, where="train.times")
    model = build_model(session.config, session.problem.convention(), session.problem.data.train)
    try:
        check_objective(model.sde, session.config.train.weighting, times)
    except ValueError as error:
        raise ConfigError(f"{error}; as a configuration: train=bound") from None
    session.diagnose(model.sde)


def check_comparison(session: Session) -> None:
    """Build the solvers, likewise."""
    settings = session.config.compare
    comparison.check(settings)
    list(comparison.budgeted(comparison.build_solvers(session.config), list(settings.budgets)))


def check_likelihood(session: Session) -> None:
    """Refuse settings of the likelihood that can't work, and a dequantizer that the data's convention rules out."""
    evaluation.checked_divergence(session.config.likelihood)
    if session.problem.dequantizer:
        session.problem.check(session.problem.dequantizer)


def load_model(session: Session) -> ScoreModel:
    """The checkpoint's model, under another process if asked for; refused for another data convention."""
    model, convention, step = checkpoint.load(session.config.checkpoint, session.device)
    here = session.problem.convention()
    if convention != here:
        raise ConfigError(f"the checkpoint was trained on {convention}, and this run has {here}; choose the same data=")
    session.run.note(checkpoint={"path": session.config.checkpoint, "step": step, "sde": str(model.sde)})
    if session.config.under is None:
        return model
    other = build(session.config.under, where="under", allowed=("sde.",))
    session.run.note(under=str(other))
    return model.under(other)


def compare_samplers(session: Session, model: ScoreModel) -> None:
    """The sampler table, its pictures, and for images whether samples are copies."""
    settings, problem, run = session.config.compare, session.problem, session.run
    result = comparison.compare(model, problem, session.config, session.device)
    run.note(comparison={"rows": [asdict(row) for row in result.rows], "noise_floor": result.floor._asdict()})
    for name, x in result.samples.items():
        np.save(run.path("samples", f"{name}.npy"), x.numpy())
    count = len(next(iter(result.samples.values())))
    session.say(report.samplers(result, count, settings.seeds))
    session.figures += pictures.of_comparison(result, problem, run)
    if problem.dequantizer:
        quality = image_quality(problem, result.samples[result.chosen])
        run.note(image_quality=quality | {"sampler": result.chosen})
        session.say(report.quality(quality, result.chosen))


def image_quality(problem: Problem, samples: torch.Tensor) -> dict[str, dict[str, float]]:
    """Distance to the nearest training image, and a classifier's confidence, beside those of real test images."""
    data, levels = problem.data, problem.dequantizer.quantize(samples)
    found = {"nearest_training_image": copy_report(levels, data.train, data.test)}
    if data.labels:
        confidence = classifier_confidence(data.train, data.labels["train"], levels, data.test, data.labels["test"])
        found["classifier_confidence"] = confidence
    return found


def evaluate_likelihood(session: Session, model: ScoreModel) -> None:
    """The likelihood table: parts and errors, beside baselines or the exact value."""
    problem, run = session.problem, session.run
    session.diagnose(model.sde)
    result, log_prob = evaluation.evaluate(model, problem, session.config, session.device)
    np.save(run.path("samples", "log_prob.npy"), log_prob.numpy())
    run.note(likelihood=asdict(result))
    baselines = all_baselines(problem.data, problem.dequantizer, session.config.seed) if problem.dequantizer else None
    exact = exact_likelihood(session, model, log_prob) if problem.data.density else None
    run.note(baselines={name: asdict(b) for name, b in (baselines or {}).items()}, exact=exact)
    session.say(report.likelihood(result, baselines, exact))
    if baselines:
        beside = {name: (b.bits_per_dim, b.stderr) for name, b in baselines.items()}
        path = run.path("figures", "likelihood.png")
        session.figures.append(pictures.figures.audit_bars(result.parts(), beside, result.value, result.stderr, path))


def exact_likelihood(session: Session, model: ScoreModel, log_prob: torch.Tensor) -> dict[str, float]:
    """Mean exact log-density of the same test points, the model's mean excess over it, and the root mean square."""
    density = {name: value.float() for name, value in session.problem.data.density.items()}
    exact = GaussianMixture(**density, sde=model.sde).to(session.device)
    session.figures += pictures.of_density(model, exact, session.run, session.device)
    truth = exact.log_prob(session.problem.data.test[: len(log_prob)].to(session.device)).cpu()
    error = (log_prob - truth).double()
    rms = error.square().mean().sqrt().item()
    return {"mean": truth.double().mean().item(), "gap": error.mean().item(), "rms": rms}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
