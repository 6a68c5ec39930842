"""What loggers are told, by stand-ins for their packages, and by TensorBoard's own reader where it is installed."""

import json
import logging
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import conf
from experiments.build import ConfigError, build
from experiments.loggers import Logger, NoLogger, TensorBoard, WandB

GROUP = Path(conf.__file__).parent / "logger"
CONFIG = {"seed": 0, "net": {"_target_": "models.MLP", "width": 16}}
GRID = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)
BINS = [(-8.0, -4.0, 0.5, 10), (-4.0, 0.0, float("nan"), 0), (0.0, 4.0, 0.25, 2)]


class Told:
    """Notes every call of any method, with its arguments; raises ``error`` where there is one."""

    def __init__(self, *made, error=None, **more):
        self.calls, self.error = [("made", made, more)], error

    def __getattr__(self, name):
        def call(*args, **more):
            if self.error:
                raise self.error
            self.calls.append((name, args, more))

        return call

    def of(self, name):
        return [(args, more) for called, args, more in self.calls if called == name]


@pytest.fixture
def tensorboard(monkeypatch):
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Told
    monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.fixture
def wandb(monkeypatch):
    """A package whose ``init`` gives a ``Told`` that knows what it was made with."""
    fake = ModuleType("wandb")
    fake.init, fake.Image, fake.Settings = Told, lambda array: ("image", array), SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def show(logger: Logger, folder: Path, step: int = 0, run_id: str | None = None) -> str | None:
    """Everything that a training says in one go."""
    run_id = logger.start(folder, CONFIG, step, run_id)
    logger.scalars(step + 10, {"loss": 0.75, "learning_rate": 1e-3})
    logger.bins(step + 10, "loss_by_log_snr", BINS)
    logger.images(step + 10, "samples", GRID)
    logger.flush()
    return run_id


def test_every_choice_builds(tensorboard, wandb):
    built = {file.stem: build(OmegaConf.load(file), where="logger") for file in GROUP.glob("*.yaml")}
    assert built == {"none": NoLogger(), "tensorboard": TensorBoard(), "wandb": WandB()}


def test_tensorboard_is_told_everything_once(tensorboard, tmp_path):
    logger = TensorBoard()
    assert show(logger, tmp_path, step=40) is None
    logger.close()
    writer = logger._writer
    assert writer.of("made") == [((str(tmp_path / "tensorboard"),), {"purge_step": 41})]
    assert json.dumps(CONFIG, indent=2) in writer.of("add_text")[0][0][1]
    low, high = "loss_by_log_snr/00_-8.0_to_-4.0", "loss_by_log_snr/02_0.0_to_4.0"
    rows = [("loss", 0.75, 50), ("learning_rate", 1e-3, 50), (low, 0.5, 50), (high, 0.25, 50)]
    assert [args for args, _ in writer.of("add_scalar")] == rows
    ((name, grid, step), more) = writer.of("add_image")[0]
    assert (name, step, more) == ("samples", 50, {"dataformats": "HWC"}) and torch.equal(grid, GRID)
    assert len(writer.of("flush")) == len(writer.of("close")) == 1


def test_wandb_is_offline_and_asks_nobody(wandb, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **more: asked.append(sys.stdin.read()) or Told(**more))
    terminal, logger = sys.stdin, WandB()
    run_id = show(logger, tmp_path)
    logger.close()
    made = logger._run.of("made")[0][1]
    assert asked == [""] and sys.stdin is terminal
    assert (made["mode"], made["id"], made["dir"], made["config"]) == ("offline", run_id, str(tmp_path), CONFIG)
    assert made["settings"].console == "off" and "resume" not in made
    logged = [(more["step"], args[0]) for args, more in logger._run.of("log")]
    assert logged[0] == (10, {"loss": 0.75, "learning_rate": 1e-3})
    assert set(logged[1][1].values()) == {0.5, 0.25}
    kind, array = logged[2][1]["samples"]
    assert kind == "image" and np.array_equal(array, GRID.numpy())
    assert len(logger._run.of("finish")) == 1


def test_a_resumed_run_of_wandb_keeps_its_id(wandb, tmp_path):
    first, second = WandB(mode="online"), WandB(mode="online")
    run_id = show(first, tmp_path)
    assert show(second, tmp_path, 40, run_id) == run_id
    made = [logger._run.of("made")[0][1] for logger in (first, second)]
    assert [m["id"] for m in made] == [run_id] * 2 and made[1]["resume"] == "allow"
    assert show(WandB(), tmp_path) != run_id


@pytest.mark.parametrize(("name", "kind"), [("tensorboard", TensorBoard), ("wandb", WandB)])
def test_a_missing_package_is_refused_at_once_with_the_cure(monkeypatch, name, kind):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"unified-score-sde\[{name}\]"):
        kind()


def test_what_wandb_refuses_is_the_users_error(wandb, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"api_key not configured.*logger\.mode=offline"):
        WandB(mode="online").start(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"logger\.mode must be one of .*'on'"):
        WandB(mode="on")


def test_a_logger_that_fails_is_warned_of_once_and_the_training_goes_on(tensorboard, wandb, tmp_path, caplog):
    for logger, inner in ((TensorBoard(), "_writer"), (WandB(), "_run")):
        caplog.clear()
        logger.start(tmp_path, CONFIG)
        getattr(logger, inner).error = OSError(28, "No space left on device")
        with caplog.at_level(logging.WARNING):
            for step in range(3):
                logger.scalars(step, {"loss": 1.0})
                logger.images(step, "samples", GRID)
                logger.flush()
            logger.close()
        assert len(caplog.records) == 1, logger
        assert "No space left on device" in caplog.text and "training goes on" in caplog.text
        getattr(logger, inner).error = None  # and it tries again
        logger.scalars(7, {"loss": 2.0})
        assert getattr(logger, inner).calls[-1][0] in ("add_scalar", "log")


def test_an_interrupt_is_not_a_failure(tensorboard, tmp_path):
    logger = TensorBoard()
    logger.start(tmp_path, CONFIG)
    logger._writer.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        logger.scalars(1, {"loss": 1.0})


@pytest.mark.parametrize("grid", [GRID.float(), GRID[..., :2], GRID[0], GRID[None]])
def test_what_is_no_picture_is_refused(grid):
    with pytest.raises(ValueError, match=r"samples: expected uint8 \(H, W, 1 or 3\), found torch"):
        NoLogger().images(1, "samples", grid)


def test_nothing_is_logged_by_none(tmp_path):
    assert show(NoLogger(), tmp_path) is None and not list(tmp_path.iterdir())


def test_no_logger_draws_random_numbers(tensorboard, wandb, tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    for logger in (NoLogger(), TensorBoard(), WandB()):
        show(logger, tmp_path)
    assert states() == before


def read(folder: Path):
    """What TensorBoard shows of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_reads_back_what_was_logged_and_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoard()
    first.start(tmp_path, CONFIG)
    for step in (10, 20, 30):
        first.scalars(step, {"loss": step / 7})
    first.bins(30, "loss_by_log_snr", BINS)
    first.images(20, "samples", GRID)
    first.flush()  # killed here, with its last checkpoint at step 20
    second = TensorBoard()
    second.start(tmp_path, CONFIG, step=20)
    for step in (30, 40):
        second.scalars(step, {"loss": step / 9})
    second.images(40, "samples", GRID[..., :1])
    second.close()
    found = read(tmp_path)
    rows = [(event.step, event.value) for event in found.Scalars("loss")]
    assert rows == [(step, pytest.approx(step / by)) for step, by in ((10, 7), (20, 7), (30, 9), (40, 9))]
    assert not found.Scalars("loss_by_log_snr/00_-8.0_to_-4.0")  # of step 30, and not logged again
    assert [(e.step, e.height, e.width) for e in found.Images("samples")] == [(20, 4, 6), (40, 4, 6)]
    (text,) = found.Tensors("configuration/text_summary")[:1]
    assert '"width": 16' in text.tensor_proto.string_val[0].decode()
    first.close()
