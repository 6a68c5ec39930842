"""What denoising and implicit score matching share: noised data, a weighting, and a distribution of the times."""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from models.network import ScoreNetwork
from models.objective import Losses, Objective, noise_like
from models.share import Source, gathered
from models.time_sampling import TimeSampler, UniformTime
from models.weighting import LikelihoodWeighting, Weighting, weighting_of


class WeightedObjective(Objective):
    """The mean of w(t) |e|^2 / D over ``times``, e the error of the pair (``models.weighting``), or its integral.

    Parameters
    ----------
    weighting: "simple", "likelihood", "edm", "min_snr", a ``Weighting``, or a function (t, sde) that weighs the squared
        error of eps. "likelihood" is an unbiased estimate of the integral over time of (g^2 / 2) |score error|^2, nats
        per dimension, whatever ``times`` is; the others are means over ``times``.
    times: distribution of the training times, ``UniformTime()`` by default. It learns from losses that have a gradient.
    """

    def __init__(self, weighting: str | Weighting | Callable = "simple", times: TimeSampler | None = None):
        super().__init__()
        self.weighting, self.times = weighting_of(weighting), times or UniformTime()

    def forward(self, model: ScoreNetwork, x0: Tensor, generator: Source = None, **condition) -> Losses:
        self.check(model)
        sde = model.sde
        t = self.times.sample(len(x0), sde, generator, x0.device, x0.dtype)
        eps = noise_like(x0, generator)
        squares = self.squared_error(model, x0, eps, t, generator, **condition)
        weight, importance = self.weighting(t, sde, model), self.times.importance(t, sde)
        if self.weighting.integral:
            weight = weight / (importance * self.times.density(t, sde))
        loss = weight * squares
        if self.times.learns and loss.requires_grad:
            self.times.observe(*gathered(generator, t, loss.detach()), sde)
        return Losses(importance * loss, sde.log_snr(t).detach())

    @abstractmethod
    def squared_error(
        self, model: ScoreNetwork, x0: Tensor, eps: Tensor, t: Tensor, generator: Source, **condition
    ) -> Tensor:
        """Of each sample, ``(B,)``: an estimate of |e|^2 / D, up to a constant."""

    def _trains_a_schedule(self) -> bool:
        """Whether the gradient to the parameters of a schedule is that of the bound (Kingma et al., 2021, eq. 18)."""
        return self.weighting == LikelihoodWeighting() and isinstance(self.times, UniformTime)
