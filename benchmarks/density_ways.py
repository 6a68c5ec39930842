"""The ways this library computes a log-density: (label, options) pairs; those that a version lacks are left out."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from density import Case
from models import GaussianMixture
from problem import Method, Plan
from sde import VP
from solvers import log_likelihood
from solvers.flow import COORDINATES
from solvers.ode import FIXED

TOLERANCES = tuple(f"{10 ** (-k / 2):.2g}" for k in range(2, 14))
"""1e-1 to 3e-7, two to a decade; they stand in the place of a sampler's grids."""
UNLIMITED = 100_000
"""The budget of methods that choose their own steps."""

Way = tuple[str, dict]

DEFAULT, ONE_PASS = "dopri5", "one_pass"
"""The labels of the way that the bars on adaptive methods are held to, and of the one-pass method."""

_ONE = torch.ones(1, 1, dtype=torch.float64)
_GAUSSIAN = GaussianMixture(_ONE[0], 0 * _ONE, _ONE[None], VP())
_OWN = type(COORDINATES["auto"](_GAUSSIAN))
OTHERS = tuple(name for name, make in COORDINATES.items() if type(make(_GAUSSIAN)) is not _OWN)
"""The coordinates that are not the default's under another name."""


def _ways(method: str) -> tuple[Way, ...]:
    """As it comes, and in all other coordinates."""
    return (method, {"method": method}), *((f"{method}, {c}", {"method": method, "coordinates": c}) for c in OTHERS)


ADAPTIVE: tuple[Way, ...] = (*_ways("dopri5"), ("dopri8", {"method": "dopri8"}))
STEPS: tuple[Way, ...] = (
    *_ways("rk4"),
    ("midpoint", {"method": "midpoint"}),
    ("euler", {"method": "euler"}),
    (ONE_PASS, {"method": "one_pass"}),
)


def adaptive(ways: Iterable[Way] = ADAPTIVE, tolerances: tuple[str, ...] = TOLERANCES) -> list[Method]:
    """A method for each of ``ways`` that exists, to be run at every tolerance."""
    return [Method("ours", label, _run(options), tolerances) for label, options in ways if known(options)]


def fixed(ways: Iterable[Way] = STEPS) -> list[Method]:
    """A method for each of ``ways`` that exists, to be run within budgets."""
    calls = {label: FIXED.get(options["method"], 1) for label, options in ways}
    return [
        Method("ours", label, _run(options), calls=calls[label])
        for label, options in ways
        if known({**options, "steps": 32})
    ]


def known(options: dict) -> bool:
    """Whether this version knows them."""
    try:
        log_likelihood(_GAUSSIAN, _ONE, **options)
    except (TypeError, ValueError):
        return False
    return True


def _run(options: dict) -> Callable[[Case, Plan], tuple[Tensor, int]]:
    def run(case: Case, plan: Plan) -> tuple[Tensor, int]:
        more = {"steps": plan.steps} if plan.grid == "own" else dict.fromkeys(("rtol", "atol"), float(plan.grid))
        ll = log_likelihood(case.model, case.x, case.divergence, prior=case.terminal, **options, **more)
        return ll.log_prob, ll.nfe

    return run
