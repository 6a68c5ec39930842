r"""The number by which a network is told the noise level.

Any strictly monotone function of time would do; they differ in what they resolve. The features of ``models.embedding``
(frequencies of 1/16 to 4 radians per unit) take a number of order 10.

    log_snr     log(sigma / alpha) = -lambda / 2, the level itself: of one level all Gaussian SDEs say the same
    log_sigma   log sigma: NCSN++ (Song et al., 2021, appendix C); c_noise of Karras et al., 2022, table 1, is a fourth
                of it, which is the embedding's scale. Where alpha = 1 it is log_snr; where sigma nears 1, it stalls
    time        16 (t - t_min) / (t_max - t_min) - 8, from -8 at the data to 8 at the prior whatever the clock: Ho et
                al., 2020, Peebles and Xie, 2023, up to the scale. Levels crowded into a short time it tells less well

A network must be given the label it was trained with, so that the label is a part of the model and of its checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sde import GaussianSDE

Label = Callable[[Tensor, Tensor, Tensor, GaussianSDE], Tensor]
"""From t, alpha(t), sigma(t) and their process to the label; shape and precision of ``t``."""


def log_snr(t: Tensor, alpha: Tensor, sigma: Tensor, sde: GaussianSDE) -> Tensor:
    """log(sigma / alpha), minus half the log signal-to-noise ratio."""
    return torch.log(sigma / alpha)


def log_sigma(t: Tensor, alpha: Tensor, sigma: Tensor, sde: GaussianSDE) -> Tensor:
    """log sigma."""
    return torch.log(sigma)


def time(t: Tensor, alpha: Tensor, sigma: Tensor, sde: GaussianSDE) -> Tensor:
    """16 (t - t_min) / (t_max - t_min) - 8."""
    return 16 * (t - sde.t_min) / (sde.t_max - sde.t_min) - 8


LABELS: dict[str, Label] = {"log_snr": log_snr, "log_sigma": log_sigma, "time": time}
"""The labels by the names that ``ScoreNetwork`` takes."""
