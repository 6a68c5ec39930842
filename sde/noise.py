"""Counter-based random numbers: every sample of a batch has a stream of its own.

A conventional generator hands out numbers in the order of the calls, so that sample i changes with the batch size and
with the device. Here a number is a function of (seed, sample, draw, element) through the Philox4x32-10 bijection
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the same on every device, in every batch and
in every process, and never a synchronization.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it are far from one another


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds on int64 tensors that hold unsigned 32-bit words (they broadcast together)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps modulo 2^64 and the shift is arithmetic; the mask makes both words unsigned again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Noise:
    """Streams of random numbers for samples ``first``, ``first + 1``, ...

    ``draw`` numbers the successive draws of one sample (a solver's steps); draws with the same number are equal.

    >>> whole, tail = Noise(seed=3), Noise(seed=3, first=2)
    >>> torch.equal(whole.normal((5, 2), draw=7)[2:], tail.normal((3, 2), draw=7))
    True
    """

    seed: int
    first: int = 0

    def __post_init__(self):
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2^64), found {self.seed!r}")

    def other(self, number: int) -> "Noise":
        """Streams for the same samples that have nothing to do with these, number 0, 1, ..."""
        return Noise((self.seed + (number + 1) * _GOLDEN) % 2**64, self.first)

    def words(self, shape: tuple[int, ...], draw: int | Tensor, device=None) -> Tensor:
        """Uniform 32-bit words as int64, of the given shape ``(B, ...)``; for a ``draw`` of shape ``(K,)``, K of them.

        Many draws at once cost little more than one: it is the number of operations that costs. A ``draw`` of shape
        ``(B, 1)`` gives each sample a number of its own.
        """
        draw = torch.as_tensor(draw, device=device)
        lead, draw = ((), draw) if draw.dim() == 2 else (draw.shape, draw[..., None, None])
        block = torch.arange(-(-math.prod(shape[1:]) // 4), device=device)
        sample = torch.arange(self.first, self.first + shape[0], device=device)[:, None]
        counter = torch.broadcast_tensors(block, sample & _MASK, draw, sample >> 32)
        words = torch.stack(philox(counter, (self.seed & _MASK, self.seed >> 32)), dim=-1)
        return words.flatten(-2)[..., : math.prod(shape[1:])].reshape(*lead, *shape)

    def normal(self, shape: tuple[int, ...], draw: int | Tensor = 0, device=None, dtype=torch.float32) -> Tensor:
        """Independent standard normal numbers of shape ``(B, ...)``, or ``(K, B, ...)``, by Box and Muller's transform.

        ``draw`` as for ``words``.
        """
        size = math.prod(shape[1:])
        words = self.words((shape[0], 2 * -(-size // 2)), draw, device)
        pairs = words.unflatten(-1, (-1, 2)).to(torch.float64)
        radius = torch.sqrt(-2 * torch.log((pairs[..., 0] + 0.5) * 2.0**-32)).to(dtype)
        angle = (pairs[..., 1] * (2 * math.pi * 2.0**-32)).to(dtype)
        normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return normal.flatten(-2)[..., :size].reshape(words.shape[: words.dim() - 2] + tuple(shape))

    def rademacher(self, shape: tuple[int, ...], draw: int = 0, device=None, dtype=torch.float32) -> Tensor:
        """Independent signs, +1 or -1 with probability 1/2 each, of shape ``(B, ...)``."""
        return ((self.words(shape, draw, device) & 1) * 2 - 1).to(dtype)
