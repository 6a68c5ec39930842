r"""Samplers over the levels of a discrete chain, for any score model in continuous time: DDPM and annealed Langevin.

A chain asks the model for its pair at a level (alpha_k, sigma_k), through the time t_k of the same log-SNR
(``ScoreModel.at_level``). Which level a step is at is the step's number, and is never recovered from a time. The state
stays in the coordinates of the model's own process: at one log-SNR it is the chain's times a scale, the ratio of the
two sqrt(alpha^2 + sigma^2).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sde import SDE, DDPMChain, GaussianChain, NCSNLevels, Prediction
from sde.base import last_time, require_count
from sde.discrete import LEARNED, check_variance
from sde.levels import SLACK, level_times, noise_ratio
from solvers.path import Path
from solvers.sampler import Sampler, Step


def _require(role: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{role} must be a {kind.__name__}, found {value!r}")


@dataclass(frozen=True)
class DDPM(Sampler):
    """The reverse chain x_{k-1} ~ p(x_{k-1} | x_k), k = N..1 (Ho et al., 2020, algorithm 2); one call a step.

    Parameters
    ----------
    chain: a ``DDPMChain``, or any other: over ``NCSNLevels`` it is the ancestral sampler of Song et al. (2021, eq. 47).
    variance: of p, "beta", "beta_tilde" or a weight v in [0, 1] between them (``GaussianChain.variance``); "learned"
        - the model's own weight of each value (Nichol and Dhariwal, 2021), from the same call.
    final: "mean" - the last step adds no noise; "sample" - it does.

    It starts at t_max and ends at the chain's own end k = 0, at ``t_min`` in the model's coordinates: x = alpha x_0. A
    beginning of the chain that is noisier than t_max is walked at t_max.
    """

    chain: GaussianChain = field(default_factory=DDPMChain)
    variance: str | float = "beta_tilde"
    final: str = "mean"
    compile: bool = False
    order: ClassVar[int] = 1
    calls_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _require("DDPM: chain", self.chain, GaussianChain)
        if not self.needs_variance:
            check_variance(self.variance, "DDPM")
        if self.needs_variance and self.compile:
            raise ValueError("DDPM: a compiled model gives the pair alone: with variance='learned' leave out compile")
        if self.final not in ("mean", "sample"):
            raise ValueError(f"DDPM: final must be 'mean' or 'sample', found {self.final!r}; it ends at x_0 itself")

    @property
    def needs_variance(self) -> bool:
        return self.variance == LEARNED

    @property
    def steps(self) -> int:
        return self.chain.steps

    @property
    def needs_pair(self) -> bool:
        return True

    def times(self, sde: SDE) -> Tensor:
        """t_max, the times of the levels N - 1 to 1, t_min; t_max again where the chain is noisier."""
        return _walk(sde, level_times(sde, self.chain)[:-1], sde.t_min)

    def with_steps(self, steps: int) -> "DDPM":
        """Over evenly spaced indices of the same chain, at most as many as it has."""
        return replace(self, chain=self.chain.respaced(steps))

    def plan(self, path: Path) -> tuple[Tensor]:
        """The time of level N: the first step starts at t_max, wherever that is."""
        return (level_times(path.sde, self.chain)[-1].expand(len(path.times) - 1),)

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        """x_{k-1} from x_k, k = N - ``step.index``, in the model's coordinates."""
        k, chain = self.steps - step.index, self.chain
        x_k = x / _scale(chain, k, step.alpha_t, step.sigma_t)
        t = step.t if step.index else step.own[0]
        extra = {"with_variance": True} if self.needs_variance else {}
        x0, eps, *v = step.model.at_level(x_k, chain.alpha(k, x), chain.sigma(k, x), t, **extra)
        mean, variance = chain.reverse(Prediction(x0, eps), k, *(v or [self.variance]))
        return _scale(chain, k - 1, step.alpha_s, step.sigma_s) * (mean + variance.sqrt() * step.draw(x)), None


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Langevin dynamics at each level, from the largest to the smallest (Song and Ermon, 2019, algorithm 1; 2020).

    In y = x / alpha, with a_k = epsilon (sigma_k / sigma_1)^2 and k = 1 the least noise,

        y <- y + a_k score(y) + sqrt(2 a_k) z,      T times at each level

    (Song and Ermon, 2020, eq. 3; in 2019 the same step is called alpha_i / 2).

    Parameters
    ----------
    levels: the noise levels, within the noise of the model's process.
    steps_per_level: T, one call each. step_size: epsilon; see ``sde.step_size``. The defaults are those for CIFAR-10
        of 2020.
    final: "denoise" - the posterior mean of x_0 in place of the sample, for one more call (2020, algorithm 1);
        "sample" - the sample at the last level, whose noise it has.
    """

    levels: NCSNLevels = field(default_factory=NCSNLevels)
    steps_per_level: int = 5
    step_size: float = 6.2e-6
    final: str = "denoise"
    compile: bool = False
    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _require("AnnealedLangevin: levels", self.levels, NCSNLevels)
        bound = 2 * self.levels.sigmas[-1] ** 2
        require_count(self.steps_per_level, "AnnealedLangevin: steps_per_level")
        if not 0 < self.step_size < bound:
            raise ValueError(
                f"AnnealedLangevin: step_size must lie between 0 and {bound:.3g}, twice the square of the smallest "
                f"sigma, where its steps grow without bound; found {self.step_size!r}; see sde.step_size"
            )
        if self.final not in ("sample", "denoise"):
            raise ValueError(f"AnnealedLangevin: final must be 'sample' or 'denoise', found {self.final!r}")

    @property
    def steps(self) -> int:
        return self.levels.steps

    @property
    def needs_pair(self) -> bool:
        return True

    @property
    def calls_per_step(self) -> int:
        return self.steps_per_level

    def times(self, sde: SDE) -> Tensor:
        """t_max, then the times of the levels N to 1: a step starts and ends at the later of its two."""
        times = level_times(sde, self.levels)
        lowest, most = sde.log_snr_range[0], float(self.levels.log_snr(self.steps))
        if most < lowest - SLACK:
            raise ValueError(
                f"the largest of {self.levels} is more noise than {sde} has, sigma/alpha = {noise_ratio(lowest):.3g} "
                "at t_max; take smaller levels"
            )
        return _walk(sde, times)

    def with_steps(self, steps: int) -> "AnnealedLangevin":
        """Over evenly spaced levels of the same, at most as many as there are."""
        return replace(self, levels=self.levels.respaced(steps))

    def plan(self, path: Path) -> tuple[()]:
        return ()

    def step(self, x: Tensor, step: Step, carry: None) -> tuple[Tensor, None]:
        """All Langevin steps at level k = L - ``step.index``."""
        k, alpha = self.steps - step.index, step.alpha_s
        # x_T is noise of the size of t_max, and becomes noise of the first level's; then y stays what it was.
        to_level = alpha / step.alpha_t if step.index else _ratio(step)
        x, size = to_level * x, alpha.square() * self.levels.langevin_step(k, self.step_size, x)
        for _ in range(self.steps_per_level):
            x = x + size * step.model.score(x, step.s) + (2 * size).sqrt() * step.fresh(x)
        return x, None


def _walk(sde: SDE, times: Tensor, *end: float) -> Tensor:
    """From the last time of ``sde`` down the increasing ``times``, to the ``end``."""
    first, last = (times.new_tensor(part) for part in ([last_time(sde)], end))
    return torch.cat((first, times.flip(0), last))


def _scale(chain: GaussianChain, k: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the model's state at ``alpha`` and ``sigma`` is times the chain's at level k."""
    # At one log-SNR any ratio of the two would do. The chain's end is x_0 without noise, and its beginning may be
    # clamped to t_max, where states of noise alone are matched.
    return alpha if k == 0 else torch.hypot(alpha, sigma) / torch.hypot(chain.alpha(k, alpha), chain.sigma(k, alpha))


def _ratio(step: Step) -> Tensor:
    return torch.hypot(step.alpha_s, step.sigma_s) / torch.hypot(step.alpha_t, step.sigma_t)
