"""The task that draws what a checkpoint is enough for, and the picture that task=verify makes."""

import json

import pytest
import torch
from checkpoints import SMALL
from configurations import configuration

from experiments import figure_tasks, pictures, tasks
from experiments.build import ConfigError
from experiments.run import Run
from experiments.verification import VerificationFailed
from sde import VP
from solvers import DDIM, ProbabilityFlow, SamplingDiverged

CHEAP = (
    "task=figures",
    "compare.names=[ddim,heun]",
    "compare.budgets=[4,8,12]",
    "likelihood.rtol=1e-2",
    "likelihood.atol=1e-2",
    *SMALL,
)
DRAWN = ["noise_to_data.gif", "same_noise.png", "samples.png", "schedules.png", "trajectories.png"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pictures, "_log_density", lambda model, grid: -grid.square().sum(-1))
    monkeypatch.setattr(figure_tasks, "POINTS", 20)
    monkeypatch.setattr(figure_tasks, "_FLOW", ProbabilityFlow(rtol=1e-2, atol=1e-2))


def test_the_task_draws_all_that_a_checkpoint_is_enough_for(tmp_path, file, quick):
    run = Run(tmp_path / "run", "figures")
    figure_tasks.figures(configuration(*CHEAP, f"checkpoint={file}"), run)
    found = sorted(path.name for path in (run.folder / "figures").iterdir())
    assert found == sorted([*DRAWN, "density.png", "scores.png", "interpolation.png"])
    summary = json.loads((run.folder / "summary.json").read_text())
    assert sorted(summary["figures"]) == found and summary["not_drawn"] == {}
    assert "noise_to_data.gif" in (run.folder / "report.txt").read_text()


def test_a_figure_that_fails_is_told_and_the_others_are_drawn(tmp_path, file, quick, monkeypatch, caplog):
    def diverges(*_):
        raise SamplingDiverged("not finite")

    for name in ("same_noise", "density", "interpolation"):
        monkeypatch.setattr(figure_tasks, name, diverges)
    monkeypatch.setattr(pictures, "of_flow", diverges)
    run = Run(tmp_path / "run", "figures")
    figure_tasks.figures(configuration(*CHEAP, f"checkpoint={file}"), run)
    assert [path.name for path in (run.folder / "figures").iterdir()] == ["schedules.png"]
    assert "no picture of the density (SamplingDiverged: not finite)" in caplog.text
    summary = json.loads((run.folder / "summary.json").read_text())
    assert set(summary["not_drawn"]) == {"noise to data", "samples", "density", "interpolation"}
    monkeypatch.setattr(pictures, "of_process", diverges)
    with pytest.raises(ConfigError, match=r"no figure could be drawn: SamplingDiverged"):
        figure_tasks.figures(configuration(*CHEAP, f"checkpoint={file}"), Run(tmp_path / "none", "figures"))


def test_the_smallest_and_the_largest_budget_are_shown():
    plan = [("ddim", DDIM(steps=n)) for n in (5, 10, 20)] + [("one", DDIM(steps=7))]
    assert figure_tasks.ends(plan) == [("ddim", DDIM(steps=5)), ("ddim", DDIM(steps=20)), ("one", DDIM(steps=7))]


def test_verify_draws_the_schedules_where_they_are_defined(tmp_path, monkeypatch, capsys):
    class Broken(VP):
        def alpha(self, t):
            return super().alpha(t) * torch.nan

    tasks.verify(configuration("task=verify"), Run(tmp_path / "sound", "verify"))
    assert (tmp_path / "sound" / "figures" / "schedules.png").is_file()
    assert "schedules.png" in capsys.readouterr().out
    monkeypatch.setattr(tasks, "build", lambda *_, **__: Broken())
    with pytest.raises(VerificationFailed):
        tasks.verify(configuration("task=verify"), Run(tmp_path / "broken", "verify"))
    assert not (tmp_path / "broken" / "figures").exists()
