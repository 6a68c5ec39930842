r"""The reverse-time SDE with step sizes of its own for every sample (Jolicoeur-Martineau et al., 2021, algorithm 1).

("Gotta go fast when generating data with score-based models".) With a(x, t) = f - g^2 score, towards the data, and the
increment W of the Brownian motion over a step h from t to s = t - h,

    x'  = x - h a(x, t) + g(t) W                    (Euler-Maruyama)
    x~  = x - h a(x', s) + g(s) W
    x'' = (x' + x~) / 2                             (stochastic improved Euler; Roberts, 2012)
    E   = rms((x' - x'') / delta),      delta = max(atol, rtol max(|x'|, |x'_before|))

over the values of one sample. For E <= 1 the step is accepted with x'', which for this noise, the same for every x, has
weak order 2; and h <- 0.9 h E^(-0.9), at most 2 h: an error that is small by accident would else lead to a step that
is accepted by another. x'_before is the x' of the last accepted step.

The noise of a refused step is kept. Whether a step passes depends on its W: with a new draw after each refusal those
would be favoured that undo the drift, and the samples far too wide (for N(0, 0.25) twice the variance and more, the
smaller the tolerance the worse). So all W are of one path, and a shorter step takes its part of what a refused one has
seen by the Brownian bridge (``solvers.brownian``). No step goes beyond the end of a stretch that was seen. Path, steps
and result of a sample depend on no other.

Samples that have arrived wait for the rest of the batch; to know of them, the solver looks at the device once in each
iteration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde import Noise, ScoreField
from sde.base import expand, last_time, require_count
from solvers.base import SamplingDiverged, Solver
from solvers.brownian import BrownianPaths
from solvers.sampler import FINALS

_SAFETY, _EXPONENT, _FIRST = 0.9, 0.9, 0.01
_SLOWEST, _FASTEST = 0.1, 2.0
_FLOOR, _SAME = 1e-10, 1e-13
"""The narrowest step, and what two times may differ by through rounding, in units of t_max - t_min."""


@dataclass(frozen=True)
class AdaptiveSDE(Solver):
    """The reverse-time SDE of any process, to a tolerance that every sample meets in each of its steps.

    Parameters
    ----------
    rtol, atol: tolerances of a step, relative and in units of x. The paper takes rtol from 0.01 to 0.5, and for atol
        one level of the data (1/128 for 256 levels in [-1, 1]).
    max_steps: steps tried, passed or refused, after which ``SamplingDiverged`` is raised.
    final: "sample" - all noise is kept, for the last step may be as long as any; "mean" - the last step adds none;
        "denoise" - the posterior mean of x_0 at t_min in place of the sample, for one more call of the model.

    Two calls of the model for each step tried, of the whole batch. Raises ``SamplingDiverged`` where a step shrinks to
    nothing, as it does where the model gives values that are not finite.

    >>> AdaptiveSDE(rtol=0.01).calls is None
    True
    """

    rtol: float = 0.05
    atol: float = 0.01
    max_steps: int = 10_000
    final: str = "sample"
    compile: bool = False
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        if not (0 < self.rtol < float("inf") and 0 < self.atol < float("inf")):
            raise ValueError(f"AdaptiveSDE: rtol and atol must be positive, found {self.rtol!r} and {self.atol!r}")
        require_count(self.max_steps, "AdaptiveSDE: max_steps")
        if self.final not in FINALS:
            raise ValueError(f"AdaptiveSDE: final must be one of {', '.join(FINALS)}, found {self.final!r}")

    @property
    def needs_pair(self) -> bool:
        return self.final == "denoise"

    @property
    def calls(self) -> None:
        return None

    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        walk = _Walk(self, model, x)
        visit(0, walk.t[0].to(x), x)
        for i in range(self.max_steps):
            walk.advance(noise.normal(tuple(x.shape), i + 1, x.device, x.dtype))
            if not walk.underway():
                break
        else:
            raise walk.failed(f"not at t_min after max_steps={self.max_steps}")
        end = walk.t[0].to(x)
        x = model(walk.x, end).x0 if self.final == "denoise" else walk.x
        visit(1, end, x)
        return x


class _Walk:
    """The samples ``x`` on their way, at times ``t`` and with steps ``h`` to try next, ``(B,)`` in float64."""

    def __init__(self, solver: AdaptiveSDE, model: ScoreField, x: Tensor):
        self.solver, self.model, self.sde = solver, model, model.sde
        self.x = self.before = x
        self.width = self.sde.t_max - self.sde.t_min
        self.t = torch.full((len(x),), last_time(self.sde), dtype=torch.float64, device=x.device)
        self.h = torch.full_like(self.t, _FIRST * self.width)
        self.paths = BrownianPaths(x)

    def advance(self, z: Tensor) -> None:
        """Try a step of every sample; ``z``: standard normal noise."""
        ahead = self.t - self.sde.t_min
        h, w = self.paths.increment(torch.minimum(self.h, ahead), z)
        s = torch.where(ahead - h > _SAME * self.width, self.t - h, self.sde.t_min)
        euler, improved, added = self._both(s, w)
        error = self._error(euler, improved).nan_to_num(nan=float("inf")).double()
        passed = error <= 1
        self.paths.pass_by(passed | (ahead == 0))
        factor = (_SAFETY * error ** (-_EXPONENT)).clamp(_SLOWEST, _FASTEST)
        # A step cut short by the end of a stretch says nothing against the longer one that was wanted.
        self.h = torch.where(passed & (h < self.h), torch.maximum(self.h, factor * h), factor * h)
        if self.solver.final == "mean":
            improved = torch.where(expand(s <= self.sde.t_min, z), improved - added, improved)
        passed = passed & (ahead > 0)
        self.t = torch.where(passed, s, self.t)
        self.x, self.before = (
            torch.where(expand(passed, z), *pair) for pair in ((improved, self.x), (euler, self.before))
        )

    def _both(self, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x' and x'' at the times ``s``, and the noise in x''."""
        x, h = self.x, expand((self.t - s).to(w), w)
        g, g_s = (expand(self.sde.diffusion(time).to(w), w) for time in (self.t, s))
        slope = self.model.reverse_drift(x, self.t.to(w))
        euler = x - h * slope + g * w
        slope = 0.5 * (slope + self.model.reverse_drift(euler, s.to(w)))
        added = 0.5 * (g + g_s) * w
        return euler, x - h * slope + added, added

    def _error(self, euler: Tensor, improved: Tensor) -> Tensor:
        """E of each sample, ``(B,)``."""
        scale = (self.solver.rtol * torch.maximum(euler.abs(), self.before.abs())).clamp(min=self.solver.atol)
        return ((euler - improved) / scale).square().flatten(1).mean(1).sqrt()

    def underway(self) -> bool:
        """Whether a sample has yet to arrive: the one look at the device in a step."""
        away = self.t > self.sde.t_min
        narrowest = torch.where(away, self.h, self.width).min()
        left, deepest, narrowest = torch.stack((away.sum(), self.paths.depth.max(), narrowest)).tolist()
        if narrowest < _FLOOR * self.width:
            raise self.failed(f"a step of {narrowest:.1g}, too narrow, was refused")
        self.paths.reserve(int(deepest) + 1)
        return left > 0

    def failed(self, how: str) -> SamplingDiverged:
        """The error to raise, with the times of the samples that have not arrived."""
        away = self.t[self.t > self.sde.t_min]
        return SamplingDiverged(
            f"{self.solver}: {how}, with {len(away)} of {len(self.t)} samples still at t={float(away.min()):.4g} to "
            f"{float(away.max()):.4g}; use larger tolerances, and check that the model's values are finite"
        )
