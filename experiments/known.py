"""Where the density of the data is known: its exact score as a model, and what samples are against it.

For a Gaussian mixture p all is closed form. Two numbers, neither of which needs held-out data:

    NLL gap      E_samples[-log p(x)] - E_p[-log p(x)], in nats: the cross entropy of the samples less the entropy of p.
                 It is 0 for samples of p, positive where they lie too far out, and negative where they crowd too close
                 to the modes: noise that is left counts on one side, noise that is missing on the other.
    flow RMSE    the root mean square, per dimension, of the distance between a sample and where the exact
                 probability-flow ODE carries the same noise. Only solvers without noise of their own have one. With
                 the exact score it is the error of the solver alone.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.build import ConfigError
from experiments.dataset import Data
from experiments.quality import Column, Measured
from models import GaussianMixture
from sde import GaussianSDE
from solvers import ProbabilityFlow, Solver

NLL_GAP = Column("nll_gap", "NLL gap (nats)", "zero")
FLOW_RMSE = Column("flow_rmse", "RMSE to exact flow")
_ENTROPY_OF = 200_000  # draws that the entropy is the mean of
_FLOW = ProbabilityFlow(rtol=1e-7, atol=1e-7)


def exact_score(data: Data, sde: GaussianSDE) -> GaussianMixture:
    """The exact score of data whose density is known, in place of a network's (``net=exact``).

    Raises ``ConfigError`` for other data.
    """
    if data.density is None:
        raise ConfigError(f"net=exact needs data of known density; that of {data.name} is not: use data=mixture2d")
    return GaussianMixture(**{name: value.float() for name, value in data.density.items()}, sde=sde).eval()


def is_exact(config: DictConfig) -> bool:
    """Whether the exact score is asked for, which needs no checkpoint and can't be trained."""
    return config.net._target_ == f"{exact_score.__module__}.{exact_score.__name__}"


class Known:
    """The yardsticks of a known density (``Data.density``), under the process that samples are drawn by."""

    columns = (NLL_GAP, FLOW_RMSE)

    def __init__(self, density: dict[str, Tensor], sde: GaussianSDE, shape: tuple[int, ...], seed: int):
        self.exact = GaussianMixture(**density, sde=sde)
        self.shape, self.seed, self._ends = shape, seed, {}

    @cached_property
    def _entropy(self) -> Tensor:
        """-log p of many draws of p, (N,)."""
        return -self.exact.log_prob(self.exact.sample(_ENTROPY_OF, self.seed))

    def nll_gap(self, sets: Sequence[Tensor]) -> Measured:
        """Of sets of samples (N, ...), one per seed: the standard error holds that of the entropy."""
        values = -self.exact.log_prob(torch.cat([x.double() for x in sets]))
        variance = values.var() / len(values) + self._entropy.var() / len(self._entropy)
        return Measured((values.mean() - self._entropy.mean()).item(), variance.sqrt().item(), len(values) - 1)

    def flow_rmse(self, sets: Sequence[Tensor]) -> Measured:
        """Of sets of samples (N, ...) by a solver without noise, from the noise of one seed after the other."""
        errors = [x.double() - self._end(i, len(x)) for i, x in enumerate(sets)]
        squares = torch.cat([error.square().flatten(1).mean(1) for error in errors])
        mean = squares.mean()
        # The root's error by the delta method: d sqrt(m) = dm / (2 sqrt(m)).
        stderr = squares.std() / len(squares) ** 0.5 / (2 * mean.sqrt()).clamp_min(1e-300)
        return Measured(mean.sqrt().item(), stderr.item(), len(squares) - 1)

    def measure(self, solver: Solver, sets: Sequence[Tensor]) -> dict[str, Measured]:
        """All that there is of a solver's samples, by the names of the columns."""
        found = {NLL_GAP.name: self.nll_gap(sets)}
        return found if solver.stochastic else found | {FLOW_RMSE.name: self.flow_rmse(sets)}

    def _end(self, i: int, n: int) -> Tensor:
        """Where the exact flow carries the noise of the i-th seed; float64."""
        if (i, n) not in self._ends:
            noise = self.exact.sde.prior((n, *self.shape)).sample(self.seed + i, dtype=torch.float32)
            self._ends[i, n] = _FLOW(self.exact, x_T=noise.double()).x
        return self._ends[i, n]
