"""The league table: its calls against a hook's count, its numbers against the metrics themselves, what is refused."""

import json
import math

import pytest
import torch
from configurations import configuration

from experiments import comparison, league, tasks
from experiments.advice import fronts
from experiments.build import ConfigError
from experiments.comparison import Measures, compare
from experiments.known import exact_score
from experiments.metrics import sliced_w2
from experiments.problem import build_model
from experiments.run import Run
from sde import VP
from solvers import SamplingDiverged

CPU = torch.device("cpu")
PLANE = ("data=mixture2d", "data.train=200", "data.validation=60", "data.test=50", "parametrization=v")
SMALL = (*PLANE, "net=mlp", "net.width=8", "compare.samples=40", "compare.seeds=2", "compare.budgets=[4,9]")
SLICED = "compare.metrics=[sliced_w2]"


def settings(*overrides):
    return configuration(*SMALL, *(overrides if any("metrics" in one for one in overrides) else (SLICED, *overrides)))


def exact(*overrides):
    return configuration(*PLANE, "net=exact", SLICED, "compare.budgets=[10]", *overrides)


@pytest.fixture(scope="module")
def model(small):
    config = settings()
    return build_model(config, small.convention(), small.data.train).eval()


@pytest.fixture(scope="module")
def small():
    from experiments.problem import load_problem

    return load_problem(settings())


@pytest.fixture(scope="module")
def found(model, small):
    names = "compare.names=[ddim,heun,probability_flow,predictor_corrector,euler_maruyama]"
    return compare(model, small, settings(names, "solver=ddim"), CPU, about="weights of nothing")


def test_the_calls_are_those_that_a_hook_counts(model, small, found):
    config = settings()
    for row in found.rows:
        solver = comparison.build_solver(config, row["sampler"])
        solver = solver if row["steps"] is None else solver.with_steps(row["steps"])
        assert str(solver) == row["solver"]
        count = []
        handle = model.net.register_forward_hook(lambda *_, count=count: count.append(1))
        for seed in (0, 1):
            solver(model, shape=(40, 2), seed=seed)
        handle.remove()
        assert row["nfe"] == len(count) / 2 and row["backward"] == 0
        assert row["budget"] is None or row["nfe"] <= row["budget"] < row["nfe"] + 3
    assert {(row["sampler"], row["budget"]) for row in found.rows} >= {
        ("heun", 4),
        ("heun", 9),
        ("ddim", 4),
        ("ddim", 9),
    }


def test_the_numbers_are_the_metrics_of_the_samples_that_a_person_would_draw(model, small, found):
    """Each value anew: the solver's own samples of each seed, against the test split; and all from the same noise."""
    config = settings()
    for row in found.rows:
        solver = comparison.build_solver(config, row["sampler"])
        solver = solver if row["steps"] is None else solver.with_steps(row["steps"])
        sets = [solver(model, shape=(40, 2), seed=seed).x for seed in (0, 1)]
        expected = sum(sliced_w2(x, small.data.test) for x in sets) / 2
        assert row["metrics"]["sliced_w2"]["value"] == pytest.approx(expected, rel=1e-5)
        assert 0 < row["metrics"]["sliced_w2"]["stderr"] < expected
        assert row["seconds"] > 0 and (row["peak_memory_bytes"] or 1) > 0
    assert torch.equal(found.samples["ddim"], comparison.build_solver(config, "ddim").with_steps(9)(model, (40, 2)).x)


def test_what_stands_beside_the_numbers(found):
    content = found.content
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    about = content["settings"]
    assert about["samples"] == 40 and about["seeds"] == 2 and about["reference"] == "mixture2d, test split, 50 examples"
    assert about["model"] == "weights of nothing" and about["sde"] == str(VP()) and about["features"] is None
    assert {row["final"] for row in found.rows if row["sampler"] != "probability_flow"} == {"mean"}
    assert list(content["metrics"]) == ["sliced_w2", "nll_gap", "flow_rmse"]
    assert content["metrics"]["sliced_w2"]["floor"]["mean"] > 0 and content["metrics"]["nll_gap"]["floor"] is None
    assert found.chosen == content["chosen"]
    chosen = [row["metrics"]["sliced_w2"]["value"] for row in found.rows if row["sampler"] == found.chosen]
    assert content["objective"] == sum(chosen) / len(chosen)
    assert content["pareto"] == fronts(content["rows"], "sliced_w2", "low")


def test_a_sampler_that_fails_is_left_out_and_said_to_be(model, small, caplog):
    config = settings("compare.names=[ddim,adaptive_sde]", "compare.solvers.adaptive_sde.max_steps=1")
    found = compare(model, small, config, CPU)
    (failed,) = found.content["failed"]
    assert failed["sampler"] == "adaptive_sde" and failed["reason"].startswith("SamplingDiverged")
    assert "adaptive_sde" not in found.samples and "is left out" in caplog.text
    assert "Left out: AdaptiveSDE(" in league.text(found.content)
    assert "Left out: AdaptiveSDE(" in league.comparison_page({"comparison": found.content}, "", [])


def test_where_the_chosen_sampler_fails_another_is_shown(model, small):
    config = settings("compare.names=[ddim]", "solver=adaptive_sde", "solver.max_steps=1")
    found = compare(model, small, config, CPU)
    assert found.chosen == "ddim" and found.content["chosen"] == "adaptive_sde" and found.content["objective"] is None


def test_where_all_fail_it_is_an_error(model, small, monkeypatch):
    monkeypatch.setattr(model.net, "forward", lambda x, *_: x * math.nan)
    with pytest.raises(SamplingDiverged, match="no sampler could be measured; the first: SamplingDiverged"):
        compare(model, small, settings("compare.names=[ddim]"), CPU)


def test_the_validation_split_leaves_the_test_split_alone(model, small):
    config = settings("compare.names=[ddim]", "compare.split=validation")
    found = compare(model, small, config, CPU)
    assert found.content["settings"]["reference"] == "mixture2d, validation split, 60 examples"
    row = found.rows[-1]
    sets = [
        comparison.build_solver(config, row["sampler"]).with_steps(row["steps"])(model, (40, 2), s).x for s in (0, 1)
    ]
    expected = sum(sliced_w2(x, small.data.validation) for x in sets) / 2
    assert row["metrics"]["sliced_w2"]["value"] == pytest.approx(expected, rel=1e-5)


REFUSED = {
    "compare.metrics=[]": "compare.metrics must name at least one metric",
    "compare.metrics=[fid]": "compare.metrics: no metric 'fid'; choose from energy, frechet",
    "compare.split=train": "compare.split must be one of test, validation, found 'train'",
    "compare.samples=4": "compare.samples: 4 are too few for neighbours",
    "compare.features={_target_: experiments.features.Trained}": "Trained needs",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_measured_is_refused_at_once(override, small):
    config = configuration(
        *SMALL, *([] if "metrics" in override else ["compare.metrics=[sliced_w2,neighbours]"]), override
    )
    with pytest.raises(ConfigError) as error:
        Measures(config, small)
    assert REFUSED[override] in str(error.value) or override.startswith("compare.features")


def test_features_are_seen_by_the_metrics_of_features_alone(small):
    measures = Measures(settings("compare.metrics=[sliced_w2,kernel]"), small)
    measures.features = lambda x: x[:, :1]
    measures.prepare()
    assert [yardstick.dimensions for yardstick in measures._yardsticks] == [2, 1]


def test_more_samples_than_there_are_real_ones_are_cut_and_said_to_be(small, caplog):
    measures = Measures(settings("compare.samples=5000"), small)
    measures.prepare()
    assert measures.n == 260
    assert "comparing 260 samples, not 5000" in caplog.text


def test_the_task_with_the_exact_score_needs_no_network(tmp_path):
    """With enough calls the solver of the flow has no error, and its samples no gap."""
    config = exact("task=compare", "compare.names=[ddim,probability_flow]", "compare.samples=200")
    tasks.compare(config, Run(tmp_path, "compare"))
    content = json.loads((tmp_path / "summary.json").read_text())["comparison"]
    assert content["settings"]["model"] == "the exact score"
    flow = next(row for row in content["rows"] if row["sampler"] == "probability_flow")["metrics"]
    assert flow["flow_rmse"]["value"] < 2e-3 and abs(flow["nll_gap"]["value"]) < 4 * flow["nll_gap"]["stderr"]
    page = (tmp_path / "report.html").read_text()
    assert "the exact score" in page and "data:image/png;base64" in page and "probability flow" in page
    assert (tmp_path / "league.csv").read_text().count("\n") == 1 + len(content["rows"])


def test_the_exact_score_is_not_trained(tmp_path):
    with pytest.raises(ConfigError, match="net=exact has nothing to learn"):
        tasks.train(exact(), Run(tmp_path, "train"))
    with pytest.raises(ConfigError, match="net=exact needs data of known density"):
        tasks.compare(configuration("net=exact"), Run(tmp_path / "b", "compare"))


def test_the_exact_score_under_another_process(small, tmp_path):
    session = tasks.Session(exact("sde@under=ve"), Run(tmp_path, "compare"))
    assert type(tasks.load_model(session).sde).__name__ == "VE"
    assert exact_score(small.data, VP()).sde == VP()
