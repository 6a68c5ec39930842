r"""Variational dequantization: a small flow learns where in its bin a value is least unlikely.

x = low + w (k + u), u ~ q(u | k) (Ho et al., "Flow++", 2019), and

    log P(k) >= E_q [log p(x) + D log w - log q(u | k)].

u comes from uniform v through its logit h = log(v / (1 - v)): coupling layers (Dinh et al. 2017) shift and scale every
second value of h, by networks that see k and the other values, and u = sigmoid(h). Zero-initialised networks leave v as
it is: training starts at the uniform bound.

Training needs no gradient through the ODE of log p. The bound is reparametrised by v, and the derivative of log p(x) is
the score of p at t_min, which the model gives in one call:

    d/dtheta E [log p(x) - log q] = E_v [score(x, t_min) . dx/dtheta - d/dtheta log q(u | k)].

This is the bound's own gradient when the model's score is that of the density that its flow assigns, as the exact one
is. A network's is nearly: then it is the gradient of a neighbouring objective, and the number that is reported, which
takes log p from the ODE, remains a bound.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from experiments.dequantization import FIRST_DRAW, Dequantizer, Drawn, inside, per_sample, uniforms
from models import MLP
from sde import Noise, ScoreModel
from sde.base import require_count

_TRAINING = 2**20  # numbers of draws that training takes, apart from those of an evaluation
_MOST = 2.0  # the largest logarithm of a layer's scale


class Variational(nn.Module, Dequantizer):
    """A learned dequantizer for levels of the shape ``shape``; ``train_dequantizer`` trains it.

    Parameters
    ----------
    levels, low, high: the bins. shape: that of one sample, ``(D,)`` or ``(C, ...)``.
    net: makes the network of a layer from a shape ``(2 C, ...)``: a module ``(x, label)`` that keeps the shape and ends
        in a layer of zeros, such as ``MLP``, or ``functools.partial(UNet, channels=16)`` for images.
    layers: of the flow; two reach every value.

    Save it by ``state_dict``; one of other bins or another shape is refused when it is loaded.
    """

    trained_on: ClassVar[str] = "uniform"

    def __init__(
        self,
        levels: int,
        low: float,
        high: float,
        shape: tuple[int, ...],
        net: Callable[[tuple[int, ...]], nn.Module] = MLP,
        layers: int = 2,
    ):
        super().__init__()
        require_count(layers, "Variational: layers")
        if not shape or min(shape) < 1:
            raise ValueError(f"shape: expected that of one sample, (D,) or (C, ...), found {tuple(shape)}.")
        self.levels, self.low, self.high, self.shape = levels, low, high, tuple(shape)
        self._check_bins()
        self.nets = nn.ModuleList(net((2 * shape[0], *shape[1:])) for _ in range(layers))
        place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")).sum(0)
        self.register_buffer("odd", place % 2 == 1, persistent=False)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u of the shape of ``k``, and log q(u | k) ``(B,)``, nats, for uniform ``v`` inside (0, 1); in float64."""
        start = h = torch.logit(v.double())
        change, given = torch.zeros_like(h), self._between(k)
        for i, net in enumerate(self.nets):
            moved = self.odd if i % 2 else ~self.odd
            shift, log_scale = self._layer(net, given, torch.where(moved, 0.0, torch.tanh(0.5 * h)))
            h = torch.where(moved, h * log_scale.exp() + shift, h)
            change = change + torch.where(moved, log_scale, 0.0)
        return torch.sigmoid(h), per_sample(_log_logistic(start) - _log_logistic(h) - change)

    def draw(self, k: Tensor, seed: int = 0, number: int = 0, first: int = 0) -> Drawn:
        bins = self._bins(k)
        with torch.no_grad():
            u, log_q = self(k, uniforms(k, seed, number, first))
        return Drawn(inside(self.place(k, u), bins), self.log_volume(k[0].numel()) - log_q)

    def place(self, k: Tensor, u: Tensor) -> Tensor:
        """x at the fraction ``u`` of the bin of each level, in the type of ``u``."""
        return self.low + self.bin_width * (k + u)

    def get_extra_state(self) -> dict:
        """The bins and the shape, beside the weights."""
        return {"levels": self.levels, "low": self.low, "high": self.high, "shape": list(self.shape)}

    def set_extra_state(self, state: dict) -> None:
        """Raises ValueError for other bins or another shape."""
        if state != self.get_extra_state():
            raise ValueError(
                f"Variational: expected weights for {self.get_extra_state()}, found {state}; build it as it was saved."
            )

    def _between(self, k: Tensor) -> Tensor:
        """Levels as numbers in (-1, 1), in the networks' type. Raises ValueError for another shape."""
        if tuple(k.shape[1:]) != self.shape:
            raise ValueError(f"k: expected the shape (B, {', '.join(map(str, self.shape))}), found {tuple(k.shape)}.")
        return ((2 * k.double() + 1) / self.levels - 1).to(next(self.parameters()).dtype)

    @staticmethod
    def _layer(net: nn.Module, given: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and logarithm of the scale, float64."""
        output = net(torch.cat((given, seen.to(given)), dim=1), given.new_zeros(len(given)))
        shift, log_scale = output.double().chunk(2, dim=1)
        return shift, _MOST * torch.tanh(log_scale / _MOST)


def train_dequantizer(
    dequantizer: Variational,
    model: ScoreModel,
    images: Tensor,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Variational:
    """Maximize the bound of ``images``, integer levels ``(N, ...)``, through the model, which stays as it is.

    Adam with a half cosine to zero. Each step is one call of the model, at t_min, without a graph. Returns the same
    dequantizer, in evaluation mode. Raises ``ValueError`` for a model without noise at t_min, whose score there is
    infinite, and ``RuntimeError`` when training has diverged.
    """
    require_count(steps, "train_dequantizer: steps")
    t = _first_time(model, dequantizer._checked(images).device)
    optimizer = torch.optim.Adam(dequantizer.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dequantizer.train()
    for step in range(steps):
        k, v = _batch(images, batch_size, step, seed)
        optimizer.zero_grad(set_to_none=True)
        surrogate(dequantizer, model, k, v, t).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(dequantizer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if not all(bool(p.isfinite().all()) for p in dequantizer.parameters()):
        raise RuntimeError(f"training of the dequantizer diverged (last gradient {norm:.3g}); lower learning_rate")
    return dequantizer.eval()


def surrogate(dequantizer: Variational, model: ScoreModel, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """A loss ``(B,)`` whose gradient in the dequantizer's parameters is that of -(log p(x) - log q(u | k)) at t_min."""
    u, log_q = dequantizer(k, v)
    x = dequantizer.place(k, u)
    with torch.no_grad():
        score = model.score(x.to(t.dtype), t)
    return log_q - per_sample(score * x)


def _first_time(model: ScoreModel, device: torch.device) -> Tensor:
    t = torch.tensor(model.sde.t_min, device=device)
    if not float(model.sde.sigma(t).detach()) > 0:
        raise ValueError(
            f"model: expected noise at t_min, where its score is needed; {model.sde} has none: raise t_min."
        )
    return t


def _batch(images: Tensor, size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Levels and uniform numbers of one step; sample ``step * size + i`` of training has its own stream."""
    words = Noise(seed, step * size).words((size,), FIRST_DRAW + _TRAINING, images.device)
    k = images[words % len(images)]
    return k, uniforms(k, seed, _TRAINING + 1, step * size)


def _log_logistic(h: Tensor) -> Tensor:
    """Log-density of the standard logistic distribution: of the logit of a uniform number."""
    return logsigmoid(h) + logsigmoid(-h)
