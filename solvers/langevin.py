r"""Langevin dynamics at a fixed time, as a corrector (Song et al., 2021, algorithms 4 and 5).

    x <- x + epsilon score + sqrt(2 epsilon) z

Three rules give epsilon, all in terms of one signal-to-noise ratio, that |epsilon score| has to |sqrt(2 epsilon) z|
where the state is pure noise. The norm is that of each sample alone, so that no sample depends on its batch.

    fixed          2 snr^2 sigma^2
    song           2 snr^2 D / |score|^2                                   (the paper's, with |z|^2 at its expectation)
    regularized    2 snr^2 (D + K) / (|score|^2 + K / sigma^2), K = 32

**Bias.** Nothing corrects for the size of the step, and at rest the variance is not V, that of p_t. On a Gaussian one
step takes V' to V' (1 - epsilon / V)^2 + 2 epsilon, so that at rest

    V' = V / (1 - epsilon / (2 V))                                                                (fixed epsilon)

which is V / (1 - snr^2) for epsilon = 2 snr^2 V: the fixed rule on pure noise, V = sigma^2. The same value is often
quoted for the paper's corrector, but there the norm is that of the score at the *wider* state, epsilon =
2 snr^2 V^2 / V', and the fixed point is V' = (1 + snr^2) V. In D dimensions E[1 / |x|^2]^-1 = (1 + snr^2) D V exactly,
or (1 + snr^2) (D + 2) V with the actual |z|: a step that follows the norm is larger where the score is small, and
however small it is, at rest the density is p_t / epsilon, 1 + 2 / D times too wide. In low dimension that is severe: a
sample whose score happens to vanish takes a step that only the bound alpha^2 + sigma^2, the variance of the state for
data of unit variance, keeps finite. In the regularized rule K values of the score of pure noise, -z / sigma, make that
1 + 2 / (D + K); its step is also capped at sigma^2 / 4, for the curvature of -log p_t never exceeds 1 / sigma^2.

**Adjusted.** Where the density is known up to a constant, each sample's move from x to y is accepted with probability
min(1, p(y) q(x | y) / (p(x) q(y | x))), q(. | x) = N(x + epsilon(x) score, 2 epsilon(x) I) (MALA; Roberts and Tweedie,
"Exponential convergence of Langevin distributions and their discrete approximations", 1996): then p_t itself is at
rest, whatever the rule and the snr.

**Alone**, over a grid of times, it is annealed Langevin dynamics. Between two times the state is scaled by the ratio of
sqrt(alpha^2 + sigma^2), to keep the variance of data of unit variance; then VE differs from VP in name only. What the
scaling leaves, Langevin steps must do as fast as sigma falls. On data wide against sigma the regularized and the fixed
rule take small steps, and with n of them for each factor e of sigma / alpha lag by a part of order 1 / (2 n snr^2).
Take n well above 1 / (2 snr^2), 20 for snr 0.16; or rule "song", whose step grows with the data; or a predictor.

The noise of a Langevin step is as large as the step, at t_min too: it is always added, whatever ``final`` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde.base import expand
from solvers.corrector import Corrector
from solvers.path import Path
from solvers.sampler import Step

_PSEUDO_VALUES = 32


class Levels(NamedTuple):
    """sigma^2 and alpha^2 + sigma^2 at the times of the corrections; what scales the state from the time before."""

    noise: Tensor
    state: Tensor
    scale: Tensor


def fixed(snr: float, squared: Tensor, dimension: int, levels: Levels) -> Tensor:
    """The same step everywhere: the map is affine where the score is."""
    return 2 * snr**2 * levels.noise.expand(squared.shape)


def song(snr: float, squared: Tensor, dimension: int, levels: Levels) -> Tensor:
    """2 (snr |z| / |score|)^2, with |z|^2 = D."""
    return torch.minimum(2 * snr**2 * dimension / squared, levels.state)


def regularized(snr: float, squared: Tensor, dimension: int, levels: Levels) -> Tensor:
    """The same, drawn towards the step for pure noise."""
    norm = (squared + _PSEUDO_VALUES / levels.noise) / (dimension + _PSEUDO_VALUES)
    return torch.minimum(2 * snr**2 / norm, levels.noise / 4)


RULES: dict[str, Callable[[float, Tensor, int, Levels], Tensor]] = {
    "regularized": regularized,
    "song": song,
    "fixed": fixed,
}
"""epsilon ``(B,)`` from snr, |score|^2 ``(B,)``, the dimension and the levels."""


class State(NamedTuple):
    """A place x, the score there, the size of a step from there ``(B,)``, and the log-density ``(B,)``."""

    x: Tensor
    score: Tensor
    size: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin steps at the earlier time of each interval: alone it is annealed Langevin dynamics over the grid.

    Parameters
    ----------
    snr: signal-to-noise ratio of a step.
    corrections: Langevin steps at each time, one call each.
    step_rule: "regularized", "song" or "fixed"; see the module.
    adjusted: accept or reject every step, so that p_t is left exactly as it is. The model must be a ``Density``; one
        call more at each time.
    """

    snr: float = 0.16
    corrections: int = 1
    step_rule: str = "regularized"
    adjusted: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.snr < float("inf"):
            raise ValueError(f"Langevin: snr must be positive and finite, found {self.snr!r}")
        if type(self.corrections) is not int or self.corrections < 0:
            raise ValueError(f"Langevin: corrections must be an integer of at least 0, found {self.corrections!r}")
        if self.step_rule not in RULES:
            raise ValueError(f"Langevin: step_rule must be one of {', '.join(RULES)}, found {self.step_rule!r}")
        if self.step_rule == "fixed" and not self.adjusted and self.snr >= 1:
            raise ValueError(
                f"Langevin: steps of a fixed size grow without bound for snr >= 1, found {self.snr!r}; lower it, or "
                "give adjusted=True"
            )
        if self.adjusted and self.compile:
            raise ValueError("Langevin: a compiled model has no density; leave out compile=True or adjusted=True")

    @property
    def needs_pair(self) -> bool:
        return self.final == "denoise"

    @property
    def needs_density(self) -> bool:
        return self.adjusted

    @property
    def stochastic(self) -> bool:
        return self.corrections > 0

    @property
    def calls_per_step(self) -> int:
        return self.corrections + (self.adjusted and self.corrections > 0)

    def plan(self, path: Path) -> Levels:
        noise = path.sigma.square()
        state = path.alpha.square() + noise
        # A process that is not Gaussian has no such scale: its drift is not linear.
        scale = torch.ones_like(state[1:]) if path.rate is None else (state[1:] / state[:-1]).sqrt()
        return Levels(noise[1:], state[1:], scale)

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        return self.correct(step.own.scale * x, step), None

    def correct(self, x: Tensor, step: Step) -> Tensor:
        """All corrections at ``step.s``."""
        return self._adjusted(x, step) if self.adjusted else self._unadjusted(x, step)

    def _unadjusted(self, x: Tensor, step: Step) -> Tensor:
        for _ in range(self.corrections):
            score = step.model.score(x, step.s)
            size = expand(self._size(score, step), x)
            moved = x + size * score + (2 * size).sqrt() * step.fresh(x)
            x = torch.where(step.sigma_s > 0, moved, x)  # without noise the step is 0, and -eps / sigma no number
        return x

    def _adjusted(self, x: Tensor, step: Step) -> Tensor:
        if not self.corrections:
            return x
        state = self._at(x, step)
        for _ in range(self.corrections):
            z, size = step.fresh(x), expand(state.size, x)
            moved = self._at(state.x + size * state.score + (2 * size).sqrt() * z, step)
            # The logarithm of a uniform number, of each sample's own stream; a ratio that is no number is refused.
            uniform = torch.special.log_ndtr(step.fresh(x.flatten(1)[:, :1]))[:, 0]
            accept = uniform < log_ratio(state, moved, z)
            state = State(*(torch.where(expand(accept, new), new, old) for old, new in zip(state, moved, strict=True)))
        return state.x

    def _at(self, x: Tensor, step: Step) -> State:
        score = step.model.score(x, step.s)
        return State(x, score, self._size(score, step), step.model.log_prob(x, step.s))

    def _size(self, score: Tensor, step: Step) -> Tensor:
        """epsilon of each sample, ``(B,)``."""
        return RULES[self.step_rule](self.snr, score.square().flatten(1).sum(1), score[0].numel(), step.own)


def log_ratio(state: State, moved: State, z: Tensor) -> Tensor:
    """log of p(y) q(x | y) / (p(x) q(y | x)) for a move from x to y by the noise ``z``; ``(B,)``."""
    there, back = expand(state.size, z), expand(moved.size, z)
    # x - y - epsilon(y) score(y) without the difference of x and y, which cancels.
    residual = there * state.score + (2 * there).sqrt() * z + back * moved.score
    squares = 0.5 * z.square() - residual.square() / (4 * back)
    widths = 0.5 * z[0].numel() * (state.size.log() - moved.size.log())
    return moved.log_prob - state.log_prob + squares.flatten(1).sum(1) + widths
