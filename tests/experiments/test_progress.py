"""A progress bar is for a person at a terminal: none in a pipe, a file, or a batch system's log."""

import os
import pty
import subprocess
import sys
import termios

import pytest
import torch
from configurations import configuration

from experiments import training
from experiments.data import mixture2d
from experiments.problem import Problem
from experiments.run import Run

SMALL = ("data=mixture2d", "net=mlp", "net.width=16", "net.depth=1", "parametrization=noise")
STEPS = ("train.steps=30", "train.log_every=10", "train.warmup=2")


def terminal():
    """The two ends of a terminal of 100 columns."""
    ends = pty.openpty()
    termios.tcsetwinsize(ends[1], (24, 100))
    return ends


def said(ends, act):
    """What ``act`` writes to the second of two connected file descriptors; less than either holds."""
    reading, writing = ends
    with os.fdopen(reading, "rb", buffering=0) as ours, os.fdopen(writing, "w") as theirs:
        act(theirs)
        theirs.write("the end")
        theirs.flush()
        return ours.read(2**16).decode()


def train(folder, monkeypatch):
    def act(stderr):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            problem = Problem.of(mixture2d(train=200, validation=20, test=20))
            training.train(configuration(*SMALL, *STEPS), problem, torch.device("cpu"), Run(folder, "train"))

    return act


def test_a_bar_in_a_terminal_and_none_in_a_pipe(tmp_path, monkeypatch):
    seen = said(terminal(), train(tmp_path / "terminal", monkeypatch))
    assert "\r" in seen and "30/30" in seen and "loss" in seen
    assert said(os.pipe(), train(tmp_path / "pipe", monkeypatch)) == "the end"


@pytest.mark.slow
def test_the_command_line_in_a_terminal_and_in_a_pipe(tmp_path):
    def run(name, **to):
        command = [sys.executable, "-m", "experiments.cli", "task=train", *SMALL, *STEPS]
        return subprocess.run([*command, f"hydra.run.dir={tmp_path / name}"], text=True, check=True, **to)

    seen = said(terminal(), lambda stderr: run("terminal", stderr=stderr, stdout=subprocess.DEVNULL))
    assert "\r" in seen and "30/30" in seen
    piped = run("pipe", capture_output=True)
    assert "\r" not in piped.stdout + piped.stderr and "30/30" not in piped.stderr
