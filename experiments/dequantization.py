r"""From integer levels to a density, and from nats back to bits per dimension.

Level k of K owns the bin [low + k w, low + (k + 1) w) of width w = (high - low)/K. A dequantizer draws x ~ q(x | k),
and P(k | x) says what level x is taken for; for a density p on x, Jensen's inequality gives (Theis, van den Oord and
Bethge 2016, eq. 1-6, for uniform x; Ho et al., "Flow++", 2019, for any in the bin)

    log P(k) >= E_q [log p(x) + log P(k | x) - log q(x | k)],

and the bracket without its first term is the draw's log-weight. The average of K draws inside the logarithm is a
tighter bound, which grows with K to log P(k) itself (Burda, Grosse and Salakhutdinov 2016, theorem 1; Hoogeboom, Cohen
and Tomczak, "Learning discrete distributions by dequantization", 2020).

``Uniform`` is x = low + w (k + u) with u uniform on [0, 1), of log-weight D log w: -(log p(x) + D log w)/(D log 2) are
bits per dimension whatever the scaling, and the uniform density on [low, high]^D has exactly log2 K. The others are in
``experiments.centres``, for models trained on the centres of the bins, and ``experiments.variational``. What a model
was trained on and what it is evaluated on must agree: each dequantizer says by ``trained_on`` which models it is for.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from models.share import Source, share_of
from sde import Noise

FIRST_DRAW = 2**30
"""Draws from here on are a dequantizer's: no samples and no divergence's probes are made of them, whatever the seed."""


class Drawn(NamedTuple):
    """x ``(B, ...)``, as the model sees it at t_min, and its log-weight ``(B,)``, nats, float64.

    log P(k) >= E [log p(x) + log_weight]: the weight is log P(k | x) - log q(x | k).
    """

    x: Tensor
    log_weight: Tensor


class Dequantizer(ABC):
    """How integer levels are given a density: it owns the levels, their map to x, and the log-determinant.

    ``trained_on`` names the data that a model must have been trained on: "uniform", dequantized uniformly, or
    "centres", the centres of the bins.
    """

    levels: int
    low: float
    high: float
    trained_on: ClassVar[str]

    @property
    def bin_width(self) -> float:
        """The width of one level in units of x."""
        return (self.high - self.low) / self.levels

    def log_volume(self, dimensions: int) -> float:
        """D log(bin width), nats: log P(k) >= E log p(x) + log_volume(D) for uniform x."""
        return dimensions * math.log(self.bin_width)

    @abstractmethod
    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        """One x for each of the integer levels ``k`` ``(B, ...)``.

        Sample i's draw depends on ``seed``, ``number`` and ``first + i`` alone.
        """

    def centres(self, k: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The centres of the bins of levels ``k``, of any shape. Raises ValueError as for other levels."""
        return (self.low + (self._checked(k).double() + 0.5) * self.bin_width).to(dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """The levels of x: uint8 (int32 beyond 256 levels), clamped to 0..levels-1. Raises ValueError for NaN."""
        if x.isnan().any():
            raise ValueError(
                f"x: expected numbers, found {int(x.isnan().sum())} NaN; check the sampler that made them."
            )
        x = x if x.dtype == torch.float64 else x.float()
        inner = self._edges(x.dtype).to(x.device)[1:-1]
        dtype = torch.uint8 if self.levels <= 256 else torch.int32
        return torch.bucketize(x.contiguous(), inner, right=True).to(dtype)

    def _check_bins(self) -> None:
        """Refuse bins that can't be."""
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"levels: expected an integer of at least 2, found {self.levels!r}.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low, high: expected finite low < high, found {self.low} and {self.high}.")
        if self._edges(torch.float32).diff().min() <= 0:
            expected = f"{self.levels} bins that float32 can tell apart"
            raise ValueError(f"low, high: expected {expected}, found [{self.low}, {self.high}]; widen or centre it.")

    def _checked(self, k: Tensor) -> Tensor:
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise ValueError(f"k: expected integer levels 0..{self.levels - 1}, found {k.dtype}; dequantize only once.")
        if k.numel() and not (k.dtype == torch.uint8 and self.levels == 256):
            lowest, highest = (int(value) for value in k.aminmax())
            if lowest < 0 or highest >= self.levels:
                expected, found = f"levels 0..{self.levels - 1}", f"{lowest}..{highest}"
                raise ValueError(f"k: expected {expected}, found {found}; set `levels` to what the data have.")
        return k

    def _edges(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return _edges(self.levels, scale * self.low, scale * self.high, dtype)

    def _bins(self, k: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The least float32 of the bin of each level, and that of the next bin; ``scale`` multiplies all edges."""
        index, edges = self._checked(k).long(), self._edges(torch.float32, scale).to(k.device)
        return edges[index], edges[index + 1]


def inside(x: Tensor, bins: tuple[Tensor, Tensor]) -> Tensor:
    """``x`` in float32, and back in its bin where rounding has lifted it onto the next one's edge."""
    lower, upper = bins
    return torch.maximum(torch.minimum(x.float(), torch.nextafter(upper, lower)), lower)


def uniforms(k: Tensor, seed: int, number: int, first: int) -> Tensor:
    """Uniform numbers inside (0, 1) for levels ``k``, of their shape, float64; the draw ``number`` of each sample."""
    return (Noise(seed, first).words(tuple(k.shape), FIRST_DRAW + number, k.device).double() + 0.5) * 2.0**-32


def per_sample(values: Tensor) -> Tensor:
    """``(B, ...)`` summed to ``(B,)``."""
    return values.reshape(len(values), -1).sum(1)


def importance_weighted(log_weights: Tensor) -> Tensor:
    """log of the mean of K weights, ``(K, B)`` to ``(B,)``, float64: logsumexp - log K.

    With the log-weights log p(x) + log_weight of K independent draws, a bound on log P(k) that grows with K in the
    mean (Burda et al. 2016, theorem 1). K equal weights give that weight, to the last bit.
    """
    if log_weights.dim() != 2 or not len(log_weights):
        raise ValueError(f"log_weights: expected the shape (K, B), K >= 1, found {tuple(log_weights.shape)}.")
    if log_weights.isnan().any():
        raise ValueError(f"log_weights: expected numbers, found {int(log_weights.isnan().sum())} NaN; check the model.")
    log_weights = log_weights.double()
    most = log_weights.amax(0)
    most = torch.where(most.isfinite(), most, 0.0)  # of weights that are all zero, the logarithm is -inf and not NaN
    return most + (log_weights - most).exp().mean(0).log()


@dataclass(frozen=True)
class Uniform(Dequantizer):
    """Maps `levels` integer levels to [low, high) and back. Raises ValueError for a range that float32 can't split."""

    levels: int
    low: float = -1.0
    high: float = 1.0
    trained_on: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        self._check_bins()

    def dequantize(self, k: Tensor, generator: Source = None) -> Tensor:
        """Levels k, integers of any shape, to float32 x of that shape, uniform inside each level's bin.

        generator: on the device of `k`; None is torch's global one. Raises ValueError for other levels or a float type.
        """
        u = share_of(lambda shape, g: torch.rand(shape, generator=g, device=k.device), k.shape, generator)
        return self._placed(k, u)

    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        x = self._placed(k, uniforms(k, seed, number, first).float())
        return Drawn(x, torch.full((len(k),), self.log_volume(k[0].numel()), dtype=torch.float64, device=k.device))

    def _placed(self, k: Tensor, u: Tensor) -> Tensor:
        """x at the fraction ``u`` of the bin of each level."""
        bins = self._bins(k)
        return inside(bins[0] + self.bin_width * u, bins)

    def bits_per_dim(self, log_prob: Tensor, dimensions: int) -> Tensor:
        """log p(x) in nats per example (any shape) to bits per dimension, for data of `dimensions` dimensions."""
        return -(log_prob + self.log_volume(dimensions)) / (dimensions * math.log(2.0))


@lru_cache(maxsize=16)
def _edges(levels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """The levels + 1 edges of the bins; in float32 rounded up, so that each is the smallest number of its bin."""
    exact = low + (high - low) * (torch.arange(levels + 1, dtype=torch.float64) / levels)
    edges = exact.to(dtype)
    return torch.where(edges < exact, torch.nextafter(edges, torch.tensor(math.inf, dtype=dtype)), edges)
