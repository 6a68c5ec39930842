"""The probability-flow ODE dx/dt = f - (g^2 / 2) score (Song et al., 2021, eq. 13), in both directions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import Noise, ScoreField
from solvers.base import Solver
from solvers.flow import check_coordinates, flow
from solvers.ode import check_method, integrate


@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """Samples and latents by torchdiffeq.

    Parameters
    ----------
    rtol, atol: tolerances of an adaptive ``method`` ("dopri5", "dopri8"), which every sample meets.
    steps: number of steps of a fixed-step ``method`` ("euler", "midpoint", "rk4"), equal in the clock.
    coordinates: "angle" or "time", those of the integration (see ``solvers.flow``); "auto": in the angle where the
        process is Gaussian.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    steps: int | None = None
    coordinates: str = "auto"
    compile: bool = False

    def __post_init__(self):
        check_coordinates(self.coordinates)
        check_method(self.method, self.rtol, self.atol, self.steps)

    @property
    def needs_pair(self) -> bool:
        return self.coordinates == "angle"

    @property
    def calls(self) -> int | None:
        return None

    def encode(self, model: ScoreField, x: Tensor) -> Tensor:
        """The latent at t_max of data ``x`` of shape ``(B, ...)``; ``self(model, x_T=latent)`` brings it back."""
        self.check_model(model)
        with torch.no_grad():
            return self._integrate(model, x, model.sde.t_min, model.sde.t_max)

    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        sde = model.sde
        visit(0, torch.tensor(sde.t_max).to(x), x)
        x = self._integrate(model, x, sde.t_max, sde.t_min)
        visit(1, torch.tensor(sde.t_min).to(x), x)
        return x

    def _integrate(self, model: ScoreField, x: Tensor, start: float, end: float) -> Tensor:
        path = flow(self.coordinates, model)

        def slope(reading: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
            return (path.slope(state[0], reading),)

        readings = (path.reading(t) for t in (start, end))
        state = (x / path.scale(start),)
        (state,) = integrate(slope, state, *readings, self.method, self.rtol, self.atol, self.steps, time=path.time)
        return state * path.scale(end)
