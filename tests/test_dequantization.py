import math

import numpy as np
import pytest
import torch
from oracles import CORE_SDES, learned, legendre

from experiments import centres
from experiments.centres import DiscreteDecoder, TruncatedNormal
from experiments.dequantization import Uniform
from experiments.variational import Variational
from sde import VE, VP, Noise, RectifiedFlow, SubVP

RANGES = [(-1.0, 1.0), (0.0, 1.0), (-0.37, 2.9), (5.0, 5.1), (-3, 7)]
DEQUANTIZERS = [Uniform(levels, low, high) for levels in (2, 17, 256, 1000) for low, high in RANGES]
each = pytest.mark.parametrize("dequantizer", DEQUANTIZERS, ids=str)


@each
def test_uniform_density_has_log2_levels_bits(dequantizer):
    dimensions = 784
    log_prob = torch.full((3,), -dimensions * math.log(dequantizer.high - dequantizer.low), dtype=torch.float64)
    bits = dequantizer.bits_per_dim(log_prob, dimensions)
    assert bits.shape == (3,)
    assert (bits - math.log2(dequantizer.levels)).abs().max() < 1e-9, dequantizer


def test_uniform_256_levels_have_8_bits_in_any_scaling():
    for low, high in RANGES:
        log_prob = torch.tensor(-3072 * math.log(high - low), dtype=torch.float64)
        assert abs(Uniform(256, low, high).bits_per_dim(log_prob, 3072).item() - 8) < 1e-9


@each
def test_round_trip(dequantizer):
    k = torch.arange(dequantizer.levels).repeat(50).view(2, 25, -1)
    x = dequantizer.dequantize(k, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.shape == k.shape
    assert torch.equal(dequantizer.quantize(x).long(), k), dequantizer
    assert torch.equal(dequantizer.quantize(x.double()).long(), k), dequantizer
    assert x.min() >= dequantizer.low and x.max() < dequantizer.high, dequantizer


@each
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_extreme_draws_stay_in_their_bin(dequantizer, u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
    k = torch.arange(dequantizer.levels)
    x = dequantizer.dequantize(k).double()
    exact = dequantizer.low + (dequantizer.high - dequantizer.low) * torch.arange(dequantizer.levels + 1).double() / (
        dequantizer.levels
    )
    assert (x >= exact[:-1]).all() and (x < exact[1:]).all(), dequantizer
    assert torch.equal(dequantizer.quantize(x.float()).long(), k), dequantizer


def test_draws_are_uniform_in_the_bin():
    dequantizer = Uniform(17)
    x = dequantizer.dequantize(torch.full((100_000,), 5), torch.Generator().manual_seed(0)).double()
    u = (x + 1) / dequantizer.bin_width - 5
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert abs(u.var() - 1 / 12) < 0.002


def test_quantize_clamps_and_keeps_the_type_small():
    x = torch.tensor([-torch.inf, -9.0, -1.0, 0.0, 0.999, 1.0, 9.0, torch.inf])
    assert Uniform(256).quantize(x).tolist() == [0, 0, 0, 128, 255, 255, 255, 255]
    assert Uniform(256).quantize(x).dtype == torch.uint8
    assert Uniform(257).quantize(x).dtype == torch.int32
    assert Uniform(256).quantize(x.bfloat16()).dtype == torch.uint8


def test_seed_decides_the_draw():
    dequantizer, k = Uniform(17), torch.arange(17, dtype=torch.uint8)
    draw = [dequantizer.dequantize(k, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_bound_holds_and_is_tight_for_a_density_that_is_flat_in_bins():
    dequantizer = Uniform(4, -2.0, 3.0)
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_density = (probability / dequantizer.bin_width).log()
    assert torch.allclose(log_density + dequantizer.log_volume(1), probability.log(), atol=1e-12)


@pytest.mark.parametrize(
    "arguments", [(1,), (2.5,), (True,), (17, 1.0, 1.0), (17, 1.0, -1.0), (17, 0.0, math.inf), (17, math.nan, 1.0)]
)
def test_refuses_bad_parameters(arguments):
    with pytest.raises(ValueError, match=r"expected .*found"):
        Uniform(*arguments)


def test_refuses_a_range_too_narrow_for_float32():
    with pytest.raises(ValueError, match="float32 can tell apart"):
        Uniform(256, 1e6, 1e6 + 1)


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (torch.zeros(3), "dequantize only once"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool"),
        (torch.tensor([0, 17]), r"found 0\.\.17"),
        (torch.tensor([-1, 3]), r"found -1\.\.3"),
        (torch.tensor([255], dtype=torch.uint8), r"levels 0\.\.16, found 255"),
    ],
)
def test_refuses_bad_levels(k, words):
    with pytest.raises(ValueError, match=words):
        Uniform(17).dequantize(k)


def test_refuses_nan():
    with pytest.raises(ValueError, match="found 1 NaN"):
        Uniform(17).quantize(torch.tensor([0.0, torch.nan]))


# ---------------------------------------------------------------------------------------------------------------------
# Every dequantizer, with bins that are much wider than the noise, about as wide, and narrower.

SPREADS = (1e-3, 0.02, 0.3)
AROUND = [kind(64, -0.5, 1.5, std, 0.9) for kind in (TruncatedNormal, DiscreteDecoder) for std in SPREADS]


def all_kinds(shape, levels=17):
    """One of each kind, for samples of a shape."""
    around = [kind.of(VP(t_min=1e-3), levels) for kind in (TruncatedNormal, DiscreteDecoder)]
    return [Uniform(levels), *around, *([disturbed(Variational(levels, -1.0, 1.0, shape))] if shape else [])]


def disturbed(flow, seed=0):
    """A dequantizing flow with parameters as training might leave them."""
    for i, parameter in enumerate(flow.parameters()):
        parameter.data += 0.1 * Noise(seed + i).normal((1, parameter.numel())).reshape(parameter.shape)
    return flow.eval()


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (1, 4, 4)], ids=str)
def test_a_sample_s_draw_does_not_depend_on_its_batch(shape):
    k = torch.from_numpy(np.random.default_rng(0).integers(0, 17, (9, *shape)))
    for dequantizer in all_kinds(shape):
        whole, part = dequantizer.draw(k, seed=4, number=2), dequantizer.draw(k[5:], seed=4, number=2, first=5)
        assert whole.x.shape == k.shape and whole.x.dtype == torch.float32, dequantizer
        assert whole.log_weight.shape == (9,) and whole.log_weight.dtype == torch.float64, dequantizer
        assert torch.allclose(part.x, whole.x[5:], rtol=0, atol=1e-6), dequantizer
        assert torch.allclose(part.log_weight, whole.log_weight[5:], rtol=0, atol=1e-3), dequantizer
        for other in (dequantizer.draw(k, 5, 2), dequantizer.draw(k, 4, 3), dequantizer.draw(k, 4, 2, first=1)):
            # Of so many numbers two may meet, but no more.
            assert torch.isclose(other.x, whole.x, rtol=0, atol=1e-6).sum() <= 1, dequantizer


@pytest.mark.parametrize("scaling", [(0.0, 1.0), (-1.0, 1.0), (-0.4242, 2.8215)], ids=str)
def test_uniform_data_have_exactly_log2_levels_bits(scaling):
    k, dimensions = torch.arange(256).repeat(3, 1), 256
    low, high = scaling
    flat = torch.full((3,), -dimensions * math.log(high - low), dtype=torch.float64)
    # Levels of equal probability at their centres, as they are at t_min: the posterior takes the density back exactly.
    decoder = DiscreteDecoder.of(VP(t_min=1e-2), 256, low, high)
    drawn = decoder.draw(k)
    z = (drawn.x.double()[..., None] - decoder.alpha * decoder.centres(torch.arange(256), torch.float64)) / decoder.std
    normal = -0.5 * z.square() - math.log(decoder.std * math.sqrt(2 * math.pi) * 256)
    for log_prob, weight in (
        (flat, Uniform(256, low, high).draw(k).log_weight),
        (flat, Variational(256, low, high, (256,)).draw(k).log_weight),
        (normal.logsumexp(-1).sum(1), drawn.log_weight),
    ):
        bits = -(log_prob + weight) / (dimensions * math.log(2))
        assert (bits - 8).abs().max() < 1e-9, (low, high)


def test_a_change_of_units_is_its_log_determinant():
    k, scale, shift = torch.arange(17).repeat(5, 1), 3.7, -0.4
    for kind, more in ((Uniform, ()), (TruncatedNormal, (0.03,)), (DiscreteDecoder, (0.03,))):
        one = kind(17, -1.0, 1.0, *more).draw(k)
        other = kind(17, shift - scale, shift + scale, *(scale * value for value in more)).draw(k)
        assert torch.allclose(other.x, scale * one.x + shift, rtol=0, atol=2e-6), kind
        difference = other.log_weight - one.log_weight
        assert torch.allclose(difference, torch.tensor(17 * math.log(scale)).double(), rtol=0, atol=3e-3), kind


# ---------------------------------------------------------------------------------------------------------------------
# What the noise at t_min costs a value that is certain, with the exact score; bits.


def cost(dequantizer, log_density, level=100, size=200_000):
    """The mean of -log2 P(k) >= 0 for one value of probability 1, and its standard error."""
    drawn = dequantizer.draw(torch.full((size, 1), level), seed=1)
    bits = -(log_density(drawn.x.double().squeeze(1)) + drawn.log_weight) / math.log(2)
    return float(bits.mean()), float(bits.std() / math.sqrt(size))


def ends(sde):
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    return float(sde.alpha(t)), float(sde.sigma(t))


def normal_at(place, sde):
    alpha, sigma = ends(sde)
    return torch.distributions.Normal(torch.tensor(alpha * place, dtype=torch.float64), sigma).log_prob


def smeared_bin(bins, sde, level=100):
    (alpha, sigma), edge = ends(sde), bins.low + bins.bin_width * level

    def log_density(x):
        lower, upper = ((x - alpha * e) / sigma for e in (edge, edge + bins.bin_width))
        return torch.log((torch.special.ndtr(lower) - torch.special.ndtr(upper)) / (alpha * bins.bin_width))

    return log_density


@pytest.mark.parametrize(
    ("sde", "low", "bits"),
    [
        (VP(t_min=1e-6), -1.0, 0.056),
        (VP(t_min=1e-5), -1.0, 0.177),
        (VP(t_min=1e-4), -1.0, 0.575),
        (VP(t_min=1e-3), -1.0, 1.82),
        (SubVP(t_min=1e-4), -1.0, 0.002),
        (SubVP(t_min=1e-2), -1.0, 0.35),
        (VE(sigma_min=0.01), 0.0, 2.70),
        (VE(sigma_min=0.002), 0.0, 0.74),
        (VE(sigma_min=0.001), 0.0, 0.35),
    ],
    ids=str,
)
def test_what_noise_at_t_min_costs_uniform_values(sde, low, bits):
    bins = Uniform(256, low, 1.0)
    found, error = cost(bins, smeared_bin(bins, sde))
    assert abs(found - bits) < 0.5 * 10 ** -len(str(bits).split(".")[1]) + 3 * error, found


@pytest.mark.parametrize(("t_min", "bits"), [(1e-5, 0.0001), (1e-4, 0.36), (1e-3, 1.78)])
def test_what_it_costs_a_truncated_normal(t_min, bits):
    sde = VP(t_min=t_min)
    dequantizer = TruncatedNormal.of(sde, 256)
    found, error = cost(dequantizer, normal_at(float(dequantizer.centres(torch.tensor(100), torch.float64)), sde))
    assert abs(found - bits) < 0.6 * 10 ** -len(str(bits).split(".")[1]), found
    assert error < 1e-12 and found == pytest.approx(-math.log2(dequantizer.mass), abs=1e-9)


@pytest.mark.parametrize(("t_min", "bits"), [(1e-5, 0.0004), (1e-4, 0.75), (1e-3, 2.47)])
def test_what_it_costs_a_decoder(t_min, bits):
    """E log2 of the shares of all levels in units of the true one's: more than the mass that the bin has lost."""
    sde = VP(t_min=t_min)
    decoder, m = DiscreteDecoder.of(sde, 256), torch.arange(-100, 156).double()[:, None]
    found, error = cost(decoder, normal_at(float(decoder.centres(torch.tensor(100), torch.float64)), sde))

    def expected(z):
        shares = (m * decoder.spacing * z - 0.5 * (m * decoder.spacing).square()).exp().sum(0)
        return shares.log2() * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)

    exact = legendre(expected, -9.0, 9.0)
    assert abs(exact - bits) < 0.6 * 10 ** -len(str(bits).split(".")[1]) and abs(found - exact) < 4 * error
    assert exact > -math.log2(TruncatedNormal.of(sde, 256).mass)


def test_a_model_of_other_values_than_it_is_evaluated_on_costs_many_bits():
    """What ``trained_on`` is there to refuse: levels at an edge of their bin, and at its centre."""
    sde, bins = VP(), Uniform(256)
    for place, bits in ((0.0, 13.0), (0.5, 2.03)):
        found, error = cost(bins, normal_at(bins.low + bins.bin_width * (100 + place), sde))
        assert abs(found - bits) < 0.05 + 3 * error, (place, found)


# ---------------------------------------------------------------------------------------------------------------------
# Around centres.


@pytest.mark.parametrize("dequantizer", AROUND[:3], ids=str)
def test_the_truncated_normal_has_its_entropy(dequantizer):
    k = torch.arange(64)[:, None].repeat(1, 500)
    drawn = dequantizer.draw(k)
    error = float(drawn.log_weight.std()) / 8
    assert abs(float(drawn.log_weight.mean()) - 500 * dequantizer.entropy) < 4 * error + 1e-9
    tau, normal = 0.5 * dequantizer.spacing, torch.distributions.Normal(0.0, 1.0)

    def density(z):
        return normal.log_prob(z).exp() / dequantizer.mass

    reach = min(tau, 12.0)
    assert legendre(density, -reach, reach) == pytest.approx(1.0, abs=1e-12)
    entropy = legendre(lambda z: -density(z) * density(z).log(), -reach, reach) + math.log(dequantizer.std)
    assert dequantizer.entropy == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("dequantizer", AROUND[:3], ids=str)
@pytest.mark.parametrize("u", [2.0**-33, 0.5, 1 - 2.0**-33])
def test_the_truncated_normal_stays_in_its_bin(dequantizer, u, monkeypatch):
    k = torch.arange(64)[:, None]
    monkeypatch.setattr(centres, "uniforms", lambda k, *_: torch.full(k.shape, u, dtype=torch.float64))
    drawn = dequantizer.draw(k)
    bins = Uniform(64, 0.9 * dequantizer.low, 0.9 * dequantizer.high)
    assert torch.equal(bins.quantize(drawn.x).long(), k)
    assert drawn.log_weight.isfinite().all()


@pytest.mark.parametrize("dequantizer", AROUND[3:], ids=str)
def test_the_decoder_s_posterior_is_the_softmax_over_all_levels(dequantizer):
    k = torch.arange(64)[:, None].repeat(1, 40)
    x, weight = dequantizer.draw(k)
    means = dequantizer.alpha * dequantizer.centres(torch.arange(64), torch.float64)
    log_normal = torch.distributions.Normal(means, dequantizer.std).log_prob(x.double()[..., None])
    own = log_normal.gather(-1, k[..., None]).squeeze(-1)
    expected = (log_normal.log_softmax(-1).gather(-1, k[..., None]).squeeze(-1) - own).sum(1)
    assert torch.allclose(weight, expected, rtol=1e-12, atol=1e-10)


def test_the_decoder_s_posterior_is_exact_for_the_most_extreme_draws():
    k, apart = torch.tensor([0, 1, 31, 62, 63]), torch.arange(64) - torch.tensor([0, 1, 31, 62, 63])[:, None]
    for dequantizer in AROUND[3:]:
        for z in (-6.8, 6.8):
            expected = (-0.5 * (z - apart.double() * dequantizer.spacing).square()).log_softmax(1)
            expected = expected.gather(1, k[:, None]).squeeze(1)
            found = dequantizer._log_posterior(k, torch.full((5,), z, dtype=torch.float64))
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14), (dequantizer, z)


def test_both_are_read_off_a_process():
    for sde in (*CORE_SDES, learned()):
        for kind in (TruncatedNormal, DiscreteDecoder):
            found = kind.of(sde, 256, 0.0, 1.0)
            assert (found.alpha, found.std) == pytest.approx(ends(sde), rel=1e-12)
            assert (found.levels, found.low, found.high, found.trained_on) == (256, 0.0, 1.0, "centres")


@pytest.mark.parametrize("kind", [TruncatedNormal, DiscreteDecoder])
def test_noise_that_can_t_be_is_refused(kind):
    for std in (0.0, -1.0, math.nan, math.inf, 1e-8):
        with pytest.raises(ValueError, match=r"std: expected .*1.2e-07.*found .*raise t_min"):
            kind(256, -1.0, 1.0, std)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha: expected a positive number"):
            kind(256, -1.0, 1.0, 0.1, alpha)
    with pytest.raises(ValueError, match="levels: expected"):
        kind(1, -1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="raise t_min"):
        kind.of(RectifiedFlow(t_min=0.0), 256)
    with pytest.raises(ValueError, match=r"found 0\.\.17"):
        kind(17, -1.0, 1.0, 0.1).draw(torch.tensor([[0, 17]]))
