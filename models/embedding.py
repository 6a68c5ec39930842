"""Features of the noise level."""

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a label at geometrically spaced frequencies (Vaswani et al., 2017; Ho et al., 2020).

    The label is log(sigma / alpha), between about -14 and 7: ``frequencies`` run from 1/16 to 4 radians per nat, enough
    to tell neighbouring noise levels apart and smooth on the scale on which the score changes.
    """

    def __init__(self, features: int, lowest: float = 1 / 16, highest: float = 4.0):
        super().__init__()
        if features < 2 or features % 2:
            raise ValueError(f"features must be an even number of at least 2, found {features}")
        frequencies = lowest * (highest / lowest) ** torch.linspace(0, 1, features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        """``(B,)`` to ``(B, features)``."""
        angle = label[:, None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=1)


def label_network(features: int, width: int) -> nn.Sequential:
    """Embedding of the label through two layers: ``(B,)`` to ``(B, width)``."""
    return nn.Sequential(
        SinusoidalEmbedding(features), nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )


def zero_(module: nn.Module) -> nn.Module:
    """Set the parameters of a layer to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
