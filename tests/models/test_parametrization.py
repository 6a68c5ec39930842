"""x_t = alpha x_0 + sigma eps for every model, and every row of the 2x2 system recovers the pair."""

import pytest
import torch
from oracles import ALL_SDES, ROWS, SDES, ExactNet, at_ends, correlated, mixture
from torch import nn

from models import MLP, EDMRow, LevelHead, ScoreNetwork
from models.parametrization import ROWS as PARAMETRIZATIONS
from sde import VP, Noise


class Fixed(nn.Module):
    """A network that outputs what it was given beforehand."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, label):
        return self.output


def pair(dtype):
    return (3 * Noise(seed).normal((5, 2, 3), dtype=dtype) for seed in (1, 2))


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_the_exact_target_gives_the_pair(sde, dtype, bound):
    """In float32 the recovered x_0 may be wrong by eps / SNR and eps by eps * SNR, and never by more.

    The bound is on the error of each as it enters x_t: alpha x_0 and sigma eps, relative to the size of x_t's parts.
    """
    x0, eps = pair(dtype)
    for t in at_ends(sde, dtype):
        x = sde.perturb(x0, t, eps)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for name in ROWS:
            a, b = PARAMETRIZATIONS[name]().row(t, sde)
            assert float(a**2 + b**2) == pytest.approx(1, abs=1e-6), (name, t)
            found = ScoreNetwork(Fixed(a * x0 + b * eps), sde, name)(x, t)
            size = max(1.0, float(sigma / alpha))
            limit = bound if dtype == torch.float32 else bound / float(sigma)
            assert (alpha * (found.x0 - x0)).abs().max() < limit * alpha * size, (name, t)
            assert (sigma * (found.eps - eps)).abs().max() < limit * alpha * size, (name, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_rows_are_the_stated_combinations(sde):
    """Each row is proportional to its definition, at every time."""
    for t in at_ends(sde):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        h = 3e-4 * t
        slopes = tuple((c(t + h) - c(t - h)) / (2 * h) for c in (sde.alpha, sde.sigma))
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        stated = {"noise": (zero, one), "data": (one, zero), "v": (-sigma, alpha), "velocity": slopes}
        stated["score"] = (zero, -1 / sigma)
        for name, (a, b) in stated.items():
            found = torch.stack(PARAMETRIZATIONS[name]().row(t, sde))
            expected = torch.stack((a, b)) / torch.hypot(a, b)
            assert torch.allclose(found, expected, atol=1e-6), (name, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("data_std", [0.5, 1.0, 3.0])
def test_edm_preconditioning_has_unit_variances(sde, data_std):
    """c_in x has unit variance, the target F too, and x_0 = c_skip x + c_out F with the coefficients of table 1."""
    row, s = EDMRow(data_std), data_std
    seen = []

    class Probe(nn.Module):
        def forward(self, x, label):
            seen.append(x)
            return torch.ones_like(x)

    for t in at_ends(sde):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        noise = sigma / alpha  # EDM's sigma; its x is x_t / alpha
        a, b = row.row(t, sde)
        assert float(a**2 * s**2 + b**2) == pytest.approx(1, rel=1e-12), t
        x = torch.full((3, 2), 2.0, dtype=torch.float64)
        found = ScoreNetwork(Probe(), sde, row)(x, t)
        assert torch.allclose(seen.pop(), x / alpha / torch.sqrt(noise**2 + s**2), rtol=1e-12), t
        c_skip, c_out = s**2 / (noise**2 + s**2), noise * s / torch.sqrt(noise**2 + s**2)
        assert torch.allclose(found.x0, c_skip * x / alpha + c_out, rtol=1e-9), t
        if s == 1:
            v = torch.stack(PARAMETRIZATIONS["v"]().row(t, sde))
            assert torch.allclose(torch.stack((a, b)), -v, rtol=1e-12), t


@pytest.mark.parametrize("bad", [0.0, -1.0, True, None, float("nan")], ids=repr)
def test_a_standard_deviation_is_positive(bad):
    with pytest.raises(ValueError, match="EDMRow: data_std must be a positive number"):
        EDMRow(bad)


def models(sde, dtype):
    torch.manual_seed(0)
    rows = [ScoreNetwork(MLP((2,), width=16, depth=1), sde, name) for name in ROWS]
    head = ScoreNetwork(MLP((2,), 5, width=16, depth=1), sde, LevelHead(torch.randn(5, 2)))
    for model in (*rows, head):
        nn.init.normal_(model.net.last[-1].weight, std=2.0)
    return [*(m.to(dtype) for m in (*rows, head)), mixture(sde, dtype), correlated(sde, dtype)]


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_every_model_keeps_the_invariant(sde, dtype, bound):
    for model in models(sde, dtype):
        for t in at_ends(sde, dtype):
            x = sde.perturb(Noise(1).normal((7, 2), dtype=dtype), t, Noise(2).normal((7, 2), dtype=dtype))
            with torch.no_grad():
                x0, eps = model(x, t)
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            size = x.abs() + (alpha * x0).abs() + (sigma * eps).abs()
            assert ((alpha * x0 + sigma * eps - x).abs() / size).max() < bound, (model, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_score_and_velocity_are_read_off_the_pair(sde):
    """The velocity is f - g^2 / 2 score, and the score -eps / sigma."""
    for model in models(sde, torch.float64):
        for t in at_ends(sde):
            x = sde.perturb(Noise(1).normal((7, 2), dtype=t.dtype), t, Noise(2).normal((7, 2), dtype=t.dtype))
            score = model.score(x, t)
            assert torch.allclose(score, -model(x, t).eps / sde.sigma(t), rtol=1e-13), (model, t)
            expected = sde.drift(x, t) - 0.5 * sde.diffusion(t) ** 2 * score
            size = (expected.abs() + sde.drift(x, t).abs()).clamp(min=1e-200)
            assert ((model.velocity(x, t) - expected).abs() / size).max() < 1e-10, (model, t)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_network_with_the_exact_target_is_the_exact_model(sde, name):
    exact = mixture(sde)
    model = ScoreNetwork(ExactNet(exact, PARAMETRIZATIONS[name]().row), sde, name)
    for t in at_ends(sde):
        x = sde.perturb(Noise(1).normal((7, 2), dtype=t.dtype), t, Noise(2).normal((7, 2), dtype=t.dtype))
        found, expected = model(x, t), exact(x, t)
        scale = max(1.0, float(sde.sigma(t) / sde.alpha(t)))
        assert torch.allclose(found.x0, expected.x0, rtol=0, atol=1e-8 * scale), t
        assert torch.allclose(found.eps, expected.eps, rtol=0, atol=1e-6), t


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_a_time_for_each_sample(sde):
    """One call with times (B,) gives what B calls with times () give."""
    for model in models(sde, torch.float64):
        t = torch.stack(at_ends(sde))
        x = sde.perturb(Noise(1).normal((3, 2), dtype=t.dtype), t, Noise(2).normal((3, 2), dtype=t.dtype))
        whole = model(x, t)
        for i in range(3):
            for found, alone in zip(whole, model(x[i : i + 1], t[i]), strict=True):
                assert torch.allclose(found[i : i + 1], alone, rtol=1e-10, atol=1e-10), (model, i)


def test_the_network_sees_unit_variance_and_the_noise_level():
    seen = []

    class Probe(nn.Module):
        def forward(self, x, label, **condition):
            seen.append((x, label, condition))
            return x

    for sde in SDES:
        model = ScoreNetwork(Probe(), sde)
        for t in at_ends(sde):
            x = torch.full((3, 2), 2.0, dtype=torch.float64)
            model(x, t, label_of=7)
            inputs, label, condition = seen.pop()
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            assert torch.allclose(inputs, x / (alpha**2 + sigma**2).sqrt(), rtol=1e-13), (sde, t)
            assert torch.allclose(label, torch.full((3,), float((sigma / alpha).log()), dtype=x.dtype), rtol=1e-12)
            assert condition == {"label_of": 7}


def test_noise_levels_keep_float32_under_autocast():
    model = ScoreNetwork(nn.Sequential(), VP())
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, label):
            seen.append(label.dtype)
            return self.linear(x)

    model.net = Probe()
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        x0, eps = model(x, t)
    assert seen == [torch.float32] and x0.dtype == eps.dtype == torch.float32
    assert (VP().alpha(t) * x0 + VP().sigma(t) * eps - x).abs().max() < 1e-5


def test_an_unknown_parametrization_is_refused():
    with pytest.raises(
        ValueError, match="parametrization must be one of noise, data, v, velocity, score, edm, found 'eps'"
    ):
        ScoreNetwork(nn.Identity(), VP(), "eps")


def test_what_is_not_a_process_is_refused():
    with pytest.raises(TypeError, match="expected a GaussianSDE such as VP"):
        ScoreNetwork(nn.Identity(), "vp")
