"""Every objective trains a small network on the plane's mixture, to a divergence in nats that is stated."""

import pytest
import torch
from oracles import legendre

from experiments.data import mixture2d
from models import (
    MLP,
    DenoisingScoreMatching,
    EDMRow,
    GaussianMixture,
    ImplicitScoreMatching,
    LogNormal,
    LossAware,
    MinSNR,
    ScoreNetwork,
    SlicedScoreMatching,
    Tabulated,
    UniformLogSNR,
    UniformTime,
)
from sde import VP, Noise


def trained(objective, data, parametrization, steps, seed=0):
    torch.manual_seed(seed)
    model = ScoreNetwork(MLP((2,), width=64, depth=2, embedding=32), VP(), parametrization)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    objective.check(model)
    for _ in range(steps):
        x0 = data.train[torch.randint(len(data.train), (256,), generator=generator)]
        optimizer.zero_grad()
        objective(model, x0, generator).value.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def divergence(model, data, n=256):
    """1/2 of the integral over log-SNR of E |eps_hat - eps*|^2, eps* of the exact score: KL(p || model) of the reverse
    SDE from the right prior is at most that; nats, by quadrature over time and draws of x_t."""
    exact = GaussianMixture(*(data.density[name].float() for name in ("weights", "means", "covariances")), model.sde)
    x0, eps = exact.sample(n, seed=1), Noise(2).normal((n, 2))

    @torch.no_grad()
    def rate(log_snr):
        values = []
        for t in model.sde.time(log_snr.float()):
            x = model.sde.perturb(x0, t, eps)
            values.append(0.5 * (model(x, t.expand(n)).eps - exact(x, t).eps).square().sum(1).mean())
        return torch.stack(values).double()

    low, high = model.sde.log_snr_range
    return legendre(rate, low, high, panels=4)


CASES = {
    "simple": (lambda: DenoisingScoreMatching("simple"), "noise"),
    "likelihood": (lambda: DenoisingScoreMatching("likelihood", UniformLogSNR()), "noise"),
    "likelihood_adaptive": (lambda: DenoisingScoreMatching("likelihood", LossAware(UniformLogSNR())), "noise"),
    "edm": (lambda: DenoisingScoreMatching("edm", LogNormal()), EDMRow(1.0)),
    "min_snr": (lambda: DenoisingScoreMatching("min_snr"), "v"),
    "min_snr_tabulated": (lambda: DenoisingScoreMatching("simple", Tabulated(MinSNR())), "v"),
    "implicit": (lambda: ImplicitScoreMatching("simple"), "noise"),
    "implicit_likelihood": (lambda: ImplicitScoreMatching("likelihood", UniformLogSNR()), "noise"),
    "sliced": (lambda: SlicedScoreMatching("simple", variance_reduced=False), "noise"),
    "sliced_variance_reduced": (lambda: SlicedScoreMatching("simple"), "noise"),
    "sliced_likelihood": (lambda: SlicedScoreMatching("likelihood", UniformLogSNR()), "noise"),
    "sliced_antithetic": (lambda: SlicedScoreMatching("simple", UniformTime("antithetic"), probes=2), "noise"),
}
