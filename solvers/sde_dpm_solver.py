r"""SDE-DPM-Solver++: exponential integration of the reverse-time SDE in the log-SNR (Lu et al., "DPM-Solver++", 2022).

With lambda = log(alpha / sigma), half of the log-SNR elsewhere, and h = lambda_s - lambda_t > 0, the reverse-time SDE
of stochasticity eta (see ``solvers.euler_maruyama``) has the exact solution

    x_s = (sigma_s / sigma_t) e^(-eta^2 h) x_t
          + alpha_s (1 + eta^2) integral from lambda_t to lambda_s of e^(-(1 + eta^2) (lambda_s - l)) x_0(x_l, l) dl
          + sigma_s sqrt(1 - e^(-2 eta^2 h)) z.

Everything but the prediction x_0 is integrated exactly. Order 1 takes x_0 at t, and order 2 in its place

    D = x_0 + h / (2 h_before) (x_0 - x_0_before),

which extrapolates the last two nodes to the middle of the step: the paper's SDE-DPM-Solver++(2M) for eta = 1, and
DPM-Solver++(2M) for eta = 0. Order 1 is ``DDIM`` of ``eta`` 1 and 0. In the pair, as
sigma_s alpha_t / sigma_t = alpha_s e^(-h),

    x_s = alpha_s x_0 + sigma_s e^(-eta^2 h) eps + alpha_s (1 - e^(-(1 + eta^2) h)) (D - x_0)
          + sigma_s sqrt(1 - e^(-2 eta^2 h)) z.

Along a noisy path the difference of two predictions is mostly noise, of size sqrt(h). The weak order does not suffer:
the noise of each step enters D one step late, and by as much as it should have entered the prediction in its own, so
that means and covariances miss it at the two ends alone, by O(h^2). The weak order is 2 for every eta. (To integrate
the extrapolated line exactly has the same order and puts more weight on that noise: with few steps it is worse.)

The first step has no node before it and is of order 1, and so is the last: where sigma_s = 0 its h is infinite.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.euler_maruyama import require_stochasticity
from solvers.linear import LinearSampler, Weights
from solvers.path import Path


@dataclass(frozen=True)
class SDEDPMSolver(LinearSampler):
    """The fastest of the stochastic samplers; one call a step.

    Parameters
    ----------
    order: 1 or 2, of the mean and the covariance.
    stochasticity: eta, 0 for the probability-flow ODE, 1 for the reverse SDE, or more.

    >>> SDEDPMSolver(steps=20, grid="log_snr").order
    2
    """

    grid: str = "log_snr"
    order: int = 2
    stochasticity: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"SDEDPMSolver: order must be 1 or 2, found {self.order!r}")
        require_stochasticity(self.stochasticity, "SDEDPMSolver")

    @property
    def stochastic(self) -> bool:
        return self.stochasticity > 0

    def plan(self, path: Path) -> Weights:
        h, (alpha, sigma) = 0.5 * path.log_snr.diff(), (path.alpha[1:], path.sigma[1:])
        noisy = self.stochasticity**2 * h if self.stochastic else torch.zeros_like(h)  # 0 times an infinite h is no 0
        noise = sigma * torch.sqrt(-torch.expm1(-2 * noisy)) if self.stochastic else None
        table = Weights(alpha, sigma * torch.exp(-noisy), noise)
        return table if self.order == 1 else self._extrapolated(table, h, -torch.expm1(-h - noisy))

    def _extrapolated(self, table: Weights, h: Tensor, gain: Tensor) -> Weights:
        """``table`` with ``gain`` alpha_s (D - x_0) added between the first step and the last."""
        extra = torch.zeros_like(h)
        extra[1:-1] = (0.5 * table.x0 * gain)[1:-1] * h[1:-1] / h[:-2]
        return table._replace(x0=table.x0 + extra, past=(-extra,), kept=(torch.ones_like(h), torch.zeros_like(h)))
