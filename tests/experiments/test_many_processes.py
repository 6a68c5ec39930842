"""Two processes do what one does: steps, samples, likelihoods; and how processes are found in the environment."""

import itertools
import math
import pathlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from oracles import correlated, mixture
from torch import nn

import conf
from experiments import processes
from experiments.build import ConfigError, build
from experiments.draw import draw
from experiments.estimator import Estimator, evaluate
from experiments.parallel import Shards, place
from experiments.processes import ALONE, Launch, Processes, first_host, joined, launched
from experiments.stepper import Stepper, StepSettings
from models import (
    MLP,
    DenoisingScoreMatching,
    EDMRow,
    LearnedVariance,
    LossAware,
    LossAwareIndex,
    NoiseRow,
    ScoreNetwork,
    Share,
    UNet,
    VariationalBound,
    VRow,
)
from models.share import gathered
from sde import VE, VP, DDPMChain, LearnedSchedule
from solvers import DDIM, EulerMaruyama, Hutchinson, ODEError, ProbabilityFlow

STEPS, BATCH = 10, 16
OBJECTIVES = sorted(path.stem for path in pathlib.Path(conf.__path__[0], "objective").glob("*.yaml"))
ROWS = {"hybrid": LearnedVariance(NoiseRow()), "vlb": LearnedVariance(NoiseRow()), "edm": EDMRow(0.5)}
PROCESSES = {"ncsn": VE, "vdm": lambda: LearnedSchedule(learn_ends=True), "bound": LearnedSchedule}
CHAIN = DDPMChain(torch.linspace(1e-2, 0.3, 6).tolist())
LEARNERS = {
    "times that learn": lambda: DenoisingScoreMatching("likelihood", LossAware(bins=3, least=2)),
    "levels that learn": lambda: VariationalBound(CHAIN, index=LossAwareIndex(6, history=2)),
}
TOLD = "classes"
CURVES = [(name, 1) for name in (*OBJECTIVES, *LEARNERS)]
CURVES += [(name, 2) for name in ("likelihood", "sliced", *LEARNERS, TOLD)]
"""Objectives, and in how many parts their batches are stepped."""


def objective_of(name):
    """One of ``conf/objective``, or of those that have learned something after a few steps."""
    if name == TOLD:
        return DenoisingScoreMatching()
    if name in LEARNERS:
        return LEARNERS[name]()
    return build(OmegaConf.load(pathlib.Path(conf.__path__[0], "objective", f"{name}.yaml")), where="objective")


def network(name):
    row = ROWS.get(name, VRow())
    net = MLP((2,), width=16, depth=1, outputs=row.outputs, classes=4 if name == TOLD else 0)
    model = ScoreNetwork(net, PROCESSES.get(name, VP)(), row).double()
    for i, parameter in enumerate(model.net.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def data(i):
    return torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


def stepper(own, name, accumulate, **settings):
    model, objective = network(name), objective_of(name).double()
    objective.check(model)
    settings = StepSettings(BATCH, clip=1.0, ema=0.9, accumulate=accumulate, **settings)
    return Stepper(model, objective, settings, torch.Generator().manual_seed(7), own)


def curve(own, name, accumulate):
    """The losses and norms of some steps, what is trained, and what the objective has learned."""
    one, read = stepper(own, name, accumulate), []
    condition = {"class_label": own.take(torch.arange(BATCH) % 5, accumulate)} if name == TOLD else {}
    for i in range(STEPS):
        one(own.take(data(i), accumulate), rate=1e-2, **condition)
        found = one.tally.read()
        read.append((found.loss, found.norm, *found.counts))
    weights = [v.clone() for v in (*one.model.state_dict().values(), *one.average.state.values())]
    return {"read": read, "weights": weights, "learned": list(one.objective.state_dict().values())}


def spoilt(own):
    """A sample of the second process that is not finite; then the loss alone of the first; then a good step."""
    one = stepper(own, "simple", 2)
    one(own.take(data(0), 2), rate=1e-2)
    before, x = [p.clone() for p in one.parameters], data(1)
    x[-1] = math.nan  # of the second process, in the last part
    one(own.take(x, 2), rate=1e-2)
    x = data(2)
    x[0], x[9] = math.inf, math.inf  # of the first and of the second, in the first and the last part
    one(own.take(x, 2), rate=1e-2)
    same = all(torch.equal(a, b) for a, b in zip(before, one.parameters, strict=True))
    state = one.state()
    one.load(state, one.average.state)
    found = one.tally.read()
    one(own.take(data(3), 2), rate=1e-2)
    return {"same": same, "read": found, "after": one.tally.read().good, "state": state["tally"]}


def sharded(own):
    """A U-Net in parts: its curve, its state taken up by another one, and the average applied and taken back."""
    found = {}
    for name, accumulate in (("likelihood", 1), ("times that learn", 2), ("vdm", 1)):
        one, other = (unet(own, name, accumulate) for _ in range(2))
        read = [step(own, one, i, accumulate) for i in range(3)]
        state, (weights, average) = one.state(), one.weights()
        kinds = {type(p).__name__ for p in one.parameters}
        other.load(state, average)
        for value, given in zip(other.model.state_dict().values(), weights.values(), strict=True):
            place(given, value)
        read += [step(own, one, 3, accumulate)]
        again = step(own, other, 3, accumulate)
        with one.average.applied(one.model), torch.no_grad():
            shown = one.objective(one.model, images(9), torch.Generator().manual_seed(1)).value
        plain = one.objective(one.model, images(9), torch.Generator().manual_seed(1)).value
        found[name] = {"read": read, "again": again, "kinds": kinds, "weights": one.weights(), "shown": (shown, plain)}
    return found


def unet(own, name, accumulate):
    torch.manual_seed(0)
    model = ScoreNetwork(UNet((1, 8, 8), channels=8, multipliers=(1, 2)), VP(), "v").double()
    settings = StepSettings(8, clip=1.0, ema=0.9, accumulate=accumulate, distributed="fsdp")
    return Stepper(model, objective_of(name).double(), settings, torch.Generator().manual_seed(7), own)


def images(i):
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def step(own, one, i, accumulate):
    one(own.take(images(i), accumulate), rate=2e-2)
    found = one.tally.read()
    return found.loss, found.norm


def sampling(own):
    model, flow = mixture(VP()), ProbabilityFlow(rtol=1e-5, atol=1e-5)
    plans = {"round": (EulerMaruyama(steps=4), 2), "uneven": (DDIM(steps=3), 3), "whole": (DDIM(steps=3), None)}
    plans |= {"adaptive": (flow, 3), "too many": (DDIM(steps=3), 9)}
    found = {
        name: draw(solver, model, (9, 2), 5, batch_size=size, processes=own) for name, (solver, size) in plans.items()
    }
    return {name: (out.x, out.nfe) for name, out in found.items()}


class Keeper:
    """In the first process alone; begins from ``found`` examples."""

    def __init__(self, found):
        self.found, self.saved = found, []

    def load(self):
        return self.found

    def save(self, done):
        self.saved.append(len(done))


def likelihood(own):
    model, estimator = correlated(VP()), Estimator(divergence=Hutchinson(2), method="rk4", steps=3)
    x, keeper = model.sample(10, seed=0), None
    begun = evaluate(model, x[:2], estimator, batch_size=2, processes=ALONE)
    if own.is_first:
        keeper = Keeper(begun)
    found = evaluate(model, x, estimator, batch_size=2, keeper=keeper, processes=own)
    return {"arrays": found.arrays(), "saved": keeper and keeper.saved}


def errors(own):
    """Of a model that fails in one of the processes: what each of them sees."""
    model, found = mixture(VP()), []
    jobs = (
        lambda: draw(DDIM(steps=3), model, (4, 2), batch_size=1, processes=own),
        lambda: evaluate(model, torch.zeros(4, 2), Estimator(), batch_size=1, processes=own),
    )
    for failing, job in itertools.product(range(own.count), jobs):
        handle = model.register_forward_pre_hook(partial(refuse, own.rank, failing))
        try:
            found.append(job())
        except RuntimeError as error:
            found.append((type(error).__name__, str(error)))
        handle.remove()
    return found


def refuse(rank, failing, *_):
    if rank == failing:
        raise (ODEError, torch.OutOfMemoryError)[failing](f"in {failing}")


def talk(own):
    """What the processes say to each other."""
    share = own.share(torch.Generator().manual_seed(0), parts=2)
    x = torch.arange(8)
    return {
        "broadcast": own.broadcast({"from": own.rank}),
        "gather": own.gather(("of", own.rank)),
        "sum": own.sum(torch.tensor([1.0, own.rank])).tolist(),
        "mean": own.mean(torch.tensor(2.0 * own.rank)).item(),
        "largest": own.largest(torch.tensor([float(own.rank), -float(own.rank)])).tolist(),
        "back": gathered(share, own.take(x, parts=2))[0].tolist() if own.count > 1 else x.tolist(),
        "current": processes.current() == own,
        "errors": errors(own),
    }


def everything(own):
    rest = {job.__name__: job(own) for job in (spoilt, sharded, sampling, likelihood, talk)}
    return {"curves": {which: curve(own, *which) for which in CURVES}, **rest}


def work(rank, folder):
    """One of two processes."""
    torch.set_num_threads(1)
    with joined("cpu", Launch(Processes(rank, 2, rank), f"file://{folder}/meeting")) as own:
        torch.save(everything(own), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found; starting them costs seconds, and so they do everything at once."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    return everything(ALONE)


@pytest.mark.parametrize("which", CURVES, ids=str)
def test_two_processes_train_as_one(both, alone, which):
    first, second = (found["curves"][which] for found in both)
    expected = alone["curves"][which]
    assert torch.allclose(torch.tensor(first["read"]), torch.tensor(expected["read"]), rtol=1e-9, atol=1e-12)
    assert first["read"] == second["read"] and len({loss for loss, *_ in first["read"]}) == STEPS
    for name in ("weights", "learned"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
        for a, b in zip(first[name], expected[name], strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [(name, n) for name in LEARNERS for n in (1, 2)], ids=str)
def test_the_learners_learned(both, which):
    one = stepper(ALONE, *which)
    fresh = list(one.objective.state_dict().values())
    found = both[0]["curves"][which]["learned"]
    assert len(fresh) == 2 and not any(torch.equal(a, b) for a, b in zip(fresh, found, strict=True))
    one.objective.load_state_dict(dict(zip(one.objective.state_dict(), found, strict=True)))
    times = (
        one.objective.times.steps().shares if which[0] == "times that learn" else one.objective.index.probabilities()
    )
    assert times.std() > 0.01  # what is drawn depends on what was learned


def test_what_is_not_finite_in_one_process_changes_nothing_in_any(both, alone):
    expected = alone["spoilt"]
    for found in (one["spoilt"] for one in both):
        assert found["same"] and found["after"] == 1 and found["read"][:5] == expected["read"][:5]
        assert (found["read"].steps, found["read"].good, found["read"].first, found["read"].run) == (3, 1, 2, 2)
        assert found["read"].levels == expected["read"].levels and found["read"].counts == expected["read"].counts
        assert torch.allclose(found["state"], expected["state"], rtol=1e-12)


@pytest.mark.parametrize("name", ["likelihood", "times that learn", "vdm"])
def test_a_network_in_parts_trains_as_a_whole_one(both, alone, name):
    (first, second), expected = (found["sharded"][name] for found in both), alone["sharded"][name]
    assert first["kinds"] == {"DTensor"} and expected["kinds"] == {"Parameter"}
    for key, one in itertools.product(("read", "again", "shown"), (first, second)):
        pairs = zip(one[key], expected[key], strict=True)
        assert all(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9) for a, b in pairs), key
    assert first["again"] == first["read"][-1] and not torch.equal(*first["shown"])
    for tree, other, single in zip(first["weights"], second["weights"], expected["weights"], strict=True):
        for key, value in single.items():
            assert torch.equal(tree[key], other[key]) and torch.allclose(tree[key], value, rtol=1e-9, atol=1e-10), key


@pytest.mark.parametrize("name", ["round", "uneven", "whole", "adaptive", "too many"])
def test_two_processes_draw_the_samples_of_one(both, alone, name):
    (x, nfe), (again, _) = (found["sampling"][name] for found in both)
    expected, calls = alone["sampling"][name]
    assert torch.equal(x, again) and nfe == calls
    # Batches of one composition are the same to the last bit; that of None is by the number of processes.
    assert torch.equal(x, expected) if name != "whole" else torch.allclose(x, expected, rtol=0, atol=1e-12)


def test_two_processes_evaluate_as_one_and_the_first_keeps_what_is_done(both, alone):
    expected = alone["likelihood"]
    for found in (one["likelihood"] for one in both):
        assert found["arrays"].keys() == expected["arrays"].keys()
        assert all(torch.equal(found["arrays"][name], value) for name, value in expected["arrays"].items())
    assert expected["saved"] == [4, 6, 8, 10]
    assert both[0]["likelihood"]["saved"] == [6, 10] and both[1]["likelihood"]["saved"] is None


def test_what_processes_tell_each_other(both, alone):
    expected = alone["talk"]
    assert expected["gather"] == [("of", 0)] and expected["sum"] == [1.0, 0.0] and expected["current"]
    for found in (one["talk"] for one in both):
        assert found["broadcast"] == {"from": 0} and found["gather"] == [("of", 0), ("of", 1)]
        assert found["sum"] == [2.0, 1.0] and found["mean"] == 1.0 and found["largest"] == [1.0, 0.0]
        assert found["errors"][:2] == [("ODEError", "in 0")] * 2 and found["errors"] == both[0]["talk"]["errors"]
        assert [name for name, _ in found["errors"][2:]] == ["OutOfMemoryError"] * 2
        assert found["back"] == list(range(8)) and found["current"]
    assert processes.current() == ALONE


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],login",
}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(Processes(3, 8, 1))),
        (SRUN | TORCHRUN, Launch(Processes(3, 8, 1))),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (SRUN | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (SRUN, Launch(Processes(2, 4, 0), "tcp://gpu07:21230")),
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), Launch(Processes(2, 4, 0), "tcp://gpu07:21230")),
        (SRUN | {"SLURM_STEP_ID": "1"}, Launch(Processes(2, 4, 0), "tcp://gpu07:21231")),
        (SRUN | {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "5"}, Launch(Processes(2, 4, 0), "tcp://[fe80::1]:5")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # a shell by srun --pty in a job of four
        (without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), Launch()),  # a batch script
        (without(SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), Launch()),  # salloc
        (without(SRUN, "SLURM_STEP_NUM_TASKS") | {"SLURM_STEP_ID": "4294967290"}, Launch()),  # an interactive step
    ],
)
def test_processes_are_found_in_the_environment(environment, expected):
    assert launched(environment) == expected


def test_processes_that_do_not_know_where_to_meet_are_refused():
    for environment in (without(SRUN, "SLURM_STEP_NODELIST"), without(TORCHRUN, "MASTER_PORT")):
        with pytest.raises(ConfigError, match=r"start them by torchrun or srun, or set both"):
            launched(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b[1-2]", "a"), ("n[010-020]", "n010"), ("r[2,4]-n[7-9].x,z", "r2-n7.x"), ("n[5,7],m", "n5")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_one_process_joins_nothing():
    with joined("cpu", Launch()) as own:
        assert own == ALONE == processes.current() and not torch.distributed.is_initialized()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    third = Processes(2, 4, 2)
    assert third.device("cpu") == torch.device("cpu") and third.device("auto") == ALONE.device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for seen, expected in ((4, 2), (8, 2), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert third.device("auto") == third.device("cuda") == torch.device("cuda", expected)
    with pytest.raises(ConfigError, match=r"device=cuda:1: 4 processes need a GPU each; use device=auto"):
        third.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine finds 2 GPUs"):
        third.device("auto")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sliced", "SlicedScoreMatching goes back through one: use train.distributed=ddp"),
        ("implicit", "ImplicitScoreMatching goes back through one"),
        ("vdm", "divides the network alone, and the schedule learns too: use train.distributed=ddp"),
    ],
)
def test_what_can_not_lie_in_parts_is_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        Shards.prepare(network(name), objective_of(name), Processes(0, 2, 0))


def test_ways_that_there_are_not_are_refused():
    with pytest.raises(ConfigError, match=r"train.distributed must be one of ddp, fsdp, found 'deepspeed'"):
        StepSettings(8, clip=1.0, ema=0.9, distributed="deepspeed")
    with pytest.raises(ConfigError, match=r"train.distributed=fsdp needs train.fused=true"):
        StepSettings(8, clip=1.0, ema=0.9, distributed="fsdp", fused=False)


def test_an_error_leaves_the_processes_at_once(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: said.append("joined"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.append("left"))
    launch = Launch(Processes(0, 2, 0), f"file://{tmp_path}/meeting")
    with pytest.raises(RuntimeError, match="mine"), joined("cpu", launch):
        raise RuntimeError("mine")
    assert said == ["joined"] and processes.current() == ALONE
    with joined("cpu", launch) as own:
        assert processes.current() == own == launch.processes
    assert said == ["joined", "joined", "left"] and processes.current() == ALONE


def test_settings_that_processes_can_not_share_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "_present", Processes(0, 3, 0))
    settings = StepSettings(batch_size=12, clip=1.0, ema=0.9)
    settings.require(torch.device("cpu"), (2,))
    with pytest.raises(ConfigError, match=r"train.batch_size=16 is of all 3 processes .* choose a multiple of 3"):
        replace(settings, batch_size=16).require(torch.device("cpu"), (2,))
    with pytest.raises(ConfigError, match=r"choose a multiple of 9"):
        replace(settings, accumulate=3).require(torch.device("cpu"), (2,))
    with pytest.raises(ConfigError, match=r"cuda_graphs can't record what 3 processes say"):
        replace(settings, cuda_graphs=True).require(torch.device("cuda"), (2,))
    assert isinstance(processes.current().share(torch.Generator()), Share)
