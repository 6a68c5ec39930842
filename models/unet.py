"""A U-Net for signals and images (Ronneberger et al., 2015): DDPM++, NCSN++ (Song et al., 2021, app. H), and kin.

From the finest resolution to the coarsest and back, every output on the way down is kept and joined to the input of its
mirror image on the way up. Each resolution has ``blocks`` residual blocks down and one more up, each followed by
attention on the way down where the resolution attends, the last alone on the way up; in the middle are a residual
block, attention and a residual block. Of ``UNet``'s arguments

    DDPM++   resample="residual", skip_rescale=True, modulation="shift", embedding_features=channels,
    NCSN++   the same with fir=True, progressive_input=True, embedding="fourier", embedding_features=2 * channels,
    VDM      multipliers=(1,), attention=(False,), fourier=(7, 8): flat, attention in the middle alone.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import Conditioning, zero_
from models.observed import Observed, beside
from models.unet_blocks import CHANGES, MODULATIONS, Inject, Keep, Norm, Plain, Stage, Style, conv


class UNet(nn.Module):
    """U-Net over samples of shape ``(C, L)`` or ``(C, H, W)``.

    Parameters
    ----------
    shape: shape of one sample; its sizes must be divisible by ``2 ** (len(multipliers) - 1)``.
    outputs: numbers given for each value of the data (see ``Parametrization.outputs``).
    channels, multipliers: width of the first resolution, and the factor at each.
    blocks: residual blocks at each resolution on the way down (one more on the way up).
    attention: for each resolution, whether it attends over all positions; the middle always does.
    heads: attention heads. dropout: probability inside the residual blocks.
    fourier: sin and cos of 2^n pi times the input, given beside it, n = 1 .. ``fourier`` or the exponents listed
        (Kingma et al., "Variational diffusion models", 2021, section 5.1): fine detail for likelihoods; 0 for none.
    resample: "conv", a convolution of stride 2 and repetition with a convolution, or "residual", residual blocks that
        resample both of their branches by means and repetition.
    fir: resample those through the filter (1, 3, 3, 1) (``models.resampling``).
    progressive_input: add the input, halved and convolved again and again, to each resolution ("residual" in NCSN++).
    skip_rescale: divide the sum of two branches by sqrt 2.
    modulation: how the embedding enters a block: "scale_shift" after its second norm, or "shift" before it.
    embedding, embedding_features, classes: of ``models.embedding.Conditioning``; 2 * ``channels`` features by default.
    observation: shape of an observation that the network is given; ``(Cy, ...)`` of the places of x goes beside its
        channels, another into the embedding (``models.observed``). None for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[bool] = (False, True),
        heads: int = 1,
        dropout: float = 0.0,
        fourier: int | Sequence[float] = 0,
        resample: str = "conv",
        fir: bool = False,
        progressive_input: bool = False,
        skip_rescale: bool = False,
        modulation: str = "scale_shift",
        embedding: str = "sinusoidal",
        embedding_features: int | None = None,
        classes: int = 0,
        observation: Sequence[int] | None = None,
    ):
        super().__init__()
        _check_numbers(shape, outputs, channels, multipliers, blocks, heads, dropout)
        _check_layout(shape, [channels * m for m in multipliers], attention, heads)
        _check_choices(resample, modulation, fir)
        self.exponents = _exponents(fourier)
        self.out_shape = (outputs * shape[0], *shape[1:])
        features = 2 * channels if embedding_features is None else embedding_features
        self.observed = Observed("UNet", shape, observation)
        self.embed = Conditioning(features, 4 * channels, embedding, classes, self.observed.apart)
        style = Style(len(shape) - 1, modulation, skip_rescale, dropout, heads, fir)
        down, up = CHANGES[resample]
        levels = [(channels * m, attend) for m, attend in zip(multipliers, attention, strict=True)]
        first = conv(style, shape[0] * (1 + 2 * len(self.exponents)) + self.observed.channels, channels)
        self._build_down(style, first, levels, blocks, down)
        self._build_pyramid(style, shape[0], levels, progressive_input)
        self.middle = nn.ModuleList(Stage(style, levels[-1][0], levels[-1][0], attend) for attend in (True, False))
        self._build_up(style, levels, blocks, up)
        self.features = [layer.features for layer in self._layers()]
        self.project = nn.Linear(4 * channels, sum(self.features))

    def _build_down(self, style: Style, first: nn.Module, levels: list[tuple[int, bool]], blocks: int, down) -> None:
        width, self.enter, self.down = first.out_channels, nn.ModuleList(), nn.ModuleList()
        for level, (out, attend) in enumerate(levels):
            self.enter.append(down(style, width) if level else Plain(first))
            inputs = (width, *[out] * (blocks - 1))
            self.down.append(nn.ModuleList(Stage(style, one, out, attend) for one in inputs))
            width = out

    def _build_pyramid(self, style: Style, inputs: int, levels: list[tuple[int, bool]], progressive: bool) -> None:
        """At the first resolution it is the input alone; at each later one it has the width that enters there."""
        self.inject = nn.ModuleList((Keep(),))
        for width, _ in levels[:-1]:
            self.inject.append(Inject(style, inputs, width) if progressive else Keep())
            inputs = width

    def _build_up(self, style: Style, levels: list[tuple[int, bool]], blocks: int, up) -> None:
        entering = (self.enter[0].layers[0].out_channels, *(width for width, _ in levels))
        last = zero_(conv(style, levels[0][0], self.out_shape[0]))
        width, self.up, self.leave = levels[-1][0], nn.ModuleList(), nn.ModuleList()
        for level, (out, attend) in reversed(list(enumerate(levels))):
            kept = (*[out] * blocks, entering[level])
            inputs = (width + kept[0], *(out + one for one in kept[1:]))
            self.up.append(
                nn.ModuleList(Stage(style, one, out, attend and i == blocks) for i, one in enumerate(inputs))
            )
            self.leave.append(up(style, out) if level else Plain(Norm(out), nn.SiLU(), last))
            width = out

    def _layers(self) -> Iterator[nn.Module]:
        """All that take a share of the projected embedding, in the order of the forward pass."""
        for enter, stages in zip(self.enter, self.down, strict=True):
            yield from (enter, *stages)
        yield from self.middle
        for stages, leave in zip(self.up, self.leave, strict=True):
            yield from (*stages, leave)

    def forward(
        self, x: Tensor, label: Tensor, class_label: Tensor | None = None, observation: Tensor | None = None
    ) -> Tensor:
        """``x`` of shape ``(B, C, ...)``, ``label`` of shape ``(B,)``; returns ``(B, outputs * C, ...)``.

        ``class_label``: integers in 0 .. ``classes``, ``(B,)``; None stands for ``classes``, no class.
        ``observation``: ``(B, *observation)``.
        """
        near, apart = self.observed.split(x, observation)
        shares = iter(self.project(F.silu(self.embed(label, class_label, apart))).split(self.features, dim=1))
        h, pyramid, kept = beside(self._with_octaves(x), near), x, []
        for enter, inject, stages in zip(self.enter, self.inject, self.down, strict=True):
            h, pyramid = inject(enter(h, next(shares)), pyramid)
            kept.append(h)
            for stage in stages:
                h = stage(h, next(shares))
                kept.append(h)
        for stage in self.middle:
            h = stage(h, next(shares))
        for stages, leave in zip(self.up, self.leave, strict=True):
            for stage in stages:
                h = stage(torch.cat((h, kept.pop()), dim=1), next(shares))
            h = leave(h, next(shares))
        return h

    def _with_octaves(self, x: Tensor) -> Tensor:
        angles = [x * (math.pi * 2.0**n) for n in self.exponents]
        return torch.cat([x, *(a.sin() for a in angles), *(a.cos() for a in angles)], dim=1) if angles else x


def _exponents(fourier: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(fourier, int):
        if fourier < 0:
            raise ValueError(f"UNet: fourier must be a number of octaves or a list of exponents, found {fourier}")
        return tuple(range(1, fourier + 1))
    return tuple(fourier)


def _check_numbers(shape, outputs, channels, multipliers, blocks, heads, dropout) -> None:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"UNet takes samples of shape (C, L) or (C, H, W), found {tuple(shape)}; for flat data use MLP"
        )
    sizes = {"shape": shape, "multipliers": multipliers, "outputs": (outputs,), "channels": (channels,)}
    for name, values in (sizes | {"blocks": (blocks,), "heads": (heads,)}).items():
        if not values or any(value != int(value) or value < 1 for value in values):
            raise ValueError(
                f"UNet: {name} must be positive whole numbers, found {', '.join(map(str, values)) or 'none'}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"UNet: dropout must be a probability in [0, 1), found {dropout}")


def _check_layout(shape, widths, attention, heads) -> None:
    if len(attention) != len(widths):
        raise ValueError(f"UNet: attention needs {len(widths)} entries, one per multiplier, found {len(attention)}")
    stride = 2 ** (len(widths) - 1)
    if any(size % stride for size in shape[1:]):
        raise ValueError(
            f"UNet: with {len(widths)} multipliers the sizes {tuple(shape[1:])} must be divisible by {stride}; "
            "use fewer multipliers or pad the data"
        )
    if any(width % heads for width in widths):
        raise ValueError(f"UNet: the widths {widths} must be divisible by heads={heads}")


def _check_choices(resample: str, modulation: str, fir: bool) -> None:
    for name, value, known in (("resample", resample, CHANGES), ("modulation", modulation, MODULATIONS)):
        if value not in known:
            raise ValueError(f"UNet: {name} must be one of {', '.join(known)}, found {value!r}")
    if fir and resample != "residual":
        raise ValueError(f'UNet: fir=True needs resample="residual", blocks that resample; found resample={resample!r}')
