"""Every process that ships verifies; plausible mistakes in a user's own are found, by the check that should."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from configurations import configuration
from oracles import CHANGED, quick

from experiments import build, checkpoint, training, verification, verify
from experiments.build import ConfigError, trust
from experiments.data import mixture2d
from experiments.problem import Problem, build_model
from experiments.run import Run
from experiments.verification import CHECKS, FAILS, HOLDS, NOT_APPLICABLE
from sde import (
    EDM,
    SDE,
    VE,
    VP,
    Cosine,
    GaussianPrior,
    GaussianSDE,
    Kernel,
    LearnedSchedule,
    RectifiedFlow,
    SubVP,
    exploding,
)
from sde.base import expand

ROOT = Path(verification.__file__).parents[1]
SLOW = ("simulation", "probability flow", "likelihood")

SHIPPED = [
    VP(t_max=3.0),
    SubVP(t_max=0.5),
    VE(t_max=3.0),
    Cosine(t_max=0.5),
    EDM(),
    RectifiedFlow(t_min=0, t_max=3.0),
    LearnedSchedule(log_snr_min=-8.0, t_max=3.0),
    *CHANGED,
    exploding(VP()),
]


@pytest.mark.parametrize("sde", quick(SHIPPED), ids=lambda sde: str(sde)[:60])
def test_every_process_that_ships_verifies(sde):
    found = verify(sde)
    assert found.ok and not found.warned, str(found)
    assert all(row.state == HOLDS for row in found.rows)
    assert len(found.rows) == sum(check.kernel is not False for check in CHECKS)


# ---------------------------------------------------------------------------------------------------------------------
# A process in the closed forms of the paper, as a user may write it, and mistakes in it.


@dataclass(frozen=True)
class Paper(VP):
    """VP with drift and diffusion in closed form."""

    def beta(self, t):
        return (self.beta_min + t / self.t_max * (self.beta_max - self.beta_min)) / self.t_max

    def drift(self, x, t):
        return -0.5 * expand(self.beta(t), x) * x

    def diffusion(self, t):
        return self.beta(t).sqrt()


class DriftWithoutHalf(Paper):
    def drift(self, x, t):
        return -expand(self.beta(t), x) * x


class DriftOfTheWrongSign(Paper):
    def drift(self, x, t):
        return 0.5 * expand(self.beta(t), x) * x


class DiffusionSquared(Paper):
    def diffusion(self, t):
        return self.beta(t)


class SigmaIsTheVariance(Paper):
    def sigma(self, t):
        return -torch.expm1(-self.integrated_beta(t))


class AlphaWithoutHalf(Paper):
    def alpha(self, t):
        return torch.exp(-self.integrated_beta(t))


class CubicDrift(Paper):
    def drift(self, x, t):
        return -0.5 * expand(self.beta(t), x) * x**3


class Cancelling(Paper):
    def sigma(self, t):
        return torch.sqrt(1 - torch.exp(-self.integrated_beta(t)))


class PerturbSwapped(Paper):
    def perturb(self, x0, t, eps):
        return super().perturb(eps, t, x0)


class FirstTimeForAll(Paper):
    def drift(self, x, t):
        return -0.5 * self.beta(t[0]) * x


class FirstTimeOfAnyShape(Paper):
    def drift(self, x, t):
        return -0.5 * self.beta(t.flatten()[0]) * x


class DoublePrecision(Paper):
    def diffusion(self, t):
        return self.beta(t.double()).sqrt()


class LogSNRWithoutTwo(Paper):
    def log_snr(self, t):
        return self.alpha(t).log() - self.sigma(t).log()


class NoNumberAtTheStart(Paper):
    def log_snr(self, t):
        return super().log_snr(t) + 0 * torch.log(t - self.t_min)


class KernelOfAnotherMean(Paper):
    def kernel(self, s, t):
        return Kernel(self.alpha(t).sqrt(), super().kernel(s, t).std)


class KernelForgetsTheScale(Paper):
    def kernel(self, s, t):
        variance = self.sigma(t).square() - self.sigma(s).square()
        return Kernel(self.alpha(t) / self.alpha(s), variance.clamp(min=0).sqrt())


class KernelReturnsTheVariance(Paper):
    def kernel(self, s, t):
        scale, std = super().kernel(s, t)
        return Kernel(scale, std.square())


class TimeOfAnotherClock(Paper):
    def time(self, log_snr):
        return super().time(log_snr) / self.t_max


class TimeSlightlyOff(Paper):
    def time(self, log_snr):
        return super().time(log_snr + 1e-3)


class WrongVelocity(Paper):
    def coefficients(self, t):
        at = super().coefficients(t)
        return at._replace(d_sigma=2 * at.d_sigma)


class Backwards(VE):
    def sigma(self, t):
        return super().sigma(self.t_max - t)


class NothingAtTheStart(VE):
    """sigma^2 - sigma_min^2, as of data without noise at t_min: the square root has no slope there."""

    def sigma(self, t):
        start = super().sigma(torch.full_like(t, self.t_min))
        return torch.sqrt(super().sigma(t).square() - start.square())


class RateWithoutClock(VE):
    """The diffusion without the factor 1 / sqrt(t_max)."""

    def diffusion(self, t):
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


class LinearSigma(VE):
    """The noise of one schedule with the diffusion of another."""

    def sigma(self, t):
        return self.sigma_min + (self.sigma_max - self.sigma_min) * t / self.t_max

    def diffusion(self, t):
        return VE.sigma(self, t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min) / self.t_max)


class KernelFromCleanData(VE):
    """The kernel's variance as sigma(t)^2 - sigma_min^2 whatever its start, while ``sigma`` is sigma(t)."""

    def kernel(self, s, t):
        return Kernel(torch.ones_like(t), torch.sqrt(self.sigma(t).square() - 0.999 * self.sigma_min**2))


class PriorOfUnitVariance(VE):
    prior_std = 1.0


class NarrowPrior(VP):
    prior_std = 0.9


class BroadPrior(VP):
    prior_std = 1.1


@dataclass(frozen=True)
class WideSamples(GaussianPrior):
    def sample(self, *arguments, **more):
        return 1.1 * super().sample(*arguments, **more)


class PriorThatSamplesAnother(VP):
    def prior(self, shape):
        return WideSamples(shape, 1.0)


@dataclass(frozen=True)
class Unnormalized(GaussianPrior):
    def log_prob(self, x):
        return super().log_prob(x) + 0.5 * math.log(2 * math.pi)


class PriorWithoutNormalization(VP):
    def prior(self, shape):
        return Unnormalized(shape, 1.0)


class EndsBeforeItBegins(VP):
    def __post_init__(self):
        pass


MISTAKES = [
    (DriftWithoutHalf(), "mean"),
    (DriftOfTheWrongSign(), "mean"),
    (DiffusionSquared(), "variance"),
    (SigmaIsTheVariance(), "variance"),
    (AlphaWithoutHalf(), "mean"),
    (CubicDrift(), "linear drift"),
    (Cancelling(), "float32"),
    (PerturbSwapped(), "perturb"),
    (FirstTimeForAll(), "shapes"),
    (FirstTimeOfAnyShape(), "own times"),
    (DoublePrecision(), "shapes"),
    (LogSNRWithoutTwo(), "log_snr"),
    (NoNumberAtTheStart(), "log_snr"),
    (KernelOfAnotherMean(), "kernel"),
    (KernelForgetsTheScale(), "composition"),
    (KernelReturnsTheVariance(), "kernel"),
    (TimeOfAnotherClock(t_max=3.0), "time"),
    (TimeSlightlyOff(), "time"),
    (WrongVelocity(), "coefficients"),
    (Backwards(), "log_snr falls"),
    (NothingAtTheStart(), "finite"),
    (KernelFromCleanData(), "kernel"),
    (PriorOfUnitVariance(), "prior deviation"),
    (NarrowPrior(), "prior deviation"),
    (BroadPrior(), "prior deviation"),
    (PriorThatSamplesAnother(), "prior samples"),
    (PriorWithoutNormalization(), "prior density"),
    (EndsBeforeItBegins(t_min=2.0), "times"),
]


def failures(sde, monkeypatch, slow=False):
    """The checks that fail, among those that take long or among the others."""
    monkeypatch.setattr(verification, "CHECKS", [check for check in CHECKS if (check.name in SLOW) == slow])
    return verify(sde).failed


@pytest.mark.parametrize(("sde", "check"), MISTAKES, ids=lambda value: type(value).__name__)
def test_a_mistake_is_found_by_the_check_that_should(sde, check, monkeypatch):
    assert check in failures(sde, monkeypatch)


@pytest.mark.parametrize(
    ("sde", "alone"),
    [
        (Cancelling(), "float32"),
        (PerturbSwapped(), "perturb"),
        (LogSNRWithoutTwo(), "log_snr"),
        (WrongVelocity(), "coefficients"),
        (NarrowPrior(), "prior deviation"),
        (CubicDrift(), "linear drift"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_in_one_place_does_not_accuse_the_others(sde, alone, monkeypatch):
    others = {"time", "kernel", "composition", "Fokker-Planck"}  # what is derived from it
    assert set(failures(sde, monkeypatch)) - others == {alone}


def test_the_paper_s_closed_forms_hold(monkeypatch):
    assert failures(Paper(), monkeypatch) == failures(Paper(t_max=3.0), monkeypatch) == ()


def test_b10_sigma_and_diffusion_of_ve_belong_together(monkeypatch):
    """The moment equation: a kernel from clean data, or another schedule's noise, does not go with VE's g."""
    assert failures(VE(), monkeypatch) == ()
    assert {"variance", "Fokker-Planck"} <= set(failures(LinearSigma(), monkeypatch))
    assert "kernel" in failures(KernelFromCleanData(), monkeypatch)


def test_b24_the_clock_s_factor_is_in_the_diffusion(monkeypatch):
    assert failures(RateWithoutClock(), monkeypatch) == ()
    for t_max in (0.5, 3.0):
        assert "variance" in failures(RateWithoutClock(t_max=t_max), monkeypatch)


def test_paths_densities_and_likelihoods_find_mistakes_by_themselves(monkeypatch):
    assert failures(RateWithoutClock(t_max=3.0), monkeypatch, slow=True) == ("simulation", "probability flow")
    assert failures(KernelOfAnotherMean(), monkeypatch, slow=True) == ("simulation",)
    assert "likelihood" in failures(TimeOfAnotherClock(t_max=3.0), monkeypatch, slow=True)


def test_a_process_that_runs_backwards_is_told_so_first(monkeypatch):
    failed = failures(Backwards(), monkeypatch)
    assert failed[:2] == ("times", "log_snr falls") and "shapes" not in failed
    text = str(verify(Backwards()))
    assert "begin with the first, as others may follow from it" in text and "not a number" in text


def test_every_check_finds_something():
    found = {name for _, name in MISTAKES} | set(SLOW) | {"simulation end", "Fokker-Planck", "prior mismatch"}
    assert found == {check.name for check in CHECKS}


def test_what_more_noise_would_mend_is_a_warning(monkeypatch):
    monkeypatch.setattr(verification, "CHECKS", [check for check in CHECKS if check.name not in SLOW])
    sde = LearnedSchedule(log_snr_min=-5.0)
    found = verify(sde)
    assert found.ok and found.warned == ("prior mismatch",)
    text = str(found)
    assert "warns  prior mismatch: nats/dim between the prior and p_T" in text and "off by 0.0033" in text
    assert all(parameter.requires_grad and parameter.grad is None for parameter in sde.parameters())


class Failing(VP):
    def sigma(self, t):
        raise RuntimeError("out of\nluck")


def test_an_error_inside_a_check_is_a_failure_of_that_check():
    found = verify(Failing())
    rows = {row.check: row for row in found.rows}
    assert rows["variance"].state == FAILS and rows["variance"].measured == "RuntimeError: out of"
    assert rows["prior density"].state == HOLDS
    assert "FAILS  variance" in str(found) and "found: RuntimeError: out of" in str(found)
    json.dumps(found.summary(), allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# Without a Gaussian kernel.


class DoubleWell(SDE):
    """dx = 2 (x - x^3) dt + sqrt(2) dw: it forgets its start, and stays in exp(x^2 - x^4 / 2)."""

    t_min, t_max = 0.0, 4.0
    width = 1.0

    def drift(self, x, t):
        return 2 * (x - x**3)

    def diffusion(self, t):
        return torch.full_like(t, math.sqrt(2))

    def prior(self, shape):
        return WellPrior(shape, self.width)


@dataclass(frozen=True)
class WellPrior:
    shape: tuple
    width: float

    def log_density(self, x):
        x = x / self.width
        return x**2 - 0.5 * x**4

    def grid(self):
        x = torch.linspace(-4 * self.width, 4 * self.width, 20001, dtype=torch.float64)
        return x, self.log_density(x).exp() * (x[1] - x[0])

    def sample(self, seed=0, device=None, dtype=torch.float32):
        x, p = self.grid()
        u = torch.rand(math.prod(self.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return x[torch.searchsorted((p / p.sum()).cumsum(0), u).clamp(max=20000)].reshape(self.shape).to(dtype)

    def log_prob(self, x):
        return (self.log_density(x) - self.grid()[1].sum().log()).flatten(1).sum(1)


class WidePrior(DoubleWell):
    width = 2.0


class Escaping(DoubleWell):
    def drift(self, x, t):
        return x**3


def test_a_process_without_a_kernel_has_the_checks_that_apply():
    found = verify(DoubleWell())
    states = {row.check: row.state for row in found.rows}
    assert found.ok, str(found)
    assert states["variance"] == states["likelihood"] == NOT_APPLICABLE
    applied = {name for name, state in states.items() if state == HOLDS}
    assert applied == {"times", "shapes", "own times", "finite", "simulation end", "prior density", "prior samples"}
    assert "not applicable" in str(found) and "all 7 checks that apply hold" in str(found)


@pytest.mark.parametrize("sde", [WidePrior(), Escaping()], ids=lambda sde: type(sde).__name__)
def test_simulated_paths_must_end_in_the_prior(sde):
    assert verify(sde).failed == ("simulation end",)


@pytest.mark.parametrize("bad", [VP, "vp", None, 3])
def test_what_is_no_process_is_refused(bad):
    with pytest.raises(TypeError, match=r"verify: expected an SDE such as VP\(\), found"):
        verify(bad)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and a user's own classes.

OWN = """
from dataclasses import dataclass
import torch
from sde import GaussianSDE

@dataclass(frozen=True)
class Exponential(GaussianSDE):
    rate: float = 10.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def alpha(self, t):
        return torch.exp(-0.5 * self.rate * t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.rate * t))

    @property
    def prior_std(self):
        return 1.0

class Broken(Exponential):
    def diffusion(self, t):
        return torch.full_like(t, self.rate)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module of the user's own and a configuration file for it; nobody trusts it yet."""
    (tmp_path / "own_processes.py").write_text(OWN)
    (tmp_path / "mine" / "sde").mkdir(parents=True)
    (tmp_path / "mine" / "sde" / "broken.yaml").write_text("_target_: own_processes.Broken\nrate: 9.0\n")
    (tmp_path / "mine" / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /sde: broken\nplugins: [own_processes]\n"
    (tmp_path / "mine" / "experiment" / "foreign.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_processes", None)
    trust([], [])


def score_sde(*arguments):
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_table_of_a_process_that_ships(tmp_path):
    code, out, err = score_sde("task=verify", "sde=rectified_flow", "sde.t_max=2.0", f"hydra.run.dir={tmp_path}")
    assert code == 0, err
    assert "RectifiedFlow(t_min=1e-05, t_max=2.0)" in out and "all 23 checks that apply hold" in out
    assert "Fokker-Planck" in out and (tmp_path / "report.txt").read_text().strip() in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verification"]["ok"] and len(summary["verification"]["rows"]) == 23
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_process_of_one_s_own_that_is_broken(folder):
    own = ("--config-dir", "mine", "task=verify", "sde=broken", "hydra.run.dir=run")
    code, out, err = score_sde(*own, "plugins=[own_processes]")
    assert code == 1 and "Broken(rate=9.0" in out
    assert err.strip() == (
        "error: VerificationFailed: Broken fails: variance, Fokker-Planck, simulation, probability flow"
    )
    assert "variance" in json.loads((folder / "run" / "summary.json").read_text())["verification"]["failed"]


def test_a_configuration_file_alone_brings_in_no_code(folder):
    arguments = ("--config-dir", "mine", "task=verify", "experiment=foreign", "hydra.run.dir=run")
    code, _, err = score_sde(*arguments)
    assert code == 2 and err.startswith("error: plugins: a configuration file names 'own_processes'")
    assert "plugins=[own_processes] on the command line" in err and not (folder / "__pycache__").exists()


@pytest.mark.parametrize(
    ("plugins", "command_line", "words"),
    [
        (["own_processes"], [], "a configuration file names 'own_processes'"),
        (["own_processes"], ["plugins=[another]", "x=own_processes"], "a configuration file names"),
        (["own_processes"], ["+myplugins=[own_processes]"], "a configuration file names"),
        (["own_procesess"], ["plugins=[own_procesess]"], "'own_procesess' can't be imported .ModuleNotFoundError"),
        (["half_done"], ["plugins=[half_done]"], "'half_done' can't be imported .ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_can_t_be_trusted_or_found(folder, plugins, command_line, words):
    (folder / "half_done.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=words):
        trust(plugins, command_line)
    with pytest.raises(ConfigError, match=r"add plugins=\[ITS_MODULE\]"):
        build.build({"_target_": "own_processes.Exponential"}, where="sde")


def test_a_trusted_plugin_is_built_and_checked_like_any_other_class(folder):
    trust(["own_processes"], ["plugins=[own_processes]"])
    assert sys.path[-1] == str(folder)
    built = build.build({"_target_": "own_processes.Exponential", "rate": 3.0}, where="sde", allowed=("sde.",))
    assert isinstance(built, GaussianSDE) and built.rate == 3.0
    for node, words in [
        ({"_target_": "own_processes.Exponentail"}, "there is no own_processes.Exponentail"),
        ({"_target_": "own_processes.Exponential", "rat": 3.0}, "no such parameter; it takes rate, t_min, t_max"),
        ({"_target_": "own_processes.Exponential", "rate": "fast"}, "sde.rate: expected float, found 'fast'"),
        ({"_target_": "own_processes_of_others.Exponential"}, "expected one of"),
        ({"_target_": "os.system"}, "expected one of"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build.build(node, where="sde")
    with pytest.raises(ConfigError, match="names 'another'"):
        trust(["another"], [])  # which leaves nothing trusted
    with pytest.raises(ConfigError, match="expected one of"):
        build.build({"_target_": "own_processes.Exponential"}, where="sde")


def test_a_model_under_a_process_of_one_s_own_needs_it_to_be_loaded_again(folder):
    trust(["own_processes"], ["plugins=[own_processes]"])
    config = configuration("net=mlp", "net.width=8", "parametrization=noise", "train.steps=2")
    config.sde = {"_target_": "own_processes.Exponential", "rate": 8.0}
    problem, run = Problem.of(mixture2d(train=50, validation=20, test=20)), Run(folder / "run", "train")
    assert str(build_model(config, problem.convention()).sde).startswith("Exponential(rate=8.0")
    training.train(config, problem, torch.device("cpu"), run)
    model, _, _ = checkpoint.load(str(run.folder), torch.device("cpu"))
    assert model.sde.rate == 8.0
    trust([], [])
    with pytest.raises(checkpoint.CheckpointError, match=r"own_processes\.Exponential.*add plugins=\[own_processes\]"):
        checkpoint.load(str(run.folder), torch.device("cpu"))
