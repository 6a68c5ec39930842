r"""The probability-flow ODE dx/dt = f - (g^2 / 2) score (Song et al., 2021, eq. 13), in both directions.

It pairs every sample with a latent at t_max. Between the latents a and b of two samples, of directions e_a and e_b at
the angle theta, lies the great circle

    [sin((1 - k) theta) e_a + sin(k theta) e_b] / sin(theta) * ((1 - k) |a| + k |b|),      0 <= k <= 1

(Shoemake, "Animating rotation with quaternion curves", 1985; Song et al., "Denoising diffusion implicit models", 2021,
appendix D.5): it stays where the prior has its mass, which the straight line, shorter in the middle, does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde import Noise, ScoreField
from solvers.base import Solver
from solvers.flow import ANY_PROCESS, check_coordinates, flow
from solvers.ode import FIXED, check_method, integrate


@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """Samples and latents by torchdiffeq.

    Parameters
    ----------
    rtol, atol: tolerances of an adaptive ``method`` ("dopri5", "dopri8", "bosh3", "adaptive_heun", of
        orders 5, 8, 3, 2), which every sample meets. Tight ones are for the higher orders.
    steps: number of steps of a fixed-step ``method`` ("euler", "midpoint", "rk4"), equal in the clock.
    coordinates: "angle", "ratio", "log_snr" or "time", those of the integration (see ``solvers.flow``); "auto": in the
        angle where the process is Gaussian, and for a fixed-step method in the ratio.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    steps: int | None = None
    coordinates: str = "auto"
    compile: bool = False
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        check_coordinates(self.coordinates)
        check_method(self.method, self.rtol, self.atol, self.steps)

    @property
    def needs_pair(self) -> bool:
        return self.coordinates not in ANY_PROCESS

    @property
    def calls(self) -> int | None:
        return FIXED[self.method] * self.steps if self.method in FIXED else None

    def encode(self, model: ScoreField, x: Tensor) -> Tensor:
        """The latent at t_max of data ``x`` of shape ``(B, ...)``; ``self(model, x_T=latent)`` brings it back."""
        self.check_model(model)
        with torch.no_grad():
            return self._integrate(model, x, model.sde.t_min, model.sde.t_max)

    def decode(self, model: ScoreField, latent: Tensor) -> Tensor:
        """The data of a ``latent`` of shape ``(B, ...)`` at t_max: the inverse of ``encode``."""
        self.check_model(model)
        with torch.no_grad():
            return self._integrate(model, latent, model.sde.t_max, model.sde.t_min)

    def round_trip_error(self, model: ScoreField, x: Tensor) -> Tensor:
        """What encoding and decoding data ``x`` changes: RMS over the values of each sample, ``(B,)``, units of x."""
        back = self.decode(model, self.encode(model, x))
        return (back - x).square().flatten(1).mean(1).sqrt()

    def interpolate(self, model: ScoreField, x_a: Tensor, x_b: Tensor, n: int) -> Tensor:
        """``n`` samples on the way from data ``x_a`` to ``x_b``, both ``(B, ...)``: ``(n, B, ...)``.

        The images of ``n`` latents at equal angles on the great circle between the two latents (see the module). The
        first and the last are ``x_a`` and ``x_b`` as encoding and decoding bring them back.

        Raises ``ValueError`` for shapes that differ and for ``n`` below 2.
        """
        if x_a.shape != x_b.shape:
            raise ValueError(f"x_a and x_b must have one shape, found {tuple(x_a.shape)} and {tuple(x_b.shape)}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise ValueError(f"n must be an integer of at least 2, the two ends among them, found {n!r}")
        ends = self.encode(model, torch.cat((x_a, x_b)))
        between = great_circle(*ends.split(len(x_a)), n)
        return self.decode(model, between.flatten(0, 1)).unflatten(0, (n, len(x_a)))

    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        sde = model.sde
        visit(0, torch.tensor(sde.t_max).to(x), x)
        x = self.decode(model, x)
        visit(1, torch.tensor(sde.t_min).to(x), x)
        return x

    def _integrate(self, model: ScoreField, x: Tensor, start: float, end: float) -> Tensor:
        path = flow(self.coordinates, model, self.method in FIXED)

        def slope(reading: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
            return (path.slope(state[0], reading),)

        readings = (path.reading(t) for t in (start, end))
        state = (x / path.scale(start),)
        (state,) = integrate(slope, state, *readings, self.method, self.rtol, self.atol, self.steps, time=path.time)
        return state * path.scale(end)


def great_circle(a: Tensor, b: Tensor, n: int) -> Tensor:
    """``n`` points from ``a`` to ``b``, both ``(B, ...)``, each sample on its own circle: ``(n, B, ...)``.

    Along the straight line where there is no one circle: directions that are the same or opposite, or a zero.
    """
    share = torch.linspace(0, 1, n, dtype=a.dtype, device=a.device).reshape(n, 1, 1)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    long_a, long_b = (flat.norm(dim=1, keepdim=True) for flat in (flat_a, flat_b))
    e_a, e_b = flat_a / long_a, flat_b / long_b
    # Twice the arc tangent of the half chords: accurate for small angles too, as the arc cosine is not.
    theta = 2 * torch.atan2((e_a - e_b).norm(dim=1, keepdim=True), (e_a + e_b).norm(dim=1, keepdim=True))
    circle = (torch.sin((1 - share) * theta) * e_a + torch.sin(share * theta) * e_b) / torch.sin(theta)
    circle = circle * torch.lerp(long_a, long_b, share)
    clear = torch.sin(theta) > 16 * torch.finfo(a.dtype).eps ** 0.5
    return torch.where(clear, circle, torch.lerp(flat_a, flat_b, share)).unflatten(2, a.shape[1:])
