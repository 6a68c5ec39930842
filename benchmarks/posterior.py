r"""How far conditional samples are from the exact posterior: bias and spread of every method, with exact scores.

    python benchmarks/posterior.py [--seed 0] [--samples 500] [--observations 4]

Gaussians and mixtures of them in 2 and 16 dimensions are seen through a mask, a random projection and a blur, with
noise of standard deviation .05 and .3, and a mask without noise; mixtures also by the class of a component. The exact
posterior has a closed form in every case (``GaussianMixture.given``). Each method has two solvers, left and right:
one that has converged, on Gaussians from the exact p_T(x_T | y), so that what is left is the method's own bias; and
``ExponentialAdams`` of 20 steps from the prior. Some have others: MMPS along the reverse SDE ``SDEDPMSolver`` of 100
steps on the right; DPS and Guided, too stiff for few, ``EulerMaruyama`` of 1000 there, and on mixtures no other;
``Replacement``, whose noise is fresh at each call, ``EulerMaruyama`` of 500 on the left; RePaint has 10 rounds of
stretches of 10 of 250 and of 100 ``Ancestral`` steps.

Of Gaussians the samples are an affine function of the noise that they start from, which is run on unit vectors: moments
without Monte Carlo. Of mixtures, and for methods that draw noise themselves, they are those of samples, and the row
"exact samples" says what the same number of exact ones would show. In units of the exact posterior, its covariance S:

    mean    sqrt((m - mu)^T S^-1 (m - mu) / D),    spread    det(C S^-1)^(1 / 2D), and the least and greatest ratio of
    standard deviations over all directions;    modes    total variation between the weights of the components;
    W2      sliced Wasserstein-2 distance to exact samples, both in principal components of S at unit variance.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics import sliced_w2
from models import (
    DPS,
    MMPS,
    Classifier,
    ClassifierFree,
    GaussianMixture,
    Guided,
    LinearOperator,
    Mask,
    Matrix,
    PiGDM,
    RandomProjection,
    Replacement,
)
from sde import VP, GaussianSDE, ScoreModel
from solvers import (
    Ancestral,
    EulerMaruyama,
    ExponentialAdams,
    ProbabilityFlow,
    RePaint,
    SamplingDiverged,
    SDEDPMSolver,
    Solver,
)
from targets import TARGETS

RESULTS = Path(__file__).parent / "results"
CONVERGED, RELAXED = ProbabilityFlow(rtol=1e-5, atol=1e-5), ProbabilityFlow(rtol=1e-3, atol=1e-3)
PRACTICAL, NOISY, NOISIER = ExponentialAdams(steps=20), EulerMaruyama(steps=500), EulerMaruyama(steps=1000)
REVERSE = SDEDPMSolver(steps=100)
RESAMPLED = tuple(RePaint(Ancestral(steps=steps), rounds=10, jump=10) for steps in (250, 100))
DIVERGED = 100.0
"""Standard deviations off, beyond which a sampler is said to have diverged."""


class Method(NamedTuple):
    """A way to sample: the model for so many samples of each observation, and the solvers it is measured with.

    ``smooth``: whether the model of Gaussian data is an affine function of x, with no noise of its own.
    """

    model: Callable[[int], ScoreModel]
    best: Solver | None = CONVERGED
    quick: Solver = PRACTICAL
    smooth: bool = True


Methods = dict[str, Method]


@dataclass(frozen=True)
class Problem:
    """K things that are known of data from ``prior``, the exact posterior of each, and the methods that sample it.

    ``seen``: coordinates that are compared; those that are known exactly are not.
    """

    name: str
    prior: GaussianMixture
    posteriors: tuple[GaussianMixture, ...]
    methods: Methods
    seen: Tensor


class Moments(NamedTuple):
    """Of the samples for each of K observations: ``(K, D)`` and ``(K, D, D)``; samples ``(K, N, D)`` if there are."""

    mean: Tensor
    covariance: Tensor
    x: Tensor | None = None


class Figures(NamedTuple):
    """What a row says of a sampler; see the module's text."""

    mean: float
    spread: float
    least: float
    greatest: float
    modes: float | None = None
    w2: float | None = None


class Cost(NamedTuple):
    """Calls of the model and passes back through it."""

    nfe: int
    backward: int


# ---------------------------------------------------------------------------------------------------------------------
# Targets and problems.


def gaussian2(sde: GaussianSDE, seed: int) -> GaussianMixture:
    """Two dimensions, correlation .85, off the origin."""
    covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.25]]], dtype=torch.float64)
    return GaussianMixture(torch.ones(1).double(), torch.tensor([[0.5, -1.0]]).double(), covariance, sde)


def gaussian16(sde: GaussianSDE, seed: int) -> GaussianMixture:
    """Sixteen dimensions on random axes, variances from 2 down to .02: condition number 100."""
    axes = RandomProjection((16,), 16, seed).matrix
    variances = 2 * 100 ** -torch.linspace(0, 1, 16, dtype=torch.float64)
    covariance = axes.mT * variances @ axes
    return GaussianMixture(torch.ones(1).double(), axes[:1], (covariance + covariance.mT)[None] / 2, sde)


def mixture2(sde: GaussianSDE, seed: int) -> GaussianMixture:
    """Two dimensions, two components of weights .3 and .7."""
    covariances = torch.tensor([[[0.05, 0.02], [0.02, 0.05]], [[0.2, -0.1], [-0.1, 0.3]]], dtype=torch.float64)
    means = torch.tensor([[1.0, -1.0], [-1.5, 0.5]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances, sde)


def mixture16(sde: GaussianSDE, seed: int) -> GaussianMixture:
    """Sixteen dimensions, five components of weights 1 to 5; the target "b" of the samplers' benchmark otherwise."""
    target = TARGETS["b"](seed)
    return GaussianMixture(torch.arange(1.0, 6).double(), target.means, target.covariances, sde)


PRIORS = {
    "Gaussian, 2-D": gaussian2,
    "Gaussian, 16-D": gaussian16,
    "mixture, 2-D": mixture2,
    "mixture, 16-D": mixture16,
}


def operators(dimension: int, seed: int) -> dict[str, LinearOperator]:
    """Half of the coordinates; a quarter as many random directions, at least 1; a circular blur (1/4, 1/2, 1/4)."""
    one = torch.eye(dimension, dtype=torch.float64)
    blur = 0.5 * one + 0.25 * (one.roll(1, 0) + one.roll(-1, 0))
    blur = blur if dimension > 2 else torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    projection = RandomProjection((dimension,), max(1, dimension // 4), seed)
    return {"mask": Mask(torch.arange(dimension) % 2 == 0), "projection": projection, "blur": Matrix(blur)}


def linear(prior: GaussianMixture, name: str, operator: LinearOperator, noise_std: float, count: int, seed: int):
    """The problem y = A x_0 + noise_std n, of ``count`` observations."""
    y = operator.simulate(prior.sample(count, seed + 1), noise_std, seed)
    matrix = operator(torch.eye(prior.means.shape[1], dtype=torch.float64)).mT
    rows = matrix.abs().sum(1) > 0  # a mask's others say nothing of x, and are 0
    y = torch.where(rows, y, 0)
    posteriors = tuple(prior.given(matrix[rows], one[rows], noise_std) for one in y)
    hidden = ~rows if noise_std == 0 else torch.ones(prior.means.shape[1], dtype=torch.bool)
    methods = linear_methods(prior, operator, y, noise_std)
    return Problem(f"{name}, noise {noise_std:g}", prior, posteriors, methods, hidden)


def linear_methods(prior: GaussianMixture, operator: LinearOperator, y: Tensor, noise_std: float) -> Methods:
    """MMPS of some numbers of iterations, PiGDM, DPS, and for what is known exactly replacement in place of DPS."""
    size = int((operator(torch.ones(1, *operator.shape).double()) != 0).sum())
    best = CONVERGED if prior.classes == 1 else RELAXED

    def built(kind: Callable[..., ScoreModel], *options) -> Callable[[int], ScoreModel]:
        return lambda n: kind(prior, operator, y.repeat_interleave(n, 0), noise_std, *options)

    counts = sorted({k for k in (1, 2, 5) if k < size} | {size})
    methods = {f"MMPS, {k} iteration{'s' * (k > 1)}": Method(built(MMPS, k), best) for k in counts}
    few = min(2, size)
    methods[f"MMPS, {few}, reverse SDE"] = Method(built(MMPS, few), None, REVERSE)
    methods["PiGDM"] = Method(built(PiGDM), best)
    if noise_std:
        return methods | {"DPS": Method(built(DPS), best if prior.classes == 1 else None, NOISIER)}
    return methods | replacements(prior, operator, y, best)


def replacements(prior: GaussianMixture, operator: LinearOperator, known: Tensor, best: Solver) -> Methods:
    """Replacement with fresh noise and with the state's own."""

    def built(fresh: bool) -> Callable[[int], ScoreModel]:
        return lambda n: Replacement(prior, known.repeat_interleave(n, 0), operator.mask, fresh)

    return {
        "Replacement": Method(built(True), NOISY, smooth=False),
        "Replacement, RePaint": Method(built(True), *RESAMPLED, smooth=False),
        "Replacement, own noise": Method(built(False), best),
    }


def classes(prior: GaussianMixture) -> Problem:
    """What is known is the component."""
    each = torch.arange(prior.classes)

    def guided(n: int) -> ScoreModel:
        label = each.repeat_interleave(n)[:, None]
        return Guided(prior, lambda x0: prior.log_class(x0).gather(1, label)[:, 0])

    covariances = prior.axes * prior.variances[:, None] @ prior.axes.mT
    posteriors = tuple(
        GaussianMixture(torch.ones(1).double(), prior.means[k, None], covariances[k, None], prior.sde) for k in each
    )
    models = {
        "Classifier": lambda n: Classifier(prior, prior.log_class, label=each.repeat_interleave(n)),
        "ClassifierFree, 1": lambda n: ClassifierFree(prior, each.repeat_interleave(n), 1.0),
        "ClassifierFree, 3": lambda n: ClassifierFree(prior, each.repeat_interleave(n), 3.0),
    }
    methods = {name: Method(model, RELAXED) for name, model in models.items()}
    methods["Guided"] = Method(guided, None, NOISIER)
    return Problem("class", prior, posteriors, methods, torch.ones(prior.means.shape[1], dtype=torch.bool))


def problems(prior: GaussianMixture, count: int, seed: int) -> Iterator[Problem]:
    """All of one target."""
    found = operators(prior.means.shape[1], seed)
    for noise_std in (0.05, 0.3):
        for name, operator in found.items():
            yield linear(prior, name, operator, noise_std, count, seed)
    yield linear(prior, "mask", found["mask"], 0.0, count, seed)
    if prior.classes > 1:
        yield classes(prior)


# ---------------------------------------------------------------------------------------------------------------------
# Samples, their moments, and how far off these are.


def moments(mixture: GaussianMixture, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of p_t, of the data for None."""
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = (one, 0 * one) if t is None else (mixture.sde.alpha(t), mixture.sde.sigma(t))
    weights = mixture.log_weights.exp()
    mean = weights @ mixture.means
    within = torch.einsum("k,kde,ke,kfe->df", weights, mixture.axes, mixture.variances, mixture.axes)
    apart = mixture.means - mean
    covariance = within + apart.mT @ (weights[:, None] * apart)
    return alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)


def affine(solver: Solver, problem: Problem, method: Method, exact: bool) -> tuple[Moments, Cost]:
    """Moments of samples that are an affine function of x_T, from the ``exact`` p_T(x_T | y) or the SDE's prior."""
    count, d = len(problem.posteriors), problem.prior.means.shape[1]
    units = torch.cat((torch.zeros(1, d), torch.eye(d))).double().repeat(count, 1)
    out = solver(method.model(1 + d), x_T=units)
    x = out.x.reshape(count, 1 + d, d)
    offset, maps = x[:, 0], x[:, 1:] - x[:, :1]
    end = torch.tensor(problem.prior.sde.t_max, dtype=torch.float64)
    nothing = torch.zeros(d).double(), problem.prior.sde.sigma(end) ** 2 * torch.eye(d).double()
    starts = [moments(one, end) if exact else nothing for one in problem.posteriors]
    mean = torch.stack([o + m @ a for o, a, (m, _) in zip(offset, maps, starts, strict=True)])
    covariance = torch.stack([a.mT @ c @ a for a, (_, c) in zip(maps, starts, strict=True)])
    return Moments(mean, covariance), Cost(out.nfe, out.backward)


def drawn(solver: Solver, problem: Problem, method: Method, n: int, seed: int):
    """Moments of ``n`` samples for each observation, from the SDE's prior."""
    shape = (len(problem.posteriors) * n, problem.prior.means.shape[1])
    out = solver(method.model(n), shape=shape, seed=seed, dtype=torch.float64)
    return of_samples(out.x.reshape(-1, n, shape[1])), Cost(out.nfe, out.backward)


def of_samples(x: Tensor) -> Moments:
    """Moments of samples ``(K, N, D)``."""
    return Moments(x.mean(1), torch.stack([one.mT.cov() for one in x]), x)


def figures(problem: Problem, found: Moments, seed: int) -> Figures:
    """Those of one sampler, over all observations: root mean squares, and the geometric mean of spreads."""
    rows = [
        compare(exact, Moments(*(None if part is None else part[i] for part in found)), problem.seen, seed)
        for i, exact in enumerate(problem.posteriors)
    ]
    columns = dict(zip(Figures._fields, zip(*rows, strict=True), strict=True))
    mean = math.sqrt(sum(v**2 for v in columns["mean"]) / len(rows))
    spread = math.exp(sum(map(math.log, columns["spread"])) / len(rows))
    others = (None if v[0] is None else sum(v) / len(v) for v in (columns["modes"], columns["w2"]))
    return Figures(mean, spread, min(columns["least"]), max(columns["greatest"]), *others)


def compare(exact: GaussianMixture, found: Moments, seen: Tensor, seed: int) -> Figures:
    """The samples of one observation with its posterior, in the coordinates ``seen``."""
    exact = restricted(exact, seen)
    mean, covariance = moments(exact)
    root = torch.linalg.cholesky(covariance)
    off = torch.linalg.solve_triangular(root, (found.mean[seen] - mean)[:, None], upper=False)
    half = torch.linalg.solve_triangular(root, found.covariance[seen][:, seen], upper=False)
    ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.mT, upper=False)).clamp_min(1e-30).sqrt()
    moved = float(off.square().mean().sqrt())
    shape = moved, float(ratios.log().mean().exp()), float(ratios[0]), float(ratios[-1])
    if found.x is None:
        return Figures(*shape)
    x = found.x[:, seen]
    modes = 0.5 * float((exact.log_class(x).exp().mean(0) - exact.log_weights.exp()).abs().sum())
    peers = exact.sample(_PEERS, seed + 1000)  # apart from those of the floor
    pairs = (torch.linalg.solve_triangular(root, part.mT, upper=False).mT for part in (x, peers))
    return Figures(*shape, modes if exact.classes > 1 else None, sliced_w2(*pairs, projections=64))


_PEERS = 4000


def restricted(mixture: GaussianMixture, seen: Tensor) -> GaussianMixture:
    """The marginal of the coordinates ``seen``."""
    covariances = (mixture.axes * mixture.variances[:, None]) @ mixture.axes.mT
    return GaussianMixture(
        mixture.log_weights.exp(), mixture.means[:, seen], covariances[:, seen][:, :, seen], mixture.sde
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def measured(problem: Problem, method: Method, solver: Solver | None, exact: bool, samples: int, seed: int):
    """Figures, None where it diverged, and cost of a method with one solver; None for both without a solver."""
    if solver is None:
        return None, None
    try:
        if problem.prior.classes == 1 and method.smooth and not solver.stochastic:
            found, cost = affine(solver, problem, method, exact)
        else:
            found, cost = drawn(solver, problem, method, samples, seed)
    except SamplingDiverged:
        return None, Cost(0, 0)
    result = figures(problem, found, seed)
    return (result if result.mean < DIVERGED and result.greatest < DIVERGED else None), cost


_WIDTHS = (8, 7, 7, 9, 7, 7)
_TITLES = (*Figures._fields[:4], "modes", "W2")


def row(name: str, *ways: tuple[Figures | None, Cost | None]) -> str:
    """One line; cost and figures of each way to solve."""
    return f"{name:23}{'  |'.join(part(*way) for way in ways)}".rstrip()


def part(found: Figures | None, cost: Cost | None) -> str:
    """The columns of one way."""
    price = f"{cost.nfe:>6}{cost.backward:>6}" if cost and cost.nfe else " " * 12
    if found is None:
        return price + ("  diverges" if cost else "").ljust(sum(_WIDTHS))
    return price + "".join(f"{'' if v is None else f'{v:.3f}':>{w}}" for v, w in zip(found, _WIDTHS, strict=True))


HEADER = f"{'method':23}" + "  |".join(
    [f"{'calls':>6}{'back':>6}" + "".join(f"{title:>{w}}" for title, w in zip(_TITLES, _WIDTHS, strict=True))] * 2
)


def table(problem: Problem, samples: int, seed: int) -> str:
    """One problem: a row for each method, and for as many exact samples."""
    lines = [problem.name, HEADER]
    for name, method in problem.methods.items():
        ways = ((method.best, True), (method.quick, False))
        lines.append(row(name, *(measured(problem, method, *way, samples, seed) for way in ways)))
    exact = torch.stack([one.sample(samples, seed + 5) for one in problem.posteriors])
    return "\n".join((*lines, row("exact samples", (figures(problem, of_samples(exact), seed), None))))


def main() -> None:
    """Print the tables of all targets, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=500, help="for each observation, where there is Monte Carlo")
    parser.add_argument("--observations", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sde, pages = VP(), [__doc__.split("\n\n", 2)[2].strip()]
    print(pages[0], flush=True)
    for title, prior in PRIORS.items():
        for problem in problems(prior(sde, args.seed), args.observations, args.seed):
            began = time.perf_counter()
            pages.append(f"{title}: {table(problem, args.samples, args.seed)}")
            print(f"\n{pages[-1]}\n({time.perf_counter() - began:.0f} s)", flush=True)
    (RESULTS / "posterior.txt").write_text("\n\n".join(pages) + "\n")


if __name__ == "__main__":
    main()
