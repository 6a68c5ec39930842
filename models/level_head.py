r"""The level head: for data of K known levels, logits per value give the score of uniform bins in closed form.

A discrete value that is dequantized uniformly lies in the bin [e_k, e_(k+1)] with the network's probability w_k and is
uniform inside. Under x_t = alpha x_0 + sigma eps, with z_k = (alpha e_k - x_t) / sigma, phi and Phi of the standard
normal distribution, and P_k = w_k (Phi(z_(k+1)) - Phi(z_k)), the posterior means are exactly

    eps_hat = -sum_k w_k (phi(z_k) - phi(z_(k+1))) / sum_k P_k,      x0_hat = (x_t - sigma eps_hat) / alpha.

It is an ordinary score model: denoising score matching trains it, every sampler and likelihood runs on it. With zero
logits it is the per-value histogram of the training set. The head knows the levels, as a discretized likelihood does.
"""

import math

import torch
from torch import Tensor

from models.parametrization import Parametrization
from sde import GaussianSDE, Prediction
from sde.base import expand

_FAR = 6.0  # standard deviations beyond the outer edges at which x0_hat is held constant
_FLAT = 0.1  # bin width in units of sigma / alpha below which the series is the more accurate form
_FLOOR = 1e-6  # probability spread over all levels: no value, however unlikely, has an undefined score


class LevelHead(Parametrization):
    """Posterior means from logits over the levels of each value.

    Parameters
    ----------
    log_marginals: ``(K, *shape)``, log-probabilities that are added to the network's logits (the training set's
        histogram; zeros for none). ``shape`` is that of one sample.
    low, high: the ends of the data's range; level k is uniform on ``low + (high - low) [k, k + 1] / K``.
    """

    def __init__(self, log_marginals: Tensor, low: float = -1.0, high: float = 1.0):
        super().__init__()
        if log_marginals.dim() < 2 or len(log_marginals) < 2:
            raise ValueError(f"log_marginals must have the shape (levels, *shape), found {tuple(log_marginals.shape)}")
        if not low < high:
            raise ValueError(f"low must be smaller than high, found low={low}, high={high}")
        self.outputs, self.low, self.high = len(log_marginals), low, high
        self.register_buffer("log_marginals", log_marginals.float())

    def row(self, t: Tensor, sde: GaussianSDE) -> tuple[Tensor, Tensor]:
        """The loss is that of noise prediction."""
        return torch.zeros_like(t), torch.ones_like(t)

    def predict(self, output: Tensor, x: Tensor, t: Tensor, sde: GaussianSDE) -> Prediction:
        """The pair from logits of shape ``(B, K * C, ...)``, level by level."""
        logits = output.reshape(len(x), self.outputs, *x.shape[1:]) + self.log_marginals
        weights = (1 - _FLOOR) * torch.softmax(logits, dim=1) + _FLOOR / self.outputs
        t = t.expand(len(x))
        alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
        y, spread, limit = x / alpha, sigma / alpha, self.width / _FLAT
        # Each form is evaluated where it is accurate, also for the samples that then take the other one: no NaN
        # reaches a gradient.
        flat = self._flat_mean(weights, y, spread.clamp(min=limit))
        sharp = self._sharp_noise(weights, y, spread.clamp(max=limit))
        is_flat = spread > limit
        return Prediction(
            torch.where(is_flat, flat, y - spread * sharp), torch.where(is_flat, (x - alpha * flat) / sigma, sharp)
        )

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / self.outputs

    def _edges(self, y: Tensor) -> Tensor:
        edges = torch.linspace(self.low, self.high, self.outputs + 1, device=y.device, dtype=y.dtype)
        return edges.reshape(-1, *(1,) * (y.dim() - 1))

    def _near(self, y: Tensor, spread: Tensor) -> Tensor:
        # Further out the nearest edge is the whole answer, and the probabilities would underflow.
        return torch.minimum(torch.maximum(y, self.low - _FAR * spread), self.high + _FAR * spread)

    def _sharp_noise(self, weights: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        """eps_hat by the closed form, for bins that are wide in units of ``spread`` = sigma / alpha."""
        near = self._near(y, spread)
        z = (self._edges(y) - near[:, None]) / spread[:, None]
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        tail = 0.5 * torch.special.erfc(z.abs() / math.sqrt(2))  # no cancellation, whichever side the bin lies on
        (lower, upper), (tail_lower, tail_upper) = (z[:, :-1], z[:, 1:]), (tail[:, :-1], tail[:, 1:])
        around_zero = (lower < 0) & (upper > 0)
        mass = torch.where(around_zero, 1 - tail_lower - tail_upper, (tail_lower - tail_upper).abs())
        eps = (weights * (density[:, 1:] - density[:, :-1])).sum(1) / (weights * mass).sum(1)
        return eps + (y - near) / spread

    def _flat_mean(self, weights: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        """x0_hat by the expansion to second order in the bin's width, for bins that are narrow in units of spread."""
        near, edges = self._near(y, spread), self._edges(y)
        centre, h_squared = 0.5 * (edges[:-1] + edges[1:]), (self.width / spread)[:, None].square()
        z = (centre - near[:, None]) / spread[:, None]
        mass = weights * torch.exp(-0.5 * z.square()) * (1 + (z.square() - 1) * h_squared / 24)
        mean = centre - spread[:, None] * z * h_squared / 12
        return (mass * mean).sum(1) / mass.sum(1)
