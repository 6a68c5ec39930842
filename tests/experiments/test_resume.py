"""A training that was ended anywhere goes on as if it had not been: every tensor, generator and row, in each bit."""

import csv
import errno
import json
import os
import signal
import time

import pytest
import torch
from configurations import configuration

from experiments import archive, checkpoint, records, signals, tally, training
from experiments.build import ConfigError
from experiments.checkpoint import CheckpointError
from experiments.data import mixture2d
from experiments.order import Order
from experiments.problem import Problem
from experiments.run import Run
from experiments.signals import Interrupted, handled
from experiments.stepper import Stepper

CPU = torch.device("cpu")
PLANE = ("net=mlp", "net.width=16", "net.depth=1", "net.dropout=0.1", "data=mixture2d", "parametrization=noise")
IMAGES = ("net=unet_tiny", "net.channels=8", "net.attention=[false,false]", "net.dropout=0.1", "train.batch_size=16")
STEPS = ("train.steps=40", "train.warmup=12", "train.log_every=5", "train.save_every=10", "train.batch_size=32")


@pytest.fixture
def stop(monkeypatch):
    """``stop(k)``: a SIGTERM arrives in the midst of the k-th step from now on, counted over all runs."""
    step, calls = Stepper.__call__, []

    def at(k):
        def stepping(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == k:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Stepper, "__call__", stepping)

    return at


def run(folder, problem, *overrides, resume=None, code=143):
    """A training in a folder; returns what its last checkpoint holds and its rows, whatever its end."""
    config = configuration(*STEPS, *overrides, *([f"resume='{resume}'"] if resume else []))
    where = Run(folder, "train", resume == "auto")
    state = "failed"
    try:
        with handled():
            training.train(config, problem, CPU, where)
        state = "done"
    except Interrupted as interrupt:
        assert interrupt.exit_code == code
        state = "interrupted"
    finally:
        where.end(state)
    return state, content(folder)


def content(folder):
    """All that must be the same: not times and machines."""
    found = checkpoint.read(folder / "checkpoints" / "last.pt")
    found["training"]["progress"].pop("seconds")
    for name in ("config", "provenance", "digest"):
        found.pop(name)
    tables = {name: rows(folder / name) for name in (records.METRICS, tally.NOISE_LEVELS)}
    for row in tables[records.METRICS]:
        row.pop("seconds"), row.pop("samples_per_second")
    return found | {"rows": tables}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def difference(one, two, where="content"):
    """Where two trees of tensors and plain values differ first; None where they don't, in any bit."""
    if isinstance(one, torch.Tensor):
        return None if one.dtype == two.dtype and torch.equal(one, two) else where
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return f"{where}: {sorted(one.keys() ^ two.keys())}"
        return next(filter(None, (difference(one[k], two[k], f"{where}.{k}") for k in one)), None)
    if isinstance(one, (list, tuple)) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return next(filter(None, (difference(*pair, f"{where}[{i}]") for i, pair in pairs)), None)
    return None if one == two or (one != one and two != two) else f"{where}: {one!r}, {two!r}"


def test_the_comparison_sees_a_bit():
    one = {"a": [torch.zeros(3), {"b": 1.0}]}
    assert difference(one, {"a": [torch.zeros(3), {"b": 1.0}]}) is None
    assert difference(one, {"a": [torch.tensor([0, 0, 1e-38]), {"b": 1.0}]}) == "content.a[0]"
    assert "content.a[1].b" in difference(one, {"a": [torch.zeros(3), {"b": 2.0}]})


KINDS = {
    "plain": (PLANE, ()),
    "unfused": (PLANE, ("train.fused=false",)),
    "parts": (PLANE, ("train.accumulate=2",)),
    "bfloat16": (PLANE, ("train.precision=bfloat16",)),
    "learning times": (PLANE, ("objective=loss_aware",)),
    "learning schedule": (PLANE, ("sde=learned", "objective=vdm")),
    "workers": (PLANE, ("train.workers=2", "train.data_on_device=false")),
    "dequantized images": (IMAGES, ()),
    "dequantized images with classes": (IMAGES, ("net.classes=10", "train.accumulate=2")),
}


QUICK = ("plain", "learning times", "workers", "dequantized images with classes")


def mostly(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", mostly(KINDS, QUICK))
def test_interrupted_twice_and_gone_on_with_is_one_training(tmp_path, request, stop, kind):
    """Once during the warm-up, in the middle of an epoch and between two rows; once in the second epoch."""
    base, overrides = KINDS[kind]
    problem = request.getfixturevalue("images" if base is IMAGES else "plane")
    state, whole = run(tmp_path / "whole", problem, *base, *overrides)
    assert state == "done" and whole["step"] == 40
    for k in (8, 31):
        stop(k)
        state, found = run(tmp_path / "parts", problem, *base, *overrides, resume="auto")
        assert (state, found["step"]) == ("interrupted", k)
    state, found = run(tmp_path / "parts", problem, *base, *overrides, resume="auto")
    assert state == "done" and difference(whole, found) is None


@pytest.mark.parametrize("k", mostly([1, 5, 10, 15, 16, 39, 40], (1, 10, 16, 40)))
def test_wherever_it_was_interrupted(tmp_path, plane, stop, k):
    """After the first step, at rows, checkpoints, the end of an epoch (500 / 32 is step 15.6), and in the last step."""
    _, whole = run(tmp_path / "whole", plane, *PLANE)
    stop(k)
    _, first = run(tmp_path / "parts", plane, *PLANE)
    assert first["step"] == k
    _, found = run(tmp_path / "parts", plane, *PLANE, resume="auto")
    assert difference(whole, found) is None


def test_another_folder_can_go_on_too(tmp_path, plane, stop):
    _, whole = run(tmp_path / "whole", plane, *PLANE)
    stop(17)
    run(tmp_path / "first", plane, *PLANE)
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    for name, source in (("folder", tmp_path / "first"), ("file", tmp_path / "first" / "checkpoints" / "last.pt")):
        _, found = run(tmp_path / name, plane, *PLANE, resume=source)
        assert difference(whole, found) is None, name
    _, found = run(tmp_path / "done", plane, *PLANE, resume=tmp_path / "whole")  # where there is nothing left to do
    assert difference(whole, found) is None
    assert before == {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}


def test_without_dropout_or_with_workers_the_same(tmp_path, plane):
    """The number of workers can change on the way: it makes the same batches."""
    _, whole = run(tmp_path / "a", plane, *PLANE)
    _, helped = run(tmp_path / "b", plane, *PLANE, "train.workers=2")
    assert difference(whole, helped) is None


def test_a_training_that_is_done_can_be_given_more_steps(tmp_path, plane, caplog):
    run(tmp_path, plane, *PLANE)
    state, found = run(tmp_path, plane, *PLANE, "train.steps=60", resume="auto")
    assert (state, found["step"]) == ("done", 60)
    assert "other settings than the training began with: train.steps=60, there 40" in caplog.text
    assert [int(row["step"]) for row in found["rows"][records.METRICS]] == list(range(5, 61, 5))
    state, again = run(tmp_path, plane, *PLANE, "train.steps=60", resume="auto")
    assert state == "done" and difference(found, again) is None  # and nothing more where there is nothing to do


def test_killed_at_any_moment(tmp_path, plane):
    """Eight processes, each killed by SIGKILL at a moment of its own, while they save after every second step."""
    often = (*PLANE, "train.steps=160", "train.log_every=2", "train.save_every=2")
    _, whole = run(tmp_path / "whole", plane, *often)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            run(tmp_path / "parts", plane, *often, resume="auto")
            os._exit(0)
        time.sleep(0.1 + 0.2 * torch.rand((), generator=generator).item())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    state, found = run(tmp_path / "parts", plane, *often, resume="auto")
    assert state == "done" and difference(whole, found) is None
    steps = [int(row["step"]) for row in found["rows"][records.METRICS]]
    assert steps == list(range(2, 161, 2))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("sde=subvp",), "sde._target_=sde.SubVP, there sde.VP"),
        (("net.width=8",), "net.width=8, there 16"),
        (("objective=simple",), "objective"),
        (("parametrization=v",), "parametrization.name=v, there noise"),
        (("label=time",), "label=time, there log_snr"),
    ],
)
def test_another_training_is_not_gone_on_with(tmp_path, plane, stop, overrides, words):
    stop(3)
    run(tmp_path, plane, *PLANE)
    with pytest.raises(ConfigError, match="is of another training") as caught:
        run(tmp_path, plane, *PLANE, *overrides, resume="auto")
    assert words in str(caught.value)


def test_other_examples_are_refused(tmp_path, plane, stop):
    stop(3)
    run(tmp_path, plane, *PLANE)
    for other in (mixture2d(train=501, validation=50, test=50), mixture2d(500, 50, 50, seed=1)):
        with pytest.raises(ConfigError, match="trained on other examples"):
            run(tmp_path, Problem.of(other), *PLANE, resume="auto")


def test_what_holds_no_training_is_refused(tmp_path, plane):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        run(tmp_path / "new", plane, *PLANE, resume=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no file"):
        run(tmp_path / "new2", plane, *PLANE, resume=tmp_path / "none.pt")


def test_nothing_to_go_on_from_is_a_beginning(tmp_path, plane):
    state, found = run(tmp_path / "a", plane, *PLANE, resume="auto")
    assert state == "done"
    assert difference(found, run(tmp_path / "b", plane, *PLANE)[1]) is None


def test_on_another_machine_it_says_so(tmp_path, plane, stop, caplog):
    stop(20)
    run(tmp_path / "a", plane, *PLANE)
    torch.set_num_threads(2)
    try:
        _, found = run(tmp_path / "a", plane, *PLANE, resume="auto")
    finally:
        torch.set_num_threads(1)
    assert "to rounding, not to the last bit: threads 1, now 2" in caplog.text
    _, whole = run(tmp_path / "b", plane, *PLANE)
    for name, value in whole["ema"].items():
        torch.testing.assert_close(found["ema"][name], value, rtol=1e-5, atol=1e-5)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, plane, stop, caplog):
    _, whole = run(tmp_path / "whole", plane, *PLANE)
    stop(33)
    run(tmp_path / "parts", plane, *PLANE)
    last = tmp_path / "parts" / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.unlink()  # its other names are other files
    last.write_bytes(data)
    _, found = run(tmp_path / "parts", plane, *PLANE, resume="auto")
    assert "passing over a checkpoint" in caplog.text and str(last) in caplog.text
    assert difference(whole, found) is None
    for file in (tmp_path / "parts" / "checkpoints").glob("*.pt"):
        file.unlink()
        file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        run(tmp_path / "parts", plane, *PLANE, "train.steps=50", resume="auto")


def test_the_place_in_the_data_is_stored(tmp_path, plane, stop):
    stop(17)
    _, found = run(tmp_path, plane, *PLANE)
    progress = found["training"]["progress"]
    assert progress["samples"] == 17 * 32
    assert (progress["best_step"], progress["stale"]) == (10, 0)  # an interrupted step is not judged
    assert tuple(found["training"]["epoch_and_position"]) == Order(0, 500, 32).place(17 * 32) == (1, 44)


def test_which_checkpoints_are_kept(tmp_path, plane):
    run(tmp_path, plane, *PLANE, "train.keep_every=20")
    folder = tmp_path / "checkpoints"
    steps = {file.name: checkpoint.read(file)["step"] for file in folder.glob("*.pt")}
    best = min(rows(tmp_path / records.METRICS)[1::2], key=lambda row: float(row["validation_loss"]))
    expected = {"last.pt": 40, "previous.pt": 30, "step_00000020.pt": 20, "step_00000040.pt": 40}
    assert steps == expected | {"best.pt": int(best["step"])}
    assert not list(folder.glob("*.tmp"))
    summary = json.loads((tmp_path / "summary.json").read_text())["training"]
    assert summary["best"] == {"step": int(best["step"]), "validation_loss": float(best["validation_loss"])}


def test_training_stops_early_and_the_best_weights_are_taken(tmp_path, plane, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0, 2.0, 9.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(training._Loop, "_validate", lambda self: next(losses))
    config = configuration(*STEPS, *PLANE, "train.early_stop=2", "train.steps=60")
    model = training.train(config, plane, CPU, Run(tmp_path, "train"))
    found = json.loads((tmp_path / "summary.json").read_text())["training"]
    assert found["steps"] == 40 and found["stopped_early"] and found["best"]["step"] == 20
    best = checkpoint.read(tmp_path / "checkpoints" / "best.pt")
    assert best["step"] == 20 and all(torch.equal(v, best["ema"][k]) for k, v in model.state_dict().items())


PHASES = {
    "saving": (checkpoint, "save"),
    "validating": (training._Loop, "_validate"),
    "looking": (training._Loop, "_watch"),
    "writing rows": (records.Metrics, "row"),
}


@pytest.mark.parametrize("phase", mostly(PHASES, ("saving", "looking")))
def test_a_signal_in_any_phase_is_obeyed_after_it(tmp_path, plane, monkeypatch, phase):
    looking = (
        "train.watch_every=10",
        "train.watch_examples=4",
        "likelihood=exact",
        "likelihood.steps=8",
        "solver=ddim",
    )
    _, whole = run(tmp_path / "whole", plane, *PLANE, *looking)
    where, name = PHASES[phase]
    original, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT if phase == "saving" else signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)
    code = 130 if phase == "saving" else 143
    state, found = run(tmp_path / "parts", plane, *PLANE, *looking, code=code)
    assert state == "interrupted" and 0 < found["step"] < 40
    _, found = run(tmp_path / "parts", plane, *PLANE, *looking, resume="auto")
    assert difference(whole, found) is None


def test_the_second_signal_is_obeyed_at_once(tmp_path, plane, monkeypatch):
    """In the midst of a step, which can't be saved: the last checkpoint is what there is to go on from."""
    _, whole = run(tmp_path / "whole", plane, *PLANE)
    step, calls = Stepper.__call__, []

    def impatient(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 17:
            monkeypatch.setattr(signals, "_ECHO", -1.0)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", impatient)
    state, found = run(tmp_path / "parts", plane, *PLANE)
    assert (state, found["step"]) == ("interrupted", 10)
    _, found = run(tmp_path / "parts", plane, *PLANE, resume="auto")
    assert difference(whole, found) is None


def test_what_is_looked_at_and_written_plays_no_part(tmp_path, plane):
    """Rows, checkpoints and looks leave the same weights."""
    cheap = ("train.watch_examples=4", "likelihood=exact", "likelihood.steps=8", "solver=ddim", "solver.steps=2")
    found = []
    for i, (rows_every, looks_every, save_every) in enumerate(((5, 20, 10), (40, 20, 100), (5, 0, 100), (40, 0, 10))):
        settings = (
            f"train.log_every={rows_every}",
            f"train.watch_every={looks_every}",
            f"train.save_every={save_every}",
        )
        _, one = run(tmp_path / str(i), plane, *PLANE, *settings, *cheap)
        one["training"]["stepper"].pop("tally")
        found.append({name: one[name] for name in ("model", "ema")} | {"moments": one["training"]["stepper"]})
    assert [difference(found[0], other) for other in found[1:]] == [None] * 3


def test_a_full_disk_ends_the_training_and_the_checkpoint_before_stays(tmp_path, plane, monkeypatch):
    _, whole = run(tmp_path / "whole", plane, *PLANE)
    write, calls = archive.write, []

    def full(path, content):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "parts", plane, *PLANE)
    assert content(tmp_path / "parts")["step"] == 20
    assert json.loads((tmp_path / "parts" / "status.json").read_text())["state"] == "failed"
    _, found = run(tmp_path / "parts", plane, *PLANE, resume="auto")
    assert difference(whole, found) is None


def test_the_best_of_another_run_is_taken_along(tmp_path, plane, stop, monkeypatch):
    """It may be better than all that comes: an early stop needs its weights."""
    stop(27)
    run(tmp_path / "first", plane, *PLANE)
    monkeypatch.setattr(training._Loop, "_validate", lambda self: 1e9)
    run(tmp_path / "second", plane, *PLANE, resume=tmp_path / "first")
    one, two = (tmp_path / name / "checkpoints" / "best.pt" for name in ("first", "second"))
    assert checkpoint.read(two)["step"] == checkpoint.read(one)["step"] == 20
