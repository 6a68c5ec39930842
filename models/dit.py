r"""The diffusion transformer (Peebles and Xie, "Scalable diffusion models with transformers", 2023, section 3).

Samples are cut into patches, each of them a token; their places on the grid are told by fixed sines and cosines
(Vaswani et al., 2017; half of the features for each axis), and the noise level and the class by "adaLN-Zero": from
the conditioning every block reads a shift, a scale and a gate for its attention and for its perceptron,

    h = h + gate_1 attention(norm(h) (1 + scale_1) + shift_1),     h = h + gate_2 mlp(norm(h) (1 + scale_2) + shift_2),

all of them zero at the start, so that every block starts as the identity and the network as zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import Conditioning, zero_
from models.observed import Observed, beside

_CONV = {1: nn.Conv1d, 2: nn.Conv2d}


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _Modulation(nn.Module):
    """``parts`` vectors for all tokens from the conditioning: ``(B, width)`` to ``(B, 1, width)`` each."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, zero_(nn.Linear(width, parts * width))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(embedding)[:, None].chunk(self.parts, dim=-1)


class _Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, _linear(width, 3 * width), _linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention, then a perceptron; each plus its input."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.modulation, self.attention = _Modulation(width, 6), _Attention(width, heads)
        self.mlp = nn.Sequential(_linear(width, hidden), nn.GELU("tanh"), _linear(hidden, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)
        h = h + gate1 * self.dropout(self.attention(_modulated(h, shift1, scale1)))
        return h + gate2 * self.dropout(self.mlp(_modulated(h, shift2, scale2)))


class DiT(nn.Module):
    """Transformer over the patches of samples of shape ``(C, L)`` or ``(C, H, W)``.

    Parameters
    ----------
    shape: shape of one sample; its sizes must be divisible by ``patch``.
    outputs: numbers given for each value of the data (see ``Parametrization.outputs``).
    patch: length of a patch's sides. A half costs four times as many tokens of an image.
    width, depth, heads: size of a token, number of blocks, attention heads in each.
    mlp_ratio: hidden size of the perceptrons in units of ``width``.
    embedding, embedding_features: kind ("sinusoidal" or "fourier") and number of the features of the noise level.
    classes: number of classes that ``class_label`` may name, 0 for none (see ``models.embedding.Conditioning``).
    dropout: probability at the end of both branches of a block.
    observation: shape of an observation that the network is given; ``(Cy, ...)`` of the places of x goes beside its
        channels, another into the embedding (``models.observed``). None for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int = 1,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4,
        embedding: str = "sinusoidal",
        embedding_features: int = 256,
        classes: int = 0,
        dropout: float = 0.0,
        observation: Sequence[int] | None = None,
    ):
        super().__init__()
        shape = tuple(shape)
        self._check(shape, outputs, patch, width, depth, heads, mlp_ratio)
        self.channels, self.patch = outputs * shape[0], patch
        self.grid = tuple(size // patch for size in shape[1:])
        self.observed = Observed("DiT", shape, observation)
        self.first = _CONV[len(self.grid)](shape[0] + self.observed.channels, width, patch, stride=patch)
        self.register_buffer("positions", positions(self.grid, width), persistent=False)
        self.embed = Conditioning(embedding_features, width, embedding, classes, self.observed.apart)
        self.blocks = nn.ModuleList(_Block(width, heads, int(mlp_ratio * width), dropout) for _ in range(depth))
        self.modulation = _Modulation(width, 2)
        self.last = zero_(nn.Linear(width, self.channels * patch ** len(self.grid)))

    @staticmethod
    def _check(shape, outputs, patch, width, depth, heads, mlp_ratio):
        if len(shape) - 1 not in _CONV:
            raise ValueError(f"DiT takes samples of shape (C, L) or (C, H, W), found {shape}; for flat data use MLP")
        if min(*shape, outputs, patch, width, depth, heads) < 1 or not mlp_ratio * width >= 1:
            sizes = f"patch={patch}, width={width}, depth={depth}, heads={heads}, mlp_ratio={mlp_ratio}"
            raise ValueError(f"DiT needs positive sizes, found shape={shape}, outputs={outputs}, {sizes}")
        if any(size % patch for size in shape[1:]):
            raise ValueError(
                f"DiT: the sizes {shape[1:]} must be divisible by patch={patch}; change it or pad the data"
            )
        parts = 2 * (len(shape) - 1)
        if width % heads or width % parts:
            raise ValueError(f"DiT: width={width} must be divisible by heads={heads} and by {parts}, the waves' parts")

    def forward(
        self, x: Tensor, label: Tensor, class_label: Tensor | None = None, observation: Tensor | None = None
    ) -> Tensor:
        """``x`` of shape ``(B, C, ...)``, ``label`` of shape ``(B,)``; returns ``(B, outputs * C, ...)``.

        ``class_label``: integers in 0..classes, ``(B,)``; None for no class. ``observation``: ``(B, *observation)``.
        """
        near, apart = self.observed.split(x, observation)
        embedding = F.silu(self.embed(label, class_label, apart))
        h = self.first(beside(x, near)).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, embedding)
        return self._unpatched(self.last(_modulated(h, *self.modulation(embedding))))

    def _unpatched(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, C p^d)`` to samples ``(B, C, ...)``."""
        d = len(self.grid)
        patches = tokens.reshape(len(tokens), *self.grid, self.channels, *(self.patch,) * d)
        order = (0, d + 1, *(axis for i in range(d) for axis in (1 + i, d + 2 + i)))
        return patches.permute(order).reshape(len(tokens), self.channels, *(self.patch * n for n in self.grid))


def positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Sines and cosines of each token's place at the rates 10000^(-i/n), n for each axis: ``(tokens, width)``."""
    n = width // (2 * len(grid))
    rates = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    angles = places.reshape(-1, len(grid), 1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
