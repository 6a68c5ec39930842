r"""What the two ends of time cost: noise left at t_min, and a prior that is not the distribution at t_max.

Neither is an error of a solver, and none removes it. Both are closed forms of the process and the data's moments:

    prior:       E KL(q(x_T | x_0) || prior) / D, an upper bound of KL(p_T || prior) / D; the term L_T of the
                 variational bound (Ho et al., 2020, eq. 5; Kingma et al., 2021, eq. 15).
    truncation:  KL(U(0, 1) || U(0, 1) + s N(0, 1)), s = sigma / alpha at t_min in units of a bin: what noise that is
                 left at t_min costs a discretized value that is certain but for its place in the bin.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from sde.base import GaussianSDE

PRIOR_BOUND = 1e-3
"""Nats per dimension of prior mismatch from which on a diagnosis warns."""
TRUNCATION_BOUND = 0.02
"""Bits per dimension of truncation, likewise."""


class DiagnosisWarning(UserWarning):
    """An end of time costs more likelihood than it need."""


@dataclass(frozen=True)
class Diagnosis:
    """What the ends of time cost, per dimension; nats unless the name says bits.

    prior_kl: E over the data of KL(q(x_T | x_0) || prior). prior_kl_matched: KL of the Gaussian with the means and
    variances of p_T, dimension by dimension, from the prior. truncation_bits, truncation_nats: the most that the noise
    left at t_min can cost discretized data; None without a bin width. log_snr: lowest, at t_max, and highest, at t_min.
    warnings: what to change, in sentences.
    """

    sde: str
    prior_kl: float
    prior_kl_matched: float
    truncation_bits: float | None
    truncation_nats: float | None
    log_snr: tuple[float, float]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        low, high = self.log_snr
        bits = "unknown without bin_width" if self.truncation_bits is None else f"{self.truncation_bits:.3g} bits/dim"
        lines = [
            self.sde,
            f"  log-SNR           {high:.4g} at t_min, {low:.4g} at t_max",
            f"  prior mismatch    {self.prior_kl:.3g} nats/dim ({self.prior_kl_matched:.3g} with the data's moments)",
            f"  noise at t_min    {bits}",
        ]
        return "\n".join(lines + [f"  warning: {sentence}" for sentence in self.warnings])


def diagnose(sde: GaussianSDE, data: Tensor, bin_width: float | None = None, quiet: bool = False) -> Diagnosis:
    """What the ends of time of ``sde`` cost ``data`` of shape ``(N, ...)``, in units of x.

    Parameters
    ----------
    bin_width: the width of one level of discretized data, in units of x; None for continuous data.
    quiet: leave it at ``Diagnosis.warnings``; otherwise each of them is issued as a ``DiagnosisWarning`` too.

    Raises ``TypeError`` for a process without a Gaussian kernel, ``ValueError`` for data or a width that can't be used.

    >>> from sde import VP
    >>> diagnose(VP(), torch.tensor([[1.0], [-1.0]])).prior_kl
    2.159...e-05
    """
    _check(sde, data, bin_width)
    mean, second = _moments(data)
    length, zero = second.sqrt(), torch.zeros_like(second)
    kl, matched = prior_mismatch(sde, length, zero), prior_mismatch(sde, mean, (second - mean.square()).clamp(min=0))
    bits = None if bin_width is None else truncation(sde, bin_width)
    found = []
    if bits is not None and bits > TRUNCATION_BOUND:
        says = f"the noise left at t_min can cost {bits:.3g} bits/dim, more than {TRUNCATION_BOUND:g}"
        found.append(says + _cure(sde, 0, lambda other: truncation(other, bin_width) <= TRUNCATION_BOUND))
    if kl > PRIOR_BOUND:
        says = f"the prior is {kl:.3g} nats/dim away from the noised data at t_max, more than {PRIOR_BOUND:g}"
        found.append(says + _cure(sde, 1, lambda other: prior_mismatch(other, length, zero) <= PRIOR_BOUND))
    for sentence in found * (not quiet):
        warnings.warn(sentence, DiagnosisWarning, stacklevel=2)
    nats = None if bits is None else bits * math.log(2)
    return Diagnosis(str(sde), kl, matched, bits, nats, sde.log_snr_range, tuple(found))


def prior_mismatch(sde: GaussianSDE, mean: Tensor, variance: Tensor) -> float:
    """KL(N(alpha mean, alpha^2 variance + sigma^2) || prior) at t_max, nats, averaged over dimensions.

    With x_0 as the mean and no variance it is KL(q(x_T | x_0) || prior).
    """
    t = torch.tensor(sde.t_max, dtype=torch.float64)
    alpha, sigma = sde.alpha(t).detach(), sde.sigma(t).detach()
    ratio = (alpha.square() * variance + sigma.square()) / sde.prior_std**2
    return (0.5 * ((alpha * mean / sde.prior_std).square() + ratio - 1 - ratio.log())).mean().item()


def truncation(sde: GaussianSDE, bin_width: float) -> float:
    """Bits/dim that the noise left at t_min costs a value that is certain but for its place in the bin.

    With s the noise in units of the bin, KL(U(0, 1) || U(0, 1) + s N(0, 1)): the most that a perfect score can lose.
    """
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    s = (sde.sigma(t) / sde.alpha(t)).item() / bin_width
    # Midpoints that crowd at the edges, where the loss is: u = 3 v^2 - 2 v^3 of uniform v.
    v = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    u, weight = v * v * (3 - 2 * v), 6 * v * (1 - v)
    density = torch.special.ndtr((1 - u) / s) - torch.special.ndtr(-u / s)
    return abs((weight * density.log2()).mean().item())


def _check(sde: GaussianSDE, data: Tensor, bin_width: float | None):
    if not isinstance(sde, GaussianSDE):
        raise TypeError(f"diagnose: expected a GaussianSDE such as VP(), found {type(sde).__name__}")
    if not isinstance(data, Tensor) or data.dim() == 0 or data.numel() == 0:
        found = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"diagnose: data must be a tensor (N, ...) with N >= 1, found {found}; give the data in x")
    if not bool(torch.isfinite(data).all()):
        bad = int((~torch.isfinite(data)).sum())
        raise ValueError(
            f"diagnose: data must be finite, found {bad} values of {data.numel()} that are not; clean them"
        )
    if bin_width is not None and not 0 < bin_width < math.inf:
        raise ValueError(f"diagnose: bin_width must be positive, or None for continuous data, found {bin_width!r}")


def _moments(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and second moment of each dimension, ``(D,)``, float64."""
    x = (data if data.is_floating_point() else data.float()).detach().reshape(len(data), -1)
    variance, mean = (m.double().cpu() for m in torch.var_mean(x, 0, correction=0))
    return mean, variance + mean.square()


def _cure(sde: GaussianSDE, end: int, suffices: Callable[[GaussianSDE], bool]) -> str:
    """The process's own cure for that end of time and, where its parameter is a number, a value that suffices."""
    cure = sde.cures[end]
    verb, name = cure.split()[:2]
    if not is_dataclass(sde) or name not in {f.name for f in fields(sde)}:
        return f"; {cure}"
    value = getattr(sde, name)
    for tenths in range(1, 121):
        tried = float(f"{value * 10 ** (tenths / 10 if verb == 'raise' else -tenths / 10):.2g}")
        try:
            if suffices(replace(sde, **{name: tried})):
                return f"; {cure}: {name}={tried:g} would do"
        except ValueError:  # beyond what the process takes
            break
    return f"; {cure}"
