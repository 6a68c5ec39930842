"""What the ends of time cost: closed forms, known numbers, and advice that works when followed."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from oracles import SDES, legendre

from sde import (
    EDM,
    SDE,
    VE,
    VP,
    Cosine,
    DiagnosisWarning,
    LearnedSchedule,
    RectifiedFlow,
    Rescaled,
    SubVP,
    TimeChanged,
    diagnose,
    exploding,
)
from sde.diagnosis import PRIOR_BOUND, TRUNCATION_BOUND, truncation

UNIT = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
"""Mean 0, variance 1 in both dimensions, exactly."""


def normal(x, mean, std):
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_prior_mismatch_is_the_divergence_of_the_kernel_from_the_prior(sde):
    """Against quadrature of q log(q / p), for data off the origin and of unequal variances."""
    data = torch.tensor([[0.5, -2.0], [1.5, 1.0], [-0.25, 0.5]], dtype=torch.float64)
    t = torch.tensor(sde.t_max, dtype=torch.float64)
    alpha, sigma = float(sde.alpha(t).detach()), float(sde.sigma(t).detach())

    def divergence(mean, std):
        def integrand(x):
            q, p = normal(x, mean, std), normal(x, 0.0, sde.prior_std)
            return q * torch.log(q / p)

        return legendre(integrand, mean - 12 * std, mean + 12 * std)

    found = diagnose(sde, data, quiet=True)
    points = [divergence(alpha * x, sigma) for x in data.flatten().tolist()]
    assert found.prior_kl == pytest.approx(sum(points) / len(points), abs=1e-9), sde
    moments = zip(data.mean(0).tolist(), data.var(0, correction=0).tolist(), strict=True)
    matched = [divergence(alpha * mean, math.sqrt(alpha**2 * v + sigma**2)) for mean, v in moments]
    assert found.prior_kl_matched == pytest.approx(sum(matched) / 2, abs=1e-9), sde
    assert found.prior_kl_matched <= found.prior_kl


def test_the_prior_mismatch_of_vp_is_the_known_number():
    assert diagnose(VP(), UNIT).prior_kl == pytest.approx(2.16e-5, rel=2e-3)
    assert diagnose(RectifiedFlow(), UNIT).prior_kl == 0
    assert diagnose(VE(), UNIT, quiet=True).prior_kl == pytest.approx(0.5 / 50**2, rel=1e-9)


@pytest.mark.parametrize(
    ("sde", "bins", "bits"),
    [
        (VP(t_min=1e-6), 1 / 128, 0.056),
        (VP(t_min=1e-5), 1 / 128, 0.177),
        (VP(t_min=1e-4), 1 / 128, 0.575),
        (VP(t_min=1e-3), 1 / 128, 1.82),
        (VP(t_min=1e-2), 1 / 128, 3.84),
        (SubVP(t_min=1e-6), 1 / 128, 0.0000),
        (SubVP(t_min=1e-5), 1 / 128, 0.0001),
        (SubVP(t_min=1e-4), 1 / 128, 0.002),
        (SubVP(t_min=1e-3), 1 / 128, 0.019),
        (SubVP(t_min=1e-2), 1 / 128, 0.35),
        (VE(sigma_min=0.01), 1 / 256, 2.70),
        (VE(sigma_min=0.002), 1 / 256, 0.74),
        (VE(sigma_min=1e-3), 1 / 256, 0.35),
        (VE(sigma_min=1e-4), 1 / 256, 0.035),
    ],
    ids=str,
)
def test_the_cost_of_the_noise_at_t_min(sde, bins, bits):
    assert truncation(sde, bins) == pytest.approx(bits, rel=0.01, abs=6e-4)
    found = diagnose(sde, UNIT, bins, quiet=True)
    assert found.truncation_bits == truncation(sde, bins)
    assert found.truncation_nats == pytest.approx(found.truncation_bits * math.log(2), rel=1e-15)


def test_no_noise_at_t_min_costs_nothing_and_no_bins_have_no_cost():
    assert truncation(RectifiedFlow(t_min=0), 1 / 128) == 0
    found = diagnose(VP(), UNIT)
    assert found.truncation_bits is None and found.truncation_nats is None and found.warnings == ()


@pytest.mark.parametrize(
    ("sde", "names"),
    [
        (VP(beta_max=5.0), ("t_min", "beta_max")),
        (SubVP(t_min=1e-2, beta_max=5.0), ("t_min", "beta_max")),
        (VE(sigma_max=3.0), ("sigma_min", "sigma_max")),
        (EDM(t_max=3.0), ("t_min", "t_max")),
    ],
    ids=str,
)
def test_following_the_advice_mends_both_ends(sde, names):
    for end, name in enumerate(names):
        sentence = diagnose(sde, UNIT, 1 / 128, quiet=True).warnings[0]
        assert ("t_max" if end else "t_min") in sentence and sentence.endswith("would do"), sentence
        assert f"; {('lower', 'raise')[end]} {name}: {name}=" in sentence
        sde = replace(sde, **{name: float(sentence.split("=")[1].split()[0])})
    found = diagnose(sde, UNIT, 1 / 128)
    assert found.warnings == ()
    assert PRIOR_BOUND / 3 < found.prior_kl <= PRIOR_BOUND  # a value that would do, and no more
    assert TRUNCATION_BOUND / 3 < found.truncation_bits <= TRUNCATION_BOUND


@pytest.mark.parametrize(
    ("sde", "words"),
    [
        (Cosine(t_min=1e-3), ["lower t_min: t_min="]),
        (RectifiedFlow(t_min=1e-2), ["lower t_min: t_min="]),
        (LearnedSchedule(log_snr_min=-5.0), ["raise log_snr_max", "lower log_snr_min"]),
        (TimeChanged(VP(beta_max=5.0), torch.square), ["lower t_min of its VP", "raise beta_max of its VP"]),
        (exploding(TimeChanged(VE(sigma_max=3.0), torch.square)), ["lower sigma_min of its VE", "raise sigma_max of"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_process_has_cures_of_its_own(sde, words):
    found = diagnose(sde, UNIT, 1 / 128, quiet=True).warnings
    assert len(found) == len(words)
    for sentence, cure in zip(found, words, strict=True):
        assert cure in sentence


def test_warnings_are_issued_with_number_and_threshold_unless_quiet():
    with pytest.warns(DiagnosisWarning) as caught:
        found = diagnose(VP(beta_max=5.0), UNIT, 1 / 128)
    assert tuple(str(w.message) for w in caught) == found.warnings
    assert "0.176 bits/dim, more than 0.02" in found.warnings[0]
    assert "0.0406 nats/dim" in found.warnings[1] and "more than 0.001" in found.warnings[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnose(VP(beta_max=5.0), UNIT, 1 / 128, quiet=True)
    text = str(found)
    for words in ("log-SNR", "-2.469 at t_max", "0.0406 nats/dim", "0.176 bits/dim", "warning: the prior"):
        assert words in text


def test_integers_scalars_and_images_are_data_too():
    levels = torch.randint(0, 256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = diagnose(VP(), levels, quiet=True)
    assert whole.prior_kl == pytest.approx(diagnose(VP(), levels.double(), quiet=True).prior_kl, rel=1e-5)
    assert diagnose(VP(), torch.tensor([1.0, -1.0])).prior_kl == pytest.approx(2.16e-5, rel=2e-3)


class Quartic(SDE):
    t_min, t_max = 1e-3, 1.0

    def drift(self, x, t):
        return -(x**3)

    def diffusion(self, t):
        return torch.ones_like(t)

    def prior(self, shape):
        return None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((Quartic(), UNIT), TypeError, "expected a GaussianSDE such as VP.., found Quartic"),
        ((VP(), torch.empty(0, 3)), ValueError, r"found shape \(0, 3\)"),
        ((VP(), torch.tensor(1.0)), ValueError, r"found shape \(\)"),
        ((VP(), [1.0]), ValueError, "found list"),
        ((VP(), torch.tensor([1.0, math.nan])), ValueError, "found 1 values of 2"),
        ((VP(), UNIT, 0), ValueError, "bin_width must be positive, .* found 0"),
        ((VP(), UNIT, -1.0), ValueError, "bin_width must be positive"),
        ((VP(), UNIT, math.nan), ValueError, "bin_width must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_one_clear_error(arguments, error, words):
    with pytest.raises(error, match=words):
        diagnose(*arguments)


def test_the_noise_at_t_min_counts_in_units_of_the_data():
    """A process of 2 x has twice the noise on twice the data: the same bins are as hard to tell apart."""
    doubled = Rescaled(VP(), lambda t: 2 + 0 * t)
    assert truncation(doubled, 1 / 128) == pytest.approx(truncation(VP(), 1 / 128), rel=1e-12)
