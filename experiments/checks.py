r"""What must hold of a process, each as a function from the process to one number that must be small.

All is measured through the public methods alone, as a user may have overridden any of them: nothing that one derives
from another is taken for granted. With alpha and sigma the moments of the kernel (Song et al., 2021, eq. 29)

    alpha' = f alpha,        (sigma^2)' = 2 f sigma^2 + g^2.

Densities, paths and the prior are in ``experiments.path_checks``.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from models import GaussianMixture
from sde import SDE, GaussianSDE, Noise
from sde.base import expand, last_time, value_and_derivative

_SHAPES = ((3, 2), (3, 1, 5), (3, 2, 4, 4))
_STEP = 1e-6


class Violation(Exception):
    """Something does not hold that is no number."""


class Subject:
    """A process with the times and points at which it is measured; all in float64."""

    def __init__(self, sde: SDE, seed: int):
        self.sde, self.seed = sde, seed

    @cached_property
    def end(self) -> float:
        """The last time at which drift and diffusion are finite; nearly t_max where there is no such time to be found.

        That is for the check of the times to tell; the others go on, to say what can be said.
        """
        start, stop = self.sde.t_min, self.sde.t_max
        try:
            end = last_time(self.sde)
        except Exception:  # of the user's code: of any type
            end = math.nan
        return end if start < end <= stop else stop - 1e-3 * (stop - start)

    @property
    def span(self) -> float:
        return self.end - self.sde.t_min

    def times(self, n: int = 200) -> Tensor:
        """Times from t_min, or just after it where it is 0, to the end; half of them crowd at t_min."""
        start, share = self.sde.t_min or 1e-5 * self.end, torch.linspace(0, 1, n // 2, dtype=torch.float64)
        times = torch.cat((start * (self.end / start) ** share, start + (self.end - start) * share))
        return times.clamp(start, self.end).unique()

    def noise(self, *shape: int, draw: int = 0) -> Tensor:
        return Noise(self.seed).normal(shape, draw, dtype=torch.float64)

    @cached_property
    def mixture(self) -> GaussianMixture:
        """Two components of different weights, means, variances and correlation: isotropic ones hide errors."""
        covariances = [[[0.05, 0.02], [0.02, 0.05]], [[0.2, -0.1], [-0.1, 0.3]]]
        parts = ([0.3, 0.7], [[1.0, -1.0], [-1.5, 0.5]], covariances)
        return GaussianMixture(*(torch.tensor(part, dtype=torch.float64) for part in parts), self.sde)

    def noised(self, t: Tensor, n: int) -> Tensor:
        """``n`` points of the mixture's p_t for each of the times ``t``, ``(len(t) n, 2)``, time after time."""
        x0, eps = self.mixture.sample(n, self.seed), self.noise(len(t) * n, 2)
        alpha, sigma = (c.repeat_interleave(n)[:, None] for c in (self.sde.alpha(t), self.sde.sigma(t)))
        return alpha * x0.repeat(len(t), 1) + sigma * eps


def worst(errors: Tensor) -> float:
    """The largest magnitude; NaN if any is."""
    return errors.detach().abs().max().item()


def brief(error: Exception) -> str:
    """An exception's type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def _rate(s: Subject, t: Tensor) -> Tensor:
    """f(x, t) / x at x = 1."""
    return s.sde.drift(torch.ones(len(t), 1, dtype=t.dtype), t)[:, 0]


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return value_and_derivative(function, t)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Any process.


def times(s: Subject) -> float:
    start, stop = s.sde.t_min, s.sde.t_max
    if not 0 <= start < stop < math.inf:
        raise Violation(f"t_min={start}, t_max={stop}")
    if not start < (end := last_time(s.sde)) <= stop:
        raise Violation(f"t_min={start}, t_max={stop}, but drift and diffusion are finite up to {end} only")
    g = s.sde.diffusion(torch.tensor(end, dtype=torch.float64))
    if not bool(torch.isfinite(g)):
        raise Violation(f"diffusion is {float(g.detach()):.3g} at t={end:g}, where solvers begin")
    return 0.0


def shapes(s: Subject) -> float:
    for dtype in (torch.float32, torch.float64):
        first, middle = (t.to(dtype) for t in s.times()[[10, 100]])
        for shape in _SHAPES:
            for t in (middle, middle.expand(3)):
                at = f"x {shape}, t {tuple(t.shape)} of {name_of(dtype)}"
                try:
                    outputs = list(_outputs(s.sde, torch.ones(shape, dtype=dtype), first.expand(t.shape), t))
                except Exception as error:  # of the user's code: of any type
                    raise Violation(f"for {at}: {brief(error)}") from error
                for name, found, like in outputs:
                    if (found.shape, found.dtype) != (like.shape, like.dtype):
                        raise Violation(f"{name} gives {tuple(found.shape)} of {name_of(found.dtype)} for {at}")
    return 0.0


def _outputs(sde: SDE, x: Tensor, s: Tensor, t: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value, and a tensor whose shape and dtype the value must have."""
    yield "drift", sde.drift(x, t), x
    yield "diffusion", sde.diffusion(t), t
    if isinstance(sde, GaussianSDE):
        for name in ("alpha", "sigma", "log_snr"):
            yield name, getattr(sde, name)(t), t
        yield "time", sde.time(sde.log_snr(t)), t
        yield "perturb", sde.perturb(x, t, x), x
        yield from (("kernel", part, t) for part in sde.kernel(s, t))
        yield from (("coefficients", part, t) for part in sde.coefficients(t))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def own_times(s: Subject) -> float:
    t, x = s.times()[[0, 20, 60, 120, -1]], s.noise(5, 2, 3)
    pairs = [(s.sde.drift(x, t), [s.sde.drift(x[i : i + 1], t[i])[0] for i in range(5)])]
    pairs.append((s.sde.diffusion(t), [s.sde.diffusion(t[i]) for i in range(5)]))
    if isinstance(s.sde, GaussianSDE):
        pairs.append((s.sde.perturb(x, t, x), [s.sde.perturb(x[i : i + 1], t[i], x[i : i + 1])[0] for i in range(5)]))
    return max(worst(whole - torch.stack(one)) / (worst(whole) + 1e-300) for whole, one in pairs)


def finite(s: Subject) -> float:
    names = ("alpha", "sigma", "diffusion") if isinstance(s.sde, GaussianSDE) else ("diffusion",)
    for dtype in (torch.float64, torch.float32):
        t = s.times().to(dtype)
        for name in names:
            value = getattr(s.sde, name)(t)
            _require(name, value, torch.isfinite(value) & (value > 0 if len(names) > 1 else value >= 0), t)
        drift = s.sde.drift(torch.ones(len(t), 1, dtype=dtype), t)[:, 0]
        _require("drift at x = 1", drift, torch.isfinite(drift), t)
    return 0.0


def _require(name: str, value: Tensor, good: Tensor, t: Tensor):
    if not bool(good.all()):
        first = int(good.int().argmin())
        more = int((~good).sum())
        where = f"t={t[first]:.4g} in {name_of(t.dtype)}"
        raise Violation(f"{name} is {float(value[first].detach()):.3g} at {where} ({more} of {len(t)} times)")


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian processes: coefficients, kernel, clock.


def linear(s: Subject) -> float:
    t = s.times()
    x = s.noise(len(t), 3)
    expected = _rate(s, t)[:, None] * x
    return worst((s.sde.drift(x, t) - expected) / (expected.abs() + 1 / s.span))


def mean(s: Subject) -> float:
    t = s.times()
    found, expected = _rate(s, t), _slope(s.sde.alpha, t) / s.sde.alpha(t)
    return worst((found - expected) / (found.abs() + expected.abs() + 1 / s.span))


def variance(s: Subject) -> float:
    t = s.times()
    slope = _slope(lambda at: s.sde.sigma(at).square(), t)
    added = s.sde.diffusion(t).square()
    return worst((slope - 2 * _rate(s, t) * s.sde.sigma(t).square() - added) / added)


def coefficients(s: Subject) -> float:
    t = s.times()
    pairs = (value_and_derivative(f, t) for f in (s.sde.alpha, s.sde.sigma))
    (alpha, d_alpha), (sigma, d_sigma) = pairs
    found, scale = s.sde.coefficients(t), torch.hypot(alpha, sigma)
    expected = ((alpha, scale), (sigma, scale), (d_alpha, scale / s.span), (d_sigma, scale / s.span))
    errors = [(a - b) / (b.abs() + c) for a, (b, c) in zip(found, expected, strict=True)]
    return worst(torch.stack(errors))


def log_snr(s: Subject) -> float:
    t = s.times()
    return worst(s.sde.log_snr(t) - 2 * (s.sde.alpha(t).log() - s.sde.sigma(t).log()))


def falling(s: Subject) -> float:
    # Not at the times of the others, which lie where drift and diffusion are finite: there they are not, if it rises.
    t = torch.linspace(s.sde.t_min, s.sde.t_max, 401, dtype=torch.float64)
    steps = s.sde.log_snr(t).diff().detach()
    _require("the change of log_snr", steps, steps < 0, t[1:])
    return 0.0


def time(s: Subject) -> float:
    t = s.times()
    beyond = s.sde.time(torch.tensor([1e3, -1e3], dtype=torch.float64))
    outside = torch.relu(torch.maximum(s.sde.t_min - beyond, beyond - s.sde.t_max)) / s.sde.t_max
    return max(worst((s.sde.time(s.sde.log_snr(t)) - t) / t), worst(outside))


def kernel(s: Subject) -> float:
    points = s.times(16)
    a, b = (grid.flatten() for grid in torch.meshgrid(points, points, indexing="ij"))
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    scale, std = s.sde.kernel(a, b)
    alphas, sigma = (s.sde.alpha(a), s.sde.alpha(b)), s.sde.sigma(b)
    variance = (scale * s.sde.sigma(a)).square() + std.square()
    return max(worst(scale * alphas[0] / alphas[1] - 1), worst(variance / sigma.square() - 1), worst(std[a == b]))


def composition(s: Subject) -> float:
    points = s.times(9)
    r, t, u = points[:-2], points[1:-1], points[2:]
    (first, noise), (second, more), (whole, total) = s.sde.kernel(r, t), s.sde.kernel(t, u), s.sde.kernel(r, u)
    variance = (second * noise).square() + more.square()
    return max(worst(first * second / whole - 1), worst(variance / total.square() - 1))


def perturb(s: Subject) -> float:
    t = s.times()
    x0, eps = s.noise(len(t), 3), s.noise(len(t), 3, draw=1)
    alpha, sigma = expand(s.sde.alpha(t), x0), expand(s.sde.sigma(t), x0)
    return worst((s.sde.perturb(x0, t, eps) - alpha * x0 - sigma * eps) / torch.hypot(alpha, sigma))


def float32(s: Subject) -> float:
    """Errors relative to the value c and to what rounding t itself changes it by, |t c'|."""
    t, errors = s.times().float(), []
    functions = {s.sde.alpha: 0.0, s.sde.sigma: 0.0, s.sde.diffusion: 0.0, lambda at: _rate(s, at): 1 / s.span}
    for function, floor in functions.items():
        exact = function(t.double())
        change = (function(t.double() * (1 - _STEP)) - exact).abs() / _STEP
        errors.append((function(t) - exact) / (exact.abs() + change + floor))
    return worst(torch.stack(errors))
