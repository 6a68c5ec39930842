r"""Exact log-likelihood along the probability-flow ODE (Song et al., 2021, section 4.3 and appendix D.2).

    log p(x) = log p_T(x_T) + integral over [t_min, t_max] of div v(x_t, t) dt,        dx/dt = v(x, t)

by the instantaneous change of variables (Chen et al., "Neural ODEs", 2018). One forward pass gives velocity and
divergence together. The number is the density that the flow of the model itself assigns: it integrates to one whatever
the network, once solver error and the probes' error are small.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde import ScoreField, ScoreModel
from solvers.base import counting
from solvers.divergence import Divergence, Exact
from solvers.flow import check_coordinates, flow
from solvers.ode import integrate


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods and their parts; nats, ``(B,)``.

    log_prob = prior + change (+ endpoint). ``prior``: log p_T of the latent. ``change``: the integrated divergence.
    ``latent``: x_T. ``endpoint``: the correction from t_min to clean data, if asked for. ``nfe``: calls of the model,
    each giving velocity and divergence together. ``stderr``: standard error of the divergence's estimate; zero when it
    is exact, None for a single probe, whose error can't be seen from one sample.
    """

    log_prob: Tensor
    prior: Tensor
    change: Tensor
    latent: Tensor
    nfe: int
    stderr: Tensor | None
    endpoint: Tensor | None = None


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
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    endpoint_correction: bool = False,
    coordinates: str = "auto",
    first: int = 0,
) -> Likelihood:
    """Log-density of data ``x`` of shape ``(B, ...)`` under the flow of ``model``.

    Parameters
    ----------
    divergence: ``Exact()`` by default, or ``Hutchinson(probes=...)``.
    method, rtol, atol, steps, coordinates: as for ``ProbabilityFlow``; the tolerances hold for every sample and for its
        log-density.
    prior: log-density x_T -> ``(B,)`` in place of that of the SDE's prior.
    endpoint_correction: ``x`` is taken as clean data, and the density at t_min is carried on to zero noise by
        log p_0 = log p_s - (s^2 / 2) (div score + |score|^2), s = sigma / alpha, in data units (the heat equation to
        first order in s^2; one more call). Without it ``x`` is taken as a sample at t_min, as is usual.
    first: number of the first sample, for data that are evaluated in parts: it decides their random probes.

    Raises ``ODEError`` when the integration fails.
    """
    check_coordinates(coordinates)
    if (endpoint_correction or coordinates == "angle") and not isinstance(model, ScoreModel):
        raise TypeError(
            f"coordinates='angle' and endpoint_correction need a ScoreModel under a GaussianSDE, found "
            f"{type(model).__name__}; use coordinates='time' without the correction"
        )
    divergence, sde = divergence or Exact(), model.sde
    directions = divergence.directions(x, first)
    with torch.no_grad(), frozen(model), counting(model) as calls:
        start, offset = _endpoint(model, x, divergence, directions) if endpoint_correction else (x, None)
        path = flow(coordinates, model)

        def slopes(reading: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return divergence.along(lambda w: path.slope(w, reading), state[0], directions)

        ends, nothing = (sde.t_min, sde.t_max), x.new_zeros(len(x), divergence.count(x))
        readings, (scale, last_scale) = map(path.reading, ends), map(path.scale, ends)
        state = (start / scale, nothing)
        latent, change = integrate(slopes, state, *readings, method, rtol, atol, steps, time=path.time)
        latent = latent * last_scale
        # The state's density is x's times scale^D.
        change = change + x[0].numel() * math.log(last_scale / scale)
        log_prior = (prior or sde.prior(x.shape).log_prob)(latent)
    mean, stderr = divergence.summary(change if offset is None else change + offset)
    change, endpoint = divergence.summary(change)[0], None if offset is None else divergence.summary(offset)[0]
    return Likelihood(log_prior + mean, log_prior, change, latent, calls.n, stderr, endpoint)


def _endpoint(model: ScoreModel, x: Tensor, divergence: Divergence, directions: Tensor) -> tuple[Tensor, Tensor]:
    """alpha x, and the estimates ``(B, E)`` of log p_0(x) - log p_t(alpha x) at t = t_min."""
    t = torch.tensor(model.sde.t_min).to(x)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    score, trace = divergence.along(lambda y: model.score(y, t), alpha * x, directions)
    squared = score.square().flatten(1).sum(1, keepdim=True)
    return alpha * x, x[0].numel() * alpha.log() - 0.5 * sigma.square() * (trace + squared)
