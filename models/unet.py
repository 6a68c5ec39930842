"""A U-Net for signals and images (Ronneberger et al., 2015) in the form of Ho et al., 2020, and Song et al., 2021."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import Conditioning, zero_

_CONV = {1: nn.Conv1d, 2: nn.Conv2d}


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class _Residual(nn.Module):
    """norm, SiLU, convolution, scale and shift by the noise level, SiLU, convolution; plus the input."""

    def __init__(self, conv, channels: int, out: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), conv(channels, out, 3, padding=1)
        self.label = nn.Linear(embedding, 2 * out)
        self.norm2, self.conv2 = _norm(out), zero_(conv(out, out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if channels == out else conv(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        label = self.label(embedding)
        scale, shift = label.reshape(*label.shape, *(1,) * (x.dim() - 2)).chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention over positions; plus the input."""

    def __init__(self, conv, channels: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, _norm(channels)
        self.qkv, self.out = conv(channels, 3 * channels, 1), zero_(conv(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return x + self.out(h)


class _Stage(nn.Module):
    """A residual block, then attention where it is asked for."""

    def __init__(self, conv, channels: int, out: int, embedding: int, dropout: float, heads: int):
        super().__init__()
        self.residual = _Residual(conv, channels, out, embedding, dropout)
        self.attention = _Attention(conv, out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """U-Net over samples of shape ``(C, L)`` or ``(C, H, W)``.

    Parameters
    ----------
    shape: shape of one sample; its sizes must be divisible by ``2 ** (len(multipliers) - 1)``.
    outputs: numbers given for each value of the data (see ``Parametrization.outputs``).
    channels, multipliers: width of the first resolution, and the factor at each.
    blocks: residual blocks at each resolution on the way down (one more on the way up).
    attention: for each resolution, whether its blocks attend over all positions; the middle always does.
    heads: attention heads. dropout: probability inside the residual blocks.
    fourier: number of octaves of sin and cos of the input given beside it, at 2 pi, 4 pi, ... over its unit range
        (Kingma et al., "Variational diffusion models", 2021, section 5.1): fine detail for likelihoods; 0 for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int = 1,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[bool, ...] = (False, True),
        heads: int = 1,
        dropout: float = 0.0,
        fourier: int = 0,
    ):
        super().__init__()
        shape, widths = tuple(shape), [channels * m for m in multipliers]
        self._check(shape, widths, attention, heads)
        conv, embedding = _CONV[len(shape) - 1], 4 * channels
        self.out_shape, self.octaves = (outputs * shape[0], *shape[1:]), fourier
        self.embed = nn.Sequential(Conditioning(2 * channels, embedding), nn.SiLU())

        def stage(inputs: int, level: int, attend: bool) -> _Stage:
            return _Stage(conv, inputs, widths[level], embedding, dropout, heads if attend else 0)

        self.first = conv(shape[0] * (1 + 2 * fourier), channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, attend in enumerate(attention):
            if level:
                self.down.append(conv(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(stage(width, level, attend))
                width = widths[level]
                skips.append(width)
        self.middle = nn.ModuleList((stage(width, -1, True), stage(width, -1, False)))
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + skips.pop(), level, attention[level]))
                width = widths[level]
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(width, width, 3, padding=1)))
        self.last = nn.Sequential(_norm(width), nn.SiLU(), zero_(conv(width, self.out_shape[0], 3, padding=1)))

    @staticmethod
    def _check(shape, widths, attention, heads):
        if len(shape) - 1 not in _CONV:
            raise ValueError(f"UNet takes samples of shape (C, L) or (C, H, W), found {shape}; for flat data use MLP")
        if len(attention) != len(widths):
            raise ValueError(f"UNet: attention needs {len(widths)} entries, one per multiplier, found {len(attention)}")
        stride = 2 ** (len(widths) - 1)
        if any(size % stride for size in shape[1:]):
            raise ValueError(
                f"UNet: with {len(widths)} multipliers the sizes {shape[1:]} must be divisible by {stride}; "
                "use fewer multipliers or pad the data"
            )
        if any(width % heads for width in widths):
            raise ValueError(f"UNet: the widths {widths} must be divisible by heads={heads}")

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """``x`` of shape ``(B, C, ...)``, ``label`` of shape ``(B,)``; returns ``(B, outputs * C, ...)``."""
        embedding = self.embed(label)
        h = self.first(self._with_octaves(x))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, _Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat((h, skips.pop()), dim=1), embedding) if isinstance(layer, _Stage) else layer(h)
        return self.last(h)

    def _with_octaves(self, x: Tensor) -> Tensor:
        angles = [x * (math.pi * 2.0**octave) for octave in range(1, self.octaves + 1)]
        return torch.cat([x, *(a.sin() for a in angles), *(a.cos() for a in angles)], dim=1) if angles else x
