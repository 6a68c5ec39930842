"""Features of the noise level, of a class, and of an observation without places.

The label that a network is given is a number of order 10: log(sigma / alpha) runs from about -14 to 7.
"""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a label at geometrically spaced frequencies (Vaswani et al., 2017; Ho et al., 2020).

    The ``frequencies`` run from 1/16 to 4 radians per unit of the label, enough to tell neighbouring noise levels apart
    and smooth on the scale on which the score changes.
    """

    def __init__(self, features: int, lowest: float = 1 / 16, highest: float = 4.0):
        super().__init__()
        _check_features(features)
        frequencies = lowest * (highest / lowest) ** torch.linspace(0, 1, features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        """``(B,)`` to ``(B, features)``, in the type of the label."""
        return _waves(label, self.frequencies)


class FourierEmbedding(nn.Module):
    """Sines and cosines of a label at random frequencies N(0, scale^2), fixed once drawn (Tancik et al., 2020).

    ``scale`` is in radians per unit of the label; NCSN++ has 2 pi 16 for log sigma (Song et al., 2021, appendix C.1),
    EDM 2 pi for log(sigma) / 4.
    """

    def __init__(self, features: int, scale: float = 2.0):
        super().__init__()
        _check_features(features)
        if not 0 < scale < math.inf:
            raise ValueError(f"FourierEmbedding: scale must be a positive number, found {scale!r}")
        self.register_buffer("frequencies", scale * torch.randn(features // 2))

    def forward(self, label: Tensor) -> Tensor:
        """``(B,)`` to ``(B, features)``, in the type of the label."""
        return _waves(label, self.frequencies)


EMBEDDINGS = {"sinusoidal": SinusoidalEmbedding, "fourier": FourierEmbedding}
"""The features of the noise level by the names that networks take."""


class Conditioning(nn.Module):
    """Features of the noise label through two layers, plus a learned vector for each class: ``(B,)`` to ``(B, width)``.

    An observation's values go through two layers of their own, and are added, too.

    Parameters
    ----------
    features, width: numbers of features of the label, and of the outputs.
    embedding: "sinusoidal" or "fourier".
    classes: number of classes, 0 for none. Class ``classes`` stands for none given, as for the samples of an
        unconditional model; it is what ``class_label=None`` means.
    observed: number of values of an observation (``models.observed``), 0 for none.
    """

    def __init__(self, features: int, width: int, embedding: str = "sinusoidal", classes: int = 0, observed: int = 0):
        super().__init__()
        if embedding not in EMBEDDINGS:
            raise ValueError(f"embedding must be one of {', '.join(EMBEDDINGS)}, found {embedding!r}")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise ValueError(f"classes must be a number of classes, or 0 for none, found {classes!r}")
        self.features = EMBEDDINGS[embedding](features)
        self.layers = _perceptron(features, width)
        self.known, self.classes = classes, nn.Embedding(classes + 1, width) if classes else None
        self.observation = _perceptron(observed, width) if observed else None

    def forward(self, label: Tensor, class_label: Tensor | None = None, observation: Tensor | None = None) -> Tensor:
        """Before its last activation. ``class_label``: integers in 0..classes, ``(B,)``.

        ``observation``: ``(B, observed)``; whether there is one where there must be, the network has checked.
        """
        h = self._of_class(self.layers(self.features(label)), label, class_label)
        return h if observation is None else h + self.observation(observation)

    def _of_class(self, h: Tensor, label: Tensor, class_label: Tensor | None) -> Tensor:
        if self.classes is None:
            if class_label is not None:
                raise ValueError("this network knows no classes: build it with classes=, or leave class_label out")
            return h
        if class_label is None:
            class_label = torch.full(label.shape, self.classes.num_embeddings - 1, device=label.device)
        return h + self.classes(class_label)


def _perceptron(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _check_features(features: int) -> None:
    if features < 2 or features % 2:
        raise ValueError(f"features must be an even number of at least 2, found {features}")


def _waves(label: Tensor, frequencies: Tensor) -> Tensor:
    angle = label[:, None] * frequencies
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def zero_(module: nn.Module) -> nn.Module:
    """Set the parameters of a layer to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
