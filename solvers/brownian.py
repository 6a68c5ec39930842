r"""A Brownian path for every sample of a batch, of which nothing that was seen is drawn again.

Over a stretch of width H the increment is known to be V. That over its first part, of width h, is then

    W = (h / H) V + sqrt(h (1 - h / H)) z,

the Brownian bridge, and V - W is known of the rest: a stack of known stretches, the nearest on top (Rackauckas and
Nie, "Adaptive methods for stochastic differential equations via natural embeddings and rejection sampling with memory",
2017, algorithm RSwM1). Nothing is known beyond the lowest: there W = sqrt(h) z.
"""

import torch
from torch import Tensor

from sde.base import expand


class BrownianPaths:
    """Paths from the present of each sample on, in the shape, type and device of ``like``, ``(B, ...)``."""

    def __init__(self, like: Tensor):
        self.widths = torch.zeros(1, len(like), dtype=torch.float64, device=like.device)
        self.increments = torch.zeros_like(like)[None]
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self._samples = torch.arange(len(like), device=like.device)

    def increment(self, h: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Width and increment of a step from the present, ``(B,)`` and ``(B, ...)``; they are then on top of the stack.

        The step is ``h`` wide, ``(B,)``, or ends with the known stretch where that comes first. ``z``: standard normal.
        """
        known, at = self.depth > 0, ((self.depth - 1).clamp(min=0), self._samples)
        width, value = self.widths[at], self.increments[at]
        part, h = known & (h < width), torch.where(known, torch.minimum(h, width), h)
        share = torch.where(known, h / width.clamp(min=torch.finfo(width.dtype).tiny), 0).clamp(max=1)
        spread = torch.where(known & ~part, 0, h * (1 - share)).sqrt()
        w = expand(share.to(z), z) * value + expand(spread.to(z), z) * z
        self._put(part, width - h, value - w)
        self.depth = self.depth + (part | ~known)
        self._put(torch.ones_like(part), h, w)
        return h, w

    def pass_by(self, passed: Tensor) -> None:
        """The step on top of the stack lies in the past for the samples of the mask ``passed``, ``(B,)``."""
        self.depth = self.depth - passed.long()

    def reserve(self, depth: int) -> None:
        """Room for stacks of at least ``depth``."""
        more = depth - len(self.widths)
        if more > 0:
            self.widths, self.increments = (
                torch.cat((kept, kept.new_zeros(more, *kept.shape[1:]))) for kept in (self.widths, self.increments)
            )

    def _put(self, chosen: Tensor, width: Tensor, value: Tensor) -> None:
        """Replace the top of the stacks of ``chosen`` samples."""
        at = ((self.depth - 1).clamp(min=0), self._samples)
        self.widths[at] = torch.where(chosen, width, self.widths[at])
        self.increments[at] = torch.where(expand(chosen, value), value, self.increments[at])
