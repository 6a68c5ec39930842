"""The tasks on likelihoods: files, interrupted and resumed runs, other data sets, interpolation."""

import csv
import json

import numpy as np
import pytest
import torch
from configurations import before_a_run, configuration
from omegaconf import OmegaConf

from experiments import estimator, likelihood_tasks, training
from experiments.build import ConfigError
from experiments.data import DataError, digits, mixture2d
from experiments.estimator import PARTS
from experiments.problem import Problem
from experiments.run import Run, RunFolderTaken, unfinished

NET = ("net=mlp", "net.width=8", "net.depth=1", "train.steps=2", "seed=3")
PLANE = ("data=mixture2d", "data.train=50", "parametrization=noise", *NET)
DIGITS = ("parametrization=levels", *NET)
HELD_OUT = (*DIGITS, "likelihood.split=validation")  # the test split is shown beside baselines, which take seconds
QUICK = ("likelihood.method=rk4", "likelihood.steps=10", "likelihood.samples=12", "likelihood.batch_size=5")


def folder_of(tmp_path_factory, name, problem, overrides):
    folder = tmp_path_factory.mktemp(name)
    training.train(configuration(*overrides), problem, torch.device("cpu"), Run(folder, "train"))
    return folder


@pytest.fixture(scope="module")
def of_plane(tmp_path_factory):
    return folder_of(tmp_path_factory, "plane", Problem.of(mixture2d(train=50)), PLANE)


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    return folder_of(tmp_path_factory, "digits", Problem.of(digits()), DIGITS)


def run(task, folder, *overrides, resume=None):
    """A task in a folder; its summary."""
    config = configuration(*QUICK, *overrides, *([f"resume={resume}"] if resume else []))
    opened = Run(folder, task.__name__, resume == "auto")
    try:
        task(config, opened)
    except BaseException as error:
        opened.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    opened.end("done")
    return json.loads((folder / "summary.json").read_text())


def examples(folder):
    with np.load(folder / "likelihood" / "examples.npz") as content:
        return dict(content)


@pytest.fixture
def interrupts(monkeypatch):
    """After so many calls of the estimator, as Ctrl-C would; counts all of them."""
    counts, call = {"calls": 0, "last": None}, estimator.Estimator.__call__

    def counted(self, *arguments):
        if counts["calls"] == counts["last"]:
            raise KeyboardInterrupt
        counts["calls"] += 1
        return call(self, *arguments)

    monkeypatch.setattr(estimator.Estimator, "__call__", counted)
    return counts


@pytest.mark.parametrize("how", ["auto", "elsewhere"])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, of_digits, interrupts, how):
    given = (*HELD_OUT, "likelihood.ode_subset=0", f"checkpoint={of_digits}")
    whole = run(likelihood_tasks.likelihood, tmp_path / "whole", *given)
    assert interrupts["calls"] == 3
    interrupts.update(calls=0, last=1)
    with pytest.raises(KeyboardInterrupt):
        run(likelihood_tasks.likelihood, tmp_path / "cut", *given)
    assert unfinished(tmp_path / "cut") and not (tmp_path / "cut" / "likelihood" / "examples.npz").exists()
    interrupts.update(calls=0, last=None)
    place, resume = (tmp_path / "cut", "auto") if how == "auto" else (tmp_path / "new", tmp_path / "cut")
    summary = run(likelihood_tasks.likelihood, place, *given, resume=resume)
    assert interrupts["calls"] == 2  # and not 3
    assert summary["likelihood"] == whole["likelihood"]
    for name, array in examples(tmp_path / "whole").items():
        assert np.array_equal(array, examples(place)[name]), name
    assert not unfinished(place) and not (place / "likelihood" / "partial.npz").exists()
    with pytest.raises(RunFolderTaken, match="already holds a run"):
        run(likelihood_tasks.likelihood, place, *given, resume="auto")


def test_other_settings_or_another_checkpoint_do_not_go_on(tmp_path, of_digits, interrupts):
    given, interrupts["last"], cut = (*HELD_OUT, f"checkpoint={of_digits}"), 1, tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(likelihood_tasks.likelihood, cut, *given)
    partial = cut / "likelihood" / "partial.npz"
    before = partial.read_bytes()
    for change in ("likelihood.draws=2", "seed=4", "data.seed=1"):
        words = rf"resume: .*{change.split('=')[0]}=.*, not .*same settings and checkpoint"
        with pytest.raises(ConfigError, match=words):
            run(likelihood_tasks.likelihood, tmp_path / change, *given, change, resume=cut)
    retrained, config = tmp_path / "retrained", configuration(*DIGITS, "seed=9")
    training.train(config, Problem.of(digits()), torch.device("cpu"), Run(retrained, "train"))
    with pytest.raises(ConfigError, match=r"resume: .*checkpoint="):
        run(likelihood_tasks.likelihood, tmp_path / "b", *HELD_OUT, f"checkpoint={retrained}", resume=cut)
    assert partial.read_bytes() == before
    partial.write_bytes(before[: len(before) // 2])
    with pytest.raises(ConfigError, match=r"partial\.npz is not readable"):
        run(likelihood_tasks.likelihood, tmp_path / "c", *given, resume=cut)
    with pytest.raises(ConfigError, match="resume=/nowhere: there is no"):
        run(likelihood_tasks.likelihood, tmp_path / "d", *given, resume="/nowhere")


def test_only_an_unfinished_run_lets_the_command_line_into_its_folder(tmp_path, capsys):
    opened = Run(tmp_path, "likelihood")
    opened.path("likelihood", "partial.npz").write_bytes(b"")
    opened.end("interrupted")
    before_a_run(tmp_path, "auto")
    with pytest.raises(SystemExit):
        before_a_run(tmp_path)
    Run(tmp_path, "likelihood", resume=True).end("done")
    with pytest.raises(SystemExit):
        before_a_run(tmp_path, "auto")
    assert "already holds a run" in capsys.readouterr().err


def test_what_is_not_interrupted_is_not_resumed(tmp_path, of_digits):
    given = (*HELD_OUT, f"checkpoint={of_digits}")
    run(likelihood_tasks.likelihood, tmp_path / "a", *given, resume="auto")  # nothing there: from the beginning
    with pytest.raises(ConfigError, match="resume= goes on with a training or an evaluation"):
        run(likelihood_tasks.interpolate, tmp_path / "b", *given, resume="auto")
    running = Run(tmp_path / "c", "likelihood")
    running.path("likelihood", "partial.npz").write_bytes(b"")
    assert not unfinished(tmp_path / "c")  # this process is alive
    running.end("failed")
    assert unfinished(tmp_path / "c")


def test_the_files_hold_every_example_with_its_parts(tmp_path, of_digits):
    given = (
        *DIGITS,
        "likelihood.split=validation",
        f"checkpoint={of_digits}",
        "dequantizer@likelihood.dequantizer=uniform",
    )
    summary = run(likelihood_tasks.likelihood, tmp_path, *given, "likelihood.draws=2", "likelihood.importance=true")
    found = examples(tmp_path)
    assert np.abs(sum(found[name] for name in PARTS) - found["log_prob"]).max() < 1e-6
    bits = -found["log_prob"] / (64 * np.log(2))
    assert np.allclose(found["bits_per_dim"], bits) and bits.mean() == pytest.approx(summary["likelihood"]["value"])
    assert found["label"].tolist() == digits().labels["validation"][:12].tolist()
    assert summary["likelihood"]["split"] == "validation" and summary["baselines"] == {}
    with (tmp_path / "likelihood" / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {"index", "log_prob", *PARTS, "bits_per_dim", "label", "nfe"}
    assert len(rows) == 12 and wanted <= rows[0].keys()
    assert float(rows[7]["bits_per_dim"]) == found["bits_per_dim"][7] and int(rows[7]["index"]) == 7
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"likelihood_histogram", "likelihood_extremes"}


def test_the_plane_is_reported_in_nats_beside_the_exact_value(tmp_path, of_plane, monkeypatch):
    monkeypatch.setattr(likelihood_tasks.pictures, "of_density", lambda *_: [])
    summary = run(likelihood_tasks.likelihood, tmp_path, *PLANE, f"checkpoint={of_plane}", "likelihood=exact")
    assert summary["likelihood"]["unit"] == "nats" and summary["exact"]["gap"] < 0
    assert "bits_per_dim" not in examples(tmp_path)
    assert {"likelihood_histogram", "likelihood_extremes"} == {p.stem for p in (tmp_path / "figures").iterdir()}


def test_another_prior_is_built_from_the_training_data(tmp_path, of_plane, monkeypatch):
    seen = {}

    def wide(data, sde, covariance):
        seen.update(shape=tuple(data.shape), sde=sde, covariance=covariance)
        return lambda x: torch.zeros(len(x))

    monkeypatch.setattr("solvers.matched_prior", wide, raising=False)
    monkeypatch.setattr(likelihood_tasks.pictures, "of_density", lambda *_: [])
    given = (*PLANE, f"checkpoint={of_plane}", "prior@likelihood.prior=diagonal")
    assert run(likelihood_tasks.likelihood, tmp_path, *given)["likelihood"]["prior"] == 0
    assert seen == {"shape": (50, 2), "sde": seen["sde"], "covariance": "diagonal"}


def test_other_data_are_scored_by_likelihood_and_typicality(tmp_path, of_digits):
    given = (*DIGITS, f"checkpoint={of_digits}", "data@ood.against=digits_inverted")
    summary = run(likelihood_tasks.out_of_distribution, tmp_path, *given)
    plain, typical = summary["ood"]["scores"].values()
    assert plain["auroc"] > 0.95 and typical["auroc"] > 0.9 and 0 <= plain["stderr"] < 0.1
    assert summary["ood"]["means"]["digits_inverted"] > summary["ood"]["means"]["test"] + 1
    text = (tmp_path / "report.txt").read_text()
    assert "known to fail" in text and (tmp_path / "figures" / "ood.png").is_file()


def test_data_are_not_told_apart_from_themselves(tmp_path, of_plane):
    given = (*PLANE, f"checkpoint={of_plane}", "data@ood.against=mixture2d")
    scores = run(likelihood_tasks.out_of_distribution, tmp_path, *given)["ood"]["scores"]
    assert [score["auroc"] for score in scores.values()] == pytest.approx([0.5, 0.5])


def test_ways_between_examples(tmp_path, of_digits, of_plane):
    given = ["interpolate.pairs=2", "interpolate.points=3", "interpolate.log_prob=true"]
    given += ["likelihood.method=dopri5", "likelihood.steps=null"]
    rough, fine = (["likelihood.rtol=" + tolerance, "likelihood.atol=" + tolerance] for tolerance in ("1e-2", "1e-6"))
    for name, data, folder in (("digits", (*DIGITS, *rough), of_digits), ("plane", (*PLANE, *fine), of_plane)):
        place = tmp_path / name
        summary = run(likelihood_tasks.interpolate, place, *data, f"checkpoint={folder}", *given)
        ways = np.load(place / "samples" / "interpolation.npy")
        assert ways.shape[:2] == (3, 2) and len(summary["interpolation"]["log_prob"]) == 3
        assert (place / "figures" / "interpolation.png").is_file()
    test = mixture2d(train=50).test.numpy()  # of the plane, whose flow is smooth
    off = np.stack((ways[0] - test[0:4:2], ways[-1] - test[1:4:2]))
    assert np.abs(off).max() < 0.01
    assert summary["interpolation"]["rmse"] == pytest.approx(np.sqrt(np.square(off).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ("likelihood", ["likelihood.split=tests"], "likelihood.split must be one of train, validation, test"),
        ("likelihood", ["likelihood.samples=1"], "samples must be at least 2, or null"),
        ("likelihood", ["likelihood.ode_subset=-1"], "ode_subset must be at least 0"),
        ("likelihood", ["likelihood=exact", "likelihood.divergence._target_=solvers.DDIM"], "must be a Divergence"),
        ("likelihood", ["likelihood.draws=0"], "likelihood: draws must be a positive integer"),
        ("likelihood", ["likelihood.draws=2"], "continuous data have no dequantization"),
        ("likelihood", ["likelihood.t_min=auto"], "t_min='auto' goes by the bins"),
        ("likelihood", ["dequantizer@likelihood.dequantizer=uniform"], "for continuous ones leave it at null"),
        ("likelihood", ["checkpoint=/nowhere"], "there is no file /nowhere"),
        ("out_of_distribution", [], "needs another data set: data@ood.against=digits_inverted"),
        ("out_of_distribution", ["data@ood.against=digits_shuffled"], "ood.against: needs examples of shape"),
        ("out_of_distribution", ["data@ood.against=mnist"], "data.path=FOLDER is needed"),
        ("interpolate", ["interpolate.pairs=0"], "pairs >= 1 and points >= 2"),
        ("interpolate", ["interpolate.pairs=501"], "needs 1002 examples, found 1000"),
        ("interpolate", ["likelihood.method=rk4"], "likelihood: .*give steps"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_clear_message(tmp_path, of_plane, task, overrides, words):
    config = configuration(*PLANE, f"checkpoint={of_plane}", *overrides)
    with pytest.raises((ConfigError, DataError, ValueError), match=words):
        getattr(likelihood_tasks, task)(config, Run(tmp_path, task))


def test_every_setting_is_part_of_what_a_partial_result_belongs_to(of_plane):
    config = configuration(*PLANE)
    flat = likelihood_tasks.flat(OmegaConf.to_container(config.likelihood))
    assert flat["divergence.probes"] == 2 and flat["t_min"] is None and "split" in flat
