import math

import pytest
import torch

from experiments.data import digits
from experiments.metrics import auroc, classifier_confidence, copy_report, nearest_distance, sliced_w2


def normal(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sliced_w2_of_equal_sets_is_zero():
    x = normal(50, 3, 4)
    assert sliced_w2(x, x[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)
    assert sliced_w2(x, x.repeat(3, 1, 1)) == pytest.approx(0, abs=1e-12)


def test_sliced_w2_is_symmetric_and_repeatable():
    x, y = normal(50, 4), normal(31, 4, seed=1) * 2
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(y, x), rel=1e-12)
    assert sliced_w2(x, y) == sliced_w2(x, y)
    assert sliced_w2(x, y, seed=1) != sliced_w2(x, y, seed=2)


def test_sliced_w2_of_a_shift():
    x, shift = normal(40, 5), torch.arange(5.0).double()
    found = sliced_w2(x, x + shift, projections=20000)
    assert found == pytest.approx(shift.norm().item() / math.sqrt(5), rel=0.02)
    assert sliced_w2(x[:, :1], x[:, :1] + 3) == pytest.approx(3, rel=1e-12)


def test_sliced_w2_of_a_scaling():
    """Isotropic Gaussians of deviation 1 and 3 are 2 apart in every direction."""
    x = normal(5000, 3)
    assert sliced_w2(x, 3 * x, projections=64) == pytest.approx(2, rel=0.03)


def test_sliced_w2_of_different_sizes_is_exact():
    """(0, 0) against (0, 1, 1): mass 2/3 moves by 1. And against a copy count that makes sizes equal."""
    a, b = torch.zeros(2, 1), torch.tensor([[0.0], [1.0], [1.0]])
    assert sliced_w2(a, b) == pytest.approx(math.sqrt(2 / 3), rel=1e-12)
    x, y = normal(6, 3), normal(4, 3, seed=1)
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(x.repeat(2, 1), y.repeat(3, 1)), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), "found 2 and 4"),
        (torch.zeros(0, 2), torch.zeros(3, 2), "a: expected at least one"),
        (torch.zeros(3), torch.zeros(3), r"\(N, ...\)"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), "b: expected finite numbers, found 3 of 3"),
    ],
)
def test_sliced_w2_refuses(a, b, words):
    with pytest.raises(ValueError, match=words):
        sliced_w2(a, b)


def test_refuses_to_average_over_nothing():
    x = normal(5, 2)
    with pytest.raises(ValueError, match="projections: expected at least 1, found 0"):
        sliced_w2(x, x, projections=0)


def test_nearest_distance_is_the_smallest_of_all():
    queries, references = normal(30, 2, 3), normal(700, 2, 3, seed=1)
    brute = (queries.flatten(1)[:, None] - references.flatten(1)[None]).norm(dim=2).min(dim=1).values
    assert torch.allclose(nearest_distance(queries, references, chunk=7), brute, rtol=1e-6)


def test_nearest_distance_of_a_copy_is_exactly_zero():
    levels = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert nearest_distance(levels[:10], levels).max() == 0


def test_copy_report_finds_copies():
    train, test = normal(200, 6), normal(100, 6, seed=1)
    honest = copy_report(normal(100, 6, seed=2), train, test)
    assert honest["closer_than_test"] < 0.1
    assert honest["samples_median"] == pytest.approx(honest["test_median"], rel=0.2)
    copied = copy_report(torch.cat([train[:50], normal(50, 6, seed=2)]), train, test)
    assert copied["samples_min"] == 0 and copied["closer_than_test"] >= 0.5


def test_classifier_tells_digits_from_noise():
    data = digits()
    noise = torch.randint(0, 17, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    blurred = (data.train[:300].double() + data.train[300:600].double()) / 2
    found = {
        name: classifier_confidence(data.train, data.labels["train"], x, data.test, data.labels["test"])
        for name, x in (("real", data.validation), ("noise", noise), ("blurred", blurred))
    }
    assert found["real"]["accuracy"] > 0.94
    assert found["real"]["samples"] == pytest.approx(found["real"]["test"], abs=0.03)
    assert found["blurred"]["samples"] < found["real"]["samples"] - 0.1
    assert found["noise"]["samples"] < found["real"]["samples"] - 0.1


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties):
    from sklearn.metrics import roc_auc_score

    for seed in range(5):
        high, low = 0.7 + normal(31, seed=seed), normal(50, seed=100 + seed)
        high, low = (high.round(), low.round()) if ties else (high, low)
        truth = roc_auc_score([1] * 31 + [0] * 50, torch.cat([high, low]).numpy())
        assert auroc(high, low)[0] == pytest.approx(truth, abs=1e-12)
        assert auroc(low, high)[0] == pytest.approx(1 - truth, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_error_of_auroc_is_its_spread(shift):
    found = torch.tensor([auroc(shift + normal(40, seed=seed), normal(70, seed=10_000 + seed)) for seed in range(400)])
    value, stderr = found.double().unbind(1)
    truth = 0.5 * (1 + math.erf(shift / 2))
    assert abs(value.mean() - truth) < 4 * value.std() / 20
    assert 0.87 < stderr.square().mean().sqrt() / value.std() < 1.15  # the spread of 400 is known to 3.5 %


def test_auroc_of_sets_that_do_not_overlap():
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == (1.0, 0.0)
    assert auroc(torch.ones(3), torch.ones(4)) == (0.5, 0.0)


@pytest.mark.parametrize("wrong", [torch.ones(1), torch.ones(2, 2), torch.tensor([1.0, math.nan])], ids=str)
def test_auroc_refuses(wrong):
    with pytest.raises(ValueError, match="positive: expected at least 2 finite scores"):
        auroc(wrong, torch.arange(3.0))
    with pytest.raises(ValueError, match="negative: expected at least 2 finite scores"):
        auroc(torch.arange(3.0), wrong)
