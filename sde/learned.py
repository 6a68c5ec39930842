"""A schedule that learns (Kingma et al., "Variational diffusion models", 2021, section 3.1 and appendix H)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde.base import Curve, GaussianSDE, require_positive, value_and_derivative


@contextmanager
def held(sde: GaussianSDE) -> Iterator[None]:
    """Within, the parameters of ``sde``, if it has any, are constants."""
    parameters = [p for p in sde.parameters() if p.requires_grad] if sde.learned else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class LearnedSchedule(nn.Module, GaussianSDE):
    """alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda), with lambda falling by a monotone network of t / t_max.

    The network is a straight line plus ``hidden`` sigmoids of positive slopes and positive weights, rescaled to run
    from ``log_snr_max`` at t = 0 to ``log_snr_min`` at t_max. Between these ends the likelihood bound does not depend
    on it (the paper's eq. 18); its variance does, and that is what can be learned. It starts as nearly a straight line.

    The ends are fixed numbers (the paper starts from 13.3 and -5; at -5 the prior is 3e-3 nats/dim off, at -10 2e-5),
    or with ``learn_ends`` only where they start: then the bound, which depends on both, moves them. The parameters
    belong to any model that is built on it.
    """

    ordered = (("log_snr_min", "log_snr_max"),)
    cures = ("raise log_snr_max", "lower log_snr_min")

    def __init__(
        self,
        log_snr_max: float = 13.3,
        log_snr_min: float = -10.0,
        hidden: int = 32,
        t_min: float = 1e-5,
        t_max: float = 1.0,
        learn_ends: bool = False,
    ):
        super().__init__()
        self.log_snr_max, self.log_snr_min, self.hidden = log_snr_max, log_snr_min, hidden
        self.t_min, self.t_max = t_min, t_max
        for name, kind in (("log_snr_max", (int, float)), ("log_snr_min", (int, float)), ("hidden", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                wanted = "an integer" if kind is int else "a finite number"
                raise ValueError(f"LearnedSchedule: {name} must be {wanted}, found {value!r}")
        require_positive(self, ["hidden", "t_min", "t_max"])
        self.centres = nn.Parameter(torch.linspace(0, 1, hidden))
        self.slopes = nn.Parameter(torch.full((hidden,), 0.5 * hidden))
        self.weights = nn.Parameter(torch.full((hidden,), -4.0))
        if not isinstance(learn_ends, bool):
            raise ValueError(f"LearnedSchedule: learn_ends must be True or False, found {learn_ends!r}")
        self.shifts = nn.Parameter(torch.zeros(2)) if learn_ends else None  # of log_snr_max and log_snr_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(0.5 * F.logsigmoid(self._lambda(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(0.5 * F.logsigmoid(-self._lambda(t)))

    @property
    def prior_std(self) -> float:
        return 1.0

    @property
    def learned(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    @property
    def learns_ends(self) -> bool:
        return self.shifts is not None and self.shifts.requires_grad

    def curve(self, t: Tensor) -> Curve:
        graph = self.learned and torch.is_grad_enabled()
        # Copies, so that what is done to their gradients is done to nothing else.
        share, slope = (part.clone() for part in value_and_derivative(self._share, t, graph))
        high, low = self._ends(t)
        return Curve(high - (high - low) * share, -(high - low) * slope, (share, slope) if graph else ())

    def extra_repr(self) -> str:
        names = ("log_snr_max", "log_snr_min", "hidden", "t_min", "t_max", "learns_ends")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _lambda(self, t: Tensor) -> Tensor:
        high, low = self._ends(t)
        return high - (high - low) * self._share(t)

    def _ends(self, t: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """lambda at t = 0 and t_max, in the precision of ``t``."""
        if self.shifts is None:
            return self.log_snr_max, self.log_snr_min
        shifts = self.shifts.to(t)
        return self.log_snr_max + shifts[0], self.log_snr_min + shifts[1]

    def _share(self, t: Tensor) -> Tensor:
        """From 0 at t = 0 to 1 at t_max."""
        start, end = (self._rise(t.new_tensor(u)) for u in (0.0, 1.0))
        return (self._rise(t / self.t_max) - start) / (end - start)

    def _rise(self, u: Tensor) -> Tensor:
        """Strictly increasing in u, in the precision of u."""
        centres, slopes, weights = (p.to(u) for p in (self.centres, self.slopes, self.weights))
        steps = torch.sigmoid(F.softplus(slopes) * (u[..., None] - centres))
        return u + (F.softplus(weights) * steps).sum(-1)
