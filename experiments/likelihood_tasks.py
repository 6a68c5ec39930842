"""The tasks on a checkpoint's likelihood and its flow: evaluate a split, tell another data set apart, interpolate."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import checkpoint, figures, likelihood_figures, pictures, report
from experiments.audit import Audit, audit, starting_at
from experiments.baselines import all_baselines
from experiments.bounds import Bounds, bounds_table
from experiments.build import NOT_NEGATIVE, POSITIVE, ConfigError, Limit, build, require_all, require_limits
from experiments.data import Data
from experiments.dequantization import Dequantizer
from experiments.dequantizers import check_convention, of_convention
from experiments.estimator import PARTS, Estimator, evaluate
from experiments.known import exact_score
from experiments.metrics import auroc
from experiments.resume import Partial, digest, source_of
from experiments.run import Run, replacing, write_columns
from experiments.session import Session, load_model
from experiments.training_state import flat
from sde import GaussianChain, GaussianSDE, ScoreModel
from solvers import Divergence, ProbabilityFlow, log_likelihood
from solvers.integration import integration

SPLITS = ("train", "validation", "test")
_ODE = ("method", "rtol", "atol", "steps", "coordinates")


def likelihood(config: DictConfig, run: Run) -> None:
    """Evaluate the log-likelihood of a split under a checkpoint, with an audit; an interrupted run can be resumed."""
    session = Session(config, run, resumable=True)
    check_settings(config.likelihood)
    evaluate_likelihood(session, load_model(session), resumable=True)
    session.close()


def out_of_distribution(config: DictConfig, run: Run) -> None:
    """Are the examples of another data set told apart by their likelihood, or by how typical it is?"""
    session = Session(config, run)
    check_settings(config.likelihood)
    other = other_data(session)
    model, estimator = prepared(session, load_model(session))
    split = config.likelihood.split
    reference = "train" if split == "validation" else "validation"
    own = session.problem.data
    sets = {"reference": (own, reference), "test": (own, split), other.name: (other, split)}
    cost = {name: _cost(session, model, estimator, *where) for name, where in sets.items()}
    _compare_costs(session, cost, other.name, reference)
    session.close()


def interpolate(config: DictConfig, run: Run) -> None:
    """Ways between pairs of test examples, along great circles of their latents, and how exact the way back is."""
    session = Session(config, run)
    check_settings(config.likelihood)
    pairs, points = config.interpolate.pairs, config.interpolate.points
    if pairs < 1 or points < 2:
        raise ConfigError(f"interpolate needs pairs >= 1 and points >= 2, found pairs={pairs}, points={points}")
    flow = build_flow(config.likelihood)
    model = load_model(session)
    values = getattr(session.problem.data, config.likelihood.split)[: 2 * pairs]
    if len(values) < 2 * pairs:
        raise ConfigError(
            f"interpolate.pairs={pairs} needs {2 * pairs} examples, found {len(values)}; take fewer pairs"
        )
    x = _as_x(session, values).to(session.device)
    ways = flow.interpolate(model, x[0::2], x[1::2], points)
    back = torch.stack((ways[0] - x[0::2], ways[-1] - x[1::2]))
    _report_ways(session, model, ways, back.square().mean().sqrt().item())
    session.close()


_LIMITS = {
    "split": Limit(lambda value: value in SPLITS, f"be one of {', '.join(SPLITS)}"),
    "batch_size": POSITIVE,
    "ode_subset": NOT_NEGATIVE,
    "samples": Limit(lambda value: value is None or value >= 2, "be at least 2, or null for all"),
}


def check_settings(settings: DictConfig) -> None:
    """Refuse settings of a likelihood that can't work: raises one ``ConfigError`` for all of them."""
    parts = (partial(build_chain, settings), partial(build_divergence, settings), partial(build_flow, settings))
    require_all((partial(require_limits, "likelihood.", settings, _LIMITS), *parts))


def build_divergence(settings: DictConfig) -> Divergence:
    """The estimate of the divergence."""
    found = build(settings.divergence, where="likelihood.divergence")
    if not isinstance(found, Divergence):
        raise ConfigError(f"likelihood.divergence must be a Divergence, found {settings.divergence._target_}")
    return found


def build_chain(settings: DictConfig) -> GaussianChain | None:
    """The chain of ``likelihood.chain``, whose bound is reported too."""
    if settings.chain is None:
        return None
    chain = build(settings.chain, where="likelihood.chain", allowed=("sde.",))
    if not isinstance(chain, GaussianChain):
        raise ConfigError(f"likelihood.chain must be a GaussianChain, found {settings.chain._target_}")
    if settings.decoder is not None and not settings.decoder._target_.endswith(".DiscretizedGaussian"):
        raise ConfigError(
            f"likelihood.decoder={settings.decoder._target_} is for the continuous bound; for likelihood.chain leave "
            "it at null, a DiscretizedGaussian"
        )
    return chain


def check_likelihood(session: Session, sde: GaussianSDE) -> None:
    """Build all that an evaluation under ``sde`` needs, to refuse what can't work before any time is spent."""
    check_settings(session.config.likelihood)
    estimator_of(session, sde)


def dequantizer_of(session: Session, sde: GaussianSDE) -> Dequantizer | None:
    """The one that the settings name, or that of the convention; refused where the model was trained otherwise."""
    settings, bins, convention = session.config.likelihood, session.problem.dequantizer, session.problem.convention()
    if settings.dequantizer is None:
        return of_convention(convention, sde)
    if bins is None:
        raise ConfigError("likelihood.dequantizer is for data of known levels; for continuous ones leave it at null")
    ends = {"levels": bins.levels, "low": bins.low, "high": bins.high}
    found = build(settings.dequantizer, where="likelihood.dequantizer")(sde, **ends)
    check_convention(convention, found, session.problem.data.shape)
    return found


def estimator_of(session: Session, sde: GaussianSDE) -> Estimator:
    """The estimator of the configuration's ``likelihood``, for models under ``sde``."""
    settings = session.config.likelihood
    names = (*_ODE, "draws", "importance", "endpoint_correction")
    options: dict[str, Any] = {name: settings[name] for name in names}
    options["divergence"] = build_divergence(settings)
    if settings.prior is not None:
        x = _as_x(session, session.problem.data.train)
        options["prior"] = build(settings.prior, where="likelihood.prior")(x, sde)
    try:
        return Estimator(dequantizer_of(session, sde), seed=session.config.seed, **options)
    except ValueError as error:
        raise ConfigError(f"likelihood: {error}") from None


def prepared(session: Session, model: ScoreModel) -> tuple[ScoreModel, Estimator]:
    """The model with its data at the configured end of time, and the estimator for it."""
    model = starting_at(model, session.config.likelihood.t_min, dequantizer_of(session, model.sde))
    return model, estimator_of(session, model.sde)


def build_flow(settings: DictConfig) -> ProbabilityFlow:
    """The flow by the ODE settings of a likelihood; by dopri5 in place of the one pass, which knows no way back."""
    try:
        way = integration(True, *(settings[name] for name in _ODE))
        back = ("dopri5", None) if way.method == "one_pass" else (way.method, way.steps)
        return ProbabilityFlow(way.rtol, way.atol, *back, settings.coordinates)
    except ValueError as error:
        raise ConfigError(f"likelihood: {error}") from None


def evaluate_likelihood(session: Session, model: ScoreModel, resumable: bool = False) -> Audit:
    """The audit of the configured split: tables, files and pictures, beside baselines or the exact value."""
    problem, run, settings = session.problem, session.run, session.config.likelihood
    session.diagnose(model.sde)
    model, estimator = prepared(session, model)
    values = getattr(problem.data, settings.split)[: settings.samples]
    keeper = keeper_of(session) if resumable else None
    options = {"ode_subset": settings.ode_subset, "batch_size": settings.batch_size, "progress": None}
    found = audit(model, values, estimator, keeper=keeper, **options)
    write_examples(session, found)
    if keeper:
        keeper.remove()
    baselines, exact = None, None
    if problem.dequantizer and settings.split == "test" and settings.baselines:
        baselines = all_baselines(problem.data, problem.dequantizer, session.config.seed)
    if problem.data.density:
        exact = exact_likelihood(session, model, values, found.examples.log_prob)
    beside = {name: asdict(b) for name, b in (baselines or {}).items()}
    run.note(likelihood=found.summary() | {"split": settings.split}, baselines=beside, exact=exact)
    session.say(report.likelihood(found, settings.split, baselines, exact))
    if problem.data.standardization:
        log_det = problem.data.log_det
        run.note(original_units={"log_prob": found.value + log_det, "stderr": found.stderr, "log_det": log_det})
        session.say(report.original_units(found.value, found.stderr, log_det))
    if settings.bounds is not None or settings.chain is not None:
        bounds = bounds_of(session, model, estimator, values, found)
        run.note(bounds=[asdict(row) for row in bounds.rows])
        session.say(bounds.text())
    draw(session, found, values)
    if baselines:
        bars = {name: (b.bits_per_dim, b.stderr) for name, b in baselines.items()}
        path = run.path("figures", "likelihood.png")
        session.figures.append(figures.audit_bars(found.parts(), bars, found.value, found.stderr, path))
    return found


def bounds_of(session: Session, model: ScoreModel, estimator: Estimator, values: Tensor, found: Audit) -> Bounds:
    """The continuous bound, those of chains of ``likelihood.bounds`` steps and ``likelihood.chain``, beside the flow's.

    For the same draw of dequantized data; for models of bin centres, of the centres, by a discretized Gaussian.
    """
    settings, bins, done = session.config.likelihood, estimator.dequantizer, found.examples
    chain = build_chain(settings)
    options: dict[str, Any] = {"seed": session.config.seed, "batch_size": settings.batch_size}
    options |= {"chains": [chain] if chain else [], "variance": settings.variance}
    if bins is None:
        x0, options["flow_log_prob"] = values, done.log_prob
    elif bins.trained_on == "centres":
        x0, options["flow"] = bins.centres(values), (found.value, found.stderr)
        decoder = settings.decoder or {"_target_": "solvers.DiscretizedGaussian", "_partial_": True}
        options["decoder"] = build(decoder, where="likelihood.decoder")(bins.levels, bins.low, bins.high)
    else:
        x0, options["bin_width"] = bins.draw(values, session.config.seed).x, bins.bin_width
        if estimator.draws == 1:
            options["flow_log_prob"] = done.log_prob - done.dequantization
        else:
            options["flow"] = (found.value, found.stderr)
    return bounds_table(model, x0.to(session.device), chain_steps=tuple(settings.bounds or ()), **options)


def keeper_of(session: Session) -> Partial:
    """Where the evaluation keeps what it has, begun from what ``resume`` says."""
    config, run = session.config, session.run
    whole = OmegaConf.to_container(config, resolve=True)  # whose parts may refer to others
    settings = flat({name: whole[name] for name in ("likelihood", "data", "under", "seed")})
    settings.pop("likelihood.ode_subset")  # which is a pass of its own
    settings["checkpoint"] = digest(checkpoint.find(config.checkpoint))
    run.path("likelihood", "examples.csv")  # makes the folder
    return Partial(run.partial, settings, source_of(config.resume, run.partial))


def write_examples(session: Session, found: Audit) -> None:
    """Each example's parts, nats, value and label: ``likelihood/examples.npz`` and ``.csv``."""
    data, split = session.problem.data, session.config.likelihood.split
    columns = {"index": torch.arange(found.n), "log_prob": found.examples.log_prob}
    columns |= {name: getattr(found.examples, name) for name in PARTS}
    if found.unit == "bits/dim":
        columns["bits_per_dim"] = found.per_example()["value"]
    if data.labels:
        columns["label"] = data.labels[split][: found.n]
    columns |= {name: value for name, value in found.examples.arrays().items() if name not in columns}
    arrays = {name: value.numpy() for name, value in columns.items()}
    with replacing(session.run.path("likelihood", "examples.npz")) as file:
        np.savez(file, **arrays)
    write_columns(session.run.path("likelihood", "examples.csv"), columns)


def draw(session: Session, found: Audit, values: Tensor) -> None:
    """The distribution over the examples, and the most and the least likely of them."""
    problem, run, split = session.problem, session.run, session.config.likelihood.split
    value = found.per_example()["value"]
    label = "bits per dimension" if found.unit == "bits/dim" else "log-density (nats)"
    path = run.path("figures", "likelihood_histogram.png")
    session.figures.append(likelihood_figures.histogram({f"{split} split": value}, label, path))
    path = run.path("figures", "likelihood_extremes.png")
    if pictures.is_image(problem) and found.n > 1:
        grey = 2 * values.double() / (problem.data.levels - 1) - 1
        session.figures.append(likelihood_figures.extreme_images(grey, value, found.unit, path))
    if pictures.is_plane(problem) and found.unit == "nats":
        session.figures.append(likelihood_figures.extreme_points(values, value, label, path))


def exact_likelihood(session: Session, model: ScoreModel, values: Tensor, log_prob: Tensor) -> dict[str, float]:
    """Mean exact log-density of the same points, the model's mean excess over it, and the root mean square."""
    exact = exact_score(session.problem.data, model.sde).to(session.device)
    session.figures += pictures.of_density(model, exact, session.run, session.device)
    truth = exact.log_prob(values.to(session.device)).cpu().double()
    error = log_prob - truth
    return {"mean": truth.mean().item(), "gap": error.mean().item(), "rms": error.square().mean().sqrt().item()}


def other_data(session: Session) -> Data:
    """The data set that ``ood.against`` names; refused where its examples are no examples for this model."""
    if session.config.ood.against is None:
        raise ConfigError("task=ood needs another data set: data@ood.against=digits_inverted, or your own group file")
    other, own = build(session.config.ood.against, where="ood.against"), session.problem.data
    if (other.shape, other.levels) != (own.shape, own.levels):
        here, there = (f"shape {data.shape}, levels {data.levels}" for data in (own, other))
        raise ConfigError(
            f"ood.against: needs examples of {here}, as the model's, found {there}; choose another data set"
        )
    return other.in_units_of(own)


def _cost(session: Session, model: ScoreModel, estimator: Estimator, data: Data, split: str) -> Tensor:
    """What each example costs: bits/dim, or minus nats for continuous data; ``(N,)``."""
    settings = session.config.likelihood
    values = getattr(data, split)[: settings.samples]
    done = evaluate(model, values, estimator, settings.batch_size, progress=None)
    unit = values[0].numel() * np.log(2) if estimator.dequantizer else 1.0
    return -done.log_prob / unit


def _compare_costs(session: Session, cost: dict[str, Tensor], other: str, reference: str) -> None:
    """AUROC of the cost and of its distance from the reference's mean: table, picture, file."""
    run, centre = session.run, cost.pop("reference").mean()
    unit = "bits/dim" if session.problem.dequantizer else "-log p (nats)"
    scores = {unit: cost, f"typicality |{unit} - mean|": {name: (c - centre).abs() for name, c in cost.items()}}
    found = {label: auroc(groups[other], groups["test"]) for label, groups in scores.items()}
    titles = {label: f"AUROC {area:.3f} ± {stderr:.3f}" for label, (area, stderr) in found.items()}
    path = run.path("figures", "ood.png")
    session.figures.append(likelihood_figures.out_of_distribution(scores, titles, path))
    with replacing(run.path("likelihood", "ood.npz")) as file:
        np.savez(file, **{"test": cost["test"].numpy(), "other": cost[other].numpy()})
    means = {name: c.mean().item() for name, c in cost.items()}
    areas = {label: {"auroc": area, "stderr": stderr} for label, (area, stderr) in found.items()}
    run.note(
        ood={"against": other, "reference": reference, "reference_mean": centre.item(), "means": means, "scores": areas}
    )
    session.say(report.out_of_distribution(unit, means, found, other, (reference, centre.item())))


def _report_ways(session: Session, model: ScoreModel, ways: Tensor, rmse: float) -> None:
    """The picture and the file of interpolations, and what was measured on them."""
    problem, run, config = session.problem, session.run, session.config
    np.save(run.path("samples", "interpolation.npy"), ways.cpu().numpy())
    path, found = run.path("figures", "interpolation.png"), {"pairs": ways.shape[1], "points": len(ways), "rmse": rmse}
    if pictures.is_image(problem):
        session.figures.append(likelihood_figures.interpolated_images(ways.clamp(-1, 1), path))
    if pictures.is_plane(problem):
        session.figures.append(likelihood_figures.interpolated_points(ways, path, problem.data.test))
    lines = [f"{ways.shape[1]} pairs of examples, {len(ways)} points on each way between them"]
    lines.append(f"  encoded and decoded again, the ends are off by {rmse:.2g} (root mean square, in units of x)")
    if config.interpolate.log_prob:
        options = {name: config.likelihood[name] for name in _ODE}
        divergence = build_divergence(config.likelihood)
        log_prob = log_likelihood(model, ways.flatten(0, 1), divergence, **options).log_prob
        found["log_prob"] = log_prob.unflatten(0, ways.shape[:2]).mean(1).tolist()
        lines.append(f"  mean log p(x) along the ways, nats: {', '.join(f'{v:.1f}' for v in found['log_prob'])}")
    run.note(interpolation=found)
    session.say("\n".join(lines))


def _as_x(session: Session, values: Tensor) -> Tensor:
    """As training sees them."""
    return session.problem.x(values, torch.Generator().manual_seed(session.config.seed))
