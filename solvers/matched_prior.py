r"""The Gaussian with the moments of the noised data at t_max, in place of the prior of the SDE.

Data of mean m and covariance C have, under a Gaussian process, the mean alpha m and the covariance
alpha^2 C + sigma^2 I at t_max. With N(0, prior_std^2 I) in place of p_T the likelihood of an exact model is wrong by
log prior - log p_T, which no solver removes; with the Gaussian of these moments it is exact for Gaussian data, and
nearer for others. C is given, or estimated (by 1 / N) as

    diagonal    the variance of each dimension
    full        the covariance of the data
    low_rank    probabilistic PCA (Tipping and Bishop, 1999, eqs. 7 and 8): the ``rank`` leading eigenpairs, and the
                mean of the other eigenvalues across them; no D x D matrix

and the density evaluated in the eigenbasis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde import GaussianSDE, Noise
from sde.base import require_count

LARGEST_FULL = 4096
"""Dimensions up to which a full covariance is taken: 128 MiB, and minutes for its eigenvectors."""
LARGEST_SVD = 2048
"""Samples or dimensions, the fewer of them, up to which the leading eigenpairs are found directly."""
_MORE, _POWERS = 10, 8


@dataclass(frozen=True, eq=False)
class MatchedPrior:
    """log N(x; mean, U diag(variances) U^T + rest (I - U U^T)), in float64; moves to the device of ``x``.

    ``mean``: of the shape of a sample. ``variances``: ``(K,)``. ``axes``: U, ``(D, K)`` and orthonormal, or None for
    the coordinate axes, K = D.
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor | None = None
    rest: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Log-density in nats, ``(B,)`` in the type of ``x``, for ``x`` of shape ``(B, ...)``."""
        if x.shape[1:] != self.mean.shape:
            raise ValueError(
                f"the matched prior is one of samples of shape {tuple(self.mean.shape)}, found a batch of shape "
                f"{tuple(x.shape)}; match it to data of the shape of x"
            )
        residual, variances = (x.double() - self.mean.to(x.device)).flatten(1), self.variances.to(x.device)
        along, squares = residual, 0.0
        if self.axes is not None:
            axes = self.axes.to(x.device)
            along = residual @ axes
            squares = (residual - along @ axes.mT).square().sum(1) / self.rest
        squares = squares + (along.square() / variances).sum(1)
        others = residual.shape[1] - len(variances)
        logarithms = torch.log(2 * math.pi * variances).sum() + others * math.log(2 * math.pi * self.rest)
        return (-0.5 * (squares + logarithms)).to(x.dtype)


def matched_prior(
    data: Tensor | None = None,
    sde: GaussianSDE | None = None,
    covariance: str | Tensor = "diagonal",
    *,
    rank: int | None = None,
    mean: Tensor | None = None,
) -> MatchedPrior:
    """log p_T of data with the moments of ``data``, or with given ones: the ``prior`` of ``log_likelihood``.

    Parameters
    ----------
    data: ``(N, ...)`` with N >= 2, in units of x, clean and of the training split; or None, with ``mean`` and
        ``covariance`` as tensors.
    covariance: "diagonal", "full" or "low_rank"; without data the covariance ``(D, D)`` or the variances ``(D,)`` of
        flattened samples.
    rank: of "low_rank", at least 1 and less than N and D.
    mean: of the shape of a sample.

    Raises ``TypeError`` for a process without a Gaussian kernel, ``ValueError`` for what can't be used.

    >>> from sde import VP
    >>> matched_prior(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), VP())(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    if not isinstance(sde, GaussianSDE):
        raise TypeError(f"matched_prior: sde must be a GaussianSDE such as VP(), found {type(sde).__name__}")
    if (data is None) == (mean is None):
        found = "neither" if data is None else "both"
        raise ValueError(f"matched_prior: give either data, or mean and covariance as tensors, found {found}")
    with torch.no_grad():
        moments = _given(mean, covariance, rank) if data is None else _estimated(data, covariance, rank)
        t = torch.tensor(sde.t_max, dtype=torch.float64)
        alpha, noise = float(sde.alpha(t)), float(sde.sigma(t)) ** 2
        variances = alpha**2 * moments.variances + noise
        return MatchedPrior(alpha * moments.mean, variances, moments.axes, alpha**2 * moments.rest + noise)


def _given(mean: Tensor, covariance: Tensor, rank: int | None) -> MatchedPrior:
    if not isinstance(covariance, Tensor) or not isinstance(mean, Tensor) or rank is not None:
        found = f"mean={type(mean).__name__}, covariance={type(covariance).__name__}, rank={rank}"
        raise ValueError(
            f"matched_prior: without data, mean and covariance must be tensors and rank None, found {found}"
        )
    size, mean, covariance = mean.numel(), mean.double(), covariance.double().to(mean.device)
    if covariance.shape not in ((size,), (size, size)):
        expected = f"({size},) or ({size}, {size}) for a mean of {size} values"
        raise ValueError(f"matched_prior: covariance must have the shape {expected}, found {tuple(covariance.shape)}")
    _require_finite(mean, "mean")
    _require_finite(covariance, "covariance")
    moments = MatchedPrior(mean, covariance) if covariance.dim() == 1 else MatchedPrior(mean, *_eigen(covariance))
    smallest, largest = float(moments.variances.min()), float(moments.variances.abs().max())
    if smallest < -1e-6 * largest:
        raise ValueError(f"matched_prior: covariance must be positive semi-definite, found the variance {smallest:.3g}")
    return MatchedPrior(mean, moments.variances.clamp(min=0), moments.axes)


def _estimated(data: Tensor, covariance: str, rank: int | None) -> MatchedPrior:
    estimator = _ESTIMATORS.get(covariance) if isinstance(covariance, str) else None
    if estimator is None:
        found = repr(covariance) if isinstance(covariance, str) else f"a {type(covariance).__name__}"
        raise ValueError(f"matched_prior: of data, covariance must be one of {', '.join(_ESTIMATORS)}, found {found}")
    if (rank is None) == (estimator is _low_rank):
        raise ValueError(f"matched_prior: covariance='low_rank', and no other, takes a rank, found rank={rank}")
    if not isinstance(data, Tensor) or data.dim() < 2 or len(data) < 2 or not data.numel():
        found = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"matched_prior: data must be a tensor (N, ...) of at least two samples, found {found}")
    _require_finite(data, "data")
    centred = data.detach().double().flatten(1)
    mean = centred.mean(0)
    return estimator(mean.reshape(data.shape[1:]), centred - mean, rank)


def _require_finite(values: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"matched_prior: {name} must be finite, found {bad} of {values.numel()} values that are not; clean them"
        )


def _diagonal(mean: Tensor, centred: Tensor, rank: None) -> MatchedPrior:
    return MatchedPrior(mean, centred.square().mean(0))


def _full(mean: Tensor, centred: Tensor, rank: None) -> MatchedPrior:
    count, size = centred.shape
    if size > LARGEST_FULL:
        raise ValueError(
            f"matched_prior: a full covariance is for at most {LARGEST_FULL} dimensions, found {size}; take "
            f"covariance='low_rank' with a rank, or 'diagonal'"
        )
    variances, axes = _eigen(centred.mT @ centred / count)
    return MatchedPrior(mean, variances.clamp(min=0), axes)


def _low_rank(mean: Tensor, centred: Tensor, rank: int) -> MatchedPrior:
    require_count(rank, "matched_prior: rank")
    count, size = centred.shape
    if rank >= min(count, size):
        raise ValueError(
            f"matched_prior: rank must be less than the {count} samples and the {size} dimensions, found {rank}; "
            f"lower it, or take covariance='full'"
        )
    values, axes = (_leading if min(count, size) <= LARGEST_SVD else _leading_of_many)(centred, rank)
    variances = values.square() / count
    rest = (centred.square().sum() / count - variances.sum()) / (size - rank)
    return MatchedPrior(mean, variances, axes, max(float(rest), 0.0))


def _leading(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular values ``(K,)`` and right singular vectors ``(D, K)``."""
    triangle = torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
    _, values, rows = torch.linalg.svd(triangle, full_matrices=False)
    return values[:rank], rows[:rank].mT


def _leading_of_many(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same by subspace iteration from a fixed start (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1)."""
    width = min(rank + _MORE, *centred.shape)
    basis = Noise(0).normal((width, centred.shape[1]), 0, centred.device, centred.dtype).mT
    for _ in range(_POWERS):
        basis = torch.linalg.qr(centred.mT @ (centred @ basis)).Q
    _, values, rows = torch.linalg.svd(centred @ basis, full_matrices=False)
    return values[:rank], basis @ rows[:rank].mT


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-8 * float(covariance.abs().max())):
        raise ValueError("matched_prior: covariance must be symmetric, found one that is not; take (C + C.T) / 2")
    return torch.linalg.eigh(0.5 * (covariance + covariance.mT))


_ESTIMATORS = {"diagonal": _diagonal, "full": _full, "low_rank": _low_rank}
