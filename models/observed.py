r"""An observation that a network is given: the conditional score learned directly.

Of pairs (x_0, y) denoising score matching with a network that is told y,

    E  lambda(t) / 2  |s(x_t, y, t) + eps / sigma|^2,

has its minimum at the score of p(x_t | y), for all y at once (Batzolis et al., "Conditional image generation with
score-based diffusion models", 2021, theorem 1): given y, it is the ordinary objective of the data x_0 | y. Such a model
needs no guidance and no likelihood, and knows the one way in which y was made in its training, and no other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.operators import sizes


class Observed:
    """Where a network of samples of ``shape`` takes the observation y in, if at all, and the check of it.

    An observation of the same places as the samples, ``(Cy, ...)``, goes beside them as ``channels`` more; one of any
    other shape goes to the embedding, flat.

    Parameters
    ----------
    network: name of its class, for messages. shape: of one x. observation: shape of one y, None for none.

    Attributes
    ----------
    values: of y, 0 for none. channels: of y beside those of x, 0 for none. apart: values of y elsewhere, 0 for none.
    """

    def __init__(self, network: str, shape: Sequence[int], observation: Sequence[int] | None = None):
        self.network, self.shape = network, None if observation is None else sizes(observation)
        self.values = 0 if self.shape is None else math.prod(self.shape)
        near = self.shape is not None and (len(self.shape), *self.shape[1:]) == (len(shape), *tuple(shape)[1:])
        self.channels, self.apart = (self.shape[0], 0) if near else (0, self.values)

    def checked(self, x: Tensor, observation: Tensor | None) -> Tensor | None:
        """y in the type and on the device of ``x``, ``(B, *shape)``; None of none. Raises ``ValueError``."""
        found = None if observation is None else tuple(observation.shape)
        expected = None if self.shape is None else (len(x), *self.shape)
        if found == expected:
            return None if observation is None else observation.to(x)
        name = self.network
        if self.shape is None:
            raise ValueError(
                f"{name}: this network takes no observation, found one of shape {found}: build it with "
                f"observation={found[1:]}, or leave it out"
            )
        raise ValueError(
            f"{name}: expected an observation of shape {expected}, found {'none' if found is None else found}: this "
            f"network was made for y of shape {self.shape}; fill it in by Conditioned(model, observation=y)"
        )

    def split(self, x: Tensor, observation: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """y to go beside x, or y flat, ``(B, apart)``; None for what is not there."""
        y = self.checked(x, observation)
        return (y, None) if self.channels or y is None else (None, y.flatten(1))


def beside(x: Tensor, y: Tensor | None) -> Tensor:
    """``x`` and ``y`` joined along their channels; ``x`` itself without y."""
    return x if y is None else torch.cat((x, y), dim=1)
