"""The parts of a U-Net: residual blocks that may resample, self-attention, and changes of resolution.

Every layer is called alike, ``layer(h, modulation)``, where ``modulation`` is the layer's own share, ``(B, features)``,
of one projection of the embedding for the whole network; a layer that the noise level does not reach has 0 features.
With ``skip_rescale`` the sum of two branches is divided by sqrt 2, which keeps its variance (Song et al., 2021, H).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import zero_
from models.resampling import RESAMPLE, Blur

CONV = {1: nn.Conv1d, 2: nn.Conv2d}


class Norm(nn.GroupNorm):
    """Groups of 4 channels, at most 32 groups, as score_sde has them. What is stored channels last stays so.

    There torch's kernel is slow for few channels a group at few positions on a CPU, and goes over to the other format
    elsewhere: in these cases one scale and shift for each channel of each sample does it.
    """

    def __init__(self, channels: int):
        super().__init__(math.gcd(max(1, min(channels // 4, 32)), channels), channels, eps=1e-6)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """``x`` of shape ``(B, C, ...)``; the result times ``scale`` plus ``shift``, both ``(B, C)``, if given."""
        if x.is_contiguous():
            return super().forward(x) if scale is None else self._modulated(x, *self._affine(scale, shift))
        large = self.num_channels >= 8 * self.num_groups or x[0, 0].numel() >= 1024
        if large and x.device.type == "cpu":
            h = super().forward(x)
            return h if scale is None else torch.addcmul(_spread(shift, x), h, _spread(scale, x))
        mean, rstd = self._moments(x.flatten(2).mT.to(torch.promote_types(x.dtype, torch.float32)))
        weight, bias = (self.weight, self.bias) if scale is None else self._affine(scale, shift)
        weight = rstd * weight
        return torch.addcmul(_spread(bias - mean * weight, x), x, _spread(weight, x)).to(x.dtype)

    def _affine(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases of the samples, each ``(B, C)``."""
        return self.weight * scale, torch.addcmul(shift, self.bias, scale)

    def _modulated(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # To the kernel the samples are the channels of one sample: that spares a pass over memory, and three backwards.
        one, groups = x.reshape(1, -1, *x.shape[2:]), len(x) * self.num_groups
        return F.group_norm(one, groups, weight.flatten(), bias.flatten(), self.eps).view_as(x)

    def _moments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / deviation of the groups, of ``(B, positions, C)``; each ``(B, C)``."""
        size = tokens[0].numel() // self.num_groups
        # Sums of squares cancel: never in half precision.
        sums = (tokens.sum(1), tokens.square().sum(1))
        mean, square = (y.unflatten(1, (self.num_groups, -1)).sum(2) / size for y in sums)
        rstd = ((square - mean.square()).clamp(min=0) + self.eps).rsqrt()
        width = self.num_channels // self.num_groups
        return mean.repeat_interleave(width, 1), rstd.repeat_interleave(width, 1)


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common; ``rank`` is the number of axes of a signal."""

    rank: int
    modulation: str = "scale_shift"
    skip_rescale: bool = False
    dropout: float = 0.0
    heads: int = 1
    fir: bool = False

    @property
    def gain(self) -> float:
        """Of the sum of two branches."""
        return math.sqrt(0.5) if self.skip_rescale else 1.0


def conv(style: Style, inputs: int, outputs: int, size: int = 3, **options) -> nn.Module:
    """A convolution that keeps sizes.

    Rescaled sums expect branches of unit variance: there its weights are uniform of variance 2 / (fan in + fan out) and
    it has no bias yet, as in Ho et al. (2020). Otherwise it starts as torch's, whose smaller weights learn faster.
    """
    layer = CONV[style.rank](inputs, outputs, size, **{"padding": size // 2} | options)
    if style.skip_rescale:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


class Shift(nn.Module):
    """norm(h + shift), in the memory of h: DDPM's, of score_sde's DDPM++ and NCSN++."""

    features = 1

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        return self.norm(h.add_(_spread(modulation, h)))


class ScaleShift(nn.Module):
    """norm(h) (1 + scale) + shift (Dhariwal and Nichol, 2021)."""

    features = 2

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return self.norm(h, 1 + scale, shift)


MODULATIONS = {"shift": Shift, "scale_shift": ScaleShift}
"""How the embedding enters a residual block."""


def _spread(modulation: Tensor, h: Tensor) -> Tensor:
    return modulation.reshape(*modulation.shape, *(1,) * (h.dim() - 2))


def silu(h: Tensor) -> Tensor:
    """SiLU of what nobody else needs, in place where no gradient does: fresh memory costs more than the function."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


def _times(total: Tensor, gain: float) -> Tensor:
    """A sum that nobody else needs, rescaled in place."""
    return total if gain == 1 else total.mul_(gain)


class Residual(nn.Module):
    """norm, SiLU, convolution, modulated norm, SiLU, convolution; plus the input.

    With ``resample`` the activations and the input are both resampled (BigGAN's blocks, Brock et al., 2019), and the
    input has its own 1 x 1 convolution, as where the number of channels changes.
    """

    def __init__(self, style: Style, inputs: int, outputs: int, resample=None):
        super().__init__()
        modulated = MODULATIONS[style.modulation]
        self.features, self.gain = modulated.features * outputs, style.gain
        self.norm1, self.conv1 = Norm(inputs), conv(style, inputs, outputs)
        self.norm2, self.conv2 = modulated(outputs), zero_(conv(style, outputs, outputs))
        self.dropout = nn.Dropout(style.dropout)
        self.resample = resample(inputs, style.rank) if resample else nn.Identity()
        same = inputs == outputs and resample is None
        self.skip = nn.Identity() if same else conv(style, inputs, outputs, 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        h = self.conv1(self.resample(silu(self.norm1(x))))
        h = self.conv2(self.dropout(silu(self.norm2(h, modulation))))
        return _times(h.add_(self.skip(self.resample(x))), self.gain)


class Attention(nn.Module):
    """Self-attention over all positions; plus the input."""

    def __init__(self, style: Style, channels: int):
        super().__init__()
        self.heads, self.gain, self.norm = style.heads, style.gain, Norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zero_(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        # (B, positions, C): a view of what is stored channels last.
        tokens = self.norm(x).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return _times(x + h.mT.unflatten(2, x.shape[2:]), self.gain)


class Stage(nn.Module):
    """A residual block, then attention where it is asked for."""

    def __init__(self, style: Style, inputs: int, outputs: int, attention: bool):
        super().__init__()
        self.residual = Residual(style, inputs, outputs)
        self.attention = Attention(style, outputs) if attention else nn.Identity()
        self.features = self.residual.features

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.attention(self.residual(x, modulation))


class Plain(nn.Module):
    """Layers that know nothing of the noise level."""

    features = 0

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.layers(x)


def conv_down(style: Style, channels: int) -> Plain:
    """A convolution of stride 2."""
    return Plain(conv(style, channels, channels, stride=2))


def conv_up(style: Style, channels: int) -> Plain:
    """Repetition, then a convolution."""
    return Plain(RESAMPLE[False][1](channels, style.rank), conv(style, channels, channels))


def residual_down(style: Style, channels: int) -> Residual:
    """A residual block at half the resolution."""
    return Residual(style, channels, channels, RESAMPLE[style.fir][0])


def residual_up(style: Style, channels: int) -> Residual:
    """A residual block at twice the resolution."""
    return Residual(style, channels, channels, RESAMPLE[style.fir][1])


CHANGES = {"conv": (conv_down, conv_up), "residual": (residual_down, residual_up)}
"""Ways to halve and double the resolution between stages."""


class Keep(nn.Module):
    """No pyramid of the input: what it would be goes on as it is."""

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, pyramid


class Inject(nn.Module):
    """NCSN++'s residual pyramid: the last sum at half its resolution is added to ``h``, and the sum goes on."""

    def __init__(self, style: Style, inputs: int, outputs: int):
        super().__init__()
        blur = Blur(inputs, style.rank) if style.fir else nn.Identity()
        strided = conv(style, inputs, outputs, stride=2, padding=0 if style.fir else 1)
        self.down, self.gain = nn.Sequential(blur, strided), style.gain

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = _times(h + self.down(pyramid), self.gain)
        return h, h
