"""What the coordinates of the probability-flow ODE cost: network calls and error of log p, on an exact score.

    python benchmarks/coordinates.py

A mixture of three correlated Gaussians in the plane, float64, dopri5, the exact density at t_max as prior; the error is
the largest over 256 samples, against the closed form at t_min.
"""

import torch

from experiments.report import table
from models import GaussianMixture
from sde import VE, VP, SubVP
from solvers import log_likelihood


def mixture(sde) -> GaussianMixture:
    """A fixed mixture with full covariances."""
    generator = torch.Generator().manual_seed(0)
    factors = 0.5 * torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.05 * torch.eye(2, dtype=torch.float64)
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.3, 0.5, 0.2]), means, covariances, sde)


def measure(sde, tolerance: float, coordinates: str) -> tuple[str, str]:
    """Calls, and the largest error in nats."""
    model = mixture(sde)
    x = model.sample(256, seed=1)
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    settings = {"rtol": tolerance, "atol": tolerance, "coordinates": coordinates}
    ll = log_likelihood(model, x, prior=lambda z: model.log_prob(z, last), **settings)
    return str(ll.nfe), f"{(ll.log_prob - model.log_prob(x, first)).abs().max():.1e}"


def main() -> None:
    """Print the table."""
    rows = [
        (type(sde).__name__, f"{tolerance:g}", *measure(sde, tolerance, "time"), *measure(sde, tolerance, "angle"))
        for sde in (VP(), SubVP(), VE())
        for tolerance in (1e-3, 1e-5, 1e-7)
    ]
    print(table(("sde", "tolerance", "time: NFE", "error", "angle: NFE", "error"), rows))


if __name__ == "__main__":
    main()
