"""Training, its average of the weights, and its checkpoints."""

import csv
import json

import pytest
import torch
from configurations import configuration

from experiments import checkpoint, training
from experiments.average import Average
from experiments.build import ConfigError
from experiments.data import mixture2d
from experiments.problem import Problem, build_model
from experiments.run import Run, RunFolderTaken

SMALL = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem():
    return Problem.of(mixture2d(train=500, validation=50, test=50))


def trained(folder, problem, *overrides):
    config = configuration(*SMALL, "train.steps=40", "train.warmup=5", "train.log_every=10", *overrides)
    return training.train(config, problem, CPU, Run(folder, "train")), config


def test_the_average_of_constant_weights_has_the_closed_form():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = Average(model, decay=0.9)
    model.weight.data.fill_(1.0)
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(200)]
    for _ in decays:
        average.update()
    left = torch.tensor(decays, dtype=torch.float64).prod().item()
    assert average.state["weight"].item() == pytest.approx(1 - left, abs=1e-5)
    assert average.updates == 200


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = configuration("train.steps=1000", "train.warmup=100", "train.learning_rate=1.0").train
    rates = [training.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) < 1.0 and rates[999] < 1e-5
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_the_loss_falls_and_the_metrics_say_so(tmp_path, problem):
    model, _ = trained(tmp_path, problem, "train.steps=200")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(10, 201, 10))
    assert float(rows[-1]["validation_loss"]) < 0.8 * float(rows[0]["validation_loss"])
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_validation_plays_no_part(tmp_path, problem):
    one, _ = trained(tmp_path / "a", problem)
    two, _ = trained(tmp_path / "b", problem, "train.log_every=40")
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_a_checkpoint_brings_the_model_back(tmp_path, problem):
    model, _ = trained(tmp_path, problem)
    x, t = torch.randn(5, 2), torch.tensor(0.3)
    for path in (tmp_path, tmp_path / "checkpoints" / "last.pt"):
        loaded, convention, step = checkpoint.load(str(path), CPU)
        assert step == 40 and convention == problem.convention()
        assert torch.equal(loaded(x, t).eps, model(x, t).eps)


@pytest.mark.parametrize("size", [0, 1, 100, -30, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, problem, size):
    trained(tmp_path, problem)
    file = tmp_path / "checkpoints" / "last.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt: not a readable checkpoint"):
        checkpoint.load(str(tmp_path), CPU)


def test_foreign_and_missing_checkpoints_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    for path, words in (("foreign.pt", "lacks"), ("text.pt", "not a readable"), ("none.pt", "there is no file")):
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.load(str(tmp_path / path), CPU)
    with pytest.raises(checkpoint.CheckpointError, match="give checkpoint="):
        checkpoint.load(None, CPU)


@pytest.mark.parametrize("part", ["net", "sde", "parametrization"])
def test_a_checkpoint_can_not_name_what_to_run(tmp_path, problem, part):
    trained(tmp_path, problem)
    file = tmp_path / "checkpoints" / "last.pt"
    content = torch.load(file, weights_only=True)
    marker = tmp_path / "marker"
    stored = json.loads(content["config"])
    stored[part] = {"_target_": "experiments.run.write_json", "path": str(marker), "content": 1}
    torch.save(content | {"config": json.dumps(stored)}, file)
    with pytest.raises(ConfigError):
        checkpoint.load(str(tmp_path), CPU)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("batch_size", -1), ("learning_rate", 0.0), ("ema", 1.0), ("clip", -1.0)],
)
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ConfigError, match=f"train.{setting} must"):
        training.check(configuration(f"train.{setting}={value}").train, CPU, (2,))


def test_an_objective_that_is_none_is_refused():
    config = configuration(*SMALL, "objective.weighting=best")
    model = build_model(config, Problem.of(mixture2d(10, 10, 10)).convention())
    with pytest.raises(ConfigError, match="objective: weighting must be one of"):
        training.build_objective(config, model)
    config.objective = {"_target_": "models.UniformTime"}
    with pytest.raises(ConfigError, match=r"objective must be an Objective, found models\.UniformTime"):
        training.build_objective(config, model)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    data = mixture2d(train=100, validation=10, test=10)
    data.train[3] = float("nan")
    with pytest.raises(training.TrainingDiverged, match="in step 1;"):
        trained(tmp_path, Problem.of(data), "train.batch_size=100")


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    Run(tmp_path, "train")
    with pytest.raises(RunFolderTaken, match="already holds a run"):
        Run(tmp_path, "train")


def test_the_stored_configuration_builds_the_same_model(tmp_path, problem):
    _, config = trained(tmp_path, problem)
    content = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    again = build_model(json.loads(content["config"]), problem.convention())
    assert str(again) == str(build_model(config, problem.convention()))
