import itertools
import math

import pytest
import torch

from experiments.baselines import (
    LinearAutoregressive,
    all_baselines,
    full_covariance_gaussian,
    gaussian_mixture,
    histogram_log_marginals,
    linear_autoregressive,
    pixel_histogram,
)
from experiments.data import Data, digits
from experiments.dequantization import Uniform


def toy(n=6000, seed=0) -> Data:
    """Three levels, three pixels: the first skewed, the second a copy of the first, the third independent of both."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), n, replacement=True, generator=generator)
    third = torch.randint(0, 3, (n,), generator=generator)
    k = torch.stack([first, first, third], dim=1).to(torch.uint8).view(n, 1, 1, 3)
    return Data("toy", k[: n // 2], k[n // 2 : -n // 4], k[-n // 4 :], levels=3)


def entropy(*probabilities):
    return -sum(p * math.log2(p) for p in probabilities)


@pytest.mark.slow
def test_digits_baselines_are_the_documented_ones():
    found = all_baselines(digits(), Uniform(17))
    bits = {name: baseline.bits_per_dim for name, baseline in found.items()}
    expected = {"uniform": 4.087, "full_covariance_gaussian": 2.938, "pixel_histogram": 2.436}
    for name, value in expected.items():
        assert bits[name] == pytest.approx(value, abs=2e-3), name
    assert bits["gaussian_mixture"] == pytest.approx(2.66, abs=0.05)
    assert bits["linear_autoregressive"] == pytest.approx(2.0, abs=0.02)
    assert all(0.01 < baseline.stderr < 0.03 for name, baseline in found.items() if name != "uniform")
    assert all("300 test images" in baseline.protocol for name, baseline in found.items() if name != "uniform")


@pytest.mark.slow
def test_density_baselines_do_not_depend_on_the_scaling():
    data = digits()
    for baseline in (full_covariance_gaussian, gaussian_mixture):
        one, other = (baseline(data, Uniform(17, *ends)) for ends in ((-1.0, 1.0), (0.0, 5.0)))
        assert one.bits_per_dim == pytest.approx(other.bits_per_dim, abs=2e-3), baseline.__name__


def test_discrete_baselines_find_the_entropy_of_a_known_source():
    data = toy()
    first, third = entropy(0.7, 0.2, 0.1), math.log2(3)
    histogram, autoregressive = pixel_histogram(data), linear_autoregressive(data)
    assert histogram.bits_per_dim == pytest.approx((2 * first + third) / 3, abs=5 * histogram.stderr)
    assert autoregressive.bits_per_dim == pytest.approx((first + third) / 3, abs=0.03)


def test_histogram_is_the_exact_bits_of_the_marginals():
    data = digits()
    table = histogram_log_marginals(data.train, 17, smoothing=0.5)
    assert table.shape == (17, 1, 8, 8) and table.dtype == torch.float32
    assert torch.allclose(table.exp().sum(0), torch.ones(1, 8, 8), atol=1e-6)
    by_hand = -sum((table[k] * (data.test == k)).sum(dtype=torch.float64) for k in range(17)) / math.log(2)
    assert pixel_histogram(data, smoothing=0.5).bits_per_dim == pytest.approx(by_hand.item() / 300 / 64, abs=1e-6)


def test_histogram_counts_and_smooths():
    train = torch.tensor([[0, 2], [0, 1], [1, 1]])
    expected = torch.tensor([[2.5, 0.5], [1.5, 2.5], [0.5, 1.5]]) / 4.5
    assert torch.allclose(histogram_log_marginals(train, 3, smoothing=0.5).exp(), expected)


def test_histogram_refuses_bad_input():
    with pytest.raises(ValueError, match="smoothing: expected a positive number, found 0"):
        histogram_log_marginals(torch.zeros(3, 2, dtype=torch.uint8), 2, smoothing=0)
    for train, found in ((torch.tensor([[3]]), r"found 3\.\.3"), (torch.tensor([[-1, 0]]), r"found -1\.\.0")):
        with pytest.raises(ValueError, match=rf"train: expected levels 0\.\.2, {found}"):
            histogram_log_marginals(train, 3)
    for train in (torch.zeros(0, 2, dtype=torch.uint8), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match="expected at least one example of integer levels"):
            histogram_log_marginals(train, 3)


def test_histogram_of_all_256_levels():
    train = torch.arange(256, dtype=torch.uint8).view(256, 1)
    assert torch.allclose(histogram_log_marginals(train, 256), torch.tensor(-math.log(256)))


def random_model(levels=3, pixels=3):
    model = LinearAutoregressive(torch.zeros(levels, pixels))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_autoregressive_probabilities_sum_to_one_over_all_images():
    images = torch.tensor(list(itertools.product(range(3), repeat=3)))
    bits = random_model().bits_per_dim(images)
    assert torch.exp2(-3 * bits).sum().item() == pytest.approx(1, abs=1e-5)


def test_autoregressive_logits_see_earlier_pixels_only():
    model, k = random_model(), torch.tensor([[0, 1, 2]])
    changed = model(torch.tensor([[0, 2, 0]])) != model(k)
    assert not changed[:, :2].any() and changed[:, 2].any()


def test_autoregressive_starts_as_the_histogram():
    data = digits()
    model = LinearAutoregressive(histogram_log_marginals(data.train, 17).flatten(1))
    assert model.bits_per_dim(data.test).mean().item() == pytest.approx(pixel_histogram(data).bits_per_dim, abs=1e-5)


def test_large_images_get_the_affordable_baselines():
    generator = torch.Generator().manual_seed(0)
    splits = {name: torch.randint(0, 4, (20, 1, 20, 20), generator=generator) for name in ("train", "test")}
    data = Data("large", **splits, validation=splits["test"], levels=4)
    found = all_baselines(data, Uniform(4))
    assert list(found) == ["uniform", "full_covariance_gaussian", "pixel_histogram"]


def test_refuses_other_levels():
    with pytest.raises(ValueError, match="expected the data's levels, 17, found 256"):
        all_baselines(digits(), Uniform(256))
