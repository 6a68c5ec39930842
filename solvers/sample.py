"""Samples along the probability flow together with their log-densities, from one integration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sde import ScoreField
from solvers.base import Output, starting_noise
from solvers.calls import counting
from solvers.divergence import Divergence, default_divergence
from solvers.integration import AlongODE
from solvers.likelihood import Likelihood, LogProb, frozen
from solvers.probability_flow import ProbabilityFlow


@dataclass(frozen=True)
class Sampled(Output):
    """Samples, and where it was asked for their ``likelihood``, whose ``latent`` is the noise that they come from."""

    likelihood: Likelihood | None = None

    @property
    def log_prob(self) -> Tensor | None:
        """Nats, ``(B,)``."""
        return self.likelihood and self.likelihood.log_prob


def sample(
    model: ScoreField,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    return_log_prob: bool = False,
    divergence: Divergence | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    coordinates: str = "auto",
    prior: LogProb | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Sampled:
    """Draw samples by the probability-flow ODE; with ``return_log_prob`` their densities by the same integration.

    Parameters as for ``ProbabilityFlow``, its call, and ``log_likelihood``. The same noise gives the same samples, with
    densities or without, up to the tolerances.

    Raises ``ODEError`` when the integration fails.
    """
    solver = ProbabilityFlow(rtol, atol, method, steps, coordinates)
    if not return_log_prob:
        out = solver(model, shape, seed, x_T, device, dtype)
        return Sampled(out.x, out.nfe)
    solver.check_model(model)
    x_T, sde = starting_noise(model, shape, seed, x_T, device, dtype), model.sde
    way, divergence = AlongODE(method, rtol, atol, steps, coordinates), divergence or default_divergence(x_T)
    with torch.no_grad(), frozen(model), counting(model) as calls:
        x, back = way.between(model, x_T, sde.t_max, sde.t_min, divergence, divergence.directions(x_T))
        log_prior = (prior or sde.prior(x_T.shape).log_prob)(x_T)
    change, stderr = divergence.summary(-back)
    return Sampled(x, calls.n, likelihood=Likelihood(log_prior + change, log_prior, change, x_T, calls.n, stderr))
