"""torchdiffeq behind one function that never leaves the interval, controls every sample, and fails in words.

What the plain call does otherwise: it evaluates the network beyond the end point and interpolates back; it takes one
error norm over the batch, so that a sample's result depends on its companions; and it reports trouble as an
``AssertionError`` or not at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from sde.base import require_count

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
"""Not "fehlberg2", whose estimate is so much below its error that the tolerances mean nothing."""
FIXED = {"euler": 1, "midpoint": 2, "rk4": 4}
"""And the evaluations in a step."""

State = tuple[Tensor, ...]


class ODEError(RuntimeError):
    """The integration of an ODE failed."""


def check_method(method: str, rtol: float, atol: float, steps: int | None, max_steps: int = 1):
    """Refuse a method, tolerances and steps that do not belong together."""
    if method in FIXED:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"method={method!r} takes a fixed number of steps: give steps >= 1, found {steps!r}")
    elif method not in ADAPTIVE:
        known = f"{', '.join(ADAPTIVE)} (adaptive) or {', '.join(FIXED)} (fixed steps)"
        raise ValueError(f"method must be one of {known}, found {method!r}")
    elif steps is not None:
        raise ValueError(f"method={method!r} chooses its own steps: leave steps out, or take method='rk4'")
    elif not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be positive, found rtol={rtol!r}, atol={atol!r}")
    require_count(max_steps, "max_steps")


def worst_sample(errors: State) -> Tensor:
    """The largest, over samples and parts of the state, of the root mean square over a sample's values.

    A step is accepted when every sample would accept it, so that the accuracy of one does not depend on the others.
    """
    return torch.stack([e.abs().square().flatten(1).mean(1).sqrt().max() for e in errors]).max()


def integrate(
    function: Callable[[Tensor, State], State],
    state: State,
    start: float,
    end: float,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    max_steps: int = 10_000,
    time: Callable[[Tensor], Tensor] = lambda reading: reading,
) -> State:
    """The state at ``end`` of d(state)/dt = function(t, state), from ``state`` at ``start``; each part is ``(B, ...)``.

    ``time`` turns the reading of the clock that the caller integrates in into t, for messages. Raises ``ODEError`` with
    t, the number of evaluations and a cure.
    """
    check_method(method, rtol, atol, steps, max_steps)
    watched = _Watched(function, time, min(start, end), max(start, end))
    ends = torch.tensor([start, end], dtype=torch.float64, device=state[0].device)
    if method in FIXED:
        grid = torch.linspace(start, end, steps + 1, dtype=ends.dtype, device=ends.device)
        grid[0], grid[-1] = ends
        options = {"grid_constructor": lambda *_: grid}
    else:
        options = {"norm": worst_sample, "step_t": ends[1:], "max_num_steps": max_steps}
    try:
        path = odeint(watched, state, ends, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:
        # torchdiffeq's own text may hold a whole tensor: its first words name the fault.
        reason = str(error).split(":")[0][:80] or "an assertion of torchdiffeq"
        cure = "take more steps" if method in FIXED else "loosen them, raise t_min, or take method='rk4' with steps"
        raise ODEError(
            f"{method} stopped near t={watched.t:.3g} after {watched.calls} evaluations ({reason}); "
            f"with rtol={rtol:g}, atol={atol:g}: {cure}"
        ) from error
    return tuple(part[-1] for part in path)


class _Watched:
    """The right-hand side, with its last reading, the number of its calls, and a check of its values."""

    def __init__(
        self, function: Callable[[Tensor, State], State], time: Callable[[Tensor], Tensor], low: float, high: float
    ):
        self.function, self.time, self.low, self.high = function, time, low, high
        self.calls, self.reading = 0, torch.tensor(float("nan"))

    @property
    def t(self) -> float:
        return float(self.time(self.reading))

    def __call__(self, reading: Tensor, state: State) -> State:
        # The trial step that chooses the first one may reach beyond the end.
        self.calls, self.reading = self.calls + 1, reading.clamp(self.low, self.high)
        slopes = self.function(self.reading, state)
        if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
            raise ODEError(
                f"the right-hand side is not finite at t={self.t:.3g} (evaluation {self.calls}); "
                "check the network's weights, or raise t_min"
            )
        return slopes
