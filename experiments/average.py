"""The average of the weights that samplers and likelihoods use (Polyak and Juditsky, 1992; Song et al., 2021, app. H).

After update n = 0, 1, ... of a model with the state theta the average is

    m <- m + w (theta - m),    1 - w = min(decay, (1 + n) / (10 + n)),

so that the first steps are soon forgotten, and after k updates of the constant decay d a constant theta has reached
the share 1 - d^k. Everything that the model's state holds in floating point is averaged, in float32 or better, the
parameters of a learned schedule among it: the averaged network belongs to the averaged schedule. Integers are copied.
What an objective keeps is no part of the model, and is not averaged.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experiments.parallel import in_parts, local


def _precise(value: Tensor) -> Tensor:
    """A copy in float32 at least; integers as they are."""
    wide = value.is_floating_point() and value.element_size() < 4
    return value.detach().to(torch.float32 if wide else value.dtype, copy=True)


def _seen(value: Tensor, mean: Tensor, good: Tensor) -> Tensor:
    """What the mean moves to. A bad step leaves parameters alone, but a forward pass may have spoilt its buffers."""
    value = value.to(mean.dtype)
    return value if isinstance(value, nn.Parameter) else torch.where(good, value, mean)


def _exchanged(value: Tensor, other: Tensor) -> Tensor:
    """Puts another content into a tensor and returns the one it had."""
    if in_parts(value):  # its storage is FSDP's
        before = value.detach().clone()
        value.detach().copy_(other)
        return before
    before, value.data = value.data, other
    return before


class Average:
    """Exponential moving average of a model's state, by name; one fused operation an update.

    Nothing here waits for the device: the number of updates lives on it, so that a captured step can be replayed. The
    model must keep its tensors: move it to its device and memory format before.

    Parameters
    ----------
    decay: the largest decay, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average must lie in [0, 1), found {decay}")
        live = model.state_dict(keep_vars=True)
        self.decay, self.state = decay, {name: _precise(value) for name, value in live.items()}
        pairs = [(local(self.state[name]), local(value)) for name, value in live.items()]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]
        device = pairs[0][0].device if pairs else None
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, good: Tensor | None = None) -> None:
        """Move towards the model's present state; a ``good`` () of False leaves everything as it is.

        The model's parameters must be finite in any case; its buffers need not be where ``good`` is False.
        """
        good = torch.ones_like(self.updates, dtype=torch.bool) if good is None else good
        weight = (9 / (10 + self.updates)).clamp_min(1 - self.decay) * good
        self.updates += good
        weights = {dtype: weight.to(dtype) for dtype in {mean.dtype for mean, _ in self._floats}}
        means = [mean for mean, _ in self._floats]
        # A weight on the device for each tensor: a single one would be read by the host.
        torch._foreach_lerp_(
            means, [_seen(value, mean, good) for mean, value in self._floats], [weights[mean.dtype] for mean in means]
        )
        for mine, value in self._others:
            mine.copy_(torch.where(good, value, mine))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged state inside the block, and as it was after it, whatever happens there.

        Storages are exchanged, not copied, and the model gets its own back: what is compiled or captured for them stays
        valid. The block must not train the model: it would train the average. Raises ``ValueError`` for a model of
        other names or shapes.
        """
        live = model.state_dict(keep_vars=True)
        self._require(live)
        own = {}
        try:
            for name, value in live.items():
                own[name] = _exchanged(value, self.state[name].to(value.dtype))
            yield
        finally:
            for name, before in reversed(own.items()):  # tied ones were exchanged more than once
                _exchanged(live[name], before)

    def _require(self, live: dict[str, Tensor]) -> None:
        shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (self.state, live)]
        other = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        if other:
            names = ", ".join(dict.fromkeys(other[:3]))
            raise ValueError(f"the average is of another network: {len(set(other))} names or shapes differ ({names})")
