"""The closed forms of Cosine, EDM, rectified flow and the learned schedule, and what is particular to each."""

import math

import mpmath
import pytest
import torch
from oracles import SDE_CLASSES, SDES, learned, make, times

from models import MLP, ScoreNetwork
from sde import EDM, VE, VP, Cosine, LearnedSchedule, Noise, RectifiedFlow, SubVP
from sde.base import last_time


def close(found, expected, rel=1e-12):
    return float(found) == pytest.approx(float(expected), rel=rel)


@pytest.mark.parametrize("sde", [Cosine(), Cosine(offset=0.1, t_max=3.0)], ids=str)
def test_cosine_is_that_of_the_paper(sde):
    """Nichol and Dhariwal (2021), eq. 17: alpha_bar = f(t) / f(0), f(t) = cos((t/T + s) / (1 + s) pi/2)^2."""
    with mpmath.workdps(40):
        for t in times(sde, 41):
            s, u = mpmath.mpf(sde.offset), mpmath.mpf(float(t)) / mpmath.mpf(sde.t_max)
            f = [mpmath.cos((v + s) / (1 + s) * mpmath.pi / 2) ** 2 for v in (u, 0)]
            alpha_bar = f[0] / f[1]
            assert close(sde.alpha(t), mpmath.sqrt(alpha_bar)), t
            assert close(sde.sigma(t), mpmath.sqrt(1 - alpha_bar)), t
            # beta = -d log alpha_bar / dt, the VP identities f = -beta / 2 and g^2 = beta.
            quarter = mpmath.pi / 2 / (1 + s)
            beta = 2 * quarter * mpmath.tan((u + s) * quarter) / mpmath.mpf(sde.t_max)
            assert close(sde.diffusion(t) ** 2, beta, 1e-10), t


def test_edm_is_noise_of_standard_deviation_t():
    """Karras et al. (2022), table 1: s(t) = 1, sigma(t) = t; dx = sqrt(2 t) dw."""
    sde = EDM()
    assert (sde.t_min, sde.t_max, sde.prior_std) == (0.002, 80.0, 80.0)
    t = times(sde, 41)
    x = torch.ones(len(t), 1, dtype=t.dtype)
    assert torch.equal(sde.alpha(t), torch.ones_like(t)) and torch.equal(sde.sigma(t), t)
    assert torch.allclose(sde.diffusion(t), (2 * t).sqrt(), rtol=1e-14) and not sde.drift(x, t).any()


@pytest.mark.parametrize("t_max", [1.0, 2.5])
def test_rectified_flow_is_a_straight_line(t_max):
    """Liu et al. (2023): x_t = (1 - t) x_0 + t eps, whose velocity eps - x_0 does not depend on t."""
    sde = RectifiedFlow(t_min=0.0, t_max=t_max)
    t = t_max * torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert torch.allclose(sde.alpha(t), torch.tensor([1.0, 0.7, 0.0]).double(), atol=1e-15)
    assert torch.allclose(sde.sigma(t), torch.tensor([0.0, 0.3, 1.0]).double(), atol=1e-15)
    at = sde.coefficients(t)
    assert torch.allclose(at.d_alpha, -torch.ones(3).double() / t_max) and torch.allclose(at.d_sigma, -at.d_alpha)
    inner = t[1:2]
    u = inner / t_max
    one = torch.ones(1, 1, dtype=t.dtype)
    assert close(sde.drift(one, inner), -1 / (1 - u) / t_max) and close(
        sde.diffusion(inner) ** 2, 2 * u / (1 - u) / t_max
    )
    assert sde.log_snr(t).tolist()[::2] == [math.inf, -math.inf] and sde.log_snr_range == (-14.0, 20.0)


@pytest.mark.parametrize("row", ["noise", "data", "v", "velocity", "score", "edm"])
@pytest.mark.parametrize("sde", [RectifiedFlow(t_min=0.0), Cosine()], ids=str)
def test_a_network_is_finite_at_both_ends_of_time(sde, row):
    """Also where alpha or sigma is 0: pair and velocity are finite, and the pair keeps the invariant."""
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=16, depth=1), sde, row).double()
    torch.nn.init.normal_(model.net.last[-1].weight)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    for t in (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max)):
        pair, velocity = model(x, t), model.velocity(x, t)
        assert all(bool(torch.isfinite(part).all()) for part in (*pair, velocity)), t
        assert torch.allclose(sde.alpha(t) * pair.x0 + sde.sigma(t) * pair.eps, x, atol=1e-10), t
    near = model(x, torch.tensor(last_time(sde), dtype=torch.float64))
    assert (near.x0 - pair.x0).norm() < 0.02 * (1 + near.x0.norm())  # the last pair is that of t_max


# The learned schedule.


def test_a_learned_schedule_keeps_its_ends_and_starts_as_nearly_a_line():
    sde = LearnedSchedule(log_snr_max=8.0, log_snr_min=-6.0, t_max=2.0)
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    found = sde.log_snr(t).detach()
    assert float(found[0]) == pytest.approx(8, rel=1e-12) and float(found[-1]) == pytest.approx(-6, rel=1e-12)
    assert (found - torch.linspace(8, -6, 9)).abs().max() < 1
    moved = learned(log_snr_max=8.0, log_snr_min=-6.0, t_max=2.0).log_snr(t)
    assert (moved - found).abs().max() > 0.3 and torch.allclose(moved[[0, -1]], found[[0, -1]], rtol=1e-12)
    assert torch.allclose(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, torch.ones(9).double(), rtol=1e-14)


def test_any_parameters_give_a_falling_log_snr():
    sde = LearnedSchedule(hidden=5).requires_grad_(False)
    for seed in range(5):
        for i, parameter in enumerate((sde.slopes, sde.weights)):
            parameter.copy_(20 * Noise(seed).normal((1, 5), i)[0])
        log_snr = sde.log_snr(torch.linspace(0, 1, 201, dtype=torch.float64))
        assert bool((log_snr.diff() < 0).all()) and bool((log_snr >= -10.0001).all()), seed


def test_coefficients_carry_the_gradient_to_the_parameters_of_a_schedule():
    """d/dp of drift and diffusion, against finite differences."""
    sde, t = LearnedSchedule(hidden=4), torch.tensor([0.2, 0.7], dtype=torch.float64)
    sde.double()
    value = (sde.coefficients(t).rate + sde.coefficients(t).diffusion_squared).sum()
    gradients = torch.autograd.grad(value, list(sde.parameters()))
    for parameter, gradient in zip(sde.parameters(), gradients, strict=True):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[1] += h
                values.append(float((sde.coefficients(t).rate + sde.coefficients(t).diffusion_squared).sum()))
                parameter[1] -= h
        assert float(gradient[1]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert not sde.requires_grad_(False).coefficients(t).alpha.requires_grad


def test_a_schedule_moves_and_is_saved_with_its_model():
    model = ScoreNetwork(MLP((2,), width=8, depth=1), LearnedSchedule(hidden=3))
    assert {name for name, _ in model.named_parameters() if name.startswith("sde.")} == {
        "sde.centres",
        "sde.slopes",
        "sde.weights",
    }
    other = ScoreNetwork(MLP((2,), width=8, depth=1), learned(hidden=3))
    other.load_state_dict(model.state_dict())
    t = torch.tensor(0.4)
    assert torch.equal(other.sde.log_snr(t), model.sde.log_snr(t))
    assert other.double().sde.log_snr(t).dtype == torch.float32  # t carries the precision


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"log_snr_min": 14.0}, "log_snr_min must be smaller than log_snr_max"),
        ({"hidden": 0}, "hidden must be a positive number"),
        ({"hidden": 2.5}, "hidden must be an integer, found 2.5"),
        ({"log_snr_max": math.nan}, "log_snr_max must be a finite number, found nan"),
        ({"log_snr_min": "low"}, "log_snr_min must be a finite number, found 'low'"),
        ({"t_min": 2.0}, "t_min must be smaller than t_max"),
    ],
)
def test_what_is_no_schedule_is_refused(arguments, words):
    with pytest.raises(ValueError, match=f"LearnedSchedule: {words}"):
        LearnedSchedule(**arguments)


# Traps: faults that other implementations have.


def test_b10_the_kernel_of_ve_and_its_diffusion_belong_together():
    """sigma(t)^2 - sigma(s)^2 is the integral of g^2, from t_min on: sigma_min of noise is in the data already."""
    sde = VE()
    s, t = (torch.tensor(u, dtype=torch.float64) for u in (sde.t_min, 1e-3))
    grid = torch.linspace(float(s), float(t), 10_001, dtype=torch.float64)
    added = torch.trapezoid(sde.diffusion(grid) ** 2, grid)
    assert float(sde.kernel(s, t).std ** 2) == pytest.approx(float(added), rel=1e-7)
    assert float(sde.sigma(t) ** 2 - sde.sigma(s) ** 2) == pytest.approx(float(added), rel=1e-7)


@pytest.mark.parametrize("cls", [VP, SubVP, Cosine])
def test_b13_small_sigma_has_no_cancellation_and_no_step_in_float32(cls):
    t = torch.logspace(-8, -2, 601, dtype=torch.float64).float()
    found, exact = cls().sigma(t), cls().sigma(t.double())
    assert ((found - exact) / exact).abs().max() < 1e-6
    smooth = (found[1:] / found[:-1]).double() / (exact[1:] / exact[:-1])
    assert (smooth - 1).abs().max() < 1e-6


@pytest.mark.parametrize("cls", [cls for cls in SDE_CLASSES if cls is not EDM])
@pytest.mark.parametrize("t_max", [0.5, 3.0])
def test_b24_another_t_max_is_in_the_diffusion_too(cls, t_max):
    """Whatever t_max, the noise at the end is the same, and the integral of g^2 / sigma^2, the range of log-SNR."""
    sde, slow = make(cls), make(cls, t_max=t_max, t_min=1e-5 * t_max)
    assert slow.log_snr_range == pytest.approx(sde.log_snr_range, abs=1e-9)
    middle = torch.tensor(0.4, dtype=torch.float64)
    assert float(slow.diffusion(t_max * middle) ** 2) == pytest.approx(float(sde.diffusion(middle) ** 2 / t_max))


GOLDEN = {  # log(sigma / alpha) at half of the clock
    VP: 1.2275677,
    SubVP: 1.1863855,
    VE: -0.3465736,
    Cosine: 0.0123134,
    RectifiedFlow: 0.0,
    EDM: 3.688879454,
}


@pytest.mark.parametrize("sde", [cls() for cls in GOLDEN], ids=str)
def test_b22_training_and_sampling_show_the_network_the_same_label(sde):
    """The noise level itself, whatever clock, index or batch it came from."""
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x, label):
            seen.append(label)
            return x

    model = ScoreNetwork(Probe(), sde).double()
    t = torch.tensor(0.5 * sde.t_max, dtype=torch.float64)
    x = torch.zeros(3, 2, dtype=torch.float64)
    for time in (t, t.expand(3), t.expand(3).clone()):
        model(x, time)
        assert torch.allclose(seen.pop(), torch.full((3,), GOLDEN[type(sde)], dtype=t.dtype), atol=1e-6), sde
    at_level = model.at_level(x, sde.alpha(t), sde.sigma(t))
    assert torch.allclose(seen.pop(), torch.full((3,), GOLDEN[type(sde)], dtype=t.dtype), atol=1e-6) and at_level


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_derivatives_in_inference_mode_are_those_outside(sde):
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    expected = sde.diffusion(t)
    with torch.inference_mode():
        assert torch.equal(sde.diffusion(t), expected)
        assert torch.equal(sde.diffusion(t.clone()), expected) and bool((expected > 0).all())
