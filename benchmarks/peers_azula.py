"""Samplers of azula on the schedules that it offers; they end at the last noise level, with its noise in the state."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from problem import Denoiser, Method, Plan, Problem, ending

_GRIDS = ("ve", "vp", "rectified")  # its cosine and decay schedules were hardly ever ahead of these
_ORDERS = {"zAB": (4,), "vAB": (2, 3, 4), "zEAB": (3, 4), "xEAB": (3, 4), "REAB": (2, 3)}


def _schedule(plan: Plan, s: float):
    """A schedule of azula from the level ``s`` to the plan's last."""
    from azula import noise

    end = plan.end
    if plan.grid == "ve":
        return noise.VESchedule(sigma_min=end, sigma_max=s)
    if plan.grid == "vp":  # sigma^2 = 1 - alpha^2 + end^2
        return noise.VPSchedule(alpha_min=math.sqrt((1 + end**2) / (1 + s**2)), sigma_min=end)
    return noise.RectifiedSchedule(alpha_min=1 / s, sigma_min=end)


def _adapter(denoise: Denoiser, schedule):
    """A denoiser in azula's sense around D(y, s)."""
    from azula.denoise import Denoiser as Base
    from azula.denoise import DiracPosterior

    class Adapter(Base):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: Tensor, t: Tensor, **_) -> DiracPosterior:
            alpha, sigma = self.schedule(t)
            return DiracPosterior(denoise(x_t / alpha, sigma / alpha))

    return Adapter()


def _sampler(name: str, **options) -> Callable:
    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        from azula import sample

        denoise, schedule = Denoiser(problem.function), _schedule(plan, problem.s)
        steps = plan.steps - (plan.ending != "own")
        adapter = _adapter(denoise, schedule)
        sampler = getattr(sample, f"{name}Sampler")(adapter, steps=steps, silent=True, **options)
        first, last = (schedule(torch.tensor(t)) for t in (1.0, 0.0))
        y = sampler(problem.y * first[0]) / last[0]
        if plan.ending == "own":
            return y, denoise.calls
        denoise(y, last[1] / last[0])
        return ending(plan.ending, denoise.last), denoise.calls

    return run


def methods() -> list[Method]:
    """The deterministic samplers."""
    import azula.sample  # noqa: F401

    kept = {"endings": ("own", "half", "two"), "grids": _GRIDS}
    found = [Method("azula", "DDIM", _sampler("DDIM"), **kept)]
    for name, orders in _ORDERS.items():
        found += [Method("azula", f"{name}{n}", _sampler(name, order=n), **kept) for n in orders]
    return [*found, Method("azula", "Heun", _sampler("Heun"), grids=_GRIDS, calls=2)]


def stochastic() -> list[Method]:
    """The stochastic samplers."""
    import azula.sample  # noqa: F401

    names = {"DDPM": 1, "PC": 2}
    return [Method("azula", name, _sampler(name), _GRIDS, calls=calls) for name, calls in names.items()]
