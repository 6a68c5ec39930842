"""Sweeps: cells that are found again, what becomes of each whatever happens, and jobs that don't touch each other."""

import csv
import importlib.util
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from configurations import configuration
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from experiments import cells, cli, schema, sweep
from experiments.cells import LONGEST, cell_hash, cell_name, claim, state_of, title
from experiments.fresh import fresh
from experiments.gpus import FOLDER, device_for
from experiments.run import PARTIAL, Run, RunFolderTaken

SMALL = ("data=mixture2d", "net=mlp", "net.width=16", "net.depth=1", "net.dropout=0.1", "parametrization=noise")
SMALL += ("train.steps=12", "train.warmup=2", "train.log_every=4", "train.batch_size=32", "device=cpu")
SMALL += ("task=sample", "compare.samples=20", "objective=simple")


@pytest.fixture
def score_sde(monkeypatch, capfd):
    """``score_sde(*arguments)``: the command line in this process; returns the exit code, and what it said."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["score-sde", *arguments])
        monkeypatch.setattr(cli, "_begun", [])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr()

    yield run
    root.handlers, root.level = handlers, level
    logging.disable(logging.NOTSET)


def process(*arguments, **more):
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def statuses(folder):
    return [cell["status"] for cell in json.loads((folder / "sweep.json").read_text())["cells"]]


def folders(folder):
    return [folder / cell["folder"] for cell in json.loads((folder / "sweep.json").read_text())["cells"]]


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_goes_on_where_it_ended(tmp_path, score_sde):
    """One network for all samplers; what is done stays, what failed is done anew, and further axes add cells."""
    given = ("-m", *SMALL, f"hydra.sweep.dir={tmp_path}", "solver.steps=3,-3")
    code, said = score_sde(*given, "solver=ddim,heun")
    assert code == 1 and "Traceback" not in said.err
    assert statuses(tmp_path) == ["done"] * 2 + ["failed"] * 2 and "2 done, 2 failed" in said.out
    assert said.err.count("ConfigError: solver: DDIM: steps must be") == 1
    assert len(list((tmp_path / "networks").iterdir())) == 1 and said.out.count("training 2,274 parameters") == 1
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done"] * 2 + ["failed"] * 2
    assert (tmp_path / "sweep.md").read_text().count("\n") == 6

    done = folders(tmp_path)[0]
    before, networks = files(done), files(tmp_path / "networks")
    code, said = score_sde(*given, "solver=ddim")
    assert code == 1 and statuses(tmp_path) == ["skipped", "failed"]
    assert files(done) == before and files(tmp_path / "networks") == networks and "training 2,274" not in said.out
    aside = folders(tmp_path)[1].with_name(folders(tmp_path)[1].name + ".failed-1")
    assert json.loads((aside / "status.json").read_text())["state"] == "failed"
    assert "steps must be" in (aside / "run.log").read_text() and (aside / ".hydra" / "config.yaml").is_file()
    assert (tmp_path / "multirun.before.yaml").is_file()

    code, said = score_sde(*given[:-1], "solver.steps=3", "seed=0,1", "solver=ddim")
    assert code == 0 and statuses(tmp_path) == ["skipped", "done"] and folders(tmp_path)[0] == done
    assert len(list((tmp_path / "networks").iterdir())) == 2
    assert (tmp_path / "multirun.before-2.yaml").is_file() and files(done) == before
    assert not [path for path in tmp_path.rglob("*") if "=" in path.name]


@pytest.mark.slow
def test_the_second_job_is_what_it_is_alone(tmp_path, score_sde):
    given = ("-m", *SMALL, "solver=euler_maruyama", "solver.steps=4")
    assert score_sde(*given, "sde=ve,vp", f"hydra.sweep.dir={tmp_path / 'both'}")[0] == 0
    alone = process(*given[1:], "sde=vp", f"networks={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'alone'}")
    assert alone.communicate(timeout=100) and alone.returncode == 0
    second = folders(tmp_path / "both")[1]
    samples = [folder / "samples" / "samples.npy" for folder in (second, tmp_path / "alone")]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    numbers = [json.loads((folder / "summary.json").read_text()) for folder in (second, tmp_path / "alone")]
    for summary in numbers:
        summary["training"].pop("seconds")
    for name in ("training", "sampling", "diagnosis", "data", "seed"):
        assert numbers[0][name] == numbers[1][name], name


def test_a_sweep_that_can_not_be_composed_is_refused_as_before(tmp_path, score_sde):
    code, said = score_sde("-m", "sde=vp,vpp", f"hydra.sweep.dir={tmp_path}")
    assert code == 2 and "vpp" in said.err and not (tmp_path / "sweep.json").exists()
    Run(tmp_path / "run", "train").end("done")
    code, said = score_sde("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'run'}")
    assert code == 2 and "already holds a run" in said.err


@pytest.mark.parametrize(
    ("argument", "plugin", "extra"),
    [
        ("hydra/launcher=joblib", "hydra_joblib_launcher", "sweep"),
        ("hydra/launcher=submitit_local", "hydra_submitit_launcher", "slurm"),
        ("hparams_search=sampler", "hydra_optuna_sweeper", "hpo"),
    ],
)
def test_a_missing_plugin_is_named(monkeypatch, capsys, argument, plugin, extra):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    cli.suggest(["-m", argument])
    assert f'pip install "unified-score-sde[{extra}]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def base():
    return configuration(*SMALL)


def test_what_determines_a_cell_is_what_it_is_known_by(base):
    for key, value, free in (
        *(("seed", 1, False), ("solver.steps", 7, False), ("compare.samples", 21, False), ("checkpoint", "x", False)),
        *(("train.steps", 13, False), ("train.log_every", 5, False), ("solver.steps", 20.0, True)),
        *(("networks", "elsewhere", True), ("device", "cuda", True), ("resume", "auto", True)),
        *(("plugins", ["mine"], True), ("train.workers", 2, True), ("optimize", "a.b", True)),
    ):
        other = base.copy()
        OmegaConf.update(other, key, value)
        assert (cell_hash(other) == cell_hash(base)) == free, key


def composed(folder, *overrides):
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", overrides=[*overrides, f"hydra.sweep.dir={folder}"], return_hydra_config=True)
    return config


def test_a_cell_finds_its_folder_again_from_another_command_line(tmp_path):
    name = cell_name(composed(tmp_path, "sde=vp", "seed=0"))
    assert name.startswith("sde-vp_seed-0-")
    assert cell_name(composed(tmp_path, "seed=0")) == f"seed-0-{name.rpartition('-')[2]}"
    (tmp_path / name).mkdir()
    assert cell_name(composed(tmp_path, "seed=0")) == name
    assert cell_name(composed(tmp_path, "seed=1")) != name


def test_names_are_short_and_plain():
    many = [f"train.a_setting_with_a_long_name_{i}=some/long path, {i}" for i in range(9)]
    for overrides in ([], ["x=" + "y" * 500], many, ["~net.fourier", "+a.b@c=[1,2]", "data.path='a=b'", "sde=größe"]):
        name = title(overrides, LONGEST - 13)
        assert name and len(name) <= LONGEST - 13 and not set(name) & set("=/ ,'[]~@"), name
    assert title(["a=1", "b.sde=vp", many[0] * 3], 20) == "a-1_sde-vp"


def ended(folder, state, **more):
    run = Run(folder, "sample", cell="c", sweep="before")
    for name, text in more.items():
        run.path(*name.split("__")).write_text(text)
    if state:
        run.end(state, "why" if state == "failed" else None)
    return run


def test_whose_turn_it_is_in_a_cell(tmp_path):
    for name, state in (("done", "done"), ("failed", "failed"), ("interrupted", "interrupted")):
        ended(tmp_path / name, state, samples="some")
    assert claim(tmp_path / "done", "sample", "c", "now") is None
    for name in ("failed", "interrupted"):
        run = claim(tmp_path / name, "sample", "c", "now")
        assert not (tmp_path / name / "samples").exists()
        assert (tmp_path / f"{name}.failed-1" / "samples").read_text() == "some"
        assert claim(tmp_path / name, "sample", "c", "now") is None and state_of(tmp_path / name) == "running"
        run.end("failed", "again")
        assert claim(tmp_path / name, "sample", "c", "now") is None  # in this invocation it was tried
        claim(tmp_path / name, "sample", "c", "later").end("done")
        assert (tmp_path / f"{name}.failed-2" / "status.json").is_file()
    with pytest.raises(RunFolderTaken, match="holds a run with other settings than this cell's"):
        claim(tmp_path / "done", "sample", "another", "now")
    claim(tmp_path / "new", "sample", "c", None).end("done")


@pytest.mark.parametrize(("state", "stays"), [("interrupted", True), ("failed", False)])
def test_an_interrupted_evaluation_is_gone_on_with_and_a_failed_one_is_not(tmp_path, state, stays):
    ended(tmp_path / "cell", state, **{"__".join(PARTIAL): "half"})
    run = claim(tmp_path / "cell", "likelihood", "c", "now")
    assert run.partial.is_file() == stays == (not (tmp_path / "cell.failed-1").exists())
    run.end("done")


def test_what_became_of_each_cell_is_told(tmp_path, monkeypatch):
    """By what stands in their folders alone."""
    names = ("done", "failed", "interrupted", "killed", "elsewhere", "old", "old_failed", "nothing", "other")
    found = sweep.Sweep(tmp_path, [sweep.Planned((f"n={name}",), name, "c") for name in names])
    for name, state in (("done", "done"), ("failed", "failed"), ("interrupted", "interrupted")):
        run = Run(tmp_path / name, "sample", cell="c", sweep=found.id)
        run.end(state, "ValueError: two\nlines" if state == "failed" else None)
    child = os.fork()
    if child == 0:
        Run(tmp_path / "killed", "sample", cell="c", sweep=found.id)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    held = Run(tmp_path / "elsewhere", "sample", cell="c", sweep="another")
    ended(tmp_path / "old", "done")
    ended(tmp_path / "old_failed", "failed")
    Run(tmp_path / "other", "sample", cell="d", sweep=found.id).end("done")
    told = {row.folder: (row.status, row.reason) for row in found.rows()}
    assert told == {
        "done": ("done", ""),
        "failed": ("failed", "ValueError: two lines"),
        "interrupted": ("interrupted", ""),
        "killed": ("killed", "its process was ended by force"),
        "elsewhere": ("running", "by another sweep"),
        "old": ("skipped", "done before"),
        "old_failed": ("not begun", ""),
        "nothing": ("not begun", ""),
        "other": ("failed", "the folder holds a run with other settings"),
    }
    held.end("done")
    assert found.end(0) == 1 and found.end(130) == 130
    assert sweep.Sweep(tmp_path, found.cells[:1]).end(0) == 0  # it is done, if by another invocation
    for name in (cells.INVOCATION, sweep.COMMAND):
        monkeypatch.delenv(name)


def test_another_round_is_for_cells_that_were_not_begun_and_ends(tmp_path, monkeypatch):
    now = sweep.Sweep(tmp_path, [sweep.Planned((), name, "c") for name in "abc"])
    monkeypatch.setattr(sweep, "_now", now)
    Run(tmp_path / "a", "sample", cell="c", sweep=now.id).end("failed")
    assert sweep.again(0, 9) is None and sweep.again(130, 9) is None
    assert sweep.again(1, 9) == 2 and sweep.again(1, 2) is None  # a round that got nowhere was the last
    assert sweep.finish(1) == 1 and cells.INVOCATION not in os.environ and sweep.current() is None


def test_a_job_leaves_the_process_as_it_was_and_finds_it_as_new():
    import matplotlib
    import matplotlib.pyplot as plt

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def state():
        flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision()
        return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), *flags

    before, size = state(), matplotlib.rcParams["font.size"]
    with fresh(3):
        first = draws()
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
        matplotlib.rcParams["font.size"] = 40
        plt.figure()
    assert state() == before and not plt.get_fignums() and matplotlib.rcParams["font.size"] == size
    with pytest.raises(KeyError), fresh(3):
        assert draws() == first
        torch.set_default_dtype(torch.float64)
        raise KeyError
    assert state() == before


def test_each_process_has_a_gpu_of_its_own_while_there_are_enough(tmp_path):
    assert device_for("cpu", tmp_path, 0, 4) == "cpu" and device_for("cuda:1", tmp_path, 0, 4) == "cuda:1"
    assert device_for("auto", tmp_path, 0, 1) == "auto" and not (tmp_path / FOLDER).exists()
    mine = device_for("auto", tmp_path, 5, 3)
    assert mine == "cuda:0" == device_for("cuda", tmp_path, 6, 3)  # it keeps it for all its jobs
    children = [in_a_child(lambda job=job: device_for("auto", tmp_path, job, 3)) for job in range(3)]
    told = [read() for read, _ in children]
    for _, release in children:
        release()
    assert told[:2] == ["cuda:1", "cuda:2"] and told[2] == "cuda:2"  # job 2 of 3 shares by its number
    read, release = in_a_child(lambda: device_for("auto", tmp_path, 7, 3))
    assert read() == "cuda:1"  # which is free again
    release()


def in_a_child(work):
    """A process that holds what ``work()`` gives: functions to read that, once, and to end the process."""
    from experiments import gpus

    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        gpus._held.clear()
        os.write(into, work().encode())
        time.sleep(60)
        os._exit(0)

    def release():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    return lambda: os.read(out, 99).decode(), release


def test_a_search_is_given_a_number_of_the_summary_or_told_which_there_are():
    summary = {"likelihood": {"value": -2.5, "split": "test"}, "seed": 1, "rows": [1]}
    assert sweep.objective(summary, "likelihood.value") == -2.5
    for path in ("likelihood.split", "likelihood", "comparison.objective", "rows", "likelihood.value.x"):
        with pytest.raises(ValueError, match=rf"optimize={path}: .*it has seed, likelihood\.value"):
            sweep.objective(summary, path)


def test_a_job_whose_number_is_missing_fails(tmp_path, score_sde):
    code, said = score_sde("-m", *SMALL, "solver=ddim", "optimize=comparison.objective", f"hydra.sweep.dir={tmp_path}")
    assert code == 1 and "optimize=comparison.objective: the run's summary has no such number" in said.err


KILLER = """
import os, signal
from dataclasses import dataclass
from solvers import DDIM

@dataclass(frozen=True)
class Killer(DDIM):
    def __call__(self, *args, **kwargs):
        if self.steps == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args, **kwargs)
"""


@pytest.mark.slow
def test_a_killed_worker_does_not_end_the_sweep(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "killer.py").write_text(KILLER)
    given = ("-m", *SMALL, "plugins=[killer]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "solver=ddim")
    given += ("hydra.launcher.batch_size=1", "solver._target_=killer.Killer", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    run = process(*given, "solver.steps=7,3,4,5,6,8", env=environment)
    out, err = run.communicate(timeout=300)
    told = statuses(tmp_path / "sweep")
    assert run.returncode == 1 and told[0] == "killed" and "were not begun, and are now" in out, (out, err)
    assert told[1] in ("done", "killed") and told[2:] == ["done"] * 4, told  # with a worker joblib ends all others
    assert len(list((tmp_path / "sweep" / "networks").iterdir())) == 1
    run = process(*given, "solver.steps=3,4,5,6,8", env=environment)
    assert run.communicate(timeout=300) and run.returncode == 0
    assert set(statuses(tmp_path / "sweep")) <= {"done", "skipped"}


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_share_networks(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    given = ("-m", *SMALL, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}")
    run = process(*given, "solver=ddim,heun", "sde=vp,ve", "solver.steps=3,-3")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 1 and sorted(statuses(tmp_path)) == ["done"] * 4 + ["failed"] * 4, (out, err)
    made = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert sorted(one["network"]["trained_here"] for one in made if "network" in one) == [False, False, True, True]


@pytest.mark.slow
def test_jobs_of_submitit(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = ("-m", *SMALL, "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}")
    run = process(*given, "solver=ddim,heun", "solver.steps=3,-3")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 1 and statuses(tmp_path) == ["done", "failed"] * 2, (out, err)
    assert len(list((tmp_path / "networks").iterdir())) == 1


@pytest.mark.slow
def test_a_search_by_optuna(tmp_path):
    """Minimized is the job's number; trials that fail don't end it; the network is trained once."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    given = ("-m", "hparams_search=schedule", *SMALL, "task=likelihood", "optimize=likelihood.value")
    given += ("likelihood=exact", "likelihood.samples=8", "likelihood.steps=8", "likelihood.ode_subset=2")
    given += ("likelihood.baselines=false", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=3")
    given += (f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    run = process(*given, "under.t_min=choice(1e-5,1e-4,-1.0)")
    out, err = run.communicate(timeout=300)
    told = statuses(tmp_path / "sweep")
    assert len(told) == 6 and {"done", "failed"} == set(told) and run.returncode == 1, (out, err)
    assert len(list((tmp_path / "sweep" / "networks").iterdir())) == 1
    made = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/summary.json")]
    best = min(one["optimized"]["value"] for one in made if "optimized" in one)
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert found.best_value == pytest.approx(best)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_an_interrupt_ends_with_the_table(tmp_path, launcher):
    if launcher != "basic" and importlib.util.find_spec("hydra_plugins") is None:
        pytest.skip("without the launcher")
    given = ("-m", *SMALL, "train.steps=100000", "train.save_every=5", f"hydra/launcher={launcher}")
    run = process(*given, "seed=0,1,2", f"hydra.sweep.dir={tmp_path}", start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("networks/*/checkpoints/last.pt")):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 130 and "does what is left" in err and "not begun" in out, (out, err)
    assert "interrupted" in statuses(tmp_path)


@pytest.mark.slow
def test_two_sweeps_in_one_folder_at_once_share_the_work(tmp_path):
    given = ("-m", *SMALL, "train.steps=400", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    runs = [process(*given) for _ in range(2)]
    ends = [(*run.communicate(timeout=200), run.returncode) for run in runs]
    assert len(list((tmp_path / "networks").iterdir())) == 2
    trained = sum(end[0].count("training 2,274 parameters") for end in ends)
    assert trained == 2 and 0 in [end[2] for end in ends], ends
    last = process(*given)
    assert last.communicate(timeout=100) and last.returncode == 0 and set(statuses(tmp_path)) == {"skipped"}
