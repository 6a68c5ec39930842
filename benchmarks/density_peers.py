"""How others compute log p along the flow, each given the same velocity field: x in the model's own time t.

    pip install flow_matching zuko

``flow_matching``: ``ODESolver.compute_likelihood``, whose time runs from 1 at the data to 0. ``zuko``:
``FreeFormJacobianTransform`` with the exact trace, which sbi builds its score-based likelihoods on. "score_sde's way":
SciPy's RK45 with drift and divergence each in a call of its own, as Song et al. (2021) published it; the exact
divergence stands in place of its one random probe. "torchdiffeq": dopri5 as it comes. The last two need nothing that
this library does not. All are optional (see ``peers.available``), and all are charged the calls that were counted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from density import Case
from density_ways import TOLERANCES
from problem import Method, Plan


class Velocity:
    """dx/dt of a case, and its divergence by the case's own means; calls are counted."""

    def __init__(self, case: Case):
        self.model, self.divergence, self.calls = case.model, case.divergence, 0
        self.directions = case.divergence.directions(case.x)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.model.velocity(x, t)

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and its divergence ``(B,)``, from one call."""
        value, trace = self.divergence.along(lambda y: self(y, t), x, self.directions)
        return value, trace[:, 0]


Solve = Callable[[Case, Velocity, float], tuple[Tensor, Tensor]]


def method(library: str, name: str, solve: Solve) -> list[Method]:
    """One method; ``solve(case, velocity, tolerance)`` gives x_T and the integral of the divergence."""

    def run(case: Case, plan: Plan) -> tuple[Tensor, int]:
        velocity = Velocity(case)
        latent, change = solve(case, velocity, float(plan.grid))
        return case.terminal(latent) + change, velocity.calls

    return [Method(library, name, run, TOLERANCES)]


def torchdiffeq() -> list[Method]:
    """dopri5 on (x, log-density) with one norm over the whole batch, which is its default."""
    from torchdiffeq import odeint

    def solve(case: Case, velocity: Velocity, tolerance: float) -> tuple[Tensor, Tensor]:
        state = (case.x, case.x.new_zeros(len(case.x)))
        path = odeint(lambda t, s: velocity.both(s[0], t), state, _ends(case), rtol=tolerance, atol=tolerance)
        return path[0][-1], path[1][-1]

    return method("torchdiffeq", "dopri5", solve)


def score_sde() -> list[Method]:
    """RK45 on one flat array; the network is called for the drift, and again for the divergence."""
    from scipy.integrate import solve_ivp

    def solve(case: Case, velocity: Velocity, tolerance: float) -> tuple[Tensor, Tensor]:
        size = case.x.numel()

        def slope(t: float, flat) -> Tensor:
            x, t = torch.as_tensor(flat[:size]).reshape(case.x.shape), torch.tensor(t, dtype=case.x.dtype)
            return torch.cat((velocity(x, t).flatten(), velocity.both(x, t)[1]))

        start = torch.cat((case.x.flatten(), case.x.new_zeros(len(case.x))))
        found = solve_ivp(slope, tuple(_ends(case).tolist()), start, rtol=tolerance, atol=tolerance, method="RK45")
        end = torch.as_tensor(found.y[:, -1])
        return end[:size].reshape(case.x.shape), end[size:]

    return method("score_sde's way", "RK45", solve)


def flow_matching() -> list[Method]:
    """Its time is 1 at the data, where the likelihood begins, and 0 at the noise."""
    from flow_matching.solver import ODESolver

    def solve(case: Case, velocity: Velocity, tolerance: float) -> tuple[Tensor, Tensor]:
        first, last = _ends(case)

        def field(x: Tensor, t: Tensor) -> Tensor:
            return (first - last) * velocity(x, last + t * (first - last))

        times, nothing = torch.tensor((1.0, 0.0), dtype=case.x.dtype), case.x.new_zeros(len(case.x))
        options = {"step_size": None, "method": "dopri5", "rtol": tolerance, "atol": tolerance, "time_grid": times}
        return ODESolver(field).compute_likelihood(case.x, lambda z: nothing, exact_divergence=True, **options)

    return method("flow_matching", "dopri5", solve)


def zuko() -> list[Method]:
    """The transform from data to noise with the exact trace."""
    from zuko.transforms import FreeFormJacobianTransform

    def solve(case: Case, velocity: Velocity, tolerance: float) -> tuple[Tensor, Tensor]:
        first, last = _ends(case).tolist()
        transform = FreeFormJacobianTransform(
            lambda t, x: velocity(x, t), first, last, atol=tolerance, rtol=tolerance, exact=True
        )
        with torch.no_grad():
            return transform.call_and_ladj(case.x)

    return method("zuko (as in sbi)", "dopri5", solve)


def _ends(case: Case) -> Tensor:
    return torch.tensor((case.model.sde.t_min, case.model.sde.t_max), dtype=case.x.dtype)


LIBRARIES = {make.__name__: (make, make) for make in (flow_matching, zuko, score_sde, torchdiffeq)}
"""For ``peers.available``: none of them is stochastic."""
HELD_TO = ("flow_matching", "zuko (as in sbi)")
"""The libraries that ours is held to, by the names of their methods."""
