r"""Bits per dimension with an audit: what the number is made of, and how well each part of it is known.

    bits/dim = -log P / (D log 2)

of integer levels in D dimensions, with the bounds on log P of ``experiments.estimator``: an upper bound. Continuous
data have no bits per dimension; their log-density is in nats, with the same parts.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.dequantization import Dequantizer
from experiments.dequantizers import check_convention, of_convention
from experiments.estimator import PARTS, Estimator, Examples, Keeper, evaluate
from experiments.report import table
from sde import GaussianSDE, ScoreModel
from sde.diagnosis import TRUNCATION_BOUND, DiagnosisWarning, truncation
from solvers import Divergence
from solvers.divergence import default_divergence
from solvers.ode import ODEError


@dataclass(frozen=True, eq=False)
class Audit:
    """The mean likelihood of ``n`` examples: bits/dim, lower is better, or nats for continuous data, higher is better.

    value = prior + divergence + dequantization + endpoint + importance (see ``Examples``). Its errors, in its unit:

    stderr: standard error over the examples, which holds the chance of probes and draws; None for one example.
    stderr_probes, stderr_draws: the parts of it from the divergence's probes and from the dequantizer's draws (each
        with its own probes); None where a single one leaves it unknown.
    ode_error, ode_rms: mean and root mean square, over the first ``ode_subset`` examples, of the difference to a pass
        of ten times smaller tolerances, or twice the steps, with the same draws and probes; None where there is none.
    truncation: how much the noise at t_min can cost at most, contained in value; None where there is no such bound.

    nfe: mean calls of the model for one example, all draws together. ``notes``: what a reader must know, in sentences.
    """

    unit: str
    value: float
    stderr: float | None
    prior: float
    divergence: float
    dequantization: float
    endpoint: float
    importance: float
    stderr_probes: float | None
    stderr_draws: float | None
    ode_error: float | None
    ode_rms: float | None
    ode_subset: int
    truncation: float | None
    n: int
    dimensions: int
    nfe: float
    sde: str
    t_min: float
    protocol: dict[str, Any]
    notes: tuple[str, ...]
    examples: Examples

    def parts(self) -> dict[str, float]:
        """The parts that sum to ``value``; those of the last two that play no role are left out."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: value for name, value in found.items() if value or name in PARTS[:3]}

    def per_example(self) -> dict[str, Tensor]:
        """Value and parts of each example, in ``unit``, ``(n,)``."""
        scale = _scale(self.unit, self.dimensions)
        parts = {name: scale * getattr(self.examples, name) for name in PARTS}
        return {"value": scale * self.examples.log_prob} | parts

    def summary(self) -> dict[str, Any]:
        """Plain values, without those of each example."""
        return {name: value for name, value in vars(self).items() if name != "examples"}

    def __str__(self) -> str:
        known = {
            "divergence": _error(self.stderr_probes, "probes", "one probe"),
            "dequantization": _error(self.stderr_draws, "draws and their probes", "one draw"),
        }
        if self.unit == "nats":
            known["dequantization"] = ""
        rows = [(name, f"{value:+.4f}", known.get(name, "")) for name, value in self.parts().items()]
        rows.append(("total", f"{self.value:.4f}", _error(self.stderr, f"{self.n} examples", "one example")))
        if self.ode_error is not None:
            rows.append(
                ("ODE error", f"{self.ode_error:+.4f}", f"RMS {self.ode_rms:.4f} on {self.ode_subset} examples")
            )
        if self.truncation is not None:
            rows.append(("noise at t_min", f"{self.truncation:.4f}", "at most, contained in the total"))
        p = self.protocol
        how = [f"{self.sde}; {p['ode']}; {p['divergence']}; {self.nfe:.0f} NFE"]
        if self.unit != "nats":
            how.append(f"{p['dequantization']}, {p['draws']} draw{'s' * (p['draws'] > 1)}, {p['bound']} bound")
        lines = [table(("part", self.unit, "standard error"), rows), *how, *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)


def _error(stderr: float | None, of: str, unknown: str) -> str:
    return f"unknown ({unknown})" if stderr is None else f"± {stderr:.4f} ({of})"


def _scale(unit: str, dimensions: int) -> float:
    """From nats to the unit; bits/dim count downwards from the log-density."""
    return 1.0 if unit == "nats" else -1 / (dimensions * math.log(2))


def audit(
    model: ScoreModel,
    values: Tensor,
    estimator: Estimator,
    *,
    ode_subset: int = 32,
    batch_size: int = 256,
    first: int = 0,
    keeper: Keeper | None = None,
    progress: bool | None = False,
) -> Audit:
    """The likelihood of ``values`` ``(N, ...)``, levels or points in units of x, with its parts and their errors."""
    done = evaluate(model, values, estimator, batch_size, first, keeper, progress)
    dimensions, unit = values[0].numel(), "bits/dim" if estimator.dequantizer else "nats"
    scale, notes = _scale(unit, dimensions), _notes(estimator, done)
    errors, excuse = _ode_errors(model, values[:ode_subset], estimator, batch_size, first, done)
    errors = None if errors is None else scale * errors
    total, parts = scale * done.log_prob, {name: (scale * getattr(done, name)).mean().item() for name in PARTS}
    return Audit(
        unit=unit,
        value=total.mean().item(),
        stderr=total.std().item() / len(done) ** 0.5 if len(done) > 1 else None,
        **parts,
        stderr_probes=_of_mean(done.stderr_probes, scale),
        stderr_draws=_of_mean(done.stderr_draws, scale),
        ode_error=None if errors is None else errors.mean().item(),
        ode_rms=None if errors is None else errors.square().mean().sqrt().item(),
        ode_subset=0 if errors is None else len(errors),
        truncation=_truncation(model.sde, estimator),
        n=len(done),
        dimensions=dimensions,
        nfe=done.nfe.double().mean().item(),
        sde=str(model.sde),
        t_min=model.sde.t_min,
        protocol=estimator.describe(),
        notes=(*notes, *excuse),
        examples=done,
    )


def _of_mean(stderr: Tensor | None, scale: float) -> float | None:
    """The error of a mean of independent numbers from the error of each."""
    return None if stderr is None else abs(scale) * stderr.square().sum().sqrt().item() / len(stderr)


def _truncation(sde: GaussianSDE, estimator: Estimator) -> float | None:
    counts = bounded_by_noise(estimator.dequantizer) and not estimator.endpoint_correction
    return truncation(sde, estimator.dequantizer.bin_width) if counts else None


def _notes(estimator: Estimator, done: Examples) -> tuple[str, ...]:
    exact = done.stderr_probes is not None and not bool(done.stderr_probes.any())
    if not estimator.importance or exact:
        return ()
    return (
        "random probes raise an importance-weighted value, by up to half their variance in nats: it is a bound only "
        "without them (Exact) or where their error is far below one nat per example",
    )


def _ode_errors(
    model: ScoreModel, values: Tensor, estimator: Estimator, batch_size: int, first: int, done: Examples
) -> tuple[Tensor | None, tuple[str, ...]]:
    """log_prob as found minus that of a tighter pass, ``(M,)``, nats; and what is to be said where there is none."""
    if not len(values):
        return None, ()
    try:
        tight = evaluate(model, values, estimator.tighter(), batch_size, first)
    except ODEError as error:
        return None, (f"the ODE's error is unknown: the tighter pass failed ({error})",)
    return done.head(len(values)).log_prob - tight.log_prob, ()


def bits_per_dim(
    model: ScoreModel,
    images: Tensor,
    dequantizer: Dequantizer | None = None,
    *,
    draws: int = 1,
    importance: bool = False,
    divergence: Divergence | None = None,
    method: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    coordinates: str = "auto",
    prior: Callable[[Tensor], Tensor] | None = None,
    endpoint_correction: bool = False,
    t_min: float | str | None = None,
    ode_subset: int = 32,
    batch_size: int = 256,
    seed: int = 0,
    first: int = 0,
    convention: dict[str, Any] | None = None,
    progress: bool = False,
    quiet: bool = False,
) -> Audit:
    """Bits per dimension of ``images``, integer levels ``(N, ...)``: an upper bound, with its parts and their errors.

    Parameters
    ----------
    dequantizer: None for the one that goes with ``convention``: ``Uniform``, or ``TruncatedNormal`` for centres.
    draws, importance: of the dequantizer; the mean of log-weights, or the importance-weighted bound over all draws.
    divergence: None for ``Exact()`` up to 8 dimensions, and two random probes beyond.
    method, rtol, atol, steps, coordinates, prior, endpoint_correction: as for ``log_likelihood``.
    t_min: where the data are taken to be: None - the model's; a time; "auto" (see ``starting_at``).
    ode_subset: examples that are evaluated again to see the ODE's error; 0 for none.
    seed, first: of the draws, and the number of the first image, which decides its draws and probes.
    convention: of the data, as ``experiments.checkpoint.load`` gives it, to be held against images and dequantizer.
    quiet: do not print the audit.

    Raises ``ValueError`` for data that are not integer levels, and for another convention than the model's.
    """
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(
            f"images: bits/dim exists only for data declared discrete, integer levels (N, ...), found {images.dtype}; "
            "give the levels themselves, or take log_likelihood for the density of continuous data"
        )
    if images.dim() < 2 or not len(images):
        raise ValueError(f"images: expected levels (N, ...) of N >= 1 examples, found shape {tuple(images.shape)}")
    dequantizer = dequantizer or _needed(convention, model.sde)
    if convention is not None:
        check_convention(convention, dequantizer, tuple(images.shape[1:]))
    divergence = divergence or default_divergence(images)
    ode = (method, rtol, atol, steps, coordinates, prior, endpoint_correction)
    estimator = Estimator(dequantizer, draws, importance, divergence, *ode, seed)
    model = starting_at(model, t_min, dequantizer)
    options = {"ode_subset": ode_subset, "batch_size": batch_size, "first": first, "progress": progress}
    found = audit(model, images, estimator, **options)
    if not quiet:
        print(found)
    return found


def _needed(convention: dict[str, Any] | None, sde: GaussianSDE) -> Dequantizer:
    """The dequantizer of a convention, which must be there and of discrete data."""
    if (found := of_convention(convention, sde) if convention else None) is None:
        raise ValueError(
            "dequantizer: needed to turn levels into x; give the one of the training data, such as "
            "Uniform(levels=256), or convention= of a checkpoint for discrete data"
        )
    return found


def bounded_by_noise(dequantizer: Dequantizer | None) -> bool:
    """Whether ``sde.diagnosis.truncation`` bounds what the noise at t_min costs: for x drawn free of it."""
    return dequantizer is not None and dequantizer.trained_on == "uniform"


def starting_at(model: ScoreModel, t_min: float | str | None, dequantizer: Dequantizer | None) -> ScoreModel:
    """``model`` with its data at ``t_min``, by ``ScoreModel.under`` the same process with that end; None leaves it.

    "auto" is the latest time at which the noise costs uniformly dequantized data no more than ``TRUNCATION_BOUND``
    bits/dim, and the model's own t_min, with a ``DiagnosisWarning``, where none does: a model knows nothing of less
    noise than it was trained on. Raises ``ValueError`` for such a time.
    """
    if t_min is None:
        return model
    if not is_dataclass(model.sde) or "t_min" not in {f.name for f in fields(model.sde)}:
        raise ValueError(f"t_min={t_min!r}: {model.sde} has no t_min of its own to choose; leave it at None")
    if t_min == "auto":
        return model.under(replace(model.sde, t_min=_latest(model.sde, dequantizer)))
    if isinstance(t_min, str):
        raise ValueError(f"t_min: expected a time, 'auto' or None, found {t_min!r}")
    return model.under(replace(model.sde, t_min=float(t_min)))


def _latest(sde: GaussianSDE, dequantizer: Dequantizer | None) -> float:
    if not bounded_by_noise(dequantizer):
        found = "continuous data" if dequantizer is None else type(dequantizer).__name__
        raise ValueError(f"t_min='auto' goes by the bins of uniform dequantization, found {found}; give a time or None")

    def cost(t: float) -> float:
        return truncation(replace(sde, t_min=t), dequantizer.bin_width)

    low, high = sde.t_min, sde.t_max
    if cost(low) > TRUNCATION_BOUND:
        says = f"t_min='auto': the noise at {low:g}, the least that the model knows, can cost {cost(low):.3g} bits/dim"
        warnings.warn(f"{says}, more than {TRUNCATION_BOUND:g}; train it with less", DiagnosisWarning, stacklevel=4)
        return low
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if cost(middle) <= TRUNCATION_BOUND else (low, middle)
    return max(sde.t_min, float(f"{0.995 * low:.3g}"))  # a number to read, and not beyond
