"""The ways to carry data and log-density from t_min to t_max: torchdiffeq's methods, or ``solvers.one_pass``."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import ScoreField, ScoreModel
from solvers.base import SamplingDiverged
from solvers.divergence import Divergence
from solvers.flow import ANY_PROCESS, check_coordinates, flow
from solvers.ode import ADAPTIVE, FIXED, ODEError, check_method, integrate
from solvers.one_pass import OnePass, Transport, check_steps, one_pass

LogProb = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Integration(ABC):
    """A method with its settings, checked; see ``log_likelihood`` for their meaning."""

    method: str
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    coordinates: str = "auto"
    max_steps: int = 10_000

    @property
    @abstractmethod
    def needs_pair(self) -> bool:
        """Whether it reads the pair (x_0, eps), which only a model under a Gaussian process has."""

    @abstractmethod
    def forward(
        self, model: ScoreField, x: Tensor, divergence: Divergence, directions: Tensor, prior: LogProb
    ) -> tuple[Transport, Tensor | None]:
        """The transport of data ``x``, and an estimate ``(B,)`` of its error in nats where there is one."""

    @abstractmethod
    def finer(self) -> "Integration":
        """The same, ten times more accurate or with twice the steps."""


@dataclass(frozen=True)
class AlongODE(Integration):
    """The flow and its divergence as one ODE."""

    def __post_init__(self):
        check_coordinates(self.coordinates)
        check_method(self.method, self.rtol, self.atol, self.steps, self.max_steps)

    @property
    def needs_pair(self) -> bool:
        return self.coordinates not in ANY_PROCESS

    def forward(self, model, x, divergence, directions, prior):
        return self.between(model, x, model.sde.t_min, model.sde.t_max, divergence, directions), None

    def between(
        self, model: ScoreField, x: Tensor, start: float, end: float, divergence: Divergence, directions: Tensor
    ) -> Transport:
        """From time ``start`` to time ``end``, in either direction."""
        path, graph = flow(self.coordinates, model, self.method in FIXED), torch.is_grad_enabled()

        def slopes(reading: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return divergence.along(lambda w: path.slope(w, reading), state[0], directions, graph)

        scale, last_scale = path.scale(start), path.scale(end)
        state = (x / scale, x.new_zeros(len(x), divergence.count(x)))
        settings = (self.method, self.rtol, self.atol, self.steps, self.max_steps)
        latent, change = integrate(slopes, state, path.reading(start), path.reading(end), *settings, time=path.time)
        # The state's density is x's times scale^D.
        return Transport(latent * last_scale, change + x[0].numel() * math.log(last_scale / scale))

    def finer(self) -> "AlongODE":
        if self.method in FIXED:
            return AlongODE(self.method, steps=2 * self.steps, coordinates=self.coordinates)
        return AlongODE(self.method, self.rtol / 10, self.atol / 10, None, self.coordinates, self.max_steps)


@dataclass(frozen=True)
class InOnePass(Integration):
    """``solvers.one_pass``."""

    def __post_init__(self):
        check_steps(self.steps)
        if self.coordinates not in ("auto", "ratio"):
            found = f"found {self.coordinates!r}; leave them out, or take method='rk4'"
            raise ValueError(f"method='one_pass' has coordinates of its own, 'ratio'; {found}")

    @property
    def needs_pair(self) -> bool:
        return True

    def forward(self, model: ScoreModel, x, divergence, directions, prior):
        try:
            found, why = one_pass(model, x, self.steps, divergence, directions), ""
        except SamplingDiverged as error:
            found, why = None, f" ({error})"
        if found is None or not bool(torch.isfinite(found.whole.change).all()):
            raise ODEError(
                f"one_pass with {self.steps} steps met values that are not finite{why}; check the data and the weights "
                "of the network, raise t_min, or take method='dopri5'"
            )
        return Transport(*(part.to(x) for part in found.whole)), self._error(found, prior).to(x)

    def _error(self, found: OnePass, prior: LogProb) -> Tensor:
        whole, half = (prior(part.latent) + part.change.mean(1) for part in (found.whole, found.half))
        return torch.maximum((whole - half).abs(), found.defect.abs()).detach()

    def finer(self) -> "InOnePass":
        return InOnePass(self.method, steps=2 * self.steps)


METHODS = {"one_pass": InOnePass} | dict.fromkeys((*ADAPTIVE, *FIXED), AlongODE)
"""By the names of the methods."""
_TOLERANCE, _STEPS = 1e-5, 100


def integration(
    pair: bool,
    method: str | Integration | None,
    rtol: float | None,
    atol: float | None,
    steps: int | None,
    coordinates: str = "auto",
    max_steps: int = 10_000,
) -> Integration:
    """The integration by the name of its method, or the default; ``ValueError`` for settings that can't work.

    ``pair``: whether the model has the pair (x_0, eps), as those under a Gaussian process do.
    """
    if isinstance(method, Integration):
        return method
    if method is None and rtol is None and atol is None and coordinates == "auto" and pair:
        method, steps = "one_pass", _STEPS if steps is None else steps
    tolerances = (_TOLERANCE if tolerance is None else tolerance for tolerance in (rtol, atol))
    method = "dopri5" if method is None else method
    known = ", ".join(METHODS)
    if method not in METHODS:
        raise ValueError(f"method must be one of {known}, found {method!r}")
    return METHODS[method](method, *tolerances, steps, coordinates, max_steps)
