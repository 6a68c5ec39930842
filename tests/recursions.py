r"""Samplers on data N(0, v), as recursions in Python floats: the formulas of the papers, one time at a time.

With the exact score of N(0, v) all predictions are linear in the state, and so is every sampler in x_T and its draws of
noise z_1, z_2, ... A state is a vector here: its coefficients of (x_T, z_1, z_2, ...). A recursion is a function

    step(v, t, s, x, z, past) -> the state at the level s from the state x at the level t

where z() is fresh noise, zero in the last step of a sampler whose ``final`` is "mean", z.fresh() is so in that step
too, and ``past`` is a list of the recursion's own, empty before the first step: there a multistep method keeps what it
has seen. With levels in the reverse order the same functions encode.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch


@functools.cache
def level(sde, t):
    """alpha, sigma, f / x and g^2 at the float ``t``, as floats, by the process itself."""
    time = torch.tensor(t, dtype=torch.float64)
    at = sde.coefficients(time)
    alpha, sigma = float(sde.alpha(time).detach()), float(sde.sigma(time).detach())
    return SimpleNamespace(
        t=t, alpha=alpha, sigma=sigma, rate=float(at.rate.detach()), squared=float(at.diffusion_squared.detach())
    )


def numbered(levels):
    """Levels that know their ``index``, from 0, the number of ``steps`` and their ``ratio`` sigma / alpha."""
    steps = len(levels) - 1
    return [SimpleNamespace(**vars(at), index=i, steps=steps, ratio=at.sigma / at.alpha) for i, at in enumerate(levels)]


class Draws:
    """Unit vectors in the directions of z_1, z_2, ..."""

    def __init__(self, size):
        self.size, self.number, self.silent = size, 0, False

    def __call__(self):
        return np.zeros(self.size) if self.silent else self.fresh()

    def fresh(self):
        self.number += 1
        return np.eye(self.size)[self.number]


def run(step, levels, v, final="mean", draws=1, correct=None):
    """Coefficients of the result in (x_T, z_1, ...): ``draws`` a step at most, and ``correct`` after each."""
    levels, size = numbered(levels), 1 + draws * (len(levels) - 1)
    x, z, past = np.eye(size)[0], Draws(size), []
    for t, s in itertools.pairwise(levels):
        z.silent = final == "mean" and s.index == s.steps
        x = step(v, t, s, x, z, past)
        x = correct(v, s, x, z) if correct else x
    return x0_weight(v, levels[-1]) * x if final == "denoise" else x


def x0_weight(v, at):
    """E[x_0 | x_t] / x_t."""
    return at.alpha * v / (at.alpha**2 * v + at.sigma**2)


def eps_weight(v, at):
    """E[eps | x_t] / x_t."""
    return at.sigma / (at.alpha**2 * v + at.sigma**2)


def added(t, s):
    """Variance of the kernel from s to t, sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, as a product."""
    kept = t.alpha / s.alpha * s.sigma
    return (t.sigma - kept) * (t.sigma + kept)


def half_log_snr(at):
    """log(alpha / sigma)."""
    return math.log(at.alpha) - math.log(at.sigma) if at.sigma else math.inf


# The reverse-time SDE.


def euler_maruyama(eta):
    """Euler-Maruyama; Euler's method on the probability-flow ODE for ``eta`` 0."""

    def step(v, t, s, x, z, past):
        dt = t.t - s.t
        drift = t.rate + (1 + eta**2) / 2 * t.squared / (t.alpha**2 * v + t.sigma**2)
        return (1 - dt * drift) * x + (eta * math.sqrt(t.squared * dt) * z() if eta else 0)

    return step


def reverse_diffusion(v, t, s, x, z, past):
    """Song et al. (2021), eq. 46."""
    scale, variance = t.alpha / s.alpha, added(t, s)
    return x - (scale - 1) * x - variance / (t.alpha**2 * v + t.sigma**2) * x + math.sqrt(variance) * z()


def sde_dpm_solver(eta, order):
    """Lu et al. (2022), SDE-DPM-Solver++(1) and (2M), and the same for other amounts of noise."""

    def step(v, t, s, x, z, past):
        h = half_log_snr(s) - half_log_snr(t)
        noisy = eta**2 * h if eta else 0.0
        x0 = d = x0_weight(v, t) * x
        if order == 2 and past and s.index < s.steps:
            before, h_before = past[-1]
            d = x0 + (x0 - before) * h / (2 * h_before)
        past.append((x0, h))
        moved = s.sigma / t.sigma * math.exp(-noisy) * x - s.alpha * math.expm1(-h - noisy) * d
        return moved + (s.sigma * math.sqrt(-math.expm1(-2 * noisy)) * z() if eta else 0)

    return step


# Through the predicted clean image.


def ddim(eta):
    """Song et al. (2021), DDIM, eqs. 12 and 16, with sigma_s^2 - noise^2 as a sum."""

    def step(v, t, s, x, z, past):
        kept = t.alpha * s.sigma / (s.alpha * t.sigma)
        direction = s.sigma * math.sqrt(1 - eta**2 + (eta * kept) ** 2)
        mean = (s.alpha * x0_weight(v, t) + direction * eps_weight(v, t)) * x
        return mean + (eta * s.sigma * math.sqrt((1 - kept) * (1 + kept)) * z() if eta else 0)

    return step


def ancestral(v, t, s, x, z, past):
    """Bayes' rule with x_t as a noisy observation of x_s, in products that may vanish with sigma_s."""
    mean = (s.alpha * added(t, s) * x0_weight(v, t) + t.alpha / s.alpha * s.sigma**2) / t.sigma**2
    return mean * x + s.sigma * math.sqrt(added(t, s)) / t.sigma * z()


# The probability-flow ODE.


def heun(churn=0.0, low=0.0, high=math.inf, scale=1.0):
    """Karras et al. (2022), algorithms 1 and 2, in x / alpha and its sigma."""

    def step(v, t, s, x, z, past):
        now, later = t.ratio, s.ratio
        past.append(now)  # the first is the most
        gamma = min(churn / t.steps, math.sqrt(2) - 1) if low <= now <= high else 0.0
        hat = min(now * (1 + gamma), past[0]) if gamma else now
        y = x / t.alpha + (scale * math.sqrt((hat - now) * (hat + now)) * z.fresh() if churn else 0)
        slope = hat / (v + hat**2) * y
        euler = y + (later - hat) * slope
        return s.alpha * (y + (later - hat) * (slope + later / (v + later**2) * euler) / 2 if later else euler)

    return step


def runge_kutta(v, t, s, x, z, past):
    """dw/du of N(0, v) is w (1 - v) sin u cos u / (v cos^2 u + sin^2 u): the four slopes by angles alone."""
    u, end = math.atan2(t.sigma, t.alpha), math.atan2(s.sigma, s.alpha)
    h = end - u

    def slope(angle, w):
        sin, cos = math.sin(angle), math.cos(angle)
        return (1 - v) * sin * cos / (v * cos**2 + sin**2) * w

    a = slope(u, 1)
    b = slope(u + h / 2, 1 + h / 2 * a)
    c = slope(u + h / 2, 1 + h / 2 * b)
    d = slope(end, 1 + h * c)
    return math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma) * (1 + h * (a + 2 * b + 2 * c + d) / 6) * x


# Multistep methods.


def lower(order, t, s):
    """Of as many nodes as there are, and lower again in the last of fewer than 15 steps and next to sigma = 0."""
    if s.sigma == 0:
        return 1
    return min(order, t.index + 1, t.steps - t.index) if t.steps < 15 else min(order, t.index + 1)


NODES, QUADRATURE = (a / 2 for a in np.polynomial.legendre.leggauss(40))


def dpm_solver(order):
    """DPM-Solver++: algorithm 2 of Lu et al. (2022); order 3 by quadrature of the parabola.

    (sigma_s / sigma) x - alpha_s (e^-h - 1) x_0 is written as alpha_s x_0 + sigma_s eps.
    """

    def step(v, t, s, x, z, past):
        m, start, h = x0_weight(v, t) * x, half_log_snr(t), half_log_snr(s) - half_log_snr(t)
        past.insert(0, (start, m))
        k, seen = lower(order, t, s), past[:3]
        x = s.alpha * m + s.sigma * (eps_weight(v, t) * x)
        if k == 2:
            x = x - s.alpha * math.expm1(-h) * h / (2 * (start - seen[1][0])) * (m - seen[1][1])
        if k == 3:
            at, weights = start + (NODES + 0.5) * h, QUADRATURE * np.exp(h * (NODES - 0.5))
            for own, value in seen:
                basis = math.prod((at - other) / (own - other) for other, _ in seen if other != own)
                x = x + s.alpha * h * float((weights * basis).sum()) * (value - m)
        return x

    return step


def unipc_change(t, s, order, seen, ahead=None):
    """What UniPC adds to the first-order step from t to s: Zhao et al. (2023), algorithms 5 to 8, with B_2."""
    start, base = seen[0]
    h = half_log_snr(s) - start
    b, rhs, phi = math.expm1(-h), [], math.expm1(-h) / -h - 1
    for i in range(1, order + 1):
        rhs.append(phi * math.factorial(i) / b)
        phi = phi / -h - 1 / math.factorial(i + 1)
    ratios = [(one - start) / h for one, _ in seen[1:order]]
    slopes = [(m - base) / r for (_, m), r in zip(seen[1:order], ratios, strict=True)]
    if ahead is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, ahead - base]
    size = len(ratios)
    matrix = np.array([[r**i for r in ratios] for i in range(size)]).reshape(size, size)
    rho = [0.5] if size == 1 else np.linalg.solve(matrix, rhs[:size]) if size else []
    return -s.alpha * b * sum(float(p) * d for p, d in zip(rho, slopes, strict=True))


def unipc(order):
    """Predicted and corrected states apart: both start from the corrected state, the predicted one plus ``gap``."""

    def step(v, t, s, x, z, past):
        m, gap = x0_weight(v, t) * x, 0.0
        if past:
            before, seen = past[-1]
            back = before, t, lower(order, before, t), seen
            gap = unipc_change(*back, ahead=m) - unipc_change(*back)
        seen = [(half_log_snr(t), m), *(past[-1][1] if past else [])]
        past.append((t, seen))
        first = s.alpha * m + s.sigma * (eps_weight(v, t) * x)
        return first + s.sigma / t.sigma * gap + unipc_change(t, s, lower(order, t, s), seen)

    return step


# Exponential Adams, in y = x / alpha and s = sigma / alpha.

FORMS = {"data": 0.0, "noise": math.inf, "v": 1.0}
"""The sampler's ``data_std``."""
FIXED = {"adaptive": False, "knee": math.inf}
BASHFORTH = {**FIXED, "corrected": False}


def predicted(form, s, v):
    """What is interpolated: x_0, eps, or the prediction of the angle's slope, for y = 1."""
    x0, eps = v / (v + s * s), s / (v + s * s)
    return {"data": x0, "noise": eps, "v": (s * x0 - eps) / math.hypot(1, s)}[form]


def carried(form, s):
    """The factor of y that a step keeps: of y / s, of y, of y / sqrt(1 + s^2)."""
    return {"data": s, "noise": 1.0, "v": math.hypot(1, s)}[form]


def against(form, z):
    """What it is integrated against, in z = ln s."""
    return {"data": -np.exp(-z), "noise": np.exp(z), "v": -np.exp(z) / (1 + np.exp(2 * z))}[form]


def damping(z, knee):
    return (1 + (np.exp(z) / knee) ** 2) ** -0.25


@functools.cache
def integrals(form, nodes, n, count, knee, back=0):
    """Of the Lagrange polynomials through ``count`` nodes up to the n-th, over the step from it, or ``back`` steps."""
    z, (x, w) = np.log(nodes[: n + 2 - back]), np.polynomial.legendre.leggauss(24)
    edges = np.linspace(z[n - back], z[n + 1 - back], 17)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, np.diff(edges)[:, None] / 2
    q, weight = (middle + half * x).ravel(), (half * w).ravel()
    weight = weight * against(form, q) / damping(q, knee)
    last = [n - i for i in range(count)]
    basis = ([(q - z[m]) / (z[k] - z[m]) for m in last if m != k] for k in last)
    return [float(weight @ np.prod([np.ones_like(q), *parts], axis=0)) for parts in basis]


def ending(nodes, y, eps, before):
    """From s to the end with g = eps / s linear in tau = s^2 through the last two nodes."""
    a, s, end = nodes[-3:]
    slope = (before / a - eps / s) / (a**2 - s**2)
    d = s**2 - end**2
    return y - 0.5 * (eps / s * d - slope * d**2 / 2)


def exponential_adams(form, order, knee=math.inf, gates=None, corrected=False):
    """``gates`` turns the sums S_1, S_2, ... of squared terms into d_1, d_2, ...; u = y / ``carried``."""

    def step(v, t, s, x, z, past):
        now, end, y = t.ratio, s.ratio, x / t.alpha
        eps = y * now / (v + now**2)
        value = y * predicted(form, now, v) * float(damping(math.log(now), knee))
        energy = past[0].energy if past else [0.0] * (order - 1)
        u = past[0].u if past and corrected else y / carried(form, now)
        past.insert(0, SimpleNamespace(ratio=now, eps=eps, value=value, energy=energy, u=u))
        nodes = (*(one.ratio for one in reversed(past)), end)
        if corrected and t.index:
            weights = integrals(form, nodes, t.index, min(order, t.index + 1), knee, back=1)
            past[0].u += sum(w * one.value for w, one in zip(weights, past, strict=False))
        y = carried(form, now) * past[0].u
        if t.index == t.steps - 1 and now >= 2 * end:  # a long last step
            at_end = ending(nodes, y, eps, past[1].eps) if t.index and now < 0.25 else y + (end - now) * eps
            return s.alpha * at_end
        sums = [
            sum(w * one.value for w, one in zip(integrals(form, nodes, t.index, k, knee), past, strict=False))
            for k in range(1, min(order, t.index + 1) + 1)
        ]
        terms = [b - a for a, b in itertools.pairwise(sums)] + [0.0] * (order - len(sums))
        past[0].energy = [term**2 + 0.9 * sofar for term, sofar in zip(terms, energy, strict=True)]
        weights = gates(past[0].energy) if gates else [1.0] * len(terms)
        change = sums[0] + sum(d * term for d, term in zip(weights, terms, strict=True))
        return s.alpha * carried(form, end) * (past[0].u + change)

    return step


# Langevin dynamics.


def correction(snr, count=1):
    """Fixed steps at the level ``s``."""

    def correct(v, s, x, z):
        size = 2 * (snr * s.sigma) ** 2
        for _ in range(count):
            x = (1 - size / (s.alpha**2 * v + s.sigma**2)) * x + math.sqrt(2 * size) * z.fresh() if size else x
        return x

    return correct


def langevin(snr, count=1):
    """Fixed steps alone: in the scale of unit variance."""

    def step(v, t, s, x, z, past):
        return correction(snr, count)(v, s, math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma) * x, z)

    return step


# Chains.


def chain_level(chain, k):
    at = torch.tensor(k)
    return SimpleNamespace(alpha=float(chain.alpha(at)), sigma=float(chain.sigma(at)))


def ddpm(chain):
    """Bayes' rule at the levels of the chain, in the scale of the process; k = 0 is alpha x_0."""

    def step(v, t, s, x, z, past):
        k = chain.steps - t.index
        before, after = chain_level(chain, k), chain_level(chain, k - 1)
        scale = math.hypot(before.alpha, before.sigma) / math.hypot(t.alpha, t.sigma)
        end = math.hypot(s.alpha, s.sigma) / math.hypot(after.alpha, after.sigma) if k > 1 else s.alpha
        return end * ancestral(v, before, after, scale * x, z, past)

    return step


def annealed_langevin(sampler):
    """T steps on y = x / alpha at each level, after x_T has become noise of the first."""

    def step(v, t, s, x, z, past):
        x = (s.alpha / t.alpha if t.index else math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma)) * x
        sigma, least = (chain_level(sampler.levels, k).sigma for k in (sampler.steps - t.index, 1))
        size = s.alpha**2 * sampler.step_size * (sigma / least) ** 2
        for _ in range(sampler.steps_per_level):
            x = (1 - size / (s.alpha**2 * v + s.sigma**2)) * x + math.sqrt(2 * size) * z.fresh()
        return x

    return step
