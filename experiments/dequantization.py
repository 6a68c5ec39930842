"""Uniform dequantization: from integer levels to a density, and from nats back to bits per dimension.

Level k of K becomes x = low + (high - low)(k + u)/K with u uniform on [0, 1): K bins of equal width w that fill
[low, high). For a density p on x, Jensen's inequality over u gives (Theis, van den Oord and Bethge 2016, eq. 1-6)

    log P(k) >= E_u log p(x(k, u)) + D log w,

so that -(log p(x) + D log w)/(D log 2) bounds the bits per dimension of the discrete data from above, whatever the
scaling: the uniform density on [low, high]^D has exactly log2 K. Training and evaluation use this one map.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde import Noise

_FIRST = 2**30  # draws apart from those that made the samples and from a divergence's probes, also under the same seed


class Drawn(NamedTuple):
    """x ``(B, ...)``, as the model sees it at t_min, and its log-weight ``(B,)``, nats.

    log P(k) >= E [log p(x) + log_weight]: the weight is log P(k | x) - log q(x | k).
    """

    x: Tensor
    log_weight: Tensor


class Dequantizer(ABC):
    """How integer levels are given a density: it owns the levels, their map to x, and the log-determinant."""

    levels: int
    low: float
    high: float
    trained_on: ClassVar[str] = "uniform"
    """What the model must have been trained on: data spread over their bins, "uniform", or at their "centres"."""

    @property
    def bin_width(self) -> float:
        """The width of one level in units of x."""
        return (self.high - self.low) / self.levels

    @abstractmethod
    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        """One x for each of the integer levels ``k`` ``(B, ...)``.

        Sample i's draw depends on ``seed``, ``number`` and ``first + i`` alone.
        """


@dataclass(frozen=True)
class UniformDequantizer(Dequantizer):
    """Maps `levels` integer levels to [low, high) and back. Raises ValueError for a range that float32 can't split."""

    levels: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"levels: expected an integer of at least 2, found {self.levels!r}.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low, high: expected finite low < high, found {self.low} and {self.high}.")
        if self._edges(torch.float32).diff().min() <= 0:
            expected = f"{self.levels} bins that float32 can tell apart"
            raise ValueError(f"low, high: expected {expected}, found [{self.low}, {self.high}]; widen or centre it.")

    def dequantize(self, k: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Levels k, integers of any shape, to float32 x of that shape, uniform inside each level's bin.

        generator: on the device of `k`; None is torch's global one. Raises ValueError for other levels or a float type.
        """
        return self._placed(k, torch.rand(k.shape, generator=generator, device=k.device))

    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        u = (Noise(seed, first).words(tuple(k.shape), _FIRST + number, k.device).double() + 0.5) * 2.0**-32
        weight = self.log_volume(k[0].numel())
        return Drawn(self._placed(k, u.float()), torch.full((len(k),), weight, device=k.device))

    def _placed(self, k: Tensor, u: Tensor) -> Tensor:
        """x at the fraction ``u`` of the bin of each level."""
        index = self._checked(k).long()
        edges = self._edges(torch.float32).to(k.device)
        lower, upper = edges[index], edges[index + 1]
        x = lower + self.bin_width * u
        # Rounding could lift u close to 1 onto the next bin's edge.
        return torch.minimum(x, torch.nextafter(upper, lower))

    def quantize(self, x: Tensor) -> Tensor:
        """The levels of x: uint8 (int32 beyond 256 levels), clamped to 0..levels-1. Raises ValueError for NaN."""
        if x.isnan().any():
            raise ValueError(
                f"x: expected numbers, found {int(x.isnan().sum())} NaN; check the sampler that made them."
            )
        x = x if x.dtype == torch.float64 else x.float()
        inner = self._edges(x.dtype).to(x.device)[1:-1]
        return torch.bucketize(x.contiguous(), inner, right=True).to(self._dtype)

    def log_volume(self, dimensions: int) -> float:
        """D log(bin width), nats: log P(k) >= E log p(x) + log_volume(D)."""
        return dimensions * math.log(self.bin_width)

    def bits_per_dim(self, log_prob: Tensor, dimensions: int) -> Tensor:
        """log p(x) in nats per example (any shape) to bits per dimension, for data of `dimensions` dimensions."""
        return -(log_prob + self.log_volume(dimensions)) / (dimensions * math.log(2.0))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.uint8 if self.levels <= 256 else torch.int32

    def _edges(self, dtype: torch.dtype) -> Tensor:
        return _edges(self.levels, self.low, self.high, dtype)

    def _checked(self, k: Tensor) -> Tensor:
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise ValueError(f"k: expected integer levels 0..{self.levels - 1}, found {k.dtype}; dequantize only once.")
        if k.numel() and not (k.dtype == torch.uint8 and self.levels == 256):
            lowest, highest = (int(value) for value in k.aminmax())
            if lowest < 0 or highest >= self.levels:
                expected, found = f"levels 0..{self.levels - 1}", f"{lowest}..{highest}"
                raise ValueError(f"k: expected {expected}, found {found}; set `levels` to what the data have.")
        return k


@lru_cache(maxsize=16)
def _edges(levels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """The levels + 1 edges of the bins; in float32 rounded up, so that each is the smallest number of its bin."""
    exact = low + (high - low) * (torch.arange(levels + 1, dtype=torch.float64) / levels)
    edges = exact.to(dtype)
    return torch.where(edges < exact, torch.nextafter(edges, torch.tensor(math.inf, dtype=dtype)), edges)
