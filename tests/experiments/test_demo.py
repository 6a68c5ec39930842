"""The bars of the default run, on the real digits: minutes each."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.cli", *arguments, f"hydra.run.dir={folder}"]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text())


def test_the_default_run_meets_its_bars(tmp_path):
    summary = run(tmp_path / "demo")
    assert summary["likelihood"]["value"] <= 1.85
    assert summary["likelihood"]["value"] < summary["baselines"]["linear_autoregressive"]["bits_per_dim"]
    rows = {row["sampler"]: row for row in summary["comparison"]["rows"]}
    floor = summary["comparison"]["metrics"]["sliced_w2"]["floor"]["mean"]
    assert rows["probability_flow"]["metrics"]["sliced_w2"]["value"] <= 1.2 * floor
    near = summary["image_quality"]["nearest_training_image"]
    assert near["samples_min"] >= near["test_min"]


def test_noise_prediction_meets_its_bar(tmp_path):
    run(tmp_path / "train", "task=train", "parametrization=noise")
    summary = run(tmp_path / "likelihood", "task=likelihood", f"checkpoint={tmp_path / 'train'}")
    assert summary["likelihood"]["value"] <= 2.60
