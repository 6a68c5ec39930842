"""What simple models reach in bits per dimension on discrete images: a number means little without them.

Two kinds. Densities of the dequantized data (Gaussian, mixture) bound the discrete likelihood as the score model does;
a smooth density pays dearly for flat bins and for pixels that are always blank. Discrete models (histogram,
autoregressive) give the exact likelihood, and are the ones that are hard to beat. All choices are made on the
validation split; the test split is only evaluated.
"""

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.data import Data
from experiments.dequantization import Uniform

COPIES = 4  # dequantization draws per image, to fit and to evaluate densities
COMPONENTS = 8
REGULARISATIONS = (1e-4, 3e-4, 1e-3, 3e-3)  # added to variances, in units of (high - low)^2/4
PENALTIES = (3e-5, 1e-5, 3e-6)  # on squared weights, beside the mean nats per pixel
SMOOTHING = 0.1
MIXTURE_DIMENSIONS = 256
AUTOREGRESSIVE_WEIGHTS = 1_000_000
LogProb = Callable[[Tensor], Tensor]  # x (N, D) to nats (N,)


@dataclass(frozen=True)
class Baseline:
    """A baseline's mean test bits per dimension, its standard error over test images, and what was done."""

    bits_per_dim: float
    stderr: float
    protocol: str


def all_baselines(data: Data, dequantizer: Uniform, seed: int = 0) -> dict[str, Baseline]:
    """Every baseline that is affordable for `data`, by name; seconds on one core for 8x8 digits.

    The mixture is left out beyond 256 dimensions, the autoregressive model beyond a million weights: for such data
    they are models to be trained, not baselines. Raises ValueError when the levels of data and dequantizer differ.
    """
    if data.levels != dequantizer.levels:
        raise ValueError(f"dequantizer: expected the data's levels, {data.levels}, found {dequantizer.levels}.")
    dimensions = math.prod(data.shape)
    found = {"uniform": Baseline(math.log2(data.levels), 0.0, "log2 of the number of levels")}
    found["full_covariance_gaussian"] = full_covariance_gaussian(data, dequantizer, seed)
    if dimensions <= MIXTURE_DIMENSIONS:
        found["gaussian_mixture"] = gaussian_mixture(data, dequantizer, seed)
    found["pixel_histogram"] = pixel_histogram(data)
    if 2 * dimensions**2 * data.levels <= AUTOREGRESSIVE_WEIGHTS:
        found["linear_autoregressive"] = linear_autoregressive(data)
    return found


def full_covariance_gaussian(data: Data, dequantizer: Uniform, seed: int = 0) -> Baseline:
    """One Gaussian with the exact mean and covariance of the dequantized training data; a bound, as any density.

    The covariance of uniform noise, w^2/12 on the diagonal, keeps it regular where pixels are always blank.
    """
    width = dequantizer.bin_width
    centres = dequantizer.low + width * (data.train.flatten(1).double() + 0.5)
    covariance = centres.T.cov(correction=0) + width**2 / 12 * torch.eye(centres.shape[1], dtype=torch.float64)
    model = torch.distributions.MultivariateNormal(centres.mean(dim=0), covariance)
    bits = _density_bits(model.log_prob, data.test, dequantizer, seed)
    return _baseline(bits, "moments of the dequantized training data; dequantization bound")


def gaussian_mixture(data: Data, dequantizer: Uniform, seed: int = 0) -> Baseline:
    """Eight Gaussians with full covariances, fitted by EM to dequantized training data; a bound, as any density."""
    x = _dequantized(data.train, dequantizer, seed).numpy()
    unit = (dequantizer.high - dequantizer.low) ** 2 / 4
    models = [_fit_mixture(x, unit * regularisation, seed) for regularisation in REGULARISATIONS]
    scores = [_density_bits(model, data.validation, dequantizer, seed).mean() for model in models]
    best = min(range(len(models)), key=scores.__getitem__)
    bits = _density_bits(models[best], data.test, dequantizer, seed + 1)
    how = f"{COMPONENTS} full covariances, +{REGULARISATIONS[best]:g} on variances chosen on validation"
    return _baseline(bits, f"{how}; dequantization bound")


def pixel_histogram(data: Data, smoothing: float = SMOOTHING) -> Baseline:
    """Independent pixels, a histogram of the levels each; exact. The bits of `histogram_log_marginals`."""
    table = histogram_log_marginals(data.train, data.levels, smoothing).flatten(1).double()
    index = data.test.flatten(1).long()
    bits = -table[index, torch.arange(table.shape[1])].mean(dim=1) / math.log(2.0)
    return _baseline(bits, f"independent pixels, +{smoothing:g} on each count; exact discrete likelihood")


def histogram_log_marginals(train: Tensor, levels: int, smoothing: float = SMOOTHING) -> Tensor:
    """Log-probability (nats, float32) of each level in each pixel: (levels, *shape), for training levels (N, *shape).

    `smoothing` is added to every count (additive smoothing), so that a level that was never seen keeps a finite value;
    it is measured in images. Raises ValueError for smoothing that is not positive, and for anything but such levels.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing: expected a positive number, found {smoothing}; 0 gives infinite bits.")
    _check_levels(train, levels)
    counts = sum(_counts(part.flatten(1).long(), levels) for part in train.split(4096)).double() + smoothing
    return (counts / counts.sum(dim=0)).log().float().view(levels, *train.shape[1:])


def linear_autoregressive(data: Data) -> Baseline:
    """Softmax regression of each pixel on the pixels before it in raster order; exact.

    Each earlier pixel enters as its value and as whether it is blank. Fitted by L-BFGS along a path of falling ridge
    penalties; the validation split picks the point of the path.
    """
    marginals = histogram_log_marginals(data.train, data.levels).flatten(1)
    model = LinearAutoregressive(marginals.to(data.train.device))
    penalty = _fit_path(model, data)
    with torch.no_grad():
        bits = model.bits_per_dim(data.test)
    return _baseline(
        bits, f"linear in earlier pixels, ridge {penalty:g} chosen on validation; exact discrete likelihood"
    )


class LinearAutoregressive(nn.Module):
    """P(k) = prod_i softmax(b_i + W_i features(k_1..k_(i-1)))[k_i], one masked linear layer.

    log_marginals: (K, D), where the biases b start; the weights start at zero.
    """

    def __init__(self, log_marginals: Tensor) -> None:
        super().__init__()
        self.levels, pixels = log_marginals.shape
        self.bias = nn.Parameter(log_marginals.T.contiguous())
        self.weight = nn.Parameter(log_marginals.new_zeros(2 * pixels, pixels * self.levels))
        earlier = log_marginals.new_ones(pixels, pixels).triu(diagonal=1)
        self.register_buffer("mask", earlier.repeat(2, 1).repeat_interleave(self.levels, dim=1))

    def forward(self, k: Tensor) -> Tensor:
        """Levels (N, D) to logits (N, D, K); those of pixel i depend on pixels before i alone."""
        features = torch.cat([k / (self.levels - 1), (k == 0).float()], dim=1)
        return (features @ (self.weight * self.mask)).unflatten(1, self.bias.shape) + self.bias

    def bits_per_dim(self, k: Tensor) -> Tensor:
        """Levels (N, ...) to exact bits per dimension (N,)."""
        k = k.flatten(1).long()
        nats = cross_entropy(self(k).flatten(0, 1), k.flatten(), reduction="none")
        return nats.view(k.shape).mean(dim=1) / math.log(2.0)


def _fit_path(model: LinearAutoregressive, data: Data, stages: int = 3, iterations: int = 20) -> float:
    """Fits in place, keeps the state that is best on validation, and returns its penalty."""
    best = (math.inf, {}, 0.0)
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")
        for _ in range(stages):
            optimizer.step(lambda: _loss(model, data.train, penalty))  # noqa: B023 - called at once
            with torch.no_grad():
                value = model.bits_per_dim(data.validation).mean().item()
            if value < best[0]:
                best = (value, deepcopy(model.state_dict()), penalty)
    model.load_state_dict(best[1])
    return best[2]


def _loss(model: LinearAutoregressive, train: Tensor, penalty: float) -> Tensor:
    model.zero_grad()
    nats = model.bits_per_dim(train).mean() * math.log(2.0)
    loss = nats + penalty * (model.weight * model.mask).square().sum()
    loss.backward()
    return loss


def _check_levels(train: Tensor, levels: int) -> None:
    if train.numel() == 0 or train.is_floating_point():
        found = f"{train.dtype} of shape {tuple(train.shape)}"
        raise ValueError(f"train: expected at least one example of integer levels, found {found}; pass data.train.")
    lowest, highest = (int(value) for value in train.aminmax())  # Python numbers: 256 wraps around in uint8
    if lowest < 0 or highest >= levels:
        raise ValueError(f"train: expected levels 0..{levels - 1}, found {lowest}..{highest}; check `levels`.")


def _counts(k: Tensor, levels: int) -> Tensor:
    """(N, D) levels to (levels, D) counts."""
    pixels = k.shape[1]
    flat = k * pixels + torch.arange(pixels, device=k.device)
    return torch.bincount(flat.flatten(), minlength=levels * pixels).view(levels, pixels)


def _fit_mixture(x: np.ndarray, regularisation: float, seed: int) -> LogProb:
    """The log-density of a mixture fitted to x (N, D)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(min(COMPONENTS, len(x)), reg_covar=regularisation, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # validation judges the fit, converged or not
        model.fit(x)
    return lambda x: torch.from_numpy(model.score_samples(x.numpy()))


def _dequantized(k: Tensor, dequantizer: Uniform, seed: int) -> Tensor:
    """COPIES draws of each of N examples, one after another: (COPIES N, D) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([dequantizer.dequantize(k, generator) for _ in range(COPIES)]).flatten(1).double()


def _density_bits(log_prob: Callable[[Tensor], Tensor], k: Tensor, dequantizer: Uniform, seed: int) -> Tensor:
    """Bits per dimension (N,) of levels (N, ...) under a density, the mean over dequantization draws."""
    x = _dequantized(k, dequantizer, seed)
    return dequantizer.bits_per_dim(log_prob(x), x.shape[1]).view(COPIES, -1).mean(dim=0)


def _baseline(bits: Tensor, protocol: str) -> Baseline:
    bits = bits.double()
    return Baseline(bits.mean().item(), (bits.std() / len(bits) ** 0.5).item(), f"{protocol}; {len(bits)} test images")
