"""Training, what it measures, and its checkpoints."""

import csv
import json

import pytest
import torch
from configurations import configuration

from experiments import checkpoint, cli, pictures, records, training
from experiments.build import ConfigError
from experiments.data import mixture2d
from experiments.loggers import NoLogger
from experiments.nan_report import TrainingDiverged
from experiments.order import batches, permutation
from experiments.problem import Problem, build_model
from experiments.run import Run, RunFolderTaken
from experiments.stepper import Stepper
from models import DenoisingScoreMatching
from sde import VP

SMALL = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem():
    return Problem.of(mixture2d(train=500, validation=50, test=50))


def trained(folder, problem, *overrides):
    config = configuration(*SMALL, "train.steps=40", "train.warmup=5", "train.log_every=10", *overrides)
    return training.train(config, problem, CPU, Run(folder, "train")), config


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = configuration("train.steps=1000", "train.warmup=100", "train.learning_rate=1.0").train
    rates = [training.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) < 1.0 and rates[999] < 1e-5
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_the_loss_falls_and_the_metrics_say_so(tmp_path, problem):
    model, _ = trained(tmp_path, problem, "train.steps=200")
    found = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in found] == list(range(10, 201, 10))
    assert float(found[-1]["validation_loss"]) < 0.8 * float(found[0]["validation_loss"])
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


def poisoned():
    data = mixture2d(train=100, validation=10, test=10)
    data.train[3] = float("nan")
    return Problem.of(data)


def test_losses_that_are_not_finite_change_nothing_and_end_the_training_with_a_report(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"in step 1 \(at log-SNR .*3 steps in a row.*nan_report\.json"):
        trained(tmp_path, poisoned(), "train.batch_size=100", "train.log_every=3", "train.max_bad_steps=3")
    assert not list((tmp_path / "checkpoints").glob("*.pt"))  # nothing was learned
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert report["first_bad_step"] == 1 and report["bad_steps_in_a_row"] == 3 and report["last_step"] == 3
    assert report["examples_not_finite"] == {"count": 1, "first": [3]}
    assert report["weights_not_finite"] == [] and report["gradients_not_finite"]
    low, high = report["log_snr_of_bad_losses"]
    assert low == high and sum(one["count"] for one in report["loss_by_log_snr"]) == 3 * 99


def test_a_sound_checkpoint_is_not_overwritten_by_a_training_that_diverges(tmp_path, problem, monkeypatch):
    step = Stepper.__call__

    def poisoning(self, x, rate, **condition):
        step(self, x if self.average.updates < 20 else x * float("nan"), rate, **condition)

    monkeypatch.setattr(Stepper, "__call__", poisoning)
    with pytest.raises(TrainingDiverged, match="in step 21 "):
        trained(tmp_path, problem, "train.save_every=20", "train.max_bad_steps=10")
    model, _, step_found = checkpoint.load(str(tmp_path), CPU)
    assert step_found == 20 and all(p.isfinite().all() for p in model.parameters())


def test_the_step_that_was_not_finite_is_named_and_the_others_count(tmp_path, caplog):
    """In batches of 10 the one bad point of 100 comes up once in ten steps, which is no end."""
    step = permutation(0, 0, 100).tolist().index(3) // 10 + 1
    model, _ = trained(tmp_path, poisoned(), "train.batch_size=10", "train.log_every=20")
    assert f"step {step} was not finite (at log-SNR" in caplog.text and "changed nothing" in caplog.text
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(rows(tmp_path / "metrics.csv")) == 2


def test_a_gradient_that_alone_is_not_finite_is_told_apart(tmp_path, problem, monkeypatch, caplog):
    class Steep(DenoisingScoreMatching):
        def forward(self, model, x0, generator=None, **condition):
            found = super().forward(model, x0, generator, **condition)
            return found._replace(value=found.value + (found.value.detach() * 0 + 0 * found.value).clamp(min=0).sqrt())

    monkeypatch.setattr(training, "build_objective", lambda config, model: Steep())
    with pytest.raises(TrainingDiverged, match=r"in step 1 \(in the gradient alone\)"):
        trained(tmp_path, problem)


def test_out_of_memory_says_what_to_do(tmp_path, problem, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(Stepper, "__call__", full)
    with pytest.raises(training.OutOfMemory, match=r"Tried to allocate 2\.00 GiB\): raise train\.accumulate"):
        trained(tmp_path, problem)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_losses_by_noise_level_add_up_to_the_loss(tmp_path, problem):
    trained(tmp_path, problem, "train.batch_size=32")
    by_level = rows(tmp_path / "loss_by_log_snr.csv")
    for row in rows(tmp_path / "metrics.csv"):
        here = [r for r in by_level if r["step"] == row["step"]]
        counts = [int(r["count"]) for r in here]
        total = sum(float(r["mean"] or 0) * n for r, n in zip(here, counts, strict=True))
        assert sum(counts) == 10 * 32 and total / sum(counts) == pytest.approx(float(row["loss"]), rel=1e-5)
        ends = [float(r["low"]) for r in here] + [float(here[-1]["high"])]
        assert ends == sorted(ends) and (ends[0], ends[-1]) == pytest.approx(VP().log_snr_range)
        assert all((r["mean"] == "") == (n == 0) for r, n in zip(here, counts, strict=True))


def test_pictures_of_a_training(tmp_path, problem):
    trained(tmp_path, problem)
    run = Run(tmp_path / "other", "train")
    run.folder = tmp_path
    assert [path.name for path in pictures.of_training(run)] == ["loss.png", "loss_by_log_snr.png"]


class Counting(DenoisingScoreMatching):
    """Counts what it was called for, as an adaptive distribution of times would learn."""

    def __init__(self):
        super().__init__()
        self.learned, self.seen, self.dropped, self.last = 0, 0, [], None

    def forward(self, model, x0, generator=None, **condition):
        self.learned, self.seen = self.learned + self.training, self.seen + 1
        self.dropped.append(model.net.training)
        self.last = [p.detach().clone() for p in model.parameters()]
        return super().forward(model, x0, generator, **condition)


def test_validation_is_of_the_average_and_teaches_nothing(tmp_path, problem, monkeypatch):
    objective = Counting()
    monkeypatch.setattr(training, "build_objective", lambda config, model: objective)
    model, _ = trained(tmp_path, problem)
    assert all(torch.equal(a, b) for a, b in zip(objective.last, model.parameters(), strict=True))  # of the average
    assert (objective.learned, objective.seen) == (40, 44)
    assert objective.dropped.count(False) == 4 and objective.training


def test_where_the_data_lie_plays_no_part_in_the_order(problem):
    def first(where):
        config = configuration("train.batch_size=64", f"train.data_on_device={where}")
        stream = batches(problem, config, CPU, torch.Generator().manual_seed(5))
        return torch.stack([next(stream) for _ in range(20)])

    assert torch.equal(first("false"), first("auto")) and torch.equal(first("true"), first("auto"))


@pytest.mark.parametrize("options", [("train.accumulate=4",), ("train.precision=bfloat16",), ("train.fused=false",)])
def test_training_by_other_means_learns_as_well(tmp_path, problem, options):
    trained(tmp_path, problem, "train.steps=100", *options)
    losses = [float(row["validation_loss"]) for row in rows(tmp_path / "metrics.csv")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("train.precision must be one of", "precision=half"),
        ("train.accumulate must divide", "accumulate=7"),
        ("train.cuda_graphs needs a CUDA device", "cuda_graphs=true"),
        ("train.channels_last is for images", "channels_last=true"),
        ("train.data_on_device must be auto, true or false, found 'often'", "data_on_device=often"),
        ("train.warmup must be at least 0", "warmup=-1"),
    ],
)
def test_settings_of_a_step_are_refused_before_training(tmp_path, problem, words, setting):
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path, problem, f"train.{setting}")
    assert not (tmp_path / "metrics.csv").exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    first = Run(tmp_path, "train")
    with pytest.raises(RunFolderTaken, match=r"is being written by another run \(process \d+ on "):
        Run(tmp_path, "train")
    first.end("done")
    with pytest.raises(RunFolderTaken, match="already holds a run"):
        Run(tmp_path, "train")


def test_a_logger_is_not_told_what_the_environment_says(tmp_path, problem, monkeypatch):
    told = {}

    class Listening(NoLogger):
        def start(self, folder, config, step=0, run_id=None):
            told.update(config)

    monkeypatch.setenv("SECRET_PLACE", "somewhere")
    monkeypatch.setattr(records, "build_logger", lambda config: Listening())
    trained(tmp_path, problem, "checkpoint='${oc.env:SECRET_PLACE}'")
    assert told["checkpoint"] == "${oc.env:SECRET_PLACE}" and told["train"]["steps"] == 40


def test_processes_that_do_not_know_where_to_meet_end_with_one_line(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "error: one of 2 processes, and neither MASTER_ADDR" in capsys.readouterr().err
