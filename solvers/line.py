r"""The density by a straight line instead of a flow: exact for exact scores, and a measure of what a learned one lacks.

The identity of ``solvers.one_pass`` holds on any path. On that of constant w = x / sqrt(alpha^2 + sigma^2) no state
depends on another:

    log p_0(w) = log p_1(w) + integral over [v_0, v_1] of div F + S.F dv,

by Gauss and Legendre's rule in v; all points are known beforehand. With an exact score 20 points give 1e-5 on mixtures,
where an ODE needs 150 calls. A learned score is the gradient of no density: this number is then neither normalised nor
the density of the model's flow, from which it departs by about what the model itself is wrong by, and its mean can
exceed the truth. So it is never a model's likelihood; its departure from that is a measure of the score's consistency.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde import ScoreModel
from sde.base import require_count
from solvers.divergence import Divergence, default_divergence
from solvers.flow import RatioFlow
from solvers.likelihood import frozen, log_likelihood
from solvers.one_pass import ask
from solvers.spectral import gauss_legendre


def line_likelihood(
    model: ScoreModel,
    x: Tensor,
    nodes: int = 20,
    divergence: Divergence | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """log p at t_min of ``x`` ``(B, ...)`` under an *exact* score, nats, ``(B,)``, from ``nodes`` calls.

    For learned scores see ``inconsistency`` and the module's docstring. ``divergence``, ``prior`` and ``first`` as for
    ``log_likelihood``. Raises ``TypeError`` for a model without the pair (x_0, eps).
    """
    if not isinstance(model, ScoreModel):
        raise TypeError(f"line_likelihood needs a ScoreModel under a GaussianSDE, found {type(model).__name__}")
    require_count(nodes, "line_likelihood: nodes")
    divergence, flow, sde = divergence or default_divergence(x), RatioFlow(model), model.sde
    ends, scales = [flow.reading(t) for t in (sde.t_min, sde.t_max)], [flow.scale(t) for t in (sde.t_min, sde.t_max)]
    places, weights = gauss_legendre(nodes)
    half = 0.5 * (ends[1] - ends[0])
    readings, weights = (ends[0] + half * (places + 1)).to(x.device), half * weights
    w, directions = x / scales[0], divergence.directions(x, first)
    total = x.new_zeros(len(x), dtype=torch.float64)
    with torch.no_grad(), frozen(model):
        for reading, weight in zip(readings, weights.tolist(), strict=True):
            said = ask(flow, w, flow.time(reading), reading, divergence, directions)
            along = (said.score.double() * said.slope.double()).flatten(1).sum(1)
            total = total + weight * (divergence.summary(said.traces)[0].double() + along)
        log_prior = (prior or sde.prior(x.shape).log_prob)(w * scales[1])
    stretch = x[0].numel() * math.log(scales[1] / scales[0])
    return (log_prior + total + stretch).to(x)


def inconsistency(model: ScoreModel, x: Tensor, divergence: Divergence | None = None, nodes: int = 50) -> Tensor:
    """Line less flow, nats, ``(B,)``: 0 where the score is the gradient of a density that diffuses as it should.

    Both from the same probes; ``nodes`` calls for the line, and 100 for the flow (``log_likelihood``).
    """
    flow = log_likelihood(model, x, divergence)
    return line_likelihood(model, x, nodes, divergence) - flow.log_prob
