"""Tasks: what they warn of, and models under another process than their own."""

import json
import logging

import pytest
import torch
from configurations import configuration

from experiments import session, tasks, training
from experiments.build import ConfigError
from experiments.data import Data, mixture2d
from experiments.problem import Problem
from experiments.run import Run
from sde import EDM, VP

PLANE = ("data=mixture2d", "data.train=50", "net=mlp", "net.width=8", "parametrization=noise", "train.steps=2")


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_default_run_has_nothing_to_warn_of(tmp_path, caplog):
    tasks.check_training(tasks.Session(configuration(), Run(tmp_path, "train")))
    assert warned(caplog) == []
    found = json.loads((tmp_path / "summary.json").read_text())["diagnosis"]
    assert found["prior_kl"] < 3e-5 and found["truncation_bits"] == pytest.approx(0.0118, rel=0.01)


def test_256_levels_under_vp_get_one_warning_once(tmp_path, caplog, monkeypatch):
    levels = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(
        session, "load_problem", lambda _: Problem.of(Data("bytes", levels, levels, levels, levels=256))
    )
    opened = tasks.Session(configuration("parametrization=v"), Run(tmp_path, "train"))
    for _ in range(2):
        tasks.check_training(opened)
    (sentence,) = warned(caplog)
    assert "0.176 bits/dim, more than 0.02; lower t_min: t_min=1e-07 would do" in sentence


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model trained, hardly, under VP."""
    folder = tmp_path_factory.mktemp("trained")
    problem = Problem.of(mixture2d(train=50))
    training.train(configuration(*PLANE), problem, torch.device("cpu"), Run(folder, "train"))
    return folder


def loaded(trained, folder, *overrides):
    config = configuration(*PLANE, "task=likelihood", f"checkpoint={trained}", *overrides)
    return tasks.load_model(tasks.Session(config, Run(folder, "likelihood")))


def test_a_model_is_evaluated_under_another_process(tmp_path, trained):
    own, other = loaded(trained, tmp_path / "a"), loaded(trained, tmp_path / "b", "sde@under=edm", "under.t_min=0.01")
    assert own.sde == VP() and other.sde == EDM(t_min=0.01)
    x, sigma = torch.tensor([[0.3, -0.5]]), torch.tensor(1.5)
    t = own.sde.time(-2 * sigma.log())
    for mine, yours in zip(own(own.sde.alpha(t) * x, t), other(x, sigma), strict=True):
        assert torch.allclose(mine, yours, atol=1e-4)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["under"] == str(other.sde) and summary["checkpoint"]["sde"] == str(own.sde)
    assert "under" not in json.loads((tmp_path / "a" / "summary.json").read_text())


def test_a_process_that_begins_with_too_little_noise_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match=r"with less noise than VP.*raise its t_min to 0.001"):
        loaded(trained, tmp_path, "sde@under=edm", "under.t_min=1e-4")


def test_training_takes_sde_and_not_under(tmp_path):
    opened = tasks.Session(configuration(*PLANE, "sde@under=edm"), Run(tmp_path, "train"))
    with pytest.raises(ConfigError, match="sde@under= is for a trained model"):
        tasks.check_training(opened)


def test_a_schedule_that_learns_needs_the_objective_that_can_train_it(tmp_path):
    opened = tasks.Session(configuration(*PLANE, "sde=learned"), Run(tmp_path / "a", "train"))
    with pytest.raises(ConfigError, match=r"only weighting='likelihood'.*objective=bound"):
        tasks.check_training(opened)
    tasks.check_training(
        tasks.Session(configuration(*PLANE, "sde=learned", "objective=bound"), Run(tmp_path / "b", "train"))
    )
