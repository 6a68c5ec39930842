"""The configuration: every file builds, and what is wrong is refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

import conf
from experiments.build import ConfigError, build
from experiments.comparison import budgeted, build_solvers
from experiments.problem import build_model
from experiments.training import build_objective
from solvers import Solver

ROOT = Path(conf.__file__).parent
DIGITS = {"shape": [1, 8, 8], "levels": 17}
CONVENTIONS = {"mlp": {"shape": [2], "levels": None}, "unet_mnist": {"shape": [1, 28, 28], "levels": None}}
SDES = {
    "cosine": "sde.Cosine",
    "edm": "sde.EDM",
    "learned": "sde.LearnedSchedule",
    "rectified_flow": "sde.RectifiedFlow",
    "subvp": "sde.SubVP",
    "ve": "sde.VE",
    "vp": "sde.VP",
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / group).glob("*.yaml"))


def test_the_groups_are_those_documented():
    groups = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_")}
    documented = (
        "task sde net parametrization solver data objective train likelihood dequantizer prior compare experiment "
        "logger metric features hparams_search condition guidance"
    )
    assert groups == set(documented.split())


@pytest.mark.parametrize(
    "sde",
    [sde if sde in ("vp", "rectified_flow") else pytest.param(sde, marks=pytest.mark.slow) for sde in choices("sde")],
)
@pytest.mark.parametrize("parametrization", choices("parametrization"))
def test_every_sde_and_parametrization_builds(sde, parametrization):
    model = build_model(configuration(f"sde={sde}", f"parametrization={parametrization}"), DIGITS)
    assert model.sde == build({"_target_": SDES[sde]}) or sde == "learned"
    assert f"sde.{type(model.sde).__name__}" == SDES[sde]


@pytest.mark.parametrize("objective", choices("objective"))
def test_every_objective_builds_and_gives_a_loss_where_it_fits(objective):
    fits = {"ncsn": ["sde=ve"], "vdm": ["sde=learned", "sde.learn_ends=true"], "bound": ["sde=learned"]}
    variance = "learned_variance" if objective in ("hybrid", "vlb") else "noise"
    more = [*fits.get(objective, ["sde=vp"]), f"parametrization={variance}", "net=mlp", "net.width=8"]
    config = configuration(f"objective={objective}", *more)
    model = build_model(config, DIGITS)
    losses = build_objective(config, model)(model, torch.zeros(3, *DIGITS["shape"]))
    assert losses.value.shape == (3,) and bool(torch.isfinite(losses.value).all())
    losses.value.mean().backward()


def test_ends_that_learn_need_the_whole_bound():
    config = configuration("sde=learned", "sde.learn_ends=true", "objective=bound", "parametrization=noise", "net=mlp")
    with pytest.raises(ConfigError, match=r"the ends of the schedule learn.*objective=vdm"):
        build_objective(config, build_model(config, DIGITS))


@pytest.mark.parametrize("net", sorted({*choices("net")} - {"exact"}))
def test_every_net_builds(net):
    config = configuration(f"net={net}", "parametrization=noise")
    assert build_model(config, CONVENTIONS.get(net, DIGITS)).net


@pytest.mark.parametrize("solver", choices("solver"))
def test_every_solver_builds(solver):
    assert isinstance(build(configuration(f"solver={solver}").solver), Solver)


@pytest.mark.parametrize("group", ["train", "likelihood", "compare"])
def test_every_choice_of_settings_builds(group):
    for choice in choices(group):
        node = configuration(f"{group}={choice}")[group]
        assert OmegaConf.missing_keys(node) == set(), choice
        for key in ("times", "divergence"):
            if key in node:
                build(node[key])


@pytest.mark.parametrize("choice", choices("solver"))
def test_every_option_of_a_solver_can_be_overridden(choice):
    node = configuration(f"solver={choice}").solver
    assert node.keys() - {"_target_"} == {field.name for field in fields(build(node))}


@pytest.mark.parametrize("task", choices("task"))
def test_every_task_is_a_function(task):
    assert callable(build(configuration(f"task={task}").task))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment):
    config = configuration(f"experiment={experiment}")
    assert build_solvers(config)
    conventions = {"digits": DIGITS, "mixture2d": CONVENTIONS["mlp"], "mnist": CONVENTIONS["unet_mnist"]}
    conventions["cifar10"] = {"shape": [3, 32, 32], "levels": 256}
    convention = conventions[config.data._target_.removeprefix("experiments.data.")]
    model = build_model(
        config, convention | {"dequantization": config.dequantization if convention["levels"] else None}
    )
    assert build_objective(config, model)


def test_the_chosen_solver_is_compared_too():
    """By the name of its class, or where another has that, as the solver; not twice."""
    assert "solver" in build_solvers(configuration("solver=ddim", "solver.eta=0.5"))
    assert "solver" not in build_solvers(configuration("solver=ddim"))
    alone = build_solvers(
        configuration("solver=predictor_corrector", "solver.predictor.steps=9", "compare.names=[ddim]")
    )
    assert list(alone) == ["ddim", "predictor_corrector"] and alone["predictor_corrector"].steps == 9


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": "os.system", "command": "true"}, "expected one of"),
        ({"_target_": "builtins.print"}, "expected one of"),
        ({"_target_": "sde.vp.torch.save"}, "there is no"),
        ({"_target_": "sde.Nothing"}, "there is no sde.Nothing"),
        ({"_target_": "experiments.build.import_module", "name": "this"}, "expected one of"),
        ({"_target_": "experiments.build.trust", "plugins": [], "command_line": []}, "expected one of"),
        ({"_target_": "experiments.run.write_json", "path": "x", "content": 1}, "expected one of"),
        ({"_target_": "experiments.tasks.Run", "folder": "x", "task": "y"}, "is only used there"),
        ({"_target_": "sde.vp.dataclass"}, "is only used there"),
        ({"_target_": "sde.vp.GaussianSDE"}, "is only used there"),
        ({"_target_": "sde.VP", "beta_mn": 1.0}, "no such parameter"),
        ({"_target_": "sde.VP", "beta_min": "abc"}, "x.beta_min: expected float, found 'abc'"),
        ({"_target_": "sde.VP", "beta_min": 30.0}, "beta_min must be smaller than beta_max"),
        ({"_target_": "sde.VP", "t_min": True}, "expected float, found True"),
        ({"_target_": "solvers.DDIM", "steps": 0}, "steps must be a positive integer"),
        ({"_target_": "solvers.DDIM", "grid": "quadratic"}, "grid must be one of"),
        ({"_target_": "solvers.ProbabilityFlow", "method": "rk4"}, "give steps"),
        ({"_target_": "solvers.ProbabilityFlow", "rtol": 0.0}, "must be positive"),
    ],
    ids=str,
)
def test_a_bad_node_is_refused(node, words):
    with pytest.raises(ConfigError, match="x") as caught:
        build(node, where="x")
    assert words in str(caught.value)


def test_a_nested_target_is_checked_too():
    node = {"_target_": "solvers.PredictorCorrector", "predictor": {"_target_": "os.getcwd"}, "corrector": None}
    with pytest.raises(ConfigError, match=r"x\.predictor\._target_"):
        build(node, where="x")


def test_levels_need_discrete_data():
    with pytest.raises(ConfigError, match="data of known levels"):
        build_model(configuration("parametrization=levels", "net=mlp"), CONVENTIONS["mlp"])


def test_a_budget_is_spent_in_whole_steps():
    plan = list(budgeted(build_solvers(configuration("solver=ddim")), [10, 21]))
    assert [(s.steps, s.steps * s.calls_per_step) for name, s in plan if name == "heun"] == [(5, 10), (10, 20)]
    assert [s.steps for name, s in plan if name == "ddim"] == [10, 21]
    assert [name for name, _ in plan].count("probability_flow") == 1
    with pytest.raises(ConfigError, match="heun needs at least 2 network calls"):
        list(budgeted({"heun": build(configuration("solver=heun").solver)}, [1]))


def test_any_list_of_solvers_is_compared():
    config = configuration("compare.names=[heun,ddpm]", "solver=heun", "compare.solvers.heun.grid=log_snr")
    assert config.compare.solvers.keys() == set(choices("solver"))
    found = build_solvers(config)
    assert list(found) == ["heun", "ddpm", "solver"] and found["heun"].grid == "log_snr"
    with pytest.raises(ConfigError, match=r"compare\.names: no solver 'huen'; choose from .*heun"):
        build_solvers(configuration("compare.names=[huen]"))


def test_a_budget_counts_the_call_that_denoises():
    ddim = build(configuration("solver=ddim", "solver.final=denoise").solver)
    assert [s.steps for _, s in budgeted({"ddim": ddim}, [10, 10, 2])] == [1, 9]
    with pytest.raises(ConfigError, match="ddim needs at least 2 network calls"):
        list(budgeted({"ddim": ddim}, [1]))
