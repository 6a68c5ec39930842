"""What a likelihood owes to its solver: the same data, probes and draws again, by a finer integration."""

from dataclasses import dataclass

from torch import Tensor

from sde import ScoreField, ScoreModel
from sde.base import require_count
from solvers.integration import Integration, integration
from solvers.likelihood import log_likelihood


@dataclass(frozen=True)
class SolverError:
    """Coarse less fine log-density over ``samples`` samples, nats: mean, root mean square, and the largest size.

    ``nfe``: calls of the finer pass.
    """

    mean: float
    rms: float
    largest: float
    samples: int
    nfe: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.2g} on average, {self.rms:.2g} RMS, at most {self.largest:.2g} nats ({self.samples} samples)"
        )


def solver_error(
    model: ScoreField,
    x: Tensor,
    samples: int = 32,
    method: str | Integration | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    coordinates: str = "auto",
    max_steps: int = 10_000,
    **options,
) -> SolverError:
    """The difference that ten times tighter tolerances, or twice the steps, make to the first ``samples`` of ``x``.

    All else as for ``log_likelihood``: call it with the same arguments.
    """
    require_count(samples, "solver_error: samples")
    way = integration(isinstance(model, ScoreModel), method, rtol, atol, steps, coordinates, max_steps)
    x = x[:samples]
    coarse, fine = (log_likelihood(model, x, method=one, **options) for one in (way, way.finer()))
    gap = (coarse.log_prob - fine.log_prob).double()
    rms = float(gap.square().mean().sqrt())
    return SolverError(float(gap.mean()), rms, float(gap.abs().max()), len(x), fine.nfe)
