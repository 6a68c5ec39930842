"""Training times: their distribution against its density by quadrature, and losses that do not depend on it."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import CORE_SDES, FEW_SDES, SOME_SDES, gaussian, learned, legendre, paper

from models import (
    MLP,
    DenoisingScoreMatching,
    EDMWeighting,
    LikelihoodWeighting,
    LogNormal,
    LossAware,
    MinSNR,
    ScoreNetwork,
    SingleTime,
    Tabulated,
    UniformLogSNR,
    UniformTime,
)
from models.adaptive_times import Steps
from sde import EDM, VP
from sde.base import last_time


def experienced(times=None, bins=6):
    """Adaptive times after a batch of losses that differ from bin to bin; quick to believe them."""
    adaptive = LossAware(times, bins, least=1).double()
    t = adaptive.times.quantile(((torch.arange(bins) + 0.5) / bins).double(), VP())
    adaptive.observe(t, torch.linspace(3, 0.5, bins, dtype=torch.float64) ** 2, VP())
    return adaptive


SAMPLERS = [
    UniformTime(),
    UniformLogSNR(),
    LogNormal(),
    LogNormal(0.5, 0.7),
    Tabulated(MinSNR(), parts=5),
    Tabulated(LikelihoodWeighting(), parts=40),
    experienced(),
    experienced(UniformLogSNR()),
]


def grid(n=7):
    return (torch.arange(n, dtype=torch.float64) + 0.3) / n


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("times", SAMPLERS, ids=str)
def test_the_quantile_inverts_the_cumulative_whose_slope_is_the_density(sde, times):
    u = grid()
    t = times.quantile(u, sde)
    assert bool((t.diff() > 0).all()) and t[0] >= sde.t_min and t[-1] <= last_time(sde)
    assert torch.allclose(times.cumulative(t, sde), u, rtol=1e-6), (sde, times)
    h = 1e-5 * t
    slope = (times.cumulative(t + h, sde) - times.cumulative(t - h, sde)) / (2 * h)
    assert torch.allclose(slope, times.density(t, sde), rtol=1e-5), (sde, times)


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("times", SAMPLERS, ids=str)
def test_nothing_lies_beyond_the_ends(sde, times):
    ends = torch.tensor((0.0, 1.0), dtype=torch.float64)
    t = times.quantile(ends, sde)
    assert t.tolist() == pytest.approx([sde.t_min, last_time(sde)], rel=1e-6), (sde, times)
    reached = times.cumulative(torch.tensor((sde.t_min, last_time(sde)), dtype=torch.float64), sde)
    assert torch.allclose(reached, ends, atol=1e-9), (sde, times)


def test_the_cumulative_likelihood_weight_is_in_closed_form():
    """Song et al.: the integral of beta / (1 - exp(-B)) is log(exp(B) - 1); sub-VP's and VE's by quadrature too."""
    for sde in CORE_SDES:
        start, end = math.log(sde.t_min), math.log(sde.t_max)

        def weight(s, sde=sde):
            values = [paper(sde, math.exp(one)) for one in s.tolist()]
            return torch.tensor([g / sigma**2 for _, sigma, _, g in values], dtype=torch.float64) * s.exp()

        total = legendre(weight, start, end, panels=32)
        for share in (0.1, 0.5, 0.9):
            middle = start + share * (end - start)
            t = torch.tensor(math.exp(middle), dtype=torch.float64)
            found = float(UniformLogSNR().cumulative(t, sde))
            assert found == pytest.approx(legendre(weight, start, middle, panels=32) / total, rel=1e-9), (sde, share)
    grown = [math.log(math.expm1(0.1 * t + 9.95 * t**2)) for t in (1e-5, 0.2, 1.0)]
    found = float(UniformLogSNR().cumulative(torch.tensor(0.2, dtype=torch.float64), VP()))
    assert found == pytest.approx((grown[1] - grown[0]) / (grown[2] - grown[0]), rel=1e-12)


def test_log_normal_is_the_noise_of_edm():
    """Truncated at log 0.002 and log 80 it is the normal distribution's, scaled."""
    sde, times = EDM(), LogNormal(-1.2, 1.2)
    below = {s: 0.5 * math.erfc(-(math.log(s) + 1.2) / (1.2 * math.sqrt(2))) for s in (0.002, 0.1, 0.3, 2.0, 80.0)}
    for s in (0.1, 0.3, 2.0):
        expected = (below[s] - below[0.002]) / (below[80.0] - below[0.002])
        assert float(times.cumulative(torch.tensor(s).double(), sde)) == pytest.approx(expected, rel=1e-7)
    t = times.sample(100_000, sde, torch.Generator().manual_seed(0))
    assert float(t.log().mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(t.log().std()) == pytest.approx(1.2, abs=1e-3)


def test_a_table_follows_its_weight():
    """Its density is the weight to the width of its parts; the likelihood weight of eps is uniform in log-SNR."""
    for sde in FEW_SDES:
        t = UniformLogSNR().quantile(grid(40), sde)
        ratio = Tabulated(EDMWeighting(0.5), parts=2000).density(t, sde) / EDMWeighting(0.5)(t, sde)
        assert torch.allclose(ratio, ratio.mean(), rtol=2e-2), sde
        even = Tabulated(lambda t, sde: (sde.diffusion(t) / sde.sigma(t)) ** 2, parts=7)
        assert torch.allclose(even.quantile(grid(), sde), UniformLogSNR().quantile(grid(), sde), rtol=1e-9), sde


def test_a_table_of_a_schedule_is_that_of_its_present_parameters():
    sde, times = learned(hidden=4), Tabulated(MinSNR(), parts=8)
    share = UniformLogSNR().quantile(grid(8), sde)
    before = times.density(share, sde) / UniformLogSNR().density(share, sde)
    with torch.no_grad():
        sde.weights.add_(3 * torch.arange(4))
    share = UniformLogSNR().quantile(grid(8), sde)
    after = times.density(share, sde) / UniformLogSNR().density(share, sde)
    assert not torch.allclose(after, before, rtol=1e-2)


@pytest.mark.parametrize("spread", ["stratified", "antithetic", "independent"])
@pytest.mark.parametrize("n", [1, 2, 7, 2000])
def test_draws_have_their_distribution(spread, n):
    """Kolmogorov and Smirnov's distance below the 1e-3 quantile of independent draws; what each spread promises."""
    for make in (UniformTime, UniformLogSNR, LogNormal):
        times = make(spread=spread)
        u = times.cumulative(times.sample(n, VP(), torch.Generator().manual_seed(3), dtype=torch.float64), VP())
        low = u.sort().values
        distance = max(float((low - k / n).abs().max()) for k in (torch.arange(n), torch.arange(1, n + 1)))
        assert u.shape == (n,) and distance < 1.95 / math.sqrt(n)
        if spread == "stratified":
            assert distance <= 1 / n + 1e-9
        if spread == "antithetic":
            assert torch.allclose(u[: n // 2] + u[n - n // 2 :], torch.ones(n // 2, dtype=u.dtype))


def test_independent_draws_are_not_spread():
    """The mean of n uniform numbers has the variance 1 / 12 n; antithetic pairs have none, strata 1 / 12 n^2."""
    generator, n = torch.Generator().manual_seed(0), 16
    for spread, variance in (("independent", 1 / (12 * n)), ("antithetic", 0.0), ("stratified", 1 / (12 * n * n))):
        times = UniformTime(spread)
        means = torch.stack([times.cumulative(times.sample(n, VP(), generator), VP()).mean() for _ in range(2000)])
        assert float(means.var()) == pytest.approx(variance, rel=0.15, abs=1e-9), spread


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=str)
@pytest.mark.parametrize("weighting", ["likelihood", "edm", "min_snr"])
def test_the_mean_of_a_loss_does_not_depend_on_what_was_learned(sde, weighting):
    """Adaptive times are unbiased: the loss of the objective, averaged over their quantiles, bin by bin."""
    model = gaussian(sde, 0.4)
    base = UniformLogSNR()
    adaptive = experienced(base, bins=5)

    def mean(times, edges):
        objective, total = DenoisingScoreMatching(weighting, times), 0.0

        def value(u):
            t = times.quantile(u, sde)
            weight = objective.weighting(t, sde) * times.importance(t, sde)
            if objective.weighting.integral:
                weight = objective.weighting(t, sde) / times.density(t, sde)
            one = torch.ones(len(u), 1, dtype=torch.float64)
            return weight * objective.squared_error(model, 0.7 * one, -1.2 * one, t, None)

        for start, end in pairwise(edges):
            total += legendre(value, start, end, panels=12)
        return total

    kinks = [0.0, *adaptive.steps().shares.cumsum(0).tolist()]
    assert max(abs(b - a - 0.2) for a, b in pairwise(kinks)) > 0.1  # it has learned something
    expected = mean(base, [k / 5 for k in range(6)])
    assert mean(adaptive, kinks) == pytest.approx(expected, rel=1e-9), (sde, weighting)


def test_the_objective_weighs_as_the_quadrature_does():
    """forward itself: at given times its losses are those that the quadrature above takes."""
    sde, model = VP(), gaussian(VP(), 0.4)
    x0 = torch.full((6, 1), 0.7, dtype=torch.float64)
    for weighting in (LikelihoodWeighting(), MinSNR()):
        times = experienced(UniformLogSNR(), bins=5)
        value, log_snr = DenoisingScoreMatching(weighting, times)(model, x0, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        t = times.sample(6, sde, generator, dtype=torch.float64)
        eps = torch.randn(6, 1, generator=generator, dtype=torch.float64)
        weight = weighting(t, sde) * times.importance(t, sde)
        weight = weighting(t, sde) / times.density(t, sde) if weighting.integral else weight
        expected = weight * (DenoisingScoreMatching().squared_error(model, x0, eps, t, None))
        assert torch.allclose(value, expected, rtol=1e-12) and torch.equal(log_snr, sde.log_snr(t))


def test_bins_are_drawn_by_the_root_mean_square_of_their_losses():
    times = LossAware(UniformTime(), bins=4, decay=0.5, floor=0.2, least=2).double()
    centres = UniformTime().quantile((torch.arange(4) + 0.5).double() / 4, VP())
    sizes = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    for batch in (centres[:3], centres[:3], centres[3:]):
        times.observe(batch, sizes[[0, 1, 2]] if len(batch) == 3 else sizes[3:], VP())
        assert times.steps().shares.tolist() == [0.25] * 4  # the last bin has seen one loss, not two
    times.observe(centres[3:], sizes[3:], VP())
    assert torch.allclose(times.steps().shares, 0.8 * sizes / 12 + 0.05, rtol=1e-12)
    assert times.counts.tolist() == [2.0] * 4
    # Two losses of 3 and 5 at once count as their mean square, against which what was there has the weight 1/2^2.
    times.observe(centres[[0, 0]], torch.tensor([3.0, 5.0]).double(), VP())
    square = (0.25 * 0.75 * 1.0 + 0.75 * 17.0) / (1 - 0.5**4)
    expected = torch.tensor([math.sqrt(square), 2.0, 3.0, 6.0], dtype=torch.float64)
    assert torch.allclose(times.steps().shares, 0.8 * expected / expected.sum() + 0.05, rtol=1e-12)
    assert float(times.importance(centres, VP()).max()) <= 1 / 0.2


def test_what_was_learned_is_state_and_the_objective_feeds_it():
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP())
    objective = DenoisingScoreMatching("likelihood", LossAware(UniformLogSNR(), bins=4, least=2))
    x0, generator = torch.randn(64, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        objective(model, x0, generator)
    assert float(objective.times.counts.sum()) == 0  # losses that train nothing teach nothing
    first = objective(model, x0, generator).value
    assert first.requires_grad and float(objective.times.counts.sum()) == 64
    again = DenoisingScoreMatching("likelihood", LossAware(UniformLogSNR(), bins=4, least=2))
    again.load_state_dict(objective.state_dict())
    a, b = (one(model, x0, torch.Generator().manual_seed(5)).value for one in (objective, again))
    assert torch.equal(a, b) and not torch.allclose(
        objective.times.steps().shares, torch.full((4,), 0.25), rtol=1e-2, atol=0
    )


def test_bins_of_no_loss_at_all_are_drawn_alike():
    times = LossAware(bins=3, least=1)
    times.observe(times.quantile(torch.tensor([0.1, 0.5, 0.9]), VP()), torch.zeros(3), VP())
    assert times.steps().shares.tolist() == pytest.approx([1 / 3] * 3)


def test_steps_are_exact_at_their_edges():
    steps = Steps(torch.tensor([0.5, 0.125, 0.375], dtype=torch.float64))
    u = torch.tensor([0.0, 0.25, 0.5, 0.5625, 0.625, 1.0], dtype=torch.float64)
    v = torch.tensor([0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0], dtype=torch.float64)
    assert torch.allclose(steps.quantile(u), v, atol=1e-15) and torch.allclose(steps.cumulative(v), u, atol=1e-15)
    assert steps.density(v[:2]).tolist() == [1.5, 1.5]


def test_one_time_for_all():
    t = SingleTime().sample(3, EDM(), dtype=torch.float64)
    assert t.tolist() == [EDM().t_min] * 3 and SingleTime(0.5).sample(2, EDM()).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"SingleTime: t must lie in \[0.002, 80.0\] of EDM.*found 81.0"):
        SingleTime(81.0).sample(2, EDM())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: UniformTime("even"), "UniformTime: spread must be one of stratified, antithetic, independent, found"),
        (lambda: LogNormal(std=0.0), "LogNormal: expected a finite mean and a positive std, found -1.2 and 0.0"),
        (lambda: LogNormal(9.0, 0.1).sample(2, VP()), r"has only .* in the range of log\(sigma / alpha\) of VP"),
        (lambda: Tabulated(MinSNR(), parts=0), "Tabulated: parts must be a positive integer, found 0"),
        (lambda: Tabulated(lambda t, sde: -t).sample(2, VP()), "Tabulated: weight must be positive and finite"),
        (lambda: LossAware(bins=0), "LossAware: bins must be a positive integer, found 0"),
        (lambda: LossAware(decay=1.0), "LossAware: decay must lie between 0 and 1, found 1.0"),
        (lambda: LossAware(floor=0.0), "LossAware: floor must lie between 0 and 1, found 0.0"),
    ],
)
def test_bad_times_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
