"""The flow's log-likelihood and the variational bounds of the same model, in one table and in the right order.

For an exact score all of them speak of one density, that of the data, and

    discrete ELBO of a chain  <=  continuous ELBO  <=  log p(x)

in the mean, the first gap falling as 1/N (``solvers.bound``), the second that of the ends alone
(``solvers.continuous_bound``). A learned score has two densities, that of the probability-flow ODE and that of the
reverse SDE, which the bounds are on. They are different distributions, and a bound may lie above the flow's number; the
chains' still tend to the continuous one. In bits/dim every sign and the order are reversed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.report import table
from sde import DDPMChain, GaussianChain, ScoreModel, log_snr_betas
from solvers import Bound, Decoder, GaussianReference, LogSNRDensity, continuous_elbo, elbo

CAPTION = (
    "ELBOs bound the density of the reverse SDE, the ODE's number is the density of its flow: for a learned score they "
    "are\ntwo, and the order is guaranteed only for an exact one. ± is one standard error over the examples."
)


@dataclass(frozen=True)
class Row:
    """One estimate in the table's unit; ``gap`` and its error are to the ODE's number, None where there is none."""

    name: str
    value: float
    stderr: float
    nfe: int | None
    gap: float | None = None
    gap_stderr: float | None = None


@dataclass(frozen=True)
class Bounds:
    """The rows of one data set. ``unit``: "nats" or "bits/dim"."""

    rows: tuple[Row, ...]
    unit: str
    samples: int

    def text(self) -> str:
        """The table and what it says."""
        title = f"Bounds of the log-likelihood of {self.samples} examples, {self.unit}"
        cells = [
            (
                row.name,
                f"{row.value:.4f} ± {row.stderr:.4f}",
                "" if row.gap is None else f"{row.gap:+.4f} ± {row.gap_stderr:.4f}",
                "" if row.nfe is None else str(row.nfe),
            )
            for row in self.rows
        ]
        return f"{title}\n{table(('estimate', self.unit, 'minus ODE', 'NFE'), cells)}\n{CAPTION}"


def bounds_table(
    model: ScoreModel,
    x0: Tensor,
    flow: tuple[float, float] | None = None,
    chain_steps: Iterable[int] = (100, 1000),
    *,
    chains: Iterable[GaussianChain] = (),
    flow_log_prob: Tensor | None = None,
    flow_nfe: int | None = None,
    decoder: Decoder | None = None,
    bin_width: float | None = None,
    points: int = 64,
    draws: int = 1,
    density: LogSNRDensity | None = None,
    variance: str | float = "beta",
    seed: int = 0,
    batch_size: int = 500,
) -> Bounds:
    """The continuous bound and those of chains, beside the flow's likelihood.

    Parameters
    ----------
    x0: clean data ``(B, ...)``, B > 1: of a density, such as uniformly dequantized data; for a ``decoder`` bin centres.
    flow: value and standard error of the ODE, in the unit of the table; or
    flow_log_prob: log-density of each sample of this ``x0`` along the ODE, nats, ``(B,)``: then the errors of the gaps
        are those of the differences, which are smaller.
    chain_steps: N of chains whose levels are evenly spaced in log-SNR over the process's own range, so that they differ
        from the continuous bound by their steps alone. chains: more chains, such as ``DDPMChain()``.
    bin_width: of uniformly dequantized data: in bits/dim; a ``decoder`` is too; nats otherwise.
    decoder: of bin centres; chains need a ``DiscretizedGaussian``, the continuous bound takes any.
    points, draws, density: as for ``continuous_elbo``. variance: as for ``elbo``; a chain draws each level once.
    """
    _check(x0, flow, flow_log_prob, decoder, bin_width)
    reference = None if decoder is not None else GaussianReference.of(x0)
    shared = {"decoder": decoder, "seed": seed, "reference": reference}
    continuous = _whole(x0, batch_size, continuous_elbo, model, points=points, draws=draws, density=density, **shared)
    bounds = {"continuous ELBO": continuous}
    own = {f"discrete ELBO, N={n}": DDPMChain(log_snr_betas(model.sde, n)) for n in chain_steps}
    for name, chain in (own | {f"discrete ELBO, {chain}": chain for chain in chains}).items():
        bounds[name] = _whole(x0, batch_size, elbo, model, chain=chain, variance=variance, **shared)
    unit = "nats" if decoder is None and bin_width is None else "bits/dim"
    head = _flow_row(bounds["continuous ELBO"], flow, flow_log_prob, flow_nfe, bin_width)
    bits = unit != "nats"
    rows = [_against(_row(name, bound, bin_width), bound, head, flow_log_prob, bits) for name, bound in bounds.items()]
    return Bounds((*([] if head is None else [head]), *rows), unit, len(x0))


def _check(x0: Tensor, flow, flow_log_prob: Tensor | None, decoder, bin_width: float | None) -> None:
    if len(x0) < 2:
        raise ValueError(f"bounds_table: a standard error needs at least 2 samples, found {len(x0)}")
    if flow is not None and flow_log_prob is not None:
        raise ValueError("bounds_table: give either flow, (value, stderr), or flow_log_prob of each sample, not both")
    if flow_log_prob is not None and flow_log_prob.shape != (len(x0),):
        found = tuple(flow_log_prob.shape)
        raise ValueError(f"bounds_table: flow_log_prob must have the shape ({len(x0)},) of x0's samples, found {found}")
    if decoder is not None and (bin_width is not None or flow_log_prob is not None):
        raise ValueError(
            "bounds_table: a decoder bounds the probability of bin centres, which has no bin_width and no log-density "
            "along the flow; leave out decoder for dequantized data, or give flow=(bits/dim, stderr)"
        )


def _whole(x0: Tensor, batch_size: int, bound, model: ScoreModel, **options) -> Bound:
    """A bound of all samples; the log_prob, and the calls for one batch."""
    # Sample i's noise is its own in any batch.
    parts = [bound(model, part, first=batch_size * i, **options) for i, part in enumerate(x0.split(batch_size))]
    return replace(parts[0], log_prob=torch.cat([part.log_prob for part in parts]).cpu())


def _row(name: str, bound: Bound, bin_width: float | None) -> Row:
    bits = bound.discrete or bin_width is not None
    value, stderr = bound.bits_per_dim(bin_width) if bits else bound.mean()
    return Row(name, value, stderr, bound.nfe)


def _flow_row(like: Bound, flow, flow_log_prob: Tensor | None, nfe: int | None, bin_width: float | None) -> Row | None:
    """The ODE's row, if it is known; in the unit of ``like``."""
    if flow is not None:
        return Row("ODE, density of the flow", *flow, nfe)
    if flow_log_prob is None:
        return None
    row = _row("ODE, density of the flow", replace(like, log_prob=flow_log_prob.cpu()), bin_width)
    return replace(row, nfe=nfe)


def _against(row: Row, bound: Bound, head: Row | None, flow_log_prob: Tensor | None, bits: bool) -> Row:
    """The row with its gap to the ODE's."""
    if head is None:
        return row
    error = math.hypot(row.stderr, head.stderr)
    if flow_log_prob is not None:
        differences = bound.log_prob.double() - flow_log_prob.cpu().double()
        error = float(differences.std()) / math.sqrt(len(differences)) / (bound.dimensions * math.log(2) if bits else 1)
    return replace(row, gap=row.value - head.value, gap_stderr=error)
