"""A multilayer perceptron for tables, and for data of any shape taken flat."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import Conditioning, zero_
from models.observed import Observed, beside


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float, layer_norm: bool):
        super().__init__()
        self.norm, self.label = _norm(width, layer_norm), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), zero_(nn.Linear(width, width))
        self.activation, self.dropout = nn.SiLU(), nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, label: Tensor) -> Tensor:
        return h + self.outer(self.dropout(self.activation(self.inner(self.norm(h)) + self.label(label))))


def _norm(width: int, layer_norm: bool) -> nn.Module:
    return nn.LayerNorm(width) if layer_norm else nn.Identity()


class MLP(nn.Module):
    """Residual perceptron on flattened data.

    Parameters
    ----------
    shape: shape of one sample, such as ``(2,)``, the columns of a table, or ``(1, 8, 8)``.
    outputs: numbers given for each value of the data (see ``Parametrization.outputs``).
    width, depth: size and number of the residual blocks.
    embedding, embedding_kind: number of features of the noise level, and "sinusoidal" or "fourier".
    classes: number of classes that ``class_label`` may name, 0 for none (see ``models.embedding.Conditioning``).
    dropout: probability inside the residual blocks.
    layer_norm: whether the blocks and the last layer see their input at unit scale; without, large values stay large.
    observation: shape of an observation that the network is given beside x (``models.observed``); None for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int = 1,
        width: int = 128,
        depth: int = 3,
        embedding: int = 64,
        embedding_kind: str = "sinusoidal",
        classes: int = 0,
        dropout: float = 0.0,
        layer_norm: bool = True,
        observation: Sequence[int] | None = None,
    ):
        super().__init__()
        shape = tuple(shape)
        if not shape or min(shape) < 1 or min(outputs, width, depth) < 1:
            raise ValueError(
                f"MLP needs positive sizes, found shape={shape}, outputs={outputs}, width={width}, depth={depth}"
            )
        size = math.prod(shape)
        self.out_shape = (outputs * shape[0], *shape[1:])
        self.embed = Conditioning(embedding, width, embedding_kind, classes)
        self.observed = Observed("MLP", shape, observation)
        self.first = nn.Linear(size + self.observed.values, width)
        self.blocks = nn.ModuleList(_Block(width, dropout, layer_norm) for _ in range(depth))
        self.last = nn.Sequential(_norm(width, layer_norm), nn.SiLU(), zero_(nn.Linear(width, outputs * size)))

    def forward(
        self, x: Tensor, label: Tensor, class_label: Tensor | None = None, observation: Tensor | None = None
    ) -> Tensor:
        """``x`` of shape ``(B, C, ...)``, ``label`` of shape ``(B,)``; returns ``(B, outputs * C, ...)``.

        ``class_label``: integers in 0..classes, ``(B,)``; None for no class. ``observation``: ``(B, *observation)``.
        """
        y = self.observed.checked(x, observation)
        h = self.first(beside(x.flatten(1), None if y is None else y.flatten(1)))
        embedding = F.silu(self.embed(label, class_label))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h).reshape(len(x), *self.out_shape)
