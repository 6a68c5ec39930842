import math

import pytest
import torch

from experiments.dequantization import Uniform

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
