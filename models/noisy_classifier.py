r"""A classifier of noised data, whose gradient leads a score model to a class (Song et al., 2021, section 5, app. I.1).

By Bayes' rule the score of the data of class y is

    grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x),

and the last term is the gradient of a classifier that knows the noise level. It learns by the cross-entropy of the
classes of noised examples, E -log q(y | x_t, t) over times, data and noise: the least is at q(y | x_t, t) = p_t(y | x),
the posterior of the class, which at the end of all noise is the prior of the classes. What is used is the gradient with
respect to x: every layer is smooth.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedding import Conditioning, zero_
from models.labels import log_snr
from models.objective import noise_like
from models.share import Source
from models.time_sampling import TimeSampler, UniformTime
from models.unet_blocks import Norm, Residual, Style, conv
from sde import GaussianSDE
from sde.base import expand, require_count

_SMALL = 4  # positions along an axis that are not halved any more


class _FlatBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.features, self.norm = width, nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), zero_(nn.Linear(width, width))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(F.silu(self.norm(h))) + modulation))


def _layers(shape: tuple[int, ...], width: int, blocks: int) -> tuple[nn.Module, list[nn.Module], nn.Module, int]:
    """Of flat data: the first layer, the blocks, the last norm, and how many numbers come out."""
    return nn.Linear(*shape, width), [_FlatBlock(width) for _ in range(blocks)], nn.LayerNorm(width), width


def _convolutions(shape: tuple[int, ...], width: int, blocks: int) -> tuple[nn.Module, list[nn.Module], nn.Module, int]:
    """Of signals and images, likewise: twice the width from the second resolution on, halved down to 4 positions."""
    style, sizes = Style(len(shape) - 1), [shape[1:]]
    while max(sizes[-1]) > _SMALL:
        sizes.append(tuple(-(-size // 2) for size in sizes[-1]))
    widths, body = [width] + [2 * width] * (len(sizes) - 1), []
    for level, out in enumerate(widths):
        if level:
            body.append(_Halved(style, widths[level - 1]))
        inputs = [widths[max(0, level - 1)], *[out] * (blocks - 1)]
        body += [Residual(style, one, out) for one in inputs]
    return conv(style, shape[0], width), body, Norm(widths[-1]), widths[-1] * math.prod(sizes[-1])


class _Halved(nn.Module):
    """A convolution of stride 2, which the noise level does not reach."""

    features = 0

    def __init__(self, style: Style, channels: int):
        super().__init__()
        self.conv = conv(style, channels, channels, stride=2)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        return self.conv(h)


_BODIES = {1: _layers, 2: _convolutions, 3: _convolutions}
"""By the number of axes of one sample."""


class ClassifierNet(nn.Module):
    """Logits of K classes from noised data and the noise level; smooth everywhere.

    Parameters
    ----------
    shape: of one sample: ``(D,)``, ``(C, L)`` or ``(C, H, W)``. classes: K, at least 2.
    width: of the hidden layers, or the channels of the first resolution.
    blocks: residual blocks, of signals and images at each resolution.
    embedding: number of features of the noise level.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 64, blocks: int = 1, embedding: int = 64):
        super().__init__()
        shape = tuple(shape)
        if len(shape) not in _BODIES or min(shape, default=0) < 1:
            raise ValueError(f"ClassifierNet takes samples of shape (D,), (C, L) or (C, H, W), found {shape}")
        for name, value in {"classes": classes, "width": width, "blocks": blocks}.items():
            require_count(value, f"ClassifierNet: {name}")
        if classes < 2:
            raise ValueError(f"ClassifierNet: there is nothing to tell apart among {classes} classes; take 2 or more")
        self.classes = classes
        self.embed = Conditioning(embedding, 2 * width)
        self.first, body, norm, size = _BODIES[len(shape)](shape, width, blocks)
        self.body = nn.ModuleList(body)
        self.features = [block.features for block in body]
        self.project = nn.Linear(2 * width, sum(self.features))
        self.last = nn.Sequential(norm, nn.SiLU(), nn.Flatten(), zero_(nn.Linear(size, classes)))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """``x`` of shape ``(B, *shape)``, ``label`` of shape ``(B,)``; returns ``(B, K)``."""
        shares = self.project(F.silu(self.embed(label))).split(self.features, dim=1)
        h = self.first(x)
        for block, share in zip(self.body, shares, strict=True):
            h = block(h, share)
        return self.last(h)


class NoisyClassifier(nn.Module):
    """The classes of x_t under ``sde``, by a network ``net(x, label)`` such as ``ClassifierNet``.

    The network sees x_t / sqrt(alpha^2 + sigma^2), of unit variance for data of unit variance, and the label
    log(sigma / alpha) of a level within ``sde.log_snr_range``, finite at both ends: as that of ``ScoreNetwork``.

    net: any module that maps ``(B, ...)`` and ``(B,)`` to logits ``(B, K)``.
    """

    def __init__(self, net: nn.Module, sde: GaussianSDE):
        super().__init__()
        if not isinstance(sde, GaussianSDE):
            raise TypeError(f"expected a GaussianSDE such as VP(), found {type(sde).__name__}")
        self.net, self.sde = net, sde
        low, high = sde.log_snr_range
        self.ends = sde.time(torch.tensor((high, low), dtype=torch.float64)).tolist()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits ``(B, K)`` for ``x`` of shape ``(B, ...)`` at times ``t`` of shape ``()`` or ``(B,)``."""
        scale, inside = torch.hypot(self.sde.alpha(t), self.sde.sigma(t)), t.clamp(*self.ends)
        label = log_snr(inside, self.sde.alpha(inside), self.sde.sigma(inside), self.sde).expand(len(x))
        return self.net(x / expand(scale, x), label)

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(y | x_t, t) of every class; nats, ``(B, K)``."""
        return torch.log_softmax(self(x, t), dim=1)


def noisy_cross_entropy(
    classifier: NoisyClassifier,
    x0: Tensor,
    labels: Tensor,
    times: TimeSampler | None = None,
    generator: Source = None,
) -> Tensor:
    """-log q(y | x_t, t) of each example at a time and with noise of its own; nats, ``(B,)``.

    x0: clean data, ``(B, ...)``. labels: int64 ``(B,)``, 0 to K - 1. times: ``UniformTime()`` by default.
    """
    if labels.shape != x0.shape[:1] or labels.dtype != torch.int64:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels: expected one int64 for each of {len(x0)} examples, found {found}")
    sde, times = classifier.sde, times or UniformTime()
    t = times.sample(len(x0), sde, generator, x0.device, x0.dtype)
    x = sde.perturb(x0, t, noise_like(x0, generator))
    return times.importance(t, sde) * F.cross_entropy(classifier(x, t), labels, reduction="none")
