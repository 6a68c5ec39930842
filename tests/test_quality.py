"""Standard errors, floors and the building of measures of sample quality."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from configurations import configuration

from experiments.build import ConfigError
from experiments.distances import MMD, Energy, Frechet, KernelDistance, SlicedW2
from experiments.jackknife import Groups, jackknife_variance
from experiments.metrics import sliced_w2
from experiments.neighbours import Neighbours
from experiments.quality import (
    Column,
    Measured,
    Recomputed,
    Yardstick,
    build_metrics,
    floors,
    measure,
    require_enough,
)

METRICS = [SlicedW2(projections=32), Energy(), MMD(bandwidth=1.5), KernelDistance(), Frechet(), Neighbours(3)]


@dataclass(frozen=True)
class Means(Recomputed):
    """The difference of the means of the first dimension: all is known of it."""

    columns: ClassVar = (Column("mean", "mean", "zero"), Column("twice", "twice the mean", "zero"))

    def distance(self, x, reference):
        found = (x[:, 0].mean() - reference[:, 0].mean()).item()
        return found, 2 * found


def normal(n, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def name_of(metric):
    return type(metric).__name__


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
@pytest.mark.parametrize(("n", "m"), [(40, 30), (43, 37)])
def test_leaving_out_a_group_is_the_metric_without_it(metric, n, m):
    x, y = 0.8 * normal(n, 3) + 0.2, normal(m, 3, seed=1)
    yardstick, own = Yardstick(metric, y, groups=10), Groups.of(n, 10)
    table = yardstick._table(x, 10)
    expected = [metric(x, y)] + [metric(x[own.label != g], y) for g in range(10)]
    expected += [metric(x, y[yardstick.groups.label != g]) for g in range(10)]
    for row, values in zip(table, expected, strict=True):
        assert row.tolist() == pytest.approx(list(values.values()), rel=1e-9, abs=1e-12)


def test_groups_are_of_equal_size_and_at_random():
    groups = Groups.of(103, 10)
    assert sorted(groups.sizes.tolist()) == [10] * 7 + [11] * 3
    assert not torch.equal(groups.label, torch.arange(103) % 10)
    assert torch.equal(groups.label, Groups.of(103, 10).label)


def test_the_jackknife_of_a_mean_is_the_variance_of_the_mean_of_groups():
    x, groups = normal(50, 1)[:, 0], Groups.of(50, 10)
    table = torch.stack([part.mean() for part in groups.subsets(x)])[:, None]
    means = torch.stack([x[groups.label == g].mean() for g in range(10)])
    assert jackknife_variance(table, groups).item() == pytest.approx(means.var().item() / 10, rel=1e-10)


def test_the_jackknife_of_a_mean_over_unequal_groups_has_no_bias():
    x, groups = normal(4000, 23), Groups.of(23, 10)
    assert len(set(groups.sizes.tolist())) == 2
    table = torch.stack([part.mean(dim=0) for part in groups.subsets(x.T)])
    found = jackknife_variance(table, groups)
    assert abs(found.mean() - 1 / 23) < 4 * found.std() / math.sqrt(4000)
    assert found.std() / math.sqrt(4000) < 0.01 / 23


def test_errors_are_of_the_samples_over_the_seeds_and_of_the_reference():
    sets, y = [normal(60, seed=i) for i in range(3)], normal(50, seed=9)
    found = measure(Means(), sets, y)
    one = [measure(Means(), [x], y)["mean"] for x in sets]
    own = [jackknife_variance(torch.stack([p[:, :1].mean(0) for p in Groups.of(60, 10).subsets(x)]), Groups.of(60, 10))
           for x in sets]  # fmt: skip
    real = one[0].stderr ** 2 - own[0].item()
    assert found["mean"].value == pytest.approx(sum(each.value for each in one) / 3)
    assert found["mean"].stderr == pytest.approx(math.sqrt(sum(own).item() / 9 + real), rel=1e-9)
    assert found["twice"].stderr == pytest.approx(2 * found["mean"].stderr)
    assert 9 < found["mean"].freedom < 36


def repeated(metric, sample_x, sample_y, truth, repetitions, seeds=2):
    """How often intervals hold ``truth`` (None: the mean over all), and the errors over the spread; (C,) each."""
    found = []
    for i in range(repetitions):
        sets = [sample_x(10 * i + s) for s in range(seeds)]
        found.append(list(measure(metric, sets, sample_y(10 * i + 9)).values()))
    table = torch.tensor([[(each.value, each.stderr) for each in row] for row in found], dtype=torch.float64)
    values, errors = table.unbind(2)
    truth = values.mean(dim=0).tolist() if truth is None else truth
    held = [[each.interval[0] <= t <= each.interval[1] for each, t in zip(row, truth, strict=True)] for row in found]
    return torch.tensor(held).double().mean(dim=0), errors.square().mean(dim=0).sqrt() / values.std(dim=0)


def test_errors_of_a_mean_are_its_spread_and_its_intervals_hold_the_truth():
    held, ratio = repeated(Means(), lambda i: normal(40, 1, i) + 0.3, lambda i: normal(30, 1, i), [0.3, 0.6], 300)
    assert ((held >= 0.91) & (held <= 0.985)).all()  # 95 %, known to 1.3 %
    assert ((ratio > 0.88) & (ratio < 1.14)).all()  # 1, known to 4 %


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "largest"), [(1.0, 1.65), (1.4, 1.35)])
@pytest.mark.parametrize("metric", METRICS[:-1], ids=name_of)
def test_errors_are_the_spread_or_more_where_the_measure_is_quadratic_in_the_noise(metric, scale, largest):
    held, ratio = repeated(metric, lambda i: scale * normal(100, 4, i), lambda i: normal(100, 4, i), None, 300)
    assert (held >= 0.93).all() and (held <= 0.995).all(), held
    assert (ratio > 0.9).all() and (ratio < largest).all(), ratio


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_errors_of_shares_among_neighbours_are_too_large_rather_than_too_small(scale):
    """They are no smooth functions of the sets, and up to twice their spread."""
    held, ratio = repeated(Neighbours(3), lambda i: scale * normal(100, 4, i), lambda i: normal(100, 4, i), None, 300)
    assert (held >= 0.93).all(), held
    assert (ratio > 1).all() and (ratio < 2.2).all(), ratio


def test_intervals_are_of_students_t():
    assert Measured(1.0, 0.1, 9.0).interval == pytest.approx((1 - 0.226216, 1 + 0.226216), abs=1e-6)
    assert Measured(1.0, 0.0, 1.0).interval == (1.0, 1.0)


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_the_order_of_examples_and_a_second_call_change_nothing(metric):
    x, y = 0.8 * normal(30, 3), normal(24, 3, seed=1)
    found = metric(x, y)
    assert metric(x, y) == found
    assert metric(x.flip(0), y[torch.randperm(24)]) == pytest.approx(found, rel=1e-9)
    assert measure(metric, [x], y).keys() == found.keys() == {column.name for column in metric.columns}
    whole = {name: each.value for name, each in measure(metric, [x, x], y).items()}
    assert whole == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_shapes_and_types_of_samples_do_not_matter(metric):
    x, y = normal(30, 8).float(), normal(24, 8, seed=1).float()
    assert metric(x.view(30, 2, 2, 2), y.view(24, 2, 2, 2)) == metric(x.double(), y.double())


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_refuses_what_is_no_two_sets(metric):
    x = normal(30, 3)
    bad = x.clone()
    bad[3, 1] = math.nan
    for a, b, words in (
        (bad, x, "x: expected finite numbers, found 1 of 30"),
        (x, bad, "reference: expected finite numbers"),
        (x, x[:, :2], "found 3 and 2"),
        (x[:0], x, "x: expected at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            metric(a, b)
        with pytest.raises(ValueError, match=words):
            measure(metric, [x, a], b)
    with pytest.raises(ValueError, match=r"x: .* needs at least \d+ examples, found 1; use more"):
        measure(metric, [x[:1]], x)
    with pytest.raises(ValueError, match=r"reference: .* needs at least \d+ examples, found 1; use more"):
        measure(metric, [x], x[:1])


def test_refuses_no_sets_one_group_and_numbers_beyond_all_squares():
    x = normal(30, 3)
    for sets, groups in (([], 10), ([x], 1)):
        with pytest.raises(ValueError, match="expected a set of samples and 2 groups"):
            measure(Energy(), sets, x, groups)
    with pytest.raises(ValueError, match="Energy: the numbers are too large to be squared"):
        Energy()(1e200 * x, x)
    with pytest.raises(ValueError, match="best must be one of low, high, zero"):
        Column("a", "a", "best")


def sliced_floor(pool, test, n, metric=SlicedW2(), **more):  # noqa: B008 - it is frozen
    return floors(metric, pool, test, n, **more)["sliced_w2"]


def test_a_floor_needs_a_draw():
    x = normal(5, 2)
    with pytest.raises(ValueError, match="draws: expected at least 1, found 0"):
        sliced_floor(x, x, n=3, draws=0)


def test_noise_floor_is_what_perfect_samples_have():
    pool, test = normal(2000, 4), normal(300, 4, seed=1)
    floor = sliced_floor(pool, test, n=300)
    perfect = sliced_w2(normal(300, 4, seed=2), test)
    wrong = sliced_w2(normal(300, 4, seed=3) * 1.5, test)
    assert abs(perfect - floor.mean) < 5 * floor.std
    assert wrong > floor.mean + 10 * floor.std
    assert sliced_floor(pool, test, n=300) == floor


def test_noise_floor_of_the_whole_pool_is_its_sliced_w2():
    pool, test = normal(50, 4), normal(30, 4, seed=1)
    floor = sliced_floor(pool, test, n=50, draws=3, metric=SlicedW2(64, 7))
    assert floor.mean == pytest.approx(sliced_w2(pool, test, projections=64, seed=7), rel=1e-12)
    assert floor.std == pytest.approx(0, abs=1e-12)


def test_noise_floor_falls_with_n_and_refuses_more_than_there_is():
    pool, test = normal(400, 4), normal(300, 4, seed=1)
    assert sliced_floor(pool, test, n=300).mean < sliced_floor(pool, test, n=50).mean
    for n in (0, 401):
        with pytest.raises(ValueError, match=f"1 to 400 .*found {n}"):
            sliced_floor(pool, test, n)


def test_floors_are_what_perfect_samples_have_and_wrong_ones_have_not():
    pool, y = normal(900, 4), normal(150, 4, seed=1)
    for metric in METRICS:
        found = floors(metric, pool, y, 150)
        perfect, wrong = (metric(s * normal(150, 4, seed=2), y) for s in (1.0, 2.0))
        for name, floor in found.items():
            assert abs(perfect[name] - floor.mean) < 5 * floor.std, name
            assert abs(wrong[name] - floor.mean) > 6 * floor.std or name == "recall", name


def test_floors_refuse_more_than_there_is():
    x = normal(30, 3)
    with pytest.raises(ValueError, match=r"n: expected 1 to 30 .*found 31"):
        floors(Energy(), x, x, 31)
    with pytest.raises(ValueError, match="draws: expected at least 1, found 0"):
        floors(Energy(), x, x, 20, draws=0)


def test_the_configured_metrics():
    settings = configuration().compare
    assert list(build_metrics(settings)) == ["sliced_w2", "energy", "neighbours"]
    assert settings.features is None
    every = build_metrics(configuration(f"compare.metrics=[{','.join(settings.measures)}]").compare)
    assert set(every.values()) == {SlicedW2(), Energy(), MMD(), Neighbours(), Frechet(), KernelDistance()}
    assert {name for name, metric in every.items() if metric.of_features} == {"neighbours", "frechet", "kernel"}
    found = build_metrics(configuration("compare.metrics=[mmd]", "compare.measures.mmd.factors=[1.0]").compare)
    assert found["mmd"] == MMD(factors=(1.0,))


def test_metrics_that_can_not_be_built_are_refused():
    with pytest.raises(ConfigError, match=r"no metric 'fid'; choose from energy, frechet, .*metric/fid.yaml"):
        build_metrics(configuration("compare.metrics=[fid]").compare)
    with pytest.raises(ConfigError, match=r"compare.measures.neighbours: k: expected at least 1 neighbour"):
        build_metrics(configuration("compare.measures.neighbours.k=0").compare)
    two = configuration("+metric@compare.measures.other=mmd", "compare.metrics=[mmd,other]").compare
    with pytest.raises(ConfigError, match="mmd and other both give mmd; take one of them"):
        build_metrics(two)
    solver = configuration("+solver@compare.measures.other=ddim", "compare.metrics=[other]").compare
    with pytest.raises(ConfigError, match=r"compare.measures.other must be a Metric"):
        build_metrics(solver)


def test_too_few_samples_are_refused_before_they_are_drawn():
    metrics = {"energy": Energy(), "neighbours": Neighbours(5)}
    require_enough(metrics, 7, 300)
    measure(Neighbours(5), [normal(7)], normal(300))
    with pytest.raises(ConfigError, match=r"compare.samples: 6 are too few for neighbours.*compare.metrics=\[energy\]"):
        require_enough(metrics, 6, 300)
    with pytest.raises(ConfigError, match="the reference set: 2 are too few for energy"):
        require_enough(metrics, 7, 2)
