r"""The chain of NCSN: x_k = x_0 + sigma_k eps, variance-exploding; its levels, and the choices of NCSNv2.

As a Markov chain x_k = x_{k-1} + sqrt(sigma_k^2 - sigma_{k-1}^2) z (Song et al., 2021, eq. 20), whose limit for
N -> infinity is ``VE``. Song and Ermon ("Generative modeling by estimating gradients of the data distribution", 2019)
list the levels from the largest, sigma_1, to the smallest, sigma_L, and so does ``NCSNLevels.sigmas``; the chain's
index k runs the other way, from the data to the noise, as in every chain: sigma(k) = sigmas[L - k].

The functions choose the levels and the step of Langevin dynamics by the techniques of Song and Ermon, "Improved
techniques for training score-based generative models", 2020 (NCSNv2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sde.discrete import GaussianChain, Index


def geometric_sigmas(largest: float = 50.0, smallest: float = 0.01, levels: int = 232) -> tuple[float, ...]:
    """``levels`` noise levels from ``largest`` to ``smallest`` in a geometric sequence; by default NCSNv2's."""
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"geometric_sigmas: levels must be an integer of at least 2, found {levels!r}")
    if not 0 < smallest < largest < math.inf:
        raise ValueError(f"geometric_sigmas: expected 0 < smallest < largest, found {smallest} and {largest}")
    inner = (largest * (smallest / largest) ** (i / (levels - 1)) for i in range(1, levels - 1))
    return (float(largest), *inner, float(smallest))


@dataclass(frozen=True, repr=False)
class NCSNLevels(GaussianChain):
    """The chain over ``sigmas``, strictly decreasing; ``geometric_sigmas()`` by default.

    >>> levels = NCSNLevels((10.0, 1.0, 0.1))
    >>> levels.sigma(1), levels.sigma(3)
    (tensor(0.1000, dtype=torch.float64), tensor(10., dtype=torch.float64))
    """

    sigmas: Sequence[float] = field(default_factory=geometric_sigmas)

    def __post_init__(self):
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        if not self.sigmas or not all(0 < sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"NCSNLevels: sigmas must be positive numbers, at least one, found {self.sigmas}")
        for i, (larger, smaller) in enumerate(pairwise(self.sigmas)):
            if not larger > smaller:
                found = f"sigmas[{i}] = {larger}, sigmas[{i + 1}] = {smaller}"
                raise ValueError(f"NCSNLevels: sigmas must decrease strictly, from the largest, found {found}")

    __hash__ = GaussianChain.__hash__

    def __repr__(self) -> str:
        return f"NCSNLevels({len(self.sigmas)} sigmas, {self.sigmas[0]:.3g} to {self.sigmas[-1]:.3g})"

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def prior_std(self) -> float:
        return self.sigmas[0]

    def levels(self) -> tuple[Tensor, Tensor]:
        sigma = torch.tensor((0.0, *reversed(self.sigmas)), dtype=torch.float64)
        return torch.ones_like(sigma), sigma

    def subset(self, indices: Sequence[int]) -> "NCSNLevels":
        return NCSNLevels([self.sigmas[self.steps - k] for k in reversed(indices)])

    def langevin_step(self, k: Index, epsilon: float, like: Tensor | None = None) -> Tensor:
        """Step of annealed Langevin dynamics, epsilon (sigma_k / sigma_1)^2, k = 1..N: the least noise has epsilon.

        In the order of Song and Ermon (2019, algorithm 1) that is alpha_i = epsilon sigma_i^2 / sigma_L^2.
        """
        return epsilon * (self._at("sigma", k, like) / self.sigmas[-1]).square()


def largest_sigma(data: Tensor, chunk: int = 1024) -> float:
    """The greatest Euclidean distance between two of the samples ``(B, ...)`` (NCSNv2, technique 1).

    Holds ``chunk`` squared distances at a time, and takes B^2 / 2 of them.
    """
    flat = data.flatten(1)
    flat = flat - flat.mean(0)  # the distances are taken through products, which cancel far from the origin
    parts = flat.split(chunk)
    distances = [torch.cdist(a, b).max() for i, a in enumerate(parts) for b in parts[i:]]
    return float(torch.stack(distances).max())


def _phi(x: float) -> float:
    """Distribution function of the standard normal."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def sigma_ratio(dimension: int) -> float:
    """The ratio g of successive levels at which half of one level's samples are likely under the next (technique 2).

    Solves Phi(sqrt(2 D) (g - 1) + 3 g) - Phi(sqrt(2 D) (g - 1) - 3 g) = 1/2. For D < 5 every g overlaps by more.
    """
    if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 5:
        raise ValueError(f"sigma_ratio: technique 2 has a solution for dimensions from 5 on, found {dimension!r}")
    root = math.sqrt(2 * dimension)
    low, high = 1.0, root / (root - 3)  # at the upper end the second argument is 0
    for _ in range(60):
        middle = 0.5 * (low + high)
        overlap = _phi(root * (middle - 1) + 3 * middle) - _phi(root * (middle - 1) - 3 * middle)
        low, high = (middle, high) if overlap > 0.5 else (low, middle)
    return 0.5 * (low + high)


def levels_for(largest: float, smallest: float, ratio: float) -> int:
    """The least number of levels from ``largest`` to ``smallest`` whose successive ratios do not exceed ``ratio``."""
    if not (0 < smallest < largest and ratio > 1):
        found = f"{largest}, {smallest} and {ratio}"
        raise ValueError(f"levels_for: expected largest > smallest > 0 and ratio > 1, found {found}")
    # A quotient that is a whole number up to rounding is that number.
    return math.ceil(math.log(largest / smallest) / math.log(ratio) - 1e-9) + 1


def variance_ratio(epsilon: float, ratio: float, steps_per_level: int, smallest: float) -> float:
    r"""s_T^2 / sigma_i^2 after T Langevin steps at a level, begun at the level before (NCSNv2, proposition 3).

        (1 - u)^(2T) (g^2 - 2 / (2 - u)) + 2 / (2 - u),      u = epsilon / smallest^2

    for data at a point, the same at each level; 1 is the aim. The paper's 2 epsilon / (s^2 - s^2 (1 - u)^2) is
    2 / (2 - u).
    """
    u = epsilon / smallest**2
    return (1 - u) ** (2 * steps_per_level) * (ratio**2 - 2 / (2 - u)) + 2 / (2 - u)


def step_size(ratio: float, steps_per_level: int, smallest: float) -> float:
    """The epsilon of annealed Langevin dynamics that brings ``variance_ratio`` closest to 1 (technique 4).

    ``steps_per_level`` is a budget: the paper takes as many as can be afforded.
    """
    if not (ratio > 1 and smallest > 0) or isinstance(steps_per_level, bool) or not steps_per_level >= 1:
        found = f"{ratio}, {smallest} and {steps_per_level}"
        raise ValueError(f"step_size: expected ratio > 1, smallest > 0 and steps_per_level >= 1, found {found}")

    def miss(log_u: float) -> float:
        return abs(variance_ratio(math.exp(log_u), ratio, steps_per_level, 1.0) - 1)

    # The ratio falls from g^2 and rises to 2 at u = 1: once a fine grid has bracketed the minimum, halve the bracket.
    centre, width = min((-0.02 * i for i in range(1001)), key=miss), 0.02
    for _ in range(50):
        centre, width = min((centre - width, centre, centre + width), key=miss), 0.5 * width
    return math.exp(min(centre, 0.0)) * smallest**2
