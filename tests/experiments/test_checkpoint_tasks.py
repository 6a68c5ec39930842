"""The tasks on a checkpoint as a file: inspect and export."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import CPU, SMALL, save
from configurations import configuration
from test_cli import score_sde

from experiments import checkpoint, checkpoint_tasks
from experiments.build import build
from experiments.checkpoint import CheckpointError
from experiments.run import Run
from experiments.session import Session, load_model
from solvers import DDIM

SCHEMA1 = Path(__file__).parent / "checkpoints" / "schema1.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save(folder / "checkpoints" / "last.pt")
    return folder


def inspected(place, run):
    config = configuration("task=inspect", f"checkpoint={place}", "data=mnist")  # whose path is not given
    build(config.task)(config, Run(run, "inspect"))
    return (run / "report.txt").read_text()


def test_what_is_in_a_checkpoint_is_said(folder, tmp_path, capsys):
    text = inspected(folder, tmp_path / "run")
    assert text in capsys.readouterr().out
    content = checkpoint.read(folder / "checkpoints" / "last.pt")
    numbers = sum(value.numel() for value in content["ema"].values())
    lines = dict(line.split(None, 1) for line in text.splitlines())
    assert f"{(folder / 'checkpoints' / 'last.pt').stat().st_size:,} bytes" in lines["size"]
    assert f"SHA-256 {content['digest']} verified" in lines["size"]
    assert (lines["schema"], lines["step"], lines["seed"]) == ("2", "7", "0")
    assert lines["sde"] == "VP(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0)"
    assert lines["parametrization"] == "row(name='noise')" and lines["net"].startswith("MLP(width=4, depth=1")
    assert "name=mixture2d, shape=[2]" in lines["data"]
    assert lines["average"] == f"{numbers:,} numbers in {len(content['ema'])} tensors (float32={len(content['ema'])})"
    assert lines["resume"].startswith("possible, from optimizer, random, losses, at (")
    assert "steps=" in lines["training"] and "DenoisingScoreMatching" in lines["objective"]
    assert f"torch={torch.__version__}" in lines["versions"] and "commit" in lines
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "report.txt", "status.json"}


def test_the_first_schema_and_exported_weights_are_said_to_be_so(tmp_path):
    text = inspected(SCHEMA1, tmp_path / "a")
    assert "schema          1\n" in text and "no digest" in text
    assert "resume          not possible, only weights are here" in text


def test_exported_weights_can_be_used_wherever_a_checkpoint_can(folder, tmp_path):
    for place, name in ((folder, "new"), (SCHEMA1, "old")):
        run = tmp_path / name
        config = configuration("task=export", f"checkpoint={place}")
        build(config.task)(config, Run(run, "export"))
        assert {path.name for path in (run / "export").iterdir()} == {"model.safetensors", "config.json"}
        description = json.loads((run / "export" / "config.json").read_text())
        assert description["schema"] == 2 and description["components"]["sde"]["name"] == "VP"
        one, convention, step = checkpoint.load(place, CPU)
        for path in (run, run / "export", run / "export" / "model.safetensors"):
            two = checkpoint.load(path, CPU)
            assert two[1:] == (convention, step) and str(two[0]) == str(one)
            pairs = zip(one.state_dict().values(), two[0].state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    text = inspected(tmp_path / "new", tmp_path / "said")
    assert "weights         none" in text and "not possible, only weights" in text and "verified" in text


def test_samples_from_exported_weights_are_the_same_to_the_bit(folder, tmp_path):
    config = configuration("task=export", f"checkpoint={folder}")
    checkpoint_tasks.export_weights(config, Run(tmp_path / "weights", "export"))
    drawn = []
    for name, place in (("a", folder), ("b", tmp_path / "weights" / "export")):
        opened = Session(configuration(*SMALL, f"checkpoint={place}"), Run(tmp_path / name, "sample"))
        drawn.append(DDIM(steps=3)(load_model(opened), shape=(20, 2), seed=0).x)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("task", ["inspect", "export"])
def test_bad_files_are_refused(tmp_path, task):
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04")
    for place, words in (("bad.pt", "not a readable checkpoint"), ("none.pt", "there is no file")):
        config = configuration(f"task={task}", f"checkpoint={tmp_path / place}")
        with pytest.raises(CheckpointError, match=words):
            build(config.task)(config, Run(tmp_path / f"run-{place}", task))
        assert not (tmp_path / f"run-{place}" / "export").exists()


@pytest.mark.slow
def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    code, out, err = score_sde("task=inspect", f"checkpoint={folder}", f"hydra.run.dir={tmp_path / 'a'}")
    assert code == 0 and "VP(beta_min=0.1" in out, err
    harmed = tmp_path / "harmed.pt"
    harmed.write_bytes((folder / "checkpoints" / "last.pt").read_bytes()[:-1])
    for task in ("inspect", "export", "sample"):
        code, out, err = score_sde(f"task={task}", f"checkpoint={harmed}", f"hydra.run.dir={tmp_path / task}")
        assert code == 2 and err.count("\n") == 1 and err.startswith(f"error: {harmed}: not a readable checkpoint"), err
