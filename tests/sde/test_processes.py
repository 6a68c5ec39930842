"""Every Gaussian process: moments, drift, diffusion, kernel, log-SNR, prior, and what is refused."""

import inspect
import math

import mpmath
import pytest
import torch
from oracles import ALL_SDES, PAPER_SDES, SDE_CLASSES, SDES, at_ends, legendre, make, paper, times

from sde import EDM, VE, VP, GaussianPrior, SubVP
from sde.base import last_time


def integral(function, start, end):
    """Quadrature with points that crowd at both ends."""

    def substituted(v):
        return function(start + (end - start) * v * v * (3 - 2 * v)) * (end - start) * 6 * v * (1 - v)

    return legendre(substituted, 0.0, 1.0)


def rate(sde, t):
    """f(x, t) / x."""
    return sde.drift(torch.ones(len(t), 1, dtype=t.dtype), t)[:, 0]


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_mean_follows_the_drift(sde):
    """m' = f m from t_min on."""
    start = torch.tensor(sde.t_min, dtype=torch.float64)
    for fraction in (0.1, 0.4, 1.0):
        end = torch.tensor(fraction * last_time(sde), dtype=torch.float64)
        expected = sde.alpha(start) * math.exp(integral(lambda t: rate(sde, t), sde.t_min, float(end)))
        assert float(sde.alpha(end)) == pytest.approx(float(expected), rel=1e-9), (sde, fraction)


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_variance_follows_drift_and_diffusion(sde):
    """v' = 2 f v + g^2 from t_min on; solved as v = m^2 (v_0 / m_0^2 + integral of g^2 / m^2)."""
    start = torch.tensor(sde.t_min, dtype=torch.float64)
    for fraction in (0.1, 0.4, 1.0):
        end = torch.tensor(fraction * last_time(sde), dtype=torch.float64)
        added = integral(lambda t: (sde.diffusion(t) / sde.alpha(t)) ** 2, sde.t_min, float(end))
        expected = sde.alpha(end) ** 2 * ((sde.sigma(start) / sde.alpha(start)) ** 2 + added)
        assert float(sde.sigma(end) ** 2) == pytest.approx(float(expected), rel=1e-9), (sde, fraction)


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_moments_satisfy_the_moment_equations(sde):
    t = times(sde).requires_grad_()
    (d_mean,) = torch.autograd.grad(sde.alpha(t).sum() + 0 * t.sum(), t)
    (d_variance,) = torch.autograd.grad(sde.sigma(t).square().sum(), t)
    f, g_squared, variance = rate(sde, t), sde.diffusion(t).square(), sde.sigma(t).square()
    assert (d_mean - f * sde.alpha(t)).abs().max() < 1e-12 * max(1, f.abs().max()), sde
    assert ((d_variance - 2 * f * variance - g_squared) / g_squared).abs().max() < 1e-12, sde


@pytest.mark.parametrize("sde", PAPER_SDES, ids=str)
def test_coefficients_are_those_of_the_paper(sde):
    for t in times(sde, 101).tolist():
        alpha, sigma, f, g_squared = paper(sde, t)
        at = torch.tensor(t, dtype=torch.float64)
        x = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
        assert float(sde.alpha(at)) == pytest.approx(alpha, rel=1e-12), (sde, t)
        assert float(sde.sigma(at)) == pytest.approx(sigma, rel=1e-12), (sde, t)
        assert torch.allclose(sde.drift(x, at), f * x, rtol=1e-12, atol=1e-14), (sde, t)
        assert float(sde.diffusion(at)) == pytest.approx(math.sqrt(g_squared), rel=1e-11), (sde, t)


def high_precision_sigma(sde, t):
    t = mpmath.mpf(float(t)) / mpmath.mpf(sde.t_max)
    if isinstance(sde, VE):
        return mpmath.mpf(sde.sigma_min) * (mpmath.mpf(sde.sigma_max) / mpmath.mpf(sde.sigma_min)) ** t
    integral = t * (mpmath.mpf(sde.beta_min) + t * (mpmath.mpf(sde.beta_max) - mpmath.mpf(sde.beta_min)) / 2)
    variance = 1 - mpmath.exp(-integral)
    return variance if isinstance(sde, SubVP) else mpmath.sqrt(variance)


@pytest.mark.parametrize("sde", PAPER_SDES, ids=str)
def test_sigma_in_float32_is_accurate_at_any_time(sde):
    t = sde.t_max * torch.logspace(-8, 0, 801, dtype=torch.float64).float()
    found = sde.sigma(t)
    with mpmath.workdps(40):
        exact = [high_precision_sigma(sde, one) for one in t]
        errors = [abs(mpmath.mpf(float(a)) / b - 1) for a, b in zip(found, exact, strict=True)]
    assert float(max(errors)) < 1e-6, sde
    assert bool((found.diff() >= 0).all()), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_float32_agrees_with_float64(sde):
    t = times(sde, dtype=torch.float32)
    for name in ("alpha", "sigma", "diffusion"):
        exact = getattr(sde, name)(t.double())
        assert ((getattr(sde, name)(t) - exact) / exact).abs().max() < 3e-6, (sde, name)
    assert (rate(sde, t) - rate(sde, t.double())).abs().max() < 3e-6 * rate(sde, t.double()).abs().max() + 1e-30, sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_kernels_compose(sde):
    """The kernel from s to t after the one from 0 to s is the one from 0 to t."""
    points = times(sde, 9)
    s, t = (grid.flatten() for grid in torch.meshgrid(points, points, indexing="ij"))
    s, t = torch.minimum(s, t), torch.maximum(s, t)
    scale, std = sde.kernel(s, t)
    assert torch.allclose(scale * sde.alpha(s), sde.alpha(t), rtol=1e-13, atol=0), sde
    assert torch.allclose((scale * sde.sigma(s)) ** 2 + std**2, sde.sigma(t) ** 2, rtol=1e-13, atol=0), sde
    assert bool((std[s == t] == 0).all()), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_kernels_compose_through_a_third_time(sde):
    r, s, t = at_ends(sde)
    (first, noise1), (second, noise2), (whole, noise) = sde.kernel(r, s), sde.kernel(s, t), sde.kernel(r, t)
    assert torch.allclose(first * second, whole, rtol=1e-13, atol=0), sde
    assert torch.allclose((second * noise1) ** 2 + noise2**2, noise**2, rtol=1e-13, atol=0), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_kernel_in_float32_never_takes_the_root_of_a_negative_number(sde):
    s = times(sde, 2000, torch.float32)
    t = torch.nextafter(s, torch.full_like(s, 1e9))
    assert bool(torch.isfinite(sde.kernel(s, t).std).all()), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_log_snr_falls_and_gives_drift_and_diffusion(sde):
    t = times(sde).requires_grad_()
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() < 0).all()), sde
    assert torch.allclose(log_snr, torch.log(sde.alpha(t) ** 2 / sde.sigma(t) ** 2), rtol=0, atol=1e-12), sde
    (slope,) = torch.autograd.grad(log_snr.sum(), t)
    assert torch.allclose(sde.diffusion(t) ** 2, -(sde.sigma(t) ** 2) * slope, rtol=1e-10, atol=0), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_the_likelihood_weight_integrates_to_the_range_of_log_snr(sde):
    """The integral of g^2 / sigma^2 over any part of time is the fall of lambda over it."""
    start, end = 0.01 * sde.t_max, 0.99 * last_time(sde)
    found = integral(lambda t: (sde.diffusion(t) / sde.sigma(t)) ** 2, start, end)
    fall = sde.log_snr(torch.tensor(start, dtype=torch.float64)) - sde.log_snr(torch.tensor(end, dtype=torch.float64))
    assert found == pytest.approx(float(fall), rel=1e-8), sde


@pytest.mark.parametrize("sde", ALL_SDES, ids=str)
def test_time_inverts_log_snr(sde):
    t = times(sde)
    assert torch.allclose(sde.time(sde.log_snr(t)), t, rtol=1e-10, atol=0), sde
    t = times(sde, dtype=torch.float32)
    slope = (sde.diffusion(t) / sde.sigma(t)) ** 2  # neighbouring numbers t differ by 2^-23 t
    error = (sde.log_snr(sde.time(sde.log_snr(t))) - sde.log_snr(t)).abs()
    assert bool((error < 1e-5 + 3 * 2**-23 * t * slope).all()), sde
    beyond = sde.time(torch.tensor([1e3, -1e3], dtype=torch.float64))
    assert torch.allclose(beyond, torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)), sde


def test_subvp_variance_is_the_square_of_vp_variance():
    vp, sub = VP(), SubVP()
    t = times(vp)
    assert torch.allclose(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-13)
    assert bool((sub.sigma(t) <= vp.sigma(t)).all())
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert float(vp.sigma(tiny) ** 2 / tiny) == pytest.approx(vp.beta_min, rel=1e-6)


def test_ve_starts_from_sigma_min():
    """The variance of the kernel is sigma(t)^2, not sigma(t)^2 - sigma(0)^2: data live at sigma_min of noise."""
    sde = VE(sigma_min=0.02, sigma_max=30.0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(sde.sigma(ends), torch.tensor([0.02, 30.0], dtype=torch.float64), rtol=1e-13)
    added = legendre(lambda t: sde.diffusion(t) ** 2, 0.0, 1.0)
    assert added == pytest.approx(30.0**2 - 0.02**2, rel=1e-12)


@pytest.mark.parametrize("cls", [cls for cls in SDE_CLASSES if cls is not EDM])  # whose clock is the noise level
def test_another_t_max_changes_the_speed_alone(cls):
    sde, slow = make(cls), make(cls, t_max=3 * make(cls).t_max)
    t = times(sde)
    for name in ("alpha", "sigma", "log_snr"):
        assert torch.allclose(getattr(slow, name)(3 * t), getattr(sde, name)(t), rtol=1e-12, atol=1e-12), (cls, name)
    assert torch.allclose(3 * slow.diffusion(3 * t) ** 2, sde.diffusion(t) ** 2, rtol=1e-10, atol=0), cls
    assert torch.allclose(3 * rate(slow, 3 * t), rate(sde, t), rtol=1e-10, atol=1e-14), cls


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 5), (3, 2, 4, 4)], ids=str)
def test_times_broadcast_over_data_of_any_rank(sde, shape):
    x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    t = times(sde, 3)
    eps = x.flip(0) + 1
    drift, perturbed = sde.drift(x, t), sde.perturb(x, t, eps)
    for i in range(3):
        assert torch.allclose(sde.drift(x[i : i + 1], t[i]), drift[i : i + 1], rtol=1e-14), (sde, i)
        expected = sde.alpha(t[i]) * x[i] + sde.sigma(t[i]) * eps[i]
        assert torch.allclose(perturbed[i], expected, rtol=1e-13, atol=1e-15), (sde, i)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_no_graph_leaks_from_the_coefficients(sde):
    t = torch.tensor(0.3, requires_grad=True)
    with torch.no_grad():
        assert not sde.diffusion(t).requires_grad
    assert not any(c.requires_grad for c in sde.coefficients(t))
    with torch.inference_mode():
        assert bool(torch.isfinite(sde.diffusion(torch.tensor(0.3))))


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_prior_is_the_normal_distribution_at_t_max(sde):
    prior = sde.prior((4, 3, 2))
    x = prior.sample(seed=1, dtype=torch.float64)
    std = torch.tensor(prior.std, dtype=torch.float64)
    expected = torch.distributions.Normal(0 * std, std).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(prior.log_prob(x), expected, rtol=1e-13)
    assert float(sde.sigma(torch.tensor(sde.t_max, dtype=torch.float64))) == pytest.approx(prior.std, rel=1e-4), sde
    whole = sde.prior((100_000, 1)).sample(seed=2).square().mean().sqrt()
    assert float(whole) == pytest.approx(prior.std, rel=5 / math.sqrt(2 * 100_000))


def test_prior_density_integrates_to_one():
    prior = GaussianPrior((1, 1), 2.5)
    assert legendre(lambda x: prior.log_prob(x[:, None]).exp(), -40, 40) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("cls", SDE_CLASSES)
@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "1", None, torch.tensor(1.0)], ids=repr)
def test_what_is_not_a_positive_number_is_refused(cls, bad):
    elsewhere = ("log_snr_min", "log_snr_max", "learn_ends")  # may be negative, and a switch
    for name in inspect.signature(cls).parameters:
        if name not in elsewhere and not (name in cls.may_be_zero and bad == 0):
            with pytest.raises(ValueError, match=f"{cls.__name__}: {name} must be (a positive number|an integer)"):
                cls(**{name: bad})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VP(beta_min=3.0, beta_max=2.0), "VP: beta_min must be smaller than beta_max, found beta_min=3.0"),
        (lambda: SubVP(beta_min=3.0, beta_max=2.0), "SubVP: beta_min must be smaller than beta_max"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "VE: sigma_min must be smaller than sigma_max"),
        (lambda: VP(t_min=1.0), "VP: t_min must be smaller than t_max, found t_min=1.0, t_max=1.0"),
    ],
)
def test_numbers_in_the_wrong_order_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
