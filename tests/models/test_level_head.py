"""The level head against the posterior of uniform bins by quadrature."""

import math

import pytest
import torch
from oracles import CORE_SDES, SDES, at_ends, legendre, times

from models import MLP, LevelHead, ScoreNetwork
from sde import EDM, VE, VP

LEVELS = 7


def head(logits, low=-1.0, high=1.0):
    """A level head on one value, with fixed logits."""
    return LevelHead(logits.double()[:, None], low, high).double()


def predict(parametrization, x, t, sde):
    output = torch.zeros(len(x), parametrization.outputs, dtype=x.dtype)
    return parametrization.predict(output, x, t, sde)


def quadrature(logits, x, t, sde, low=-1.0, high=1.0, floor=1e-6):
    """E[x_0 | x_t] and E[eps | x_t] for x_0 uniform in bins of probability softmax(logits), by quadrature."""
    k = len(logits)
    weights = (1 - floor) * torch.softmax(logits.double(), 0) + floor / k
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    edges = torch.linspace(low, high, k + 1, dtype=torch.float64)
    nearest = (x / alpha).clamp(low, high)
    peak = -0.5 * ((x - alpha * nearest) / sigma) ** 2

    def moment(power, i):
        def integrand(x0):
            eps = (x - alpha * x0) / sigma
            return torch.exp(-0.5 * eps**2 - peak) * eps**power

        # Only where the integrand lives; panels narrow in units of sigma / alpha.
        reach = 12 * float(sigma / alpha)
        start, end = max(float(edges[i]), float(nearest) - reach), min(float(edges[i + 1]), float(nearest) + reach)
        return legendre(integrand, start, end, panels=24) if end > start else 0.0

    mass = sum(float(weights[i]) * moment(0, i) for i in range(k))
    eps = sum(float(weights[i]) * moment(1, i) for i in range(k)) / mass
    return (float(x) - float(sigma) * eps) / float(alpha), eps


@pytest.mark.parametrize("sde", [*CORE_SDES, EDM()], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_posterior_means_of_uniform_bins(sde, seed):
    logits = 3 * torch.randn(LEVELS, generator=torch.Generator().manual_seed(seed))
    for t in times(sde, 9):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for u in (-0.97, -0.4, 0.0, 0.3, 1.0):
            for offset in (-2.0, 0.0, 1.0):
                x = (alpha * u + sigma * offset).reshape(1, 1)
                found = predict(head(logits), x, t, sde)
                x0, eps = quadrature(logits, x[0, 0], t, sde)
                # The narrow-bin series is right to fourth order in width / spread <= 0.1.
                narrow = float(2 / LEVELS * alpha / sigma)
                slack = 0.2 * narrow**4 if narrow <= 0.1 else 0.0
                assert float(found.x0) == pytest.approx(x0, abs=1e-7 + slack), (sde, t, u, offset)
                assert float(found.eps) == pytest.approx(eps, abs=1e-6 + slack), (sde, t, u, offset)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_score_is_the_gradient_of_the_log_marginal_density(sde):
    """p_t(x) is the sum over bins of w_k (Phi(upper) - Phi(lower)) / (alpha width)."""
    logits = torch.randn(LEVELS, generator=torch.Generator().manual_seed(2)).double()
    weights = (1 - 1e-6) * torch.softmax(logits.float().double(), 0) + 1e-6 / LEVELS
    edges = torch.linspace(-1, 1, LEVELS + 1, dtype=torch.float64)
    for fraction in (0.02, 0.1, 0.3):
        t = torch.tensor(fraction * sde.t_max, dtype=torch.float64)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        inside, outside = torch.linspace(-1, 1, 11, dtype=t.dtype), torch.tensor([-4.0, 4.0], dtype=t.dtype)
        x = torch.cat([alpha * inside, alpha * outside.sign() + sigma * outside])[:, None].requires_grad_()
        z = (alpha * edges - x) / sigma
        density = (weights * (torch.special.ndtr(z[:, 1:]) - torch.special.ndtr(z[:, :-1]))).sum(1)
        (expected,) = torch.autograd.grad(density.log().sum(), x)
        score = -predict(head(logits), x.detach(), t, sde).eps / sigma
        assert torch.allclose(score, expected, rtol=1e-6, atol=1e-8), (sde, fraction)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_zero_logits_are_the_histogram_and_levels_tend_to_their_bins(sde):
    """Near t_min x_0 is x_t / alpha inside a bin; near t_max it is the mean of the histogram."""
    logits = torch.tensor([0.1, 2.0, -1.0, 0.4, 0.0, 1.0, -2.0])
    weights = torch.softmax(logits.double(), 0)
    centres = -1 + 2 * (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    late = predict(head(logits), torch.zeros(1, 1).double(), at_ends(sde)[2], sde).x0
    assert float(late) == pytest.approx(float((weights * centres).sum()), abs=0.02)
    model = ScoreNetwork(MLP((3,), LEVELS, width=8, depth=1), sde, LevelHead(logits[:, None].repeat(1, 3))).double()
    x = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    for t in at_ends(sde):
        expected = predict(head(logits), x.reshape(-1, 1), t, sde).x0.reshape(5, 3)
        assert torch.allclose(model(x, t).x0, expected, rtol=1e-10, atol=1e-12), (sde, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_everywhere_with_gradients(sde, dtype):
    """Far outside the range, at both ends of time, with extreme logits: values and gradients are finite."""
    torch.manual_seed(0)
    parametrization = LevelHead(torch.zeros(17, 4)).to(dtype)
    x = torch.tensor([0, 1e-3, 0.999, 1.001, -1.5, 3, -30, 1e3, 1e6], dtype=dtype)[:, None].repeat(1, 4)
    x = x.requires_grad_()
    for scale in (0.0, 1.0, 200.0):
        output = (scale * torch.randn(len(x), 17 * 4, dtype=dtype)).requires_grad_()
        for t in times(sde, 15, dtype):
            for part in parametrization.predict(output, x, t, sde):
                assert bool(torch.isfinite(part).all()), (scale, t)
                for gradient in torch.autograd.grad(part.sum(), (output, x), retain_graph=True):
                    assert bool(torch.isfinite(gradient).all()), (scale, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_posterior_mean_stays_in_the_range(sde):
    for dtype, slack in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        parametrization = head(torch.randn(LEVELS, generator=torch.Generator().manual_seed(0))).to(dtype)
        for t in times(sde, 25, dtype):
            x = sde.alpha(t) * torch.linspace(-1, 1, 41, dtype=dtype)[:, None]
            x = torch.cat([x + sde.sigma(t) * offset for offset in (-4, 0, 4)])
            assert predict(parametrization, x, t, sde).x0.abs().max() <= 1 + slack, (sde, t, dtype)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_two_forms_agree_where_they_meet(sde):
    """On either side of the spread at which the series takes over, and in float32 too."""
    width = 2 / LEVELS
    switch = sde.time(torch.tensor(-2 * math.log(width / 0.1), dtype=torch.float64))
    logits = torch.randn(LEVELS, generator=torch.Generator().manual_seed(1))
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None] * sde.alpha(switch)
    for dtype, bound in ((torch.float64, 3e-6), (torch.float32, 3e-4)):
        sides = [
            predict(head(logits).to(dtype), x.to(dtype), (switch * f).to(dtype), sde) for f in (1 - 1e-7, 1 + 1e-7)
        ]
        for before, after in zip(*sides, strict=True):
            assert (before - after).abs().max() < bound, (sde, dtype)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.0, 5.0)])
def test_another_range(low, high):
    sde, logits = VP(), torch.randn(LEVELS, generator=torch.Generator().manual_seed(5))
    for fraction in (0.01, 0.2, 0.7):
        t = torch.tensor(fraction, dtype=torch.float64)
        x = (sde.alpha(t) * (low + 0.3 * (high - low)) + 0.5 * sde.sigma(t)).reshape(1, 1)
        x0, eps = quadrature(logits, x[0, 0], t, sde, low, high)
        found = predict(head(logits, low, high), x, t, sde)
        assert float(found.x0) == pytest.approx(x0, abs=1e-6) and float(found.eps) == pytest.approx(eps, abs=1e-6)


def test_logits_are_those_of_each_value():
    """For images the network gives K C channels, level by level: value (c, i, j) takes its own K logits."""
    sde, t = VE(), torch.tensor(0.3, dtype=torch.float64)
    parametrization = LevelHead(torch.zeros(5, 2, 3, 3)).double()
    output = torch.randn(4, 10, 3, 3, dtype=t.dtype, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, 4 * 18, dtype=t.dtype).reshape(4, 2, 3, 3)
    whole = parametrization.predict(output, x, t, sde)
    one = head(output[1].reshape(5, 2, 3, 3)[:, 1, 2, 0])
    one.log_marginals = output[1].reshape(5, 2, 3, 3)[:, 1, 2, 0][:, None]
    assert torch.allclose(whole.eps[1, 1, 2, 0], predict(one, x[1:2, 1, 2, 0][:, None], t, sde).eps[0, 0], rtol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(5),), r"must have the shape \(levels, \*shape\), found \(5,\)"),
        ((torch.zeros(1, 4),), "must have the shape"),
        ((torch.zeros(5, 1), 1.0, 1.0), "low must be smaller than high"),
    ],
)
def test_what_is_no_head_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LevelHead(*arguments)


def test_the_histogram_is_saved_with_the_model():
    model = ScoreNetwork(MLP((2,), 5, width=16, depth=1), VP(), LevelHead(torch.zeros(5, 2)))
    assert "parametrization.log_marginals" in model.state_dict()


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_beyond_six_deviations_x0_is_off_by_less_than_a_fifth_of_the_spread(sde):
    logits = torch.randn(LEVELS, generator=torch.Generator().manual_seed(3))
    for fraction in (0.05, 0.2, 0.5):
        t = torch.tensor(fraction * sde.t_max, dtype=torch.float64)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for side in (-1, 1):
            x = (side * (alpha + 9 * sigma)).reshape(1, 1)
            x0, eps = quadrature(logits, x[0, 0], t, sde)
            found = predict(head(logits), x, t, sde)
            assert abs(float(found.x0) - x0) < 0.2 * float(sigma / alpha), (sde, fraction, side)
            assert abs(float(found.eps) - eps) < 0.2, (sde, fraction, side)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_float32_agrees_with_float64(sde):
    """Within the range and three deviations around it; the error of x_0 in units of the range, of eps in its own."""
    logits = torch.randn(LEVELS, generator=torch.Generator().manual_seed(4))
    for t in times(sde, 25, torch.float32):
        x = sde.alpha(t) * torch.linspace(-1, 1, 41)[:, None]
        x = torch.cat([x + sde.sigma(t) * offset for offset in (-3, 0, 3)])
        found = predict(head(logits).float(), x, t, sde)
        expected = predict(head(logits), x.double(), t.double(), sde)
        ratio = float(sde.alpha(t) / sde.sigma(t))
        assert (found.x0 - expected.x0).abs().max() < 2e-4, (sde, t)
        assert (found.eps - expected.eps).abs().max() < 2e-4 * max(1, 1e-2 * ratio), (sde, t)
