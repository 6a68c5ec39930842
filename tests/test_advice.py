"""Fronts and recommendations, on tables made by hand."""

import pytest

from experiments.advice import calls, fronts, recommendation

W2 = {"title": "sliced W2", "best": "low", "floor": {"mean": 0.05, "std": 0.004}}


def row(sampler, nfe, value, seconds=None, backward=0, stderr=0.002):
    metrics = {"w2": {"value": value, "stderr": stderr}}
    cost = {"nfe": nfe, "backward": backward, "seconds": nfe / 10 if seconds is None else seconds}
    return {"sampler": sampler, "metrics": metrics} | cost


def test_the_front_counts_passes_back_and_takes_time_by_itself():
    rows = [row("a", 10, 0.3, 5.0), row("b", 10, 0.2, backward=10), row("c", 20, 0.25, 0.1), row("d", 50, 0.2, 9.0)]
    assert calls(rows[1]) == 20
    assert fronts(rows, "w2", "low") == {"nfe": [0, 1], "seconds": [1, 2]}


@pytest.mark.parametrize(("best", "front"), [("low", [0]), ("high", [1, 2]), ("zero", [0, 1])])
def test_the_front_knows_what_is_best(best, front):
    rows = [row("a", 1, -0.2), row("b", 2, 0.1), row("c", 3, 0.4)]
    assert fronts(rows, "w2", best)["nfe"] == sorted({0, *front} if best != "low" else front)


def test_the_cheapest_that_is_as_good_as_real_data():
    rows = [row("slow", 100, 0.051), row("quick", 20, 0.056, 9.0), row("rough", 10, 0.09), row("fast", 50, 0.05, 1.0)]
    words = recommendation(rows, "w2", W2, seeds=1)
    assert words.startswith(
        "quick at 20 has the fewest calls of those that can't be told from real data (0.056 ± 0.002"
    )
    assert "fast at 50 is the quickest of them, in 1 s" in words
    assert "With fewer calls the best is rough at 10 (0.09" in words


def test_more_seeds_tell_more_from_real_data():
    """0.056 lies within two deviations of one draw of real data, 0.05 +- 0.004, and not of the mean of three."""
    rows = [row("a", 20, 0.056), row("b", 50, 0.0501)]
    assert recommendation(rows, "w2", W2, seeds=1).startswith("a at 20")
    assert recommendation(rows, "w2", W2, seeds=3).startswith("b at 50")


def test_where_none_reaches_real_data_the_standard_errors_decide():
    rows = [row("a", 10, 0.2), row("b", 20, 0.085), row("c", 50, 0.08)]
    words = recommendation(rows, "w2", W2, seeds=3)
    assert words.startswith(
        "b at 20 has the fewest calls of those within two standard errors of the best, c at 50, and"
    )
    assert "none reaches real data" in words
    apart = [row("b", 20, 0.085, stderr=1e-4), row("c", 50, 0.08, stderr=1e-4)]
    assert recommendation(apart, "w2", W2, seeds=3).startswith("c at 50")


def test_without_a_floor_and_with_other_bests():
    metric = {"title": "NLL gap", "best": "zero", "floor": None}
    words = recommendation([row("a", 10, -0.5), row("b", 20, 0.01), row("c", 30, 0.011)], "w2", metric, seeds=1)
    assert words.startswith("b at 20") and "real data" not in words
    high = {"title": "precision", "best": "high", "floor": {"mean": 0.99, "std": 0.01}}
    assert recommendation([row("a", 10, 0.5), row("b", 20, 0.985)], "w2", high, seeds=1).startswith("b at 20")
