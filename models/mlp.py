"""A multilayer perceptron for data of any shape, taken flat."""

import math

from torch import Tensor, nn

from models.embedding import Conditioning, zero_


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm, self.label = nn.LayerNorm(width), nn.Linear(embedding, width)
        self.inner, self.outer = nn.Linear(width, width), zero_(nn.Linear(width, width))
        self.activation = nn.SiLU()

    def forward(self, h: Tensor, label: Tensor) -> Tensor:
        return h + self.outer(self.activation(self.inner(self.norm(h)) + self.label(label)))


class MLP(nn.Module):
    """Residual perceptron on flattened data.

    Parameters
    ----------
    shape: shape of one sample, such as ``(2,)`` or ``(1, 8, 8)``.
    outputs: numbers given for each value of the data (see ``Parametrization.outputs``).
    width, depth: size and number of the residual blocks.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int = 1, width: int = 128, depth: int = 3, embedding: int = 64):
        super().__init__()
        shape = tuple(shape)
        if not shape or min(shape) < 1 or min(outputs, width, depth) < 1:
            raise ValueError(
                f"MLP needs positive sizes, found shape={shape}, outputs={outputs}, width={width}, depth={depth}"
            )
        size = math.prod(shape)
        self.out_shape = (outputs * shape[0], *shape[1:])
        self.embed = nn.Sequential(Conditioning(embedding, width), nn.SiLU())
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, width) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zero_(nn.Linear(width, outputs * size)))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """``x`` of shape ``(B, C, ...)``, ``label`` of shape ``(B,)``; returns ``(B, outputs * C, ...)``."""
        embedding, h = self.embed(label), self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h).reshape(len(x), *self.out_shape)
