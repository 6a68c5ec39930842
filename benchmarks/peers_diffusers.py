"""Schedulers of diffusers, asked for D at the very noise level that they step from."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from problem import Denoiser, Method, Plan, Problem, ending

_GRIDS = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


def betas(first: float, last: float, n: int = 1000, low: float = 0.1, high: float = 20.0) -> list[float]:
    """The betas of a chain whose levels sigma / alpha run from ``last`` to ``first`` on the clock of VP."""

    def clock(s: float) -> float:  # B(t) = log(1 + s^2), solved for t
        return (math.sqrt(low**2 + 2 * (high - low) * math.log1p(s**2)) - low) / (high - low)

    t = torch.linspace(clock(last), clock(first), n, dtype=torch.float64)
    integrated = low * t + 0.5 * (high - low) * t**2
    return (-torch.expm1(-integrated.diff(prepend=torch.zeros(1).double()))).tolist()


def _scheduler(name: str, options: dict, steps: int):
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else two equal first timesteps make it skip one
    return scheduler


def _level(scheduler, i: int, t: Tensor) -> Tensor:
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas[i]
    left = scheduler.alphas_cumprod[int(t)]
    return torch.sqrt((1 - left) / left)


def _chain(name: str, **options) -> Callable:
    """A scheduler of variance-preserving states x = y / sqrt(1 + s^2) that takes D for the model's output."""

    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        trained = {"trained_betas": betas(problem.s, plan.end), "prediction_type": "sample"}
        scheduler = _scheduler(name, trained | _GRIDS[plan.grid] | options | _full_order(name, plan), plan.steps)
        denoise, x = Denoiser(problem.function), None
        for i, t in enumerate(scheduler.timesteps):
            s = _level(scheduler, i, t)
            x = problem.y / torch.sqrt(1 + s**2) if x is None else x
            x0 = denoise(x * torch.sqrt(1 + s**2), s)
            if plan.ending != "own" and i == plan.steps - 1:
                return ending(plan.ending, denoise.last), denoise.calls
            x = scheduler.step(x0, t, x).prev_sample
        last = scheduler.sigmas[-1] if hasattr(scheduler, "sigmas") else torch.zeros(())
        return x * torch.sqrt(1 + last**2), denoise.calls

    return run


def _exploding(name: str, **options) -> Callable:
    """A scheduler of states y that takes the network of EDM, or eps, for the model's output."""

    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        scheduler = _scheduler(name, _parameters(name, problem, plan) | options | _full_order(name, plan), plan.steps)
        denoise, y = Denoiser(problem.function), problem.y
        for i, t in enumerate(scheduler.timesteps):
            s = scheduler.sigmas[i]
            scheduler.scale_model_input(y, t)
            x0 = denoise(y, s)
            if plan.ending != "own" and i == plan.steps - 1:
                return ending(plan.ending, denoise.last), denoise.calls
            y = scheduler.step(_output(scheduler, y, s, x0), t, y).prev_sample
        return y, denoise.calls

    return run


def _full_order(name: str, plan: Plan) -> dict:
    """Without its own ending a multistep scheduler need not lower its order in the last steps."""
    return {"lower_order_final": False} if "Multistep" in name and plan.ending != "own" else {}


def _parameters(name: str, problem: Problem, plan: Plan) -> dict:
    if not name.startswith("EDM"):
        return {"trained_betas": betas(problem.s, plan.end), **_GRIDS[plan.grid]}
    return {"sigma_min": plan.end, "sigma_max": problem.s, "sigma_schedule": plan.grid}


def _output(scheduler, y: Tensor, s: Tensor, x0: Tensor) -> Tensor:
    """What the scheduler takes for the model's output: F of D = c_skip y + c_out F, or eps."""
    data = getattr(scheduler.config, "sigma_data", None)
    if data is None:
        return (y - x0) / s
    total = s**2 + data**2
    return (x0 - y * data**2 / total) * torch.sqrt(total) / (s * data)


_ENDINGS = ("own", "half", "two")
_MULTI = "DPMSolverMultistepScheduler"


def methods() -> list[Method]:
    """The deterministic schedulers."""
    import diffusers  # noqa: F401

    grids, ddim = ("karras", "exponential"), _chain("DDIMScheduler", clip_sample=False)
    found = [Method("diffusers", "DDIM", ddim, ("linspace", "trailing"), endings=_ENDINGS)]
    for order in (2, 3):
        multi, edm = _chain(_MULTI, solver_order=order), _exploding(f"EDM{_MULTI}", solver_order=order)
        unipc = _chain("UniPCMultistepScheduler", solver_order=order)
        deis = _chain("DEISMultistepScheduler", solver_order=order)
        found += [
            Method("diffusers", f"DPM++{order}M, default grid", multi, ("linspace",), endings=_ENDINGS),
            Method("diffusers", f"DPM++{order}M", edm, grids, endings=_ENDINGS),
            Method("diffusers", f"UniPC{order}", unipc, grids, endings=_ENDINGS),
            Method("diffusers", f"DEIS{order}", deis, grids, endings=_ENDINGS),
        ]
    return [*found, Method("diffusers", "Heun", _exploding("HeunDiscreteScheduler"), ("karras",), calls=2)]


def stochastic() -> list[Method]:
    """The stochastic schedulers."""
    import diffusers  # noqa: F401

    chain = ("linspace", "trailing")
    sde = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    return [
        Method("diffusers", "DDPM", _chain("DDPMScheduler", clip_sample=False), chain),
        Method("diffusers", "SDE-DPM++2M", _chain(_MULTI, **sde), (*chain, "karras", "exponential")),
        Method("diffusers", "EDM SDE-DPM++2M", _exploding(f"EDM{_MULTI}", **sde), ("karras", "exponential")),
    ]
