"""The random numbers of one batch that several processes share.

The mean of a loss over a batch must not depend on how many processes compute it, and so neither may the numbers that
are drawn for it: stratified times are spread over the whole batch, and what learns from losses must see them all. Every
process therefore holds a generator in the same state, draws for the whole batch, and takes its own samples' numbers:
of B samples in N processes, process r has those from r B / N on. That costs each the draws of all, and no message.

A batch that is stepped in P parts is divided part by part: a process has its share of each, one after another, so that
its part p belongs to part p of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One process's share of a batch, and the generator of the random numbers of all of it.

    Parameters
    ----------
    generator: in the same state in every process. index, count: which process of how many.
    parts: in how many parts the batch is stepped.
    """

    generator: torch.Generator
    index: int
    count: int
    parts: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"Share: index must lie in 0..{self.count - 1}, found {self.index}")

    def take(self, whole: Tensor, axis: int = 0) -> Tensor:
        """This process's samples of a batch, ``(B, ...)`` to ``(B / count, ...)``, or along another ``axis``.

        Raises ``ValueError`` for a batch that can't be divided.
        """
        if whole.shape[axis] % (self.parts * self.count):
            raise ValueError(
                f"a batch of {whole.shape[axis]} can't be divided among {self.count} processes in {self.parts} parts; "
                "choose a multiple of their product"
            )
        return whole.unflatten(axis, (self.parts, self.count, -1)).select(axis + 1, self.index).flatten(axis, axis + 1)

    def gather(self, own: Tensor) -> Tensor:
        """What ``take`` divided, from all processes, ``(B / count, ...)`` to ``(B, ...)``; all of them must ask."""
        own = own.contiguous()
        shares = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(shares, own)
        return torch.stack([share.unflatten(0, (self.parts, -1)) for share in shares], 1).flatten(0, 2)


Source = torch.Generator | Share | None
"""Where random numbers come from: a generator, a share of what one draws, or torch's global generator."""


def share_of(
    make: Callable[[tuple[int, ...], torch.Generator | None], Tensor], shape: tuple[int, ...], source: Source, axis=0
) -> Tensor:
    """Random numbers of ``shape`` by ``make(shape, generator)``; ``axis`` counts the samples.

    Of a ``Share`` the shape is that of its samples, and the numbers are its part of those of the whole batch.
    """
    if not isinstance(source, Share):
        return make(tuple(shape), source)
    whole = (*shape[:axis], shape[axis] * source.count, *shape[axis + 1 :])
    return source.take(make(whole, source.generator), axis)


def gathered(source: Source, *own: Tensor) -> tuple[Tensor, ...]:
    """What all processes found, in the order of the samples; a message only where there are several."""
    return tuple(source.gather(one) for one in own) if isinstance(source, Share) else own
