r"""The levels of a discrete chain as a process in continuous time sees them.

A kernel is known by its log-SNR: level k of a chain is the time t_k of ``sde`` at which lambda(t_k) = lambda_k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sde.base import SDE, GaussianSDE, last_time
from sde.discrete import GaussianChain

SLACK = 1e-3
"""Difference of log-SNR that two ends may have and still be the same."""


def level_times(sde: SDE, chain: GaussianChain) -> Tensor:
    """The times at which ``sde`` has the log-SNR of the levels k = 1..N; ``(N,)``, in float64 on the CPU.

    A level noisier than any of the process has its last time. Raises ``ValueError`` where the least noise of the chain
    is less than that at t_min, which no model of ``sde`` has seen.
    """
    if not isinstance(sde, GaussianSDE):
        raise TypeError(f"the levels of a chain need a GaussianSDE, which has a log-SNR; found {sde}")
    least, highest = float(chain.log_snr(1)), sde.log_snr_range[1]
    if not least <= highest + SLACK:
        raise ValueError(
            f"level 1 of {chain} has less noise than {sde} at t_min, sigma/alpha = {noise_ratio(least):.3g} and not "
            f"{noise_ratio(highest):.3g} or more; take a chain that begins with more noise, or a model trained on less"
        )
    with torch.no_grad():
        times = sde.time(chain.log_snr(torch.arange(1, chain.steps + 1)))
    return times.clamp(max=last_time(sde))


class Levels(NamedTuple):
    """What models and bounds need of the levels k = 1..N of a chain, ``(N,)`` each, or of some of them.

    weight: w of ``sde.bound_terms``, of the square of ``pair_error`` at the variance beta_tilde. gap: log(beta /
    beta_tilde). Both have beta_tilde_2 for beta_tilde_1 = 0.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    weight: Tensor
    gap: Tensor

    @classmethod
    def of(cls, sde: SDE, chain: GaussianChain, like: Tensor) -> "Levels":
        """All levels of ``chain``, with their times under ``sde``, on the device and in the type of ``like``."""
        k = torch.arange(1, chain.steps + 1)
        log_snr, smallest = chain.log_snr(k), chain.variance(k, 0.0)
        weight, gap = chain.eps_weight(k, 0.0) * torch.sigmoid(log_snr), chain.variance(k, 1.0).log() - smallest.log()
        columns = (level_times(sde, chain), chain.alpha(k), chain.sigma(k), log_snr, weight, gap)
        return cls(*(column.to(like) for column in columns))

    def at(self, k: int | Tensor) -> "Levels":
        """Of the levels ``k``, an int or ``(B,)``, of which no number is read back from a GPU."""
        return Levels(*(column[k - 1] for column in self))


def noise_ratio(log_snr: float) -> float:
    """sigma / alpha."""
    return float(torch.exp(torch.tensor(-0.5 * log_snr, dtype=torch.float64)))
