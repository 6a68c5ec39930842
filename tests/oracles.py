"""Closed forms that the tests measure the code against; none of it is written in terms of the code under test."""

import functools
import inspect
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import sde as processes
import solvers.sampler
from models import GaussianMixture
from sde import (
    EDM,
    VE,
    VP,
    GaussianSDE,
    LearnedSchedule,
    Noise,
    RectifiedFlow,
    Rescaled,
    ScoreModel,
    SubVP,
    TimeChanged,
    preserving,
)
from sde.base import last_time
from solvers import Step
from solvers.path import Path, rows


def _concrete_sdes():
    classes = (getattr(processes, name) for name in processes.__all__)
    concrete = [c for c in classes if inspect.isclass(c) and issubclass(c, GaussianSDE) and not inspect.isabstract(c)]
    return [c for c in concrete if c not in (TimeChanged, Rescaled)]


SDE_CLASSES = _concrete_sdes()


def learned(**options):
    """A schedule with parameters as training might leave them."""
    sde = LearnedSchedule(**options).requires_grad_(False)
    for i, parameter in enumerate(sde.parameters()):
        parameter += (1.0, 3.0, 1.5)[i] * Noise(i).normal((1, parameter.numel()))[0]
    return sde


def make(cls, **options):
    """A process of the class, with parameters of its own if it learns."""
    return (learned if cls is LearnedSchedule else cls)(**options)


CHANGED = [TimeChanged(VP(), torch.square), Rescaled(SubVP(), lambda t: 1 + t), preserving(VE(t_max=2.0))]
"""Processes that are others seen through a clock or a scale."""

SDES = [*(make(cls) for cls in SDE_CLASSES), *CHANGED]
"""Every Gaussian process that ``sde`` exports, as constructed without arguments, and the changed ones."""

ALL_SDES = [*SDES, *(make(cls, t_max=t_max) for cls in SDE_CLASSES for t_max in (0.5, 3.0))]
"""The same on slower and faster clocks."""

PAPER_SDES = [cls(**({"t_max": t} if t != 1 else {})) for cls in (VP, SubVP, VE) for t in (1, 0.5, 3.0)]

CORE_SDES = [VP(), SubVP(), VE()]
"""For tests that take long, where ``SDES`` would add nothing but time."""

SOME_SDES = [*CORE_SDES, RectifiedFlow(), EDM(), TimeChanged(VP(), torch.square)]
"""One of each kind."""

FEW_SDES = [VP(), SubVP(t_max=3.0), VE(t_max=0.5)]
"""The same on other clocks."""


def quick(sdes, *kinds):
    """The same for ``parametrize``: only ``kinds``, or VP and one that is singular, by default; the rest slow."""
    kinds = kinds or (VP, RectifiedFlow)
    return [sde if isinstance(sde, kinds) else pytest.param(sde, marks=pytest.mark.slow) for sde in sdes]


ROWS = ("noise", "data", "v", "velocity", "score")


def train(objective, model, data, steps, rate=2e-3, batch=256):
    """Adam with a warm-up and a cosine; the losses of the last 500 steps, ``(500, batch)``."""
    optimizer, generator = torch.optim.Adam(model.parameters()), torch.Generator().manual_seed(0)
    losses = []
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        optimizer.zero_grad()
        loss = objective(model, x0, generator).value
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-500:])


def times(sde, n=1001, dtype=torch.float64):
    """Times from t_min to the last at which drift and diffusion are finite, denser towards t_min."""
    return (sde.t_min * (last_time(sde) / sde.t_min) ** torch.linspace(0, 1, n, dtype=torch.float64)).to(dtype)


def at_ends(sde, dtype=torch.float64):
    """t_min, a middle time, the last time."""
    last = last_time(sde)
    return [torch.tensor(t, dtype=dtype) for t in (sde.t_min, 0.5 * (sde.t_min + last), last)]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels and the coefficients of Song et al. (2021), eqs. 29-33, in Python floats.


def paper(sde, t):
    """(alpha, sigma, f, g^2) of VP, sub-VP or VE at the float ``t``, with the clock running over t / t_max."""
    if isinstance(sde, VE):
        rate = math.log(sde.sigma_max / sde.sigma_min) / sde.t_max
        sigma = sde.sigma_min * (sde.sigma_max / sde.sigma_min) ** (t / sde.t_max)
        return 1.0, sigma, 0.0, 2 * rate * sigma**2
    u = t / sde.t_max
    beta = (sde.beta_min + u * (sde.beta_max - sde.beta_min)) / sde.t_max
    integral = sde.beta_min * u + (sde.beta_max - sde.beta_min) * u**2 / 2
    mean, variance = math.exp(-integral / 2), -math.expm1(-integral)
    if isinstance(sde, SubVP):
        return mean, variance, -beta / 2, -beta * math.expm1(-2 * integral)
    return mean, math.sqrt(variance), -beta / 2, beta


def legendre(function, start, end, panels=64, order=16):
    """Integral of ``function`` (of a float64 tensor) by composite Gauss-Legendre quadrature."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(order))
    edges = torch.linspace(start, end, panels + 1, dtype=torch.float64)
    centre, half = 0.5 * (edges[1:] + edges[:-1])[:, None], 0.5 * (edges[1:] - edges[:-1])[:, None]
    values = function((centre + half * nodes).flatten()).reshape(panels, order)
    return float((values * weights * half).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Targets.


def gaussian(sde, variance=0.25, mean=0.0, dtype=torch.float64):
    """N(mean, variance) in one dimension, with its exact score."""
    one = torch.ones(1, dtype=dtype)
    return GaussianMixture(one, mean * one[None], variance * one[None, None], sde)


CORRELATED = torch.tensor([[0.5, 0.3], [0.3, 0.25]], dtype=torch.float64)
CENTRE = torch.tensor([0.5, -1.0], dtype=torch.float64)


def correlated(sde, dtype=torch.float64):
    """A correlated Gaussian off the origin in two dimensions: an isotropic one hides errors."""
    return GaussianMixture(torch.ones(1, dtype=dtype), CENTRE[None].to(dtype), CORRELATED[None].to(dtype), sde)


def mixture(sde, dtype=torch.float64):
    """Two components, of different weights, means, variances and correlation."""
    covariances = torch.tensor([[[0.05, 0.02], [0.02, 0.05]], [[0.2, -0.1], [-0.1, 0.3]]], dtype=dtype)
    means = torch.tensor([[1.0, -1.0], [-1.5, 0.5]], dtype=dtype)
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=dtype), means, covariances, sde)


@functools.cache
def time_of(sde, label):
    """The time at which log(sigma / alpha) is ``label``, a float."""
    return sde.time(torch.tensor(-2 * label, dtype=torch.float64))


class ExactNet(nn.Module):
    """A network that outputs exactly the target a x_0 + b eps of a parametrization, from the exact pair of ``exact``.

    Like any network it is given x_t / sqrt(alpha^2 s^2 + sigma^2), s the parametrization's standard deviation of the
    data, and log(sigma / alpha), and nothing else.
    """

    def __init__(self, exact, row, data_std=1.0):
        super().__init__()
        self.exact, self.row, self.data_std = exact, row, data_std

    def forward(self, x, label):
        sde = self.exact.sde
        t = torch.stack([time_of(sde, one) for one in label.tolist()])
        alpha, sigma = (c.to(x)[:, None] for c in (sde.alpha(t), sde.sigma(t)))
        x0, eps = self.exact(x * torch.hypot(self.data_std * alpha, sigma), t.to(x))
        a, b = (c.to(x) for c in self.row(t, sde))
        return a[:, None] * x0 + b[:, None] * eps


class Watch(ScoreModel):
    """Keeps the times at which it is called."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner, self.times = inner, []

    def forward(self, x, t):
        self.times.append(float(t))
        return self.inner(x, t)


def signs(dimension, dtype=torch.float64):
    """All 2^D vectors of signs."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dimension)), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers as affine maps.


class Response(NamedTuple):
    """x = offset + x_T @ start + sum_k z_k @ noise[k], for one sample x of D values and K draws z_k."""

    offset: torch.Tensor  # (D,)
    start: torch.Tensor  # (D, D)
    noise: torch.Tensor  # (K, D, D)

    def moments(self, mean, covariance):
        """Mean and covariance of x when x_T has the given ones."""
        added = torch.einsum("kij,kil->jl", self.noise, self.noise)
        return self.offset + mean @ self.start, self.start.T @ covariance @ self.start + added


def response(monkeypatch, sampler, model, dimension=1, draws=1):
    """Run a sampler on unit vectors in place of x_T and of each of its draws: no Monte Carlo."""
    k, d = sampler.steps * draws, dimension

    class Impulses:
        def __init__(self, *_):
            self.silent, self.number, self.noise = False, 0, Noise(0)

        def __call__(self, like):
            return torch.zeros_like(like) if self.silent else self.fresh(like)

        def fresh(self, like):
            out, first = torch.zeros_like(like), 1 + d + self.number * d
            out[first : first + d] = torch.eye(d, dtype=like.dtype)
            self.number += 1
            return out

    monkeypatch.setattr(solvers.sampler, "Draws", Impulses)
    x_T = torch.zeros(1 + d + k * d, d, dtype=torch.float64)
    x_T[1 : 1 + d] = torch.eye(d)
    out = sampler(model, x_T=x_T).x
    rows = out[1:] - out[0]
    return Response(out[0], rows[:d], rows[d:].reshape(k, d, d))


@functools.cache
def moved(sampler, sde, target, direction):
    """Where a sampler takes noise ("decode") or data."""
    model = target(sde)
    if direction == "encode":
        return sampler.encode(model, model.sample(4, seed=1))
    return sampler(model, x_T=sde.prior((4, 2)).sample(1, dtype=torch.float64)).x


def one_step(sampler, model, t, s, x, index=1):
    """The mean of one step of a sampler, from time ``t`` to ``s``, as the number ``index`` of its steps."""
    path = Path(model.sde, torch.tensor([t, s], dtype=torch.float64))
    own = next(iter(rows(sampler.plan(path), x)))
    step = Step(model, *path.times, *path.alpha, *path.sigma, torch.zeros_like, torch.zeros_like, own, index)
    return sampler.step(x, step, None)[0]


def marginal(model, t):
    """Mean and covariance of p_t for a mixture of one component."""
    alpha, sigma = (c(torch.tensor(t, dtype=torch.float64)) for c in (model.sde.alpha, model.sde.sigma))
    covariance = (model.axes[0] * model.variances[0]) @ model.axes[0].T
    return alpha * model.means[0], alpha**2 * covariance + sigma**2 * torch.eye(len(covariance), dtype=alpha.dtype)
