"""How far samples are from data: a sliced distance, copies, and a classifier's confidence.

No single number tells a good model from a broken or a copying one. The sliced distance catches broken samplers, the
distance to the nearest training image catches copies, and a classifier's confidence catches images that are neither.
Each is reported beside the value that real held-out data have.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Floor(NamedTuple):
    """A measure of real data against real data: mean and standard deviation over independent draws."""

    mean: float
    std: float


def sliced_w2(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of two sets, (N, ...) and (M, ...), in units of x.

    The square root of the mean, over random directions theta on the unit sphere, of the squared Wasserstein-2 distance
    between the projections of both sets on theta (Bonneel et al. 2015): for a shift by v in D dimensions that is
    |v|/sqrt(D). Exact for N != M too, on the common grid of both quantile functions. One `seed` gives the same
    directions on every call. Raises ValueError for different shapes, empty sets and numbers that are not finite.
    """
    a, b = rows("a", a), rows("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected as many dimensions in both, found {a.shape[1]} and {b.shape[1]}.")
    theta = directions(a.shape[1], projections, seed)
    return _distance(_quantiles(a, theta), _quantiles(b, theta))


def nearest_distance(queries: Tensor, references: Tensor, chunk: int = 256) -> Tensor:
    """The L2 distance of each query (N, ...) to the nearest reference (M, ...): (N,) float64, in their own units.

    The nearest is found with the fast inner-product form; its distance is then computed without cancellation, so that
    an exact copy has distance 0.
    """
    queries, references = rows("queries", queries), rows("references", references)
    # One contiguous float32 copy for the search; |q|^2 is the same for every reference and left out.
    fast, squares = references.float(), references.square().sum(dim=1).float()
    parts = [(squares - 2 * part.float() @ fast.T).argmin(dim=1) for part in queries.split(chunk)]
    return (queries - references[torch.cat(parts)]).norm(dim=1)


def copy_report(samples: Tensor, train: Tensor, test: Tensor) -> dict[str, float]:
    """Are the samples (N, ...) copies of the training data (M, ...)? Real data in `test` set the scale.

    Returns the median and the minimum distance to the nearest training example, of samples and of test examples, and
    `closer_than_test`: the fraction of samples nearer to the training data than every test example. A model that has
    learned, and not memorised, has about 0 there (1/(number of test examples + 1) in expectation for real data).
    """
    ours, real = nearest_distance(samples, train), nearest_distance(test, train)
    return {
        "samples_median": ours.median().item(),
        "samples_min": ours.min().item(),
        "test_median": real.median().item(),
        "test_min": real.min().item(),
        "closer_than_test": (ours < real.min()).double().mean().item(),
    }


def classifier_confidence(
    train: Tensor, labels: Tensor, samples: Tensor, test: Tensor, test_labels: Tensor, limit: int = 5000
) -> dict[str, float]:
    """Mean largest class probability of samples and of real test examples, under a logistic regression on `train`.

    train, samples, test: (N, ...) in one common unit; labels, test_labels: (N,). At most `limit` training examples,
    evenly spaced, are used. Returns "samples" and "test" (mean probabilities) and "accuracy" (on the test examples).
    """
    from sklearn.linear_model import LogisticRegression

    train, samples, test = (rows(*pair) for pair in (("train", train), ("samples", samples), ("test", test)))
    few = torch.linspace(0, len(train) - 1, min(limit, len(train))).round().long()
    scale = train.abs().max().clamp_min(torch.finfo(train.dtype).tiny)
    model = LogisticRegression(max_iter=10_000).fit((train[few] / scale).numpy(), labels.cpu()[few].numpy())
    ours, real = (torch.from_numpy(model.predict_proba((x / scale).numpy())) for x in (samples, test))
    hits = torch.from_numpy(model.classes_)[real.argmax(dim=1)] == test_labels.cpu()
    confidence = {name: p.max(dim=1).values.mean().item() for name, p in (("samples", ours), ("test", real))}
    return confidence | {"accuracy": hits.double().mean().item()}


def auroc(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Area under the ROC curve of scores, (M,) that should be high and (N,) that should be low, and its standard error.

    The share of pairs in the right order, ties by half. The error is DeLong, DeLong and Clarke-Pearson's (1988), from
    the spread over either set of an example's own share. Raises ValueError for fewer than two scores on a side.
    """
    high, low = (torch.as_tensor(scores).detach().cpu().double() for scores in (positive, negative))
    for name, scores in (("positive", high), ("negative", low)):
        if scores.dim() != 1 or len(scores) < 2 or not scores.isfinite().all():
            raise ValueError(f"{name}: expected at least 2 finite scores (N,), found shape {tuple(scores.shape)}.")
    of_high, of_low = _share_below(high, low), 1 - _share_below(low, high)
    variance = of_high.var() / len(high) + of_low.var() / len(low)
    return of_high.mean().item(), variance.sqrt().item()


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of ``others`` (N,), how many lie below each of the scores (M,), ties counted half; as a fraction, (M,)."""
    ordered = others.sort().values
    both = torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)
    return both.double() / (2 * len(others))


def rows(name: str, x: Tensor) -> Tensor:
    """(N, ...) to float64 (N, D) on the CPU."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected at least one example in shape (N, ...), found {tuple(x.shape)}.")
    rows = x.detach().cpu().double().flatten(1)
    if not rows.isfinite().all():
        bad = int((~rows.isfinite()).any(dim=1).sum())
        raise ValueError(f"{name}: expected finite numbers, found {bad} of {len(rows)} examples with NaN or infinity.")
    return rows


def directions(dimensions: int, projections: int, seed: int) -> Tensor:
    if projections < 1:
        raise ValueError(f"projections: expected at least 1, found {projections}.")
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(dimensions, projections, generator=generator, dtype=torch.float64)
    return theta / theta.norm(dim=0)


def _quantiles(x: Tensor, theta: Tensor) -> Tensor:
    """(N, D) to the quantile functions (N, P) of its projections: N steps of equal length each."""
    return (x @ theta).sort(dim=0).values


def _distance(a: Tensor, b: Tensor) -> float:
    """Root of the mean over projections of the integral of the squared difference of two quantile functions."""
    length, i, j = common_grid(len(a), len(b))
    return (length @ (a[i] - b[j]).square()).mean().sqrt().item()


def common_grid(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts [0, 1] where either of two quantile functions, of n and m equal steps, jumps.

    Returns each piece's length and the index of its step in both. In units of 1/(n m), so that no cut is rounded.
    """
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))
    return lengths.double() / (n * m), (ends - 1) // m, (ends - 1) // n
