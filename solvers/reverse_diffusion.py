r"""Reverse diffusion: the reverse-time SDE in the discretization of the forward chain (Song et al., 2021, appendix E).

Let the forward process go from s to t by x_t = x_s + f_t(x_s) + G_t z. Its reverse is discretized alike (eqs. 45, 46),

    x_s = x_t - f_t(x_t) + G_t^2 score(x_t, t) + G_t z.

Here f and G are those of the exact transition of a Gaussian process, N(a x_s, std^2 I) with a = alpha_t / alpha_s:

    f_t(x) = (a - 1) x,      G_t^2 = std^2 = sigma_t^2 rho,      rho = 1 - SNR_t / SNR_s,

in the pair x_s = (2 - a) x_t - sigma_t rho eps + sigma_t sqrt(rho) z. Under VE it is eq. 47, and under VP that of the
chain with beta = 1 - a^2, which is smaller than 1 however few the steps.

The noise is the forward's, std, and not that of the posterior q(x_s | x_t, x_0), which is smaller by the factor
sigma_s / sigma_t (``Ancestral``): as sigma_s falls to 0 the latter vanishes and the former does not. Both have weak
order 1. 2 - a stands for 1 / a, to first order in 1 - a: in large steps data that the process has scaled down are not
scaled up enough, and few steps are better spent by ``SDEDPMSolver``.

With half of the score and without noise the formula would be a discretization of the probability-flow ODE whose error
is large, for 2 - a expands more than the Euler step of f: there is no such option. Take ``DDIM``, or
``EulerMaruyama(stochasticity=0)``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.linear import LinearSampler, Weights
from solvers.path import Path


@dataclass(frozen=True)
class ReverseDiffusion(LinearSampler):
    """x_s = (2 - a) x_t + std^2 score + std z, with the kernel N(a x_s, std^2 I) from s to t: weak order 1, one call.

    >>> ReverseDiffusion(steps=1000).stochastic
    True
    """

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def plan(self, path: Path) -> Weights:
        alpha, sigma = path.alpha[:-1], path.sigma[:-1]
        growth, rho = 2 - alpha / path.alpha[1:], -torch.expm1(-path.log_snr.diff())
        return Weights(growth * alpha, (growth - rho) * sigma, sigma * rho.sqrt())
