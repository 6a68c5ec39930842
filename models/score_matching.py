r"""Denoising score matching (Vincent, 2011; Song et al., 2021, eq. 7).

For x_t = alpha x_0 + sigma eps the score of the kernel is -eps / sigma, and the objective is

    E  lambda(t) / 2  |s(x_t, t) + eps / sigma|^2,

whose minimum is the score of p_t: it differs by a constant from the explicit E lambda / 2 |s - grad log p_t|^2. The
weightings lambda are those of ``models.weighting``.
"""

from collections.abc import Callable

from torch import Tensor

from models.network import ScoreNetwork
from models.share import Source
from models.time_sampling import TimeSampler
from models.weighted_objective import WeightedObjective
from models.weighting import Weighting
from sde.base import expand
from sde.bound_terms import pair_error


class DenoisingScoreMatching(WeightedObjective):
    """Denoising score matching over any SDE and parametrization; its parameters are those of ``WeightedObjective``.

    "simple" is the mean over the dimensions of the squared error of the unit row a x_0 + b eps of the model's
    parametrization.
    """

    def check(self, model: ScoreNetwork) -> None:
        """Refuse for a schedule that learns any objective but the likelihood bound in time."""
        if model.sde.learns_ends:
            raise ValueError("the ends of the schedule learn, which takes the whole bound: use VariationalDiffusion")
        if model.sde.learned and not self._trains_a_schedule():
            raise ValueError(
                "the schedule has parameters to learn, whose gradient only weighting='likelihood' with "
                f"times=UniformTime() gives; found weighting={self.weighting!r}, times={self.times}. Choose these, or "
                "sde.requires_grad_(False)"
            )

    def squared_error(
        self, model: ScoreNetwork, x0: Tensor, eps: Tensor, t: Tensor, generator: Source, **condition
    ) -> Tensor:
        alpha, sigma = expand(model.sde.alpha(t), x0), expand(model.sde.sigma(t), x0)
        pair = model(alpha * x0 + sigma * eps, t, **condition)
        return pair_error(x0, eps, pair, alpha, sigma).square().flatten(1).mean(1)


def denoising_score_matching(
    model: ScoreNetwork,
    x0: Tensor,
    weighting: str | Weighting | Callable = "simple",
    times: TimeSampler | None = None,
    generator: Source = None,
    **condition,
) -> Tensor:
    """Loss of each sample, ``(B,)``; see ``DenoisingScoreMatching``."""
    return DenoisingScoreMatching(weighting, times)(model, x0, generator, **condition).value
