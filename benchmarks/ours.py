"""The samplers of this library; those that a version does not have are left out."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

import solvers
from problem import Method, Plan, Problem, landed, scaled, with_end

Make = Callable[..., solvers.Solver]
_FEW = ("log_snr", "karras", "angle")


def _fixed(order: int, data_std: float, lib, **options) -> solvers.Solver:
    """Exponential Adams-Bashforth of a fixed order, as other libraries have it."""
    fixed = {"adaptive": False, "corrected": False, "knee": math.inf}
    return lib.ExponentialAdams(order=order, data_std=data_std, **fixed, **options)


ODE: dict[str, Make] = {
    "DDIM": lambda lib, **k: lib.DDIM(**k),
    "Euler": lambda lib, **k: lib.Euler(**k),
    "Heun": lambda lib, **k: lib.Heun(**k),
    "RungeKutta4": lambda lib, **k: lib.RungeKutta4(**k),
    "DPMSolver2": lambda lib, **k: lib.DPMSolver(order=2, **k),
    "DPMSolver3": lambda lib, **k: lib.DPMSolver(order=3, **k),
    "UniPC": lambda lib, **k: lib.UniPC(**k),
    "UniPC3": lambda lib, **k: lib.UniPC(order=3, **k),
    "ExponentialAdams": lambda lib, **k: lib.ExponentialAdams(**k),
}
FIXED: dict[str, Make] = {
    **{f"ExponentialAdams v-{n}": partial(_fixed, n, 1.0) for n in (2, 3, 4)},
    **{f"ExponentialAdams eps-{n}": partial(_fixed, n, math.inf) for n in (3, 4)},
    **{f"ExponentialAdams x0-{n}": partial(_fixed, n, 0.0) for n in (3, 4)},
}
SDE: dict[str, Make] = {
    "EulerMaruyama": lambda lib, **k: lib.EulerMaruyama(**k),
    "Ancestral": lambda lib, **k: lib.Ancestral(**k),
    "ReverseDiffusion": lambda lib, **k: lib.ReverseDiffusion(**k),
    "SDEDPMSolver": lambda lib, **k: lib.SDEDPMSolver(**k),
    "PC, Euler-Maruyama": lambda lib, **k: lib.PredictorCorrector(lib.EulerMaruyama(**k), lib.Langevin()),
    "PC, reverse diffusion": lambda lib, **k: lib.PredictorCorrector(lib.ReverseDiffusion(**k), lib.Langevin()),
}


def methods(makers: dict[str, Make]) -> list[Method]:
    """Those of ``makers`` whose classes exist."""
    return [_method(label, make) for label, make in makers.items() if _made(make) is not None]


def _made(make: Make, **options) -> solvers.Solver | None:
    try:
        return make(solvers, steps=10, **options)
    except (AttributeError, TypeError):  # no such class, or no such option
        return None


def _method(label: str, make: Make) -> Method:
    grids = tuple(grid for grid in (_FEW if label in FIXED else solvers.GRIDS) if _made(make, grid=grid) is not None)
    calls = getattr(_made(make), "calls_per_step", 1)
    return Method("ours", label, _run(make), ("own", *grids), calls=calls, own_end=True)


def _run(make: Make) -> Callable[[Problem, Plan], tuple[Tensor, int]]:
    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        model = with_end(problem.model, plan.end)
        grid = {} if plan.grid == "own" else {"grid": plan.grid}
        sampler = make(solvers, steps=plan.steps, **grid)
        out = sampler(model, x_T=scaled(model.sde, problem.y), seed=problem.seed)
        return landed(model.sde, out.x), out.nfe

    return run
