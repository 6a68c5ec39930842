"""What a model was trained on travels with it, and nothing that doesn't fit it is evaluated."""

import json

import pytest
import torch
from configurations import configuration

from experiments import archive, checkpoint, tasks, training
from experiments.build import ConfigError
from experiments.centres import DiscreteDecoder, TruncatedNormal
from experiments.data import digits, mixture2d
from experiments.dequantization import Uniform
from experiments.dequantizers import check_convention, of_convention
from experiments.likelihood_tasks import check_settings, likelihood
from experiments.order import batches
from experiments.problem import Problem, build_model, load_problem
from experiments.run import Run
from experiments.session import Session, load_model
from experiments.variational import Variational
from sde import VP

SMALL = ("net=mlp", "net.width=8", "net.depth=1", "parametrization=v", "train.steps=2", "train.batch_size=8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of two models trained, hardly, in either convention."""
    folders = {}
    for name in ("uniform", "centres"):
        folders[name] = tmp_path_factory.mktemp(name)
        config = configuration(*SMALL, f"dequantization={name}")
        training.train(config, Problem.of(digits(), name), CPU, Run(folders[name], "train"))
    return folders


def loaded(folder, run_folder, *overrides):
    config = configuration(*SMALL, "task=likelihood", f"checkpoint={folder}", *overrides)
    return load_model(Session(config, Run(run_folder, "likelihood")))


def check(problem, dequantizer):
    check_convention(problem.convention(), dequantizer, problem.data.shape)


def test_training_sees_the_centres_of_the_bins_or_all_of_them():
    k = torch.arange(17)
    uniform, centred = (Problem.of(digits(), name) for name in ("uniform", "centres"))
    assert torch.allclose(centred.x(k), -1 + (2 * k + 1) / 17) and torch.equal(centred.x(k), centred.x(k))
    assert not torch.isclose(uniform.x(k), uniform.x(k)).any()
    for problem in (uniform, centred):
        assert torch.equal(problem.dequantizer.quantize(problem.x(k)).long(), k)
    batch = next(batches(centred, configuration("train.batch_size=4"), CPU, torch.Generator().manual_seed(0)))
    assert torch.equal(centred.x(centred.dequantizer.quantize(batch)), batch)


def test_the_convention_says_which():
    conventions = [Problem.of(digits(), name).convention() for name in ("uniform", "centres")]
    assert [c["dequantization"] for c in conventions] == ["uniform", "centres"]
    assert Problem.of(digits()).convention() == conventions[0]
    assert Problem.of(mixture2d(train=5)).convention()["dequantization"] is None
    assert load_problem(configuration("dequantization=centres")).trained_on == "centres"
    assert load_problem(configuration()).trained_on == "uniform"


def test_noise_that_training_does_not_add_is_not_warned_of():
    assert Problem.of(digits()).noise_width == pytest.approx(2 / 17)
    assert Problem.of(digits(), "centres").noise_width is None and Problem.of(mixture2d(train=5)).noise_width is None


def test_names_that_there_are_not_and_centres_of_nothing_are_refused():
    with pytest.raises(ConfigError, match="must be one of uniform, centres, found 'gaussian'"):
        Problem.of(digits(), "gaussian")
    with pytest.raises(ConfigError, match="mixture2d are continuous: use dequantization=uniform"):
        Problem.of(mixture2d(train=5), "centres")


def test_a_checkpoint_keeps_its_convention_and_refuses_the_other(tmp_path, trained):
    for own, other in (("uniform", "centres"), ("centres", "uniform")):
        assert checkpoint.load(str(trained[own]), CPU)[1]["dequantization"] == own
        loaded(trained[own], tmp_path / f"{own}-a", f"dequantization={own}")
        with pytest.raises(ConfigError, match=rf"trained on .*{own}.* this run has .*{other}"):
            loaded(trained[own], tmp_path / f"{own}-b", f"dequantization={other}")


def test_a_checkpoint_that_does_not_say_is_uniform(tmp_path, trained):
    content = torch.load(trained["uniform"] / "checkpoints" / "last.pt", weights_only=True)
    convention = json.loads(content["convention"])
    del convention["dequantization"]
    archive.write(tmp_path / "old.pt", content | {"convention": json.dumps(convention)})
    loaded(tmp_path / "old.pt", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"this run has .*centres"):
        loaded(tmp_path / "old.pt", tmp_path / "b", "dequantization=centres")
    continuous = convention | {"levels": None, "range": None, "shape": [2]}
    model = build_model(configuration(*SMALL), continuous)
    content |= {"convention": json.dumps(continuous), "ema": model.state_dict()}
    archive.write(tmp_path / "continuous.pt", content)
    assert checkpoint.load(str(tmp_path / "continuous.pt"), CPU)[1]["dequantization"] is None


def test_every_dequantizer_is_checked_against_the_convention():
    around = [kind.of(VP(), 17) for kind in (TruncatedNormal, DiscreteDecoder)]
    kinds = {"uniform": [Uniform(17), Variational(17, -1.0, 1.0, (1, 8, 8))], "centres": around}
    for own, other in (("uniform", "centres"), ("centres", "uniform")):
        problem = Problem.of(digits(), own)
        for fits in kinds[own]:
            check(problem, fits)
        for wrong in kinds[other]:
            words = rf"{type(wrong).__name__}: the model was trained on data of dequantization {own}, and not {other}"
            with pytest.raises(ConfigError, match=words):
                check(problem, wrong)
    others = {"levels 17, and not 16": Uniform(16), r"range \[-1.0, 1.0\], and not": Uniform(17, 0.0, 1.0)}
    for words, bins in others.items():
        with pytest.raises(ConfigError, match=words):
            check(Problem.of(digits()), bins)
    with pytest.raises(ConfigError, match="levels None, and not 17"):
        check(Problem.of(mixture2d(train=5)), Uniform(17))


def test_each_convention_has_its_dequantizer():
    kinds = {"uniform": Uniform(17), "centres": TruncatedNormal.of(VP(), 17)}
    for name, expected in kinds.items():
        assert of_convention(Problem.of(digits(), name).convention(), VP()) == expected
    assert of_convention(Problem.of(mixture2d(train=5)).convention(), VP()) is None


def test_centres_are_not_evaluated_with_uniform_noise(tmp_path, trained):
    options = ("dequantizer@likelihood.dequantizer=uniform", "dequantization=centres")
    config = configuration(*SMALL, *options, f"checkpoint={trained['centres']}")
    with pytest.raises(ConfigError, match=r"Uniform: the model was trained on data of dequantization centres"):
        likelihood(config, Run(tmp_path / "likelihood", "likelihood"))
    with pytest.raises(ConfigError, match=r"Uniform: the model was trained on data of dequantization centres"):
        tasks.everything(config, Run(tmp_path / "all", "all"))
    assert not (tmp_path / "all" / "checkpoints").exists()


def test_the_level_head_is_of_uniform_bins(tmp_path):
    config = configuration("net=mlp", "dequantization=centres", "parametrization=levels")
    with pytest.raises(ConfigError, match=r"score of uniform bins, found dequantization=centres: use .*=v"):
        tasks.check_training(Session(config, Run(tmp_path, "train")))
    assert build_model(configuration("net=mlp"), Problem.of(digits()).convention())


CHAIN = "+likelihood.chain={_target_: sde.DDPMChain, betas: {_target_: sde.linear_betas, steps: 25}}"
POSTERIOR = "+likelihood.decoder={_target_: solvers.LevelPosterior, _partial_: true}"
BOUNDS = {
    None: (["likelihood.bounds=[5]"], ["continuous ELBO", "discrete ELBO, N=5"]),
    "truncated_normal": ([CHAIN], ["continuous ELBO", "discrete ELBO, DDPMChain(25 betas, 0.004 to 0.8)"]),
    "discrete_decoder": ([POSTERIOR, "likelihood.bounds=[]"], ["continuous ELBO"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_model_of_centres_is_evaluated_by_the_dequantizers_and_bounds_for_it(tmp_path, trained, name):
    options = [f"dequantizer@likelihood.dequantizer={name}"] if name else []
    settings = ("dequantization=centres", "likelihood.samples=6", "likelihood.ode_subset=0", "likelihood.steps=20")
    settings += ("likelihood.split=validation",)  # without the baselines, which take their time
    bounds, rows = BOUNDS[name]
    config = configuration(*SMALL, *settings, *bounds, f"checkpoint={trained['centres']}", *options)
    likelihood(config, Run(tmp_path, "likelihood"))
    found = json.loads((tmp_path / "summary.json").read_text())
    kind = "DiscreteDecoder" if name == "discrete_decoder" else "TruncatedNormal"
    assert found["likelihood"]["protocol"]["dequantization"].startswith(kind)
    assert [row["name"] for row in found["bounds"]] == ["ODE, density of the flow", *rows]


@pytest.mark.parametrize(
    "options, message",
    [
        ([CHAIN, POSTERIOR], r"decoder=solvers.LevelPosterior is for the continuous bound; for likelihood.chain leave"),
        (["+likelihood.chain={_target_: sde.VP}"], r"likelihood.chain must be a GaussianChain, found sde.VP"),
    ],
)
def test_bounds_that_can_not_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(configuration(*SMALL, *options).likelihood)
