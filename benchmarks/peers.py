"""Samplers of other libraries, each given its own grids, last noise levels and endings. All are optional.

    pip install k-diffusion diffusers azula

A library that is not installed has no methods here; ``available`` says so.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache

from torch import Tensor

import peers_azula
import peers_diffusers
from problem import Denoiser, Method, Plan, Problem, ending

ENDINGS = ("own", "half", "two")


@cache
def _kdiffusion():
    """The module of samplers alone: the package imports a dozen image libraries that the samplers don't use."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        raise ImportError("k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__spec__ = found
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault("k_diffusion", package)
    missing = [name for name in ("torchvision", "torchvision.transforms", "torchsde") if not _there(name)]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].functional = sys.modules[name].transforms = None
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in missing:
            del sys.modules[name]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _sigmas(library, plan: Plan, problem: Problem) -> Tensor:
    """``steps`` noise levels from the first to the last, and 0."""
    make = {"karras": library.get_sigmas_karras, "exponential": library.get_sigmas_exponential}[plan.grid]
    return make(plan.steps, plan.end, problem.s)


def _kdiffusion_run(library, sample: Callable, **options):
    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        denoise, sigmas = Denoiser(problem.function), _sigmas(library, plan, problem)

        def model(y: Tensor, s: Tensor) -> Tensor:
            return denoise(y, s[0])

        if plan.ending == "own":
            return sample(model, problem.y, sigmas, disable=True, **options), denoise.calls
        denoise(sample(model, problem.y, sigmas[:-1], disable=True, **options), sigmas[-2])
        return ending(plan.ending, denoise.last), denoise.calls

    return run


def _fast(library):
    def run(problem: Problem, plan: Plan) -> tuple[Tensor, int]:
        denoise = Denoiser(problem.function)
        y = library.sample_dpm_fast(
            lambda y, s: denoise(y, s[0]), problem.y, plan.end, problem.s, plan.steps, disable=True
        )
        return y, denoise.calls

    return run


def kdiffusion() -> list[Method]:
    """The deterministic samplers of k-diffusion."""
    library, grids = _kdiffusion(), ("karras", "exponential")
    single = {name: getattr(library, f"sample_{name}") for name in ("euler", "lms", "dpmpp_2m")}
    double = {name: getattr(library, f"sample_{name}") for name in ("heun", "dpm_2")}
    methods = [
        Method("k-diffusion", name, _kdiffusion_run(library, sample), grids, calls=calls, endings=ENDINGS)
        for samples, calls in ((single, 1), (double, 2))
        for name, sample in samples.items()
    ]
    return [*methods, Method("k-diffusion", "dpm_fast", _fast(library))]


def kdiffusion_sde() -> list[Method]:
    """The stochastic samplers of k-diffusion, with independent noise in every step."""
    library = _kdiffusion()
    names = {"euler_ancestral": 1, "dpmpp_2s_ancestral": 2, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 1}

    def independent(name: str):
        def sample(model, y: Tensor, sigmas: Tensor, disable: bool) -> Tensor:
            noise = library.default_noise_sampler(y)
            return getattr(library, f"sample_{name}")(model, y, sigmas, disable=disable, noise_sampler=noise)

        return sample

    return [
        Method("k-diffusion", n, _kdiffusion_run(library, independent(n)), ("karras", "exponential"), calls=c)
        for n, c in names.items()
    ]


LIBRARIES: dict[str, tuple[Callable[[], list[Method]], Callable[[], list[Method]]]] = {
    "k-diffusion": (kdiffusion, kdiffusion_sde),
    "diffusers": (peers_diffusers.methods, peers_diffusers.stochastic),
    "azula": (peers_azula.methods, peers_azula.stochastic),
}
"""Deterministic and stochastic samplers by library."""


def available(stochastic: bool = False, libraries: dict | None = None) -> tuple[list[Method], list[str]]:
    """The methods of the libraries that are here, and a line for each that is not."""
    methods, lines = [], []
    for name, makers in (LIBRARIES if libraries is None else libraries).items():
        try:
            methods += makers[stochastic]()
        except ImportError:
            lines.append(f"{name}: not installed")
    return methods, lines
