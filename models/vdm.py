r"""The likelihood bound of continuous time as an objective, with schedules that learn (Kingma et al., "Variational
diffusion models", 2021).

    -log p(x_0) <= KL(q(x_T | x_0) || prior) - E log p(x_0 | x_t_min) - 1/2 int lambda'(t) E |eps - eps_hat|^2 dt

(eqs. 11, 13 and 17), the integral at one uniform time for each sample, evenly spread over the batch (appendix I.1).
It is minus ``solvers.continuous_elbo``, in nats per dimension.

A schedule that learns gets two gradients (appendix I.2). Its ends and the network follow the bound. Between the ends
the bound does not depend on it (eq. 18), but the variance of the estimate does: there it follows the mean square of
the integrand l, whose gradient is that of the loss times 2 l, sample by sample. Both come from one backward pass:
lambda = high - (high - low) u(t), and the gradient that reaches u and du/dt of a sample is multiplied by its 2 l. The
minimum is where -lambda'(t) (E |eps - eps_hat|^4)^(1/2) is the same at all times.

So that u and du/dt are all that the gradient of lambda reaches, the network is asked under the schedule as a constant,
at the time t + (lambda - lambda_0) / lambda_0', where lambda_0 is the value of lambda: it is t, with its gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.level_sampling import spread
from models.network import ScoreNetwork
from models.objective import Losses, Objective, noise_like
from models.share import Source
from sde import Decoder, GaussianSDE, Prediction
from sde.base import Curve, expand, last_time
from sde.bound_terms import pair_error, prior_divergence, reconstruction
from sde.learned import held


class _Point(NamedTuple):
    """x_t = alpha x_0 + sigma eps in the variance-preserving coordinates of its log-SNR; ``t`` has its gradient."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    t: Tensor

    def predict(self, model: ScoreNetwork, condition: dict) -> Prediction:
        """The model's pair; its schedule is a constant."""
        with held(model.sde):
            return model.at_level(self.x, self.alpha, self.sigma, self.t, **condition)


class VariationalDiffusion(Objective):
    """The bound in nats per dimension, for any Gaussian process, fixed or learned, and its ends too.

    Parameters
    ----------
    decoder: None - p(x_0 | x_t) at t_min is a Gaussian density about the predicted x_0; or ``LevelPosterior(levels)``,
        the paper's, or ``DiscretizedGaussian(levels)``, for data at the centres of the bins. All but
        ``LevelPosterior`` take a second call of the model, at t_min.
    """

    def __init__(self, decoder: Decoder | None = None):
        super().__init__()
        if decoder is not None and not isinstance(decoder, Decoder):
            raise TypeError(f"VariationalDiffusion: decoder must be a Decoder or None, found {decoder!r}")
        self.decoder, self.checked, self._ends = decoder, False, None

    def check(self, model: ScoreNetwork) -> None:
        """Every model of a Gaussian process can be trained."""

    def forward(self, model: ScoreNetwork, x0: Tensor, generator: Source = None, **condition) -> Losses:
        sde = model.sde
        first, last = self._times(sde)
        fixed = self._prior(sde, x0, last) + self._last(model, x0, first, generator, condition)
        t = first + (last - first) * spread(len(x0), generator, x0.device, x0.dtype)
        integrand, log_snr = self._integrand(model, x0, t, generator, condition)
        return Losses(fixed / x0[0].numel() + (last - first) * integrand, log_snr)

    def _times(self, sde: GaussianSDE) -> tuple[float, float]:
        """The first and the last time, at the ends of ``log_snr_range``."""
        if sde.learned:  # its log-SNR is finite
            return sde.t_min, sde.t_max
        if self._ends is None or self._ends[0] is not sde:
            high = torch.tensor(sde.log_snr_range[1], dtype=torch.float64)
            self._ends = (sde, max(sde.t_min, float(sde.time(high))), last_time(sde))
        return self._ends[1:]

    def _integrand(self, model: ScoreNetwork, x0: Tensor, t: Tensor, generator, condition) -> tuple[Tensor, Tensor]:
        """-lambda' |eps - eps_hat|^2 / (2 D) of each sample, and its log-SNR."""
        curve, eps = model.sde.curve(t), noise_like(x0, generator)
        point = _point(x0, eps, curve, t)
        pair = point.predict(model, condition)
        alpha, sigma = (expand(c, x0) for c in (point.alpha, point.sigma))
        error = alpha * pair_error(x0, eps, pair, alpha, sigma)  # alpha^2 + sigma^2 is 1
        loss = -0.5 * curve.slope * error.square().flatten(1).mean(1)
        _scale_gradients(curve, 2 * loss.detach())
        return loss, curve.log_snr.detach()

    def _last(self, model: ScoreNetwork, x0: Tensor, first: float, generator, condition: dict) -> Tensor:
        """-log p(x_0 | x_t) at t_min, ``(B,)``."""
        t = torch.full((len(x0),), first, device=x0.device, dtype=x0.dtype)
        curve, eps = model.sde.curve(t), noise_like(x0, generator)
        _scale_gradients(curve, torch.zeros_like(t))  # it is a matter of the ends
        point = _point(x0, eps, curve, t)
        alpha, sigma = (expand(c, x0) for c in (point.alpha, point.sigma))
        if self.decoder is not None and not self.decoder.needs_prediction:
            centre = self.decoder.centre(point.x / alpha, None)
        else:
            centre = point.predict(model, condition).x0
        check = x0.device.type == "cpu" or not self.checked  # a look at all values is a wait for a GPU
        self.checked = True
        return reconstruction(self.decoder, x0, centre, sigma / alpha, check)

    def _prior(self, sde: GaussianSDE, x0: Tensor, last: float) -> Tensor:
        """KL(q(x_T | x_0) || prior), ``(B,)``."""
        end = torch.tensor(last, dtype=torch.float64, device=x0.device)
        return prior_divergence(x0, sde.alpha(end), sde.sigma(end), sde.prior_std)


def _point(x0: Tensor, eps: Tensor, curve: Curve, t: Tensor) -> _Point:
    log_snr, slope = curve.log_snr, curve.slope.detach()
    alpha, sigma = (torch.exp(0.5 * F.logsigmoid(sign * log_snr)) for sign in (1, -1))
    x = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
    return _Point(x, alpha, sigma, t + (log_snr - log_snr.detach()) / slope)


def _scale_gradients(curve: Curve, factor: Tensor) -> None:
    """Multiply what the backward pass brings to the interior of a schedule by ``factor``, sample by sample."""
    for part in curve.interior:
        part.register_hook(lambda gradient: factor * gradient)
