"""The store: what a network is known by, that it is trained once, and that a death on the way changes nothing."""

import json
import os
import signal
import time

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

from experiments import cells, checkpoint, networks
from experiments.networks import NetworkFailed, Store, identity, name_of, obtain
from experiments.problem import Problem
from experiments.run import Run, RunFolderTaken
from experiments.session import Session, load_model
from experiments.stepper import Stepper

PLANE = ("net=mlp", "net.width=16", "net.depth=1", "net.dropout=0.1", "data=mixture2d", "parametrization=noise")
STEPS = ("train.steps=30", "train.warmup=5", "train.log_every=5", "train.save_every=10", "train.batch_size=32")

GROUPS = ("task", "sde", "sde@under", "parametrization", "objective", "logger", "solver")


def configured(folder, *more):
    """Composed where a group is chosen, which takes long; or else with the values put in."""
    groups = [one for one in more if "." not in one and "=" in one and one.split("=")[0] in GROUPS]
    config = configuration("task=sample", "device=cpu", *PLANE, *STEPS, *groups)
    for one in ("networks=" + str(folder / "store"), *(one for one in more if one not in groups)):
        name, _, value = one.partition("=")
        OmegaConf.update(config, name, OmegaConf.create(f"value: {value}").value)
    return config


@pytest.fixture
def session(tmp_path):
    """``session(name, *overrides)``: a run of its own that shares the test's store."""
    return lambda name, *more: Session(configured(tmp_path, *more), Run(tmp_path / name, "sample"))


@pytest.fixture
def trainings(monkeypatch):
    """The trainings of this process, as they begin."""
    begun, train = [], networks.training.train

    def counted(config, problem, device, run):
        begun.append(run.folder)
        return train(config, problem, device, run)

    monkeypatch.setattr(networks.training, "train", counted)
    return begun


def in_a_child(work):
    """Run ``work()`` in a child process; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def at_step(monkeypatch, number, what):
    """Call ``what()`` in the midst of a step, counted from now on."""
    step, calls = Stepper.__call__, []

    def stepping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            what()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", stepping)


def content(file):
    """All of a checkpoint that must be the same: not times, machines and places."""
    found = checkpoint.read(file)
    found["training"]["progress"].pop("seconds")
    return {name: value for name, value in found.items() if name not in ("config", "provenance", "digest")}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


OTHER = ["seed=1", "sde=ve", "sde.beta_max=19.0", "net.width=32", "parametrization=v", "label=time", "data.seed=1"]
OTHER += ["train.steps=31", "train.ema=0.5", "train.learning_rate=0.1", "train.batch_size=16", "train.clip=3.0"]
OTHER += ["objective=ddpm", "train.early_stop=3", "train.precision=bfloat16"]
SAME = ["task=compare", "solver=heun", "solver.steps=7", "compare.samples=50", "compare.budgets=[7]", "device=auto"]
SAME += ["likelihood.samples=9", "likelihood.rtol=1e-3", "networks=elsewhere", "optimize=training.loss", "resume=auto"]
SAME += ["train.log_every=10", "train.save_every=5", "train.keep_every=10", "train.workers=1", "checkpoint=x"]
SAME += ["logger=tensorboard", "sde@under=edm", "interpolate.pairs=2", "train.max_bad_steps=4", "sde.beta_max=20"]


@pytest.mark.parametrize("override", OTHER + SAME)
def test_what_determines_the_weights_is_what_a_network_is_known_by(tmp_path, plane, override):
    names = [name_of(configured(tmp_path, *more), plane) for more in ((), (override,))]
    assert (names[0] != names[1]) == (override in OTHER), names
    assert "=" not in names[1] and len(names[1]) <= cells.LONGEST


def test_where_training_may_stop_early_what_judges_it_counts(tmp_path, plane):
    given = ("train.early_stop=3", "train.save_every=5"), ("train.early_stop=3", "train.save_every=10")
    assert len({name_of(configured(tmp_path, *more), plane) for more in given}) == 2


def test_the_examples_themselves_count_and_not_where_they_lie(tmp_path, plane):
    data = plane.data
    altered = data.train.clone()
    altered[0, 0] += 1
    other = Problem.of(type(data)(data.name, altered, data.validation, data.test))
    alike = Problem.of(type(data)(data.name, data.train.clone(), data.validation, data.test))
    config = configured(tmp_path)
    assert identity(config, plane) == identity(config, alike) != identity(config, other)
    OmegaConf.set_struct(config, False)
    config.data.path = "/somewhere/else"
    assert name_of(config, plane) == name_of(config, alike)


def test_a_network_is_trained_once_for_all_runs_that_need_it(tmp_path, session, trainings):
    first = load_model(session("one"))
    after = torch.rand(3)
    second = load_model(session("two", "solver=heun", "train.log_every=10"))
    assert len(trainings) == 1 and torch.equal(after, torch.rand(3))  # whoever trained
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    notes = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert [note["network"]["trained_here"] for note in notes] == [True, False]
    assert notes[0]["training"] == notes[1]["training"] and notes[0]["training"]["steps"] == 30
    folder = trainings[0]
    assert folder.parent == tmp_path / "store" and folder.name.startswith("vp-mixture2d-seed0-")
    assert json.loads((folder / "status.json").read_text())["task"] == "train"
    for name in ("metrics.csv", "network.json", "run.log", "report.txt", "figures/loss.png", "checkpoints/last.pt"):
        assert (folder / name).is_file(), name
    load_model(session("three", "seed=1"))
    assert len(trainings) == 2


def test_a_killed_training_is_gone_on_with_to_the_last_bit(tmp_path, session, trainings, monkeypatch):
    other = Session(configured(tmp_path / "whole"), Run(tmp_path / "whole" / "run", "sample"))
    whole = obtain(other)

    def die():
        at_step(monkeypatch, 15, lambda: os.kill(os.getpid(), signal.SIGKILL))
        obtain(session("first"))

    assert os.WTERMSIG(os.waitpid(in_a_child(die), 0)[1]) == signal.SIGKILL
    found = obtain(session("second"))
    summary = json.loads((found.parent.parent / "summary.json").read_text())
    assert summary["training"]["resumed_from"]["step"] == 10
    assert same(content(found), content(whole))


def test_two_processes_train_one_network(tmp_path, session, monkeypatch, caplog):
    ready, begun = os.pipe()

    def slowly():
        at_step(monkeypatch, 5, lambda: (os.write(begun, b"."), time.sleep(1.5)))
        obtain(session("first"))

    child = in_a_child(slowly)
    os.read(ready, 1)
    with caplog.at_level("INFO"):
        obtain(session("second"))
    os.waitpid(child, 0)
    assert f"waiting for process {child} on" in caplog.text and caplog.text.count("waiting for") == 1
    notes = [json.loads((tmp_path / name / "summary.json").read_text())["network"] for name in ("first", "second")]
    assert [note["trained_here"] for note in notes] == [True, False]
    for number in (ready, begun):
        os.close(number)


def test_what_failed_in_a_sweep_is_not_tried_again_in_it(tmp_path, session, trainings, monkeypatch):
    monkeypatch.setenv(cells.INVOCATION, "a")

    def fail():
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        at_step(broken, 12, fail)
        with pytest.raises(OSError, match="the disk is full"):
            obtain(session("one"))
    with pytest.raises(NetworkFailed, match=r"vp-mixture2d-seed0-\w+ has failed in this sweep \(OSError: the disk"):
        obtain(session("two"))
    assert len(trainings) == 1
    assert json.loads((trainings[0] / "status.json").read_text())["state"] == "failed"
    monkeypatch.setenv(cells.INVOCATION, "b")
    obtain(session("three"))
    assert len(trainings) == 2 and json.loads((trainings[0] / "status.json").read_text())["state"] == "done"


def test_a_network_of_another_version_is_used_with_one_warning(session, trainings, monkeypatch, caplog):
    obtain(session("one"))
    assert "which was trained with" not in caplog.text
    now = networks.provenance()
    monkeypatch.setattr(networks, "provenance", lambda: now | {"git_commit": "abc123"})
    obtain(session("two"))
    assert caplog.text.count("which was trained with commit") == 1 and "now abc123; to train anew, move" in caplog.text
    assert len(trainings) == 1


def test_a_folder_of_another_network_is_refused(session, trainings):
    obtain(session("one"))
    record = trainings[0] / networks.RECORD
    record.write_text(record.read_text().replace('"train.steps": 30', '"train.steps": 300'))
    with pytest.raises(ValueError, match=r"network\.json is not of this training; move"):
        obtain(session("two"))


def test_after_an_early_stop_the_best_weights_are_the_network(tmp_path, session):
    given = ("train.early_stop=1", "train.learning_rate=1.0", "train.save_every=5", "train.steps=1000")
    found = obtain(session("one", *given))
    summary = json.loads((found.parent.parent / "summary.json").read_text())["training"]
    assert summary["stopped_early"] and found.name == "best.pt"
    assert checkpoint.read(found)["step"] == summary["best"]["step"] < summary["steps"]


def test_a_folder_that_another_run_goes_on_in_is_refused(tmp_path, session, plane):
    config = configured(tmp_path)
    problem = session("one").problem
    run = Run(Store(tmp_path / "store").folder / name_of(config, problem), "train")
    with pytest.raises(RunFolderTaken, match="is being written by another run"):
        obtain(session("two"))
    run.end("failed")


def test_without_a_store_a_missing_checkpoint_is_refused(tmp_path):
    config = configuration("task=sample", "device=cpu", *PLANE)
    with pytest.raises(ValueError, match="this task needs a trained model"):
        load_model(Session(config, Run(tmp_path, "sample")))


def test_to_resume_from_elsewhere_has_no_place_in_a_store(tmp_path):
    with pytest.raises(ValueError, match=r"resume=elsewhere has no place among networks that are trained once"):
        networks.store(configured(tmp_path, "resume=elsewhere"))
