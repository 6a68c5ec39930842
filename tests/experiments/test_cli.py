"""The command line, as a newcomer meets it."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

QUICK = [
    "train.steps=12",
    "train.log_every=4",
    "train.warmup=2",
    "compare.samples=40",
    "compare.seeds=1",
    "compare.budgets=[4]",
    "compare.solvers.probability_flow.rtol=1e-2",
    "compare.solvers.probability_flow.atol=1e-2",
    "likelihood.samples=8",
    "likelihood.steps=10",
    "likelihood.ode_subset=2",
    "likelihood.baselines=false",
]


def start(*arguments: str, **more):
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def score_sde(*arguments: str):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_help_is_for_people_and_does_not_import_torch():
    code, out, _ = score_sde("--help")
    assert (
        code == 0
        and "score-sde task=likelihood checkpoint=" in out
        and "sde: cosine, edm, learned, rectified_flow, subvp, ve, vp" in out
    )
    assert "sde@under=" in out and "plugins=[my_sdes]" in out
    check = "import sys, experiments.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_demo_in_short(tmp_path):
    run = tmp_path / "run"
    code, out, err = score_sde(*QUICK, f"hydra.run.dir={run}")
    assert code == 0 and "nats/dim" not in err and "bits/dim" not in err, err  # nothing to warn of
    for words in (
        "noise floor",
        "; 1 seed\n",
        "bits/dim",
        "nearest training image",
        "All results",
    ):
        assert words in out, words
    pictures = {path.stem for path in (run / "figures").glob("*.png")}
    of_likelihood = {"likelihood_histogram", "likelihood_extremes"}
    of_samples = {"quality", "samples", "same_noise", "noise_to_data"}
    assert pictures == {"loss", "loss_by_log_snr"} | of_samples | of_likelihood
    assert (run / "figures" / "noise_to_data.gif").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert {"seed", "versions", "git_commit", "training", "comparison", "likelihood"} <= summary.keys()
    assert len({row["sampler"] for row in summary["comparison"]["rows"]}) >= 5
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    for name in ("checkpoints/last.pt", "metrics.csv", "run.log", "report.txt", ".hydra/config.yaml"):
        assert (run / name).is_file(), name
    assert not [path for path in tmp_path.rglob("*") if "=" in path.name]

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, _, err = score_sde("seed=7", f"hydra.run.dir={run}")
    assert code == 2 and "already holds a run" in err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, _, err = score_sde(
        "task=likelihood", f"checkpoint={run}", "data=mixture2d", f"hydra.run.dir={tmp_path / 'x'}"
    )
    assert code == 2 and "was trained on" in err


@pytest.mark.slow
def test_the_baselines_of_the_demo_and_the_tasks_on_its_checkpoint(tmp_path):
    """Baselines stand beside the model in the table, the summary and a picture."""
    code, out, err = score_sde(*QUICK, "likelihood.baselines=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 0 and "linear autoregressive" in out, err
    assert (tmp_path / "run" / "figures" / "likelihood.png").is_file()
    assert "linear_autoregressive" in json.loads((tmp_path / "run" / "summary.json").read_text())["baselines"]
    for task in ("sample", "likelihood", "compare", "figures"):
        words = ("compare.names=[ddim]", f"task={task}", f"checkpoint={tmp_path / 'run'}")
        code, out, err = score_sde(*QUICK, *words, f"hydra.run.dir={tmp_path / task}")
        assert code == 0, err


@pytest.mark.slow
def test_the_mixture_in_short(tmp_path):
    code, out, err = score_sde("experiment=mixture2d", *QUICK, f"hydra.run.dir={tmp_path}")
    assert code == 0, err
    assert "exact log-density" in out
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    of_likelihood = {"likelihood_histogram", "likelihood_extremes", "scores", "density"}
    of_samples = {"quality", "samples", "same_noise", "trajectories"}
    assert pictures == {"loss", "loss_by_log_snr"} | of_samples | of_likelihood


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stepz=3"], "stepz"),
        pytest.param(["train.steps=abc"], "could not be converted to Integer", marks=pytest.mark.slow),
        (["sde=vpp"], "vpp"),
        pytest.param(["+sde.beta_mn=1"], "sde.beta_mn: sde.VP has no such parameter", marks=pytest.mark.slow),
        pytest.param(
            ["experiment=sliced_score_matching", "data=mixture2d", "net=mlp"], "; ~net.fourier", marks=pytest.mark.slow
        ),
        pytest.param(["sde.beta_min=abc"], "sde.beta_min: expected float, found 'abc'", marks=pytest.mark.slow),
        pytest.param(["train.learning_rate=-1"], "train.learning_rate must be positive", marks=pytest.mark.slow),
        (["task=likelihood", "train.ema=1"], "train.ema must lie in [0, 1)"),
        pytest.param(["task=likelihood"], "checkpoint=", marks=pytest.mark.slow),
        pytest.param(["likelihood.splt=train"], "splt", marks=pytest.mark.slow),
        pytest.param(["task=ood", "checkpoint=x"], "data@ood.against=digits_inverted", marks=pytest.mark.slow),
        pytest.param(["task=sample", "resume=auto"], "it is for task=train, all or likelihood", marks=pytest.mark.slow),
        pytest.param(["task=sample", "checkpoint=/nowhere/last.pt"], "there is no file", marks=pytest.mark.slow),
        pytest.param(["data=mnist"], "data.path=FOLDER is needed", marks=pytest.mark.slow),
        pytest.param(["device=cuda:99"], "device=cuda:99", marks=pytest.mark.slow),
        pytest.param(["data=mixture2d", "net=mlp"], "data of known levels", marks=pytest.mark.slow),
        pytest.param(
            ["net.multipliers=[1,2,2,2,2]", "net.attention=[false,false,false,false,false]"],
            "divisible by 16",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message(tmp_path, arguments, words):
    code, _, err = score_sde(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert code in (1, 2) and words in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_truncated_idx_file_is_named(tmp_path):
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 28, 28)) + bytes(100))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10]) + bytes(10))
    code, _, err = score_sde("data=mnist", f"data.path={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2 and "train-images-idx3-ubyte.gz: expected 7840 bytes" in err
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback" in log and json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_failing_job_does_not_stop_a_sweep(tmp_path):
    arguments = ["experiment=mixture2d", "task=train", "train.steps=5", "train.log_every=5", "net.depth=1"]
    code, out, err = score_sde("-m", *arguments, "train.ema=0.9,2.0,0.99", f"hydra.sweep.dir={tmp_path}")
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["done", "failed", "done"] and code == 1
    failed = tmp_path / cells[1]["folder"]
    assert json.loads((failed / "status.json").read_text())["state"] == "failed"
    assert "train.ema must lie in [0, 1)" in (failed / "run.log").read_text() and "2 done, 1 failed" in out
    assert "error: job 1 failed: ConfigError: train.ema must lie in [0, 1)" in err and "Traceback" not in err
    assert len(list((tmp_path / "networks").glob("*/checkpoints/last.pt"))) == 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupt_keeps_the_weights(tmp_path, number, code):
    process = start("task=train", "train.steps=100000", "net.channels=8", f"hydra.run.dir={tmp_path}", env=os.environ)
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "metrics.csv").is_file():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "checkpoints" / "last.pt").is_file() and "Traceback" not in err


@pytest.mark.slow
def test_an_interrupted_evaluation_says_how_to_go_on_and_does(tmp_path):
    trained, cut = tmp_path / "trained", tmp_path / "cut"
    assert score_sde("task=train", "train.steps=12", "net.channels=8", f"hydra.run.dir={trained}")[0] == 0
    given = ["task=likelihood", f"checkpoint={trained}", "likelihood.samples=60", "likelihood.batch_size=6"]
    process = start(*given, f"hydra.run.dir={cut}", env=os.environ)
    partial, deadline = cut / "likelihood" / "partial.npz", time.time() + 120
    while time.time() < deadline and not (partial.is_file() and partial.stat().st_size > 3000):
        time.sleep(0.05)  # an empty one has about 2300 bytes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"resume=auto hydra.run.dir={cut}" in out and "Traceback" not in err, err
    assert score_sde(*given, f"hydra.run.dir={cut}")[0] == 2
    code, out, err = score_sde(*given, "resume=auto", f"hydra.run.dir={cut}")
    assert code == 0 and "Likelihood of 60 examples" in out, err
    assert not partial.exists() and json.loads((cut / "status.json").read_text())["state"] == "done"


PAIR = ["data=mixture2d", "net=mlp", "net.width=16", "net.depth=1", "parametrization=v", "train.batch_size=32"]
SHORT = ["train.steps=40", "train.log_every=5", "train.save_every=10"]


def torchrun(*arguments: str, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "experiments", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def columns(path, *names):
    with path.open(newline="") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_are_one_run(tmp_path, way):
    """One folder, the loss curve of one process, and a checkpoint that another number of them goes on from."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert score_sde("task=train", *PAIR, *SHORT, f"hydra.run.dir={alone}")[0] == 0
    process = torchrun("task=train", *PAIR, *SHORT, f"train.distributed={way}", f"hydra.run.dir={pair}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("All results") == 1, err
    names = ("step", "loss", "validation_loss", "gradient_norm")
    expected, found = (columns(folder / "metrics.csv", *names) for folder in (alone, pair))
    assert len(found) == 8
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    code, _, err = score_sde("task=train", *PAIR, *SHORT, "train.steps=50", "resume=auto", f"hydra.run.dir={pair}")
    assert code == 0 and "going on in 1 processes, not 2" in (pair / "run.log").read_text(), err
    process = torchrun(
        "task=train", *PAIR, *SHORT, "train.steps=60", f"resume={pair}", f"hydra.run.dir={tmp_path / 'c'}"
    )
    assert process.communicate(timeout=120) and process.returncode == 0
    assert [row[0] for row in columns(tmp_path / "c" / "metrics.csv", "step")] == list(range(5, 61, 5))


@pytest.mark.slow
def test_two_processes_sample_and_evaluate_as_one(tmp_path):
    assert score_sde("task=train", *PAIR, *SHORT, f"hydra.run.dir={tmp_path / 'trained'}")[0] == 0
    given = [
        f"checkpoint={tmp_path / 'trained'}",
        "data=mixture2d",
        "likelihood=exact",
        "solver=ddim",
        "solver.steps=5",
    ]
    given += ["likelihood.samples=70", "likelihood.batch_size=16", "compare.samples=70", "compare.batch_size=16"]
    for task, file in (("sample", "samples/samples.npy"), ("likelihood", "likelihood/examples.csv")):
        one, two = (tmp_path / f"{task}{i}" for i in (1, 2))
        assert score_sde(f"task={task}", *given, f"hydra.run.dir={one}")[0] == 0
        process = torchrun(f"task={task}", *given, f"hydra.run.dir={two}")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and (two / file).read_bytes() == (one / file).read_bytes(), err


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_all_processes_after_the_same_step(tmp_path):
    process = torchrun("task=train", *PAIR, "train.steps=100000", f"hydra.run.dir={tmp_path}")
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "checkpoints" / "last.pt").is_file():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted", err
    steps = columns(tmp_path / "metrics.csv", "step")[-1][0] + 50
    code, _, err = score_sde(
        "task=train", *PAIR, f"train.steps={steps:.0f}", "resume=auto", f"hydra.run.dir={tmp_path}"
    )
    assert code == 0, err


@pytest.mark.slow
def test_of_two_runs_that_begin_in_one_folder_at_once_one_goes_on(tmp_path):
    runs = [start("task=train", *PAIR, *SHORT, f"hydra.run.dir={tmp_path}") for _ in range(2)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in runs]
    assert sorted(end[2] for end in ends) == [0, 2]
    assert any("is being written by another run (process" in end[1] or "already holds a run" in end[1] for end in ends)
    assert len(columns(tmp_path / "metrics.csv", "step")) == 8
