"""What a training step minimizes: one interface for denoising, sliced and implicit score matching, and for bounds.

An objective draws its own times and noise and gives the loss of each sample, with the log-SNR at which it was measured:
training minimizes the mean, and shows the loss by noise level. What it learns of the losses as it goes, as an adaptive
distribution of the times does, it keeps in buffers, so that a checkpoint can hold them.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.network import ScoreNetwork
from models.share import Source, share_of


class Losses(NamedTuple):
    """Of each sample, ``(B,)``: the loss, to be averaged, and the log-SNR at which it was measured (no gradient)."""

    value: Tensor
    log_snr: Tensor


def noise_like(x0: Tensor, generator: Source) -> Tensor:
    """Standard normal noise of the shape, type and device of ``x0``; ``generator`` is on that device."""
    return share_of(
        lambda shape, g: torch.randn(shape, generator=g, device=x0.device, dtype=x0.dtype), x0.shape, generator
    )


class Objective(nn.Module, ABC):
    """A loss of a score network on clean data."""

    differentiates_twice: bool = False
    """Whether it differentiates the network itself, so that training goes back through a backward pass."""

    @abstractmethod
    def check(self, model: ScoreNetwork) -> None:
        """Refuse a model that this objective can't train: raises ``ValueError``."""

    @abstractmethod
    def forward(self, model: ScoreNetwork, x0: Tensor, generator: Source = None, **condition) -> Losses:
        """The losses of clean data ``x0``, ``(B, ...)``; times and noise from ``generator``, on its device.

        With a ``Share`` for it, ``x0`` are the samples of one of several processes.
        """
