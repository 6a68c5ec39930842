"""Halving and doubling of resolution, by means and repetition or through a filter (Zhang, 2019; Song et al., 2021).

With the taps h = (1, 3, 3, 1) / 8 on every axis, which sum to 1, and x padded by zeros,

    down:  y_i = sum_k h_k x_(2 i + k - 1),        up:  y_(2 i + k - 1) += 2 h_k x_i,

so that up is 2 down^T on each axis, and a constant stays what it is but for the border. These are score_sde's
``upsample_2d`` and ``downsample_2d`` (its upfirdn2d with the same paddings), each as one depthwise convolution.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
CONV = {1: F.conv1d, 2: F.conv2d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d}


def taps(channels: int, rank: int) -> Tensor:
    """The filter on ``rank`` axes as the weight of a depthwise convolution, ``(channels, 1, 4, ...)``."""
    h = torch.tensor(TAPS)
    axes = [h.reshape(1, 1, *(-1 if i == j else 1 for j in range(rank))) for i in range(rank)]
    return math.prod(axes).repeat(channels, 1, *(1,) * rank)


class Filter(nn.Module):
    """Holds the filter of ``channels`` signals over ``rank`` axes."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.channels, self.rank = channels, rank
        self.register_buffer("weight", taps(channels, rank), persistent=False)


class FilterDown(Filter):
    """Half the resolution, through the filter."""

    def forward(self, x: Tensor) -> Tensor:
        return CONV[self.rank](x, self.weight, stride=2, padding=1, groups=self.channels)


class FilterUp(Filter):
    """Twice the resolution, through the filter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2**self.rank
        return CONV_TRANSPOSE[self.rank](x, weight, stride=2, padding=1, groups=self.channels)


class Blur(Filter):
    """The filter alone, on sizes larger by 1: what a strided convolution over 3 without padding takes (NCSN++)."""

    def forward(self, x: Tensor) -> Tensor:
        return CONV[self.rank](x, self.weight, padding=2, groups=self.channels)


class MeanDown(nn.Module):
    """Half the resolution: means of neighbours on every axis."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        # As sums of slices: several times faster than pooling on a CPU, and nothing is kept for the gradient.
        for dim in range(2, x.dim()):
            even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            x = even + odd
        return x * 0.5**self.rank


class RepeatUp(nn.Module):
    """Twice the resolution: every value repeated on every axis."""

    def __init__(self, channels: int, rank: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.is_contiguous() or torch.compiler.is_compiling():
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        # Here torch's kernel, where it is not compiled, takes 1.3 to 5 times as long as copies, the last axis first.
        for dim in reversed(range(2, x.dim())):
            x = torch.stack((x, x), dim + 1).flatten(dim, dim + 1)
        return x


RESAMPLE = {False: (MeanDown, RepeatUp), True: (FilterDown, FilterUp)}
"""Down and up, without and with the filter."""
