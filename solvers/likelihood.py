r"""Exact log-likelihood along the probability-flow ODE (Song et al., 2021, section 4.3 and appendix D.2).

    log p(x) = log p_T(x_T) + integral over [t_min, t_max] of div v(x_t, t) dt,        dx/dt = v(x, t)

by the instantaneous change of variables (Chen et al., "Neural ODEs", 2018). One forward pass gives velocity and
divergence together. The number is the density that the flow of the model itself assigns: it integrates to one whatever
the network, once solver error and the probes' error are small.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sde import Noise, ScoreField, ScoreModel, of_samples
from sde.base import require_count
from solvers.calls import counting
from solvers.compiled import Compiled
from solvers.divergence import Divergence, default_divergence
from solvers.endpoint import check_endpoint, endpoint, endpoint_bias
from solvers.integration import Integration, LogProb, integration


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods and their parts; nats, ``(B,)``.

    log_prob = prior + change (+ endpoint). ``prior``: log p_T of the latent. ``change``: the integrated divergence.
    ``latent``: x_T. ``endpoint``: the correction from t_min to clean data, if asked for. ``nfe``: calls of the model,
    each giving velocity and divergence together; for data in parts, the most for any. ``stderr``: standard error of the
    divergence's estimate; zero when it is exact, None for a single probe, whose error can't be seen from one sample.
    ``error``: an estimate of the integration's error, on the safe side; None where the method has none of its own (see
    ``solver_error``). ``endpoint_bias``: of mean 0 where the score is accurate enough for the correction.
    """

    log_prob: Tensor
    prior: Tensor
    change: Tensor
    latent: Tensor
    nfe: int
    stderr: Tensor | None
    endpoint: Tensor | None = None
    error: Tensor | None = None
    endpoint_bias: Tensor | None = None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients to the parameters, which a divergence does not need, while the context is open."""
    learned = [p for p in module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def log_likelihood(
    model: ScoreField,
    x: Tensor,
    divergence: Divergence | None = None,
    method: str | Integration | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    prior: LogProb | None = None,
    endpoint_correction: bool | int = False,
    coordinates: str = "auto",
    first: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    compile: bool = False,
    gradients: bool = False,
    max_steps: int = 10_000,
) -> Likelihood:
    """Log-density of data ``x`` of shape ``(B, ...)`` under the flow of ``model``.

    Parameters
    ----------
    divergence: ``Exact()``, ``Hutchinson(probes=...)`` or ``HutchPlusPlus``; by default exact up to 8 dimensions, and
        two random probes beyond.
    method: "one_pass" with ``steps`` calls (``solvers.one_pass``), by far the most accurate where those are few, with
        an estimate of its error; or those of ``ProbabilityFlow``, such as "dopri5" with ``rtol`` and ``atol``, which
        hold for every sample and for its log-density, or "rk4" with ``steps``. By default "one_pass", with 100 steps
        unless given; "dopri5" where tolerances or coordinates are given, or the process is not Gaussian.
    rtol, atol: of adaptive methods, 1e-5 unless given. ``coordinates``, ``max_steps``: as for ``ProbabilityFlow``.
    prior: log-density x_T -> ``(B,)`` in place of that of the SDE's prior, such as ``matched_prior``.
    endpoint_correction: ``x`` is taken as clean data, and the density at t_min is carried on to zero noise
        (``solvers.endpoint``; two more calls, of which one checks the score); 2: to second order, by a third. Without,
        ``x`` is taken as a sample at t_min, as is usual.
    first: number of the first sample, for data that are evaluated in parts: it decides their random probes.
    batch_size: samples at a time, to bound the memory. ``progress``: show a bar of the model's calls.
    compile: compile the model (``torch.compile``); the products with its Jacobian stay outside.
    gradients: keep the graph, for gradients of the result with respect to ``x`` and to the model's parameters. It
        holds every call's activations.

    Raises ``ODEError`` when the integration fails; ``EndpointWarning`` is issued where the score is too rough at t_min.
    """
    way = integration(isinstance(model, ScoreModel), method, rtol, atol, steps, coordinates, max_steps)
    _check(model, way, endpoint_correction, batch_size)
    task = _Task(way, divergence or default_divergence(x), prior, endpoint_correction)
    parts, done, number = x.split(batch_size or max(1, len(x))), [], first
    bar = tqdm(desc="log-likelihood", unit="call", leave=False, disable=not progress)
    with torch.set_grad_enabled(gradients), frozen_unless(gradients, model), bar:
        for part in parts:
            run = of_samples(model, Noise(0, number), len(part))
            run = Compiled(run) if compile else run
            with counting(run, bar) as calls:
                found = task.of(run, part, number)
            done.append((found, calls.n))
            number += len(part)
    found = _joined(done)
    if endpoint_correction:
        check_endpoint(found.endpoint_bias, found.endpoint.detach())
    return found


@contextmanager
def frozen_unless(gradients: bool, module: nn.Module) -> Iterator[None]:
    """``frozen``, unless gradients to the parameters are wanted."""
    if gradients:
        yield
    else:
        with frozen(module):
            yield


@dataclass(frozen=True)
class _Task:
    """What is done with each part of the data."""

    way: Integration
    divergence: Divergence
    prior: LogProb | None
    endpoint_correction: bool | int

    def of(self, model: ScoreField, x: Tensor, first: int) -> dict[str, Tensor | None]:
        """The tensors of a ``Likelihood``."""
        divergence, directions = self.divergence, self.divergence.directions(x, first)
        start, offset, bias = x, None, None
        if self.endpoint_correction:
            start, offset = endpoint(model, x, divergence, directions, int(self.endpoint_correction))
            bias = endpoint_bias(model, x, first)
        prior = self.prior or model.sde.prior(x.shape).log_prob
        (latent, estimates), error = self.way.forward(model, start, divergence, directions, prior)
        log_prior = prior(latent)
        mean, stderr = divergence.summary(estimates if offset is None else estimates + offset)
        change = divergence.summary(estimates)[0]
        parts = {"log_prob": log_prior + mean, "prior": log_prior, "change": change, "latent": latent}
        parts["endpoint"] = None if offset is None else divergence.summary(offset)[0]
        return parts | {"stderr": stderr, "error": error, "endpoint_bias": bias}


def _check(model: ScoreField, way: Integration, endpoint_correction: bool | int, batch_size: int | None) -> None:
    if endpoint_correction not in (False, True, 2):
        raise ValueError(f"endpoint_correction must be False, True (first order) or 2, found {endpoint_correction!r}")
    if (endpoint_correction or way.needs_pair) and not isinstance(model, ScoreModel):
        asked = (
            "endpoint_correction" if endpoint_correction else f"method={way.method!r}, coordinates={way.coordinates!r}"
        )
        raise TypeError(
            f"{asked} needs a ScoreModel under a GaussianSDE, found {type(model).__name__}; "
            "use coordinates='time' without the correction"
        )
    if batch_size is not None:
        require_count(batch_size, "batch_size")


def _joined(parts: list[tuple[dict[str, Tensor | None], int]]) -> Likelihood:
    names = [field.name for field in fields(Likelihood) if field.name != "nfe"]
    columns = {name: [part[name] for part, _ in parts] for name in names}
    whole = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
    return Likelihood(**whole, nfe=max(nfe for _, nfe in parts))
