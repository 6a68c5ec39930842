r"""Denoising score matching (Vincent, 2011; Song et al., 2021, eq. 7).

For x_t = alpha x_0 + sigma eps the score of the kernel is -eps / sigma, and the objective is

    E  lambda(t) / 2  |s(x_t, t) + eps / sigma|^2.

The weighting "simple" (lambda = sigma^2, Ho et al., 2020, eq. 14) is the squared error of the network's own target;
"likelihood" (lambda = g^2, Song et al., "Maximum likelihood training", 2021) integrates over time, up to a constant,
to the Kullback-Leibler divergence that the score's error costs.
"""

import torch
from torch import Tensor

from models.network import ScoreNetwork
from models.objective import Losses, Objective
from models.time_sampling import TimeSampler, UniformTime
from sde.base import expand

WEIGHTINGS = ("simple", "likelihood")


class DenoisingScoreMatching(Objective):
    """Denoising score matching over any SDE and parametrization.

    Parameters
    ----------
    weighting: "simple" - mean over the dimensions of the squared error of the unit row a x_0 + b eps of the model's
        parametrization, at times drawn from ``times``; "likelihood" - an unbiased estimate of the integral over time of
        (g^2 / 2) |score error|^2, nats per dimension, whatever ``times`` is.
    times: distribution of the training times, ``UniformTime()`` by default.
    """

    def __init__(self, weighting: str = "simple", times: TimeSampler | None = None):
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, found {weighting!r}")
        self.weighting, self.times = weighting, times or UniformTime()

    def check(self, model: ScoreNetwork) -> None:
        """Refuse for a schedule that learns any objective but the likelihood bound in time."""
        if model.sde.learns_ends:
            raise ValueError("the ends of the schedule learn, which takes the whole bound: use VariationalDiffusion")
        if model.sde.learned and (self.weighting != "likelihood" or not isinstance(self.times, UniformTime)):
            raise ValueError(
                "the schedule has parameters to learn, whose gradient only weighting='likelihood' with "
                f"times=UniformTime() gives; found weighting={self.weighting!r}, times={self.times}. Choose these, or "
                "sde.requires_grad_(False)"
            )

    def forward(self, model: ScoreNetwork, x0: Tensor, generator: torch.Generator | None = None, **condition) -> Losses:
        self.check(model)
        sde = model.sde
        t = self.times.sample(len(x0), sde, generator, x0.device, x0.dtype)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x0_hat, eps_hat = model(sde.perturb(x0, t, eps), t, **condition)
        log_snr = sde.log_snr(t).detach()
        if self.weighting == "simple":
            a, b = (expand(c, x0) for c in model.parametrization.row(t, sde))
            return Losses((a * (x0_hat - x0) + b * (eps_hat - eps)).square().flatten(1).mean(1), log_snr)
        at = sde.coefficients(t)
        weight = at.diffusion_squared / (2 * at.sigma.square() * self.times.density(t, sde))
        return Losses(weight * (eps_hat - eps).square().flatten(1).mean(1), log_snr)


def denoising_score_matching(
    model: ScoreNetwork,
    x0: Tensor,
    weighting: str = "simple",
    times: TimeSampler | None = None,
    generator: torch.Generator | None = None,
    **condition,
) -> Tensor:
    """Loss of each sample, ``(B,)``; see ``DenoisingScoreMatching``."""
    return DenoisingScoreMatching(weighting, times)(model, x0, generator, **condition).value
