"""Observations in training: what the network is told, what a checkpoint says of it, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

from experiments import checkpoint, observing, session, tasks, training
from experiments.archive import CheckpointError
from experiments.build import ConfigError, build
from experiments.checkpoint_tasks import describe
from experiments.dataset import Data
from experiments.networks import identity
from experiments.observing import ObservedModel, Observing, observed_model
from experiments.problem import Problem
from experiments.run import Run
from models import MMPS, Blur, Conditioned, DenoisingScoreMatching, Matrix, half_mask
from models.share import Share
from solvers import DDIM

CPU = torch.device("cpu")
SHORT = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise", "train.steps=10")
SHORT += ("train.log_every=5", "train.warmup=1", "train.batch_size=20")
ROW = {"_target_": "models.Matrix", "matrix": [[1.0, 2.0]]}
NOISE = 0.25


def configured(*overrides, observe=ROW, noise=NOISE):
    """As the command line composes it."""
    base = configuration(*SHORT)
    OmegaConf.set_struct(base, False)
    more = OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.merge(more, {"observe": observe, "observe_noise_std": noise})


def correlated(n=400):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(5)) @ torch.tensor([[1.0, 0.5], [0.0, 0.4]])
    return Data("correlated", x, x[:50], x[:50])


@pytest.fixture(scope="module")
def problem():
    return Problem.of(correlated())


def trained(folder, problem, *overrides, **more):
    return training.train(configured(*overrides, **more), problem, CPU, Run(folder, "train"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, problem):
    folder = tmp_path_factory.mktemp("observed")
    trained(folder, problem)
    return folder


@pytest.fixture
def loaded(run, problem, monkeypatch, tmp_path):
    """Loading its checkpoint as tasks do."""
    monkeypatch.setattr(session, "load_problem", lambda config: problem)

    def load(*overrides, **more):
        config = configured(f"checkpoint={run}", *overrides, observe=None)
        return session.load_model(
            session.Session(config, Run(tmp_path / f"{len(list(tmp_path.iterdir()))}", "x")), **more
        )

    return load


OPERATOR = Matrix([[1.0, 2.0]])

# In training


def test_what_is_told_is_the_observation_with_new_noise(problem):
    told, x = Observing(configured(), problem), problem.data.train.repeat(50, 1)
    source = torch.Generator().manual_seed(0)
    first, second = (told(x, source) for _ in range(2))
    assert first.keys() == {"observation"} and first["observation"].shape == (20000, 1)
    assert first["observation"].dtype == torch.float32
    clean = x @ torch.tensor([[1.0], [2.0]])
    noise = torch.cat([each["observation"] - clean for each in (first, second)], 1)
    assert noise.std(0).tolist() == pytest.approx([NOISE] * 2, rel=0.02)
    for one, other in ((noise[:, 0], noise[:, 1]), (noise[:, 0], clean[:, 0]), (noise[1:, 0], noise[:-1, 0])):
        assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 4 / 20000**0.5
    again = told(x, torch.Generator().manual_seed(0))["observation"]
    assert torch.equal(again, first["observation"])


def test_processes_have_their_share_of_the_noise(problem):
    told, x = Observing(configured(), problem), problem.data.train[:12]
    whole = told(x, torch.Generator().manual_seed(1))["observation"]
    for rank in range(3):
        share = Share(torch.Generator().manual_seed(1), rank, 3, 2)
        assert torch.equal(told(share.take(x), share)["observation"], share.take(whole))


def test_without_observe_nothing_is_told_and_no_number_drawn(problem):
    source = torch.Generator().manual_seed(0)
    before = source.get_state()
    assert Observing(configured(observe=None), problem)(problem.data.train, source) == {}
    assert torch.equal(source.get_state(), before)
    assert observing.convention(configured(observe=None), problem) == problem.convention()


@pytest.mark.parametrize("options", [(), ("train.accumulate=2",)])
def test_training_tells_each_example_its_own_and_validation_the_same_each_time(tmp_path, monkeypatch, problem, options):
    seen = {True: [], False: []}

    class Listening(DenoisingScoreMatching):
        def forward(self, model, x0, generator=None, **condition):
            assert condition.keys() == {"observation"}
            seen[self.training].append((x0, condition["observation"]))
            return super().forward(model, x0, generator, **condition)

    monkeypatch.setattr(training, "build_objective", lambda config, model: Listening())
    trained(tmp_path, problem, *options)
    x, y = (torch.cat(parts) for parts in zip(*seen[True], strict=True))
    off = y - x @ torch.tensor([[1.0], [2.0]])
    assert len(off) == 200 and len(off.unique()) == 200
    assert off.square().mean().sqrt().item() == pytest.approx(NOISE, rel=4 / math.sqrt(2 * 200))
    held_out = [y for _, y in seen[False]]
    seeded = Observing(configured(), problem)(problem.data.validation, torch.Generator().manual_seed(0))
    assert torch.equal(held_out[0], seeded["observation"])
    assert len(held_out) == 2 and torch.equal(*held_out) and len(held_out[0]) == 50


def test_a_training_that_was_interrupted_goes_on_to_the_last_bit(tmp_path, problem):
    """The noise of observations comes from the generator whose state is saved."""
    whole = trained(tmp_path / "whole", problem, "train.save_every=5", "train.keep_every=5")
    kept = tmp_path / "whole" / "checkpoints" / "step_00000005.pt"
    assert kept.is_file()
    rest = trained(tmp_path / "rest", problem, f"resume={kept}")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_a_training_goes_on_with_its_own_observations_alone(tmp_path, run, problem):
    for number, more in enumerate(
        ({"noise": 0.3}, {"observe": None}, {"observe": ROW | {"matrix": [[1.0, 2.5]]}}),
    ):
        with pytest.raises(ConfigError, match=r"is of another training: .*observe"):
            trained(tmp_path / str(number), problem, "train.steps=12", f"resume={run}", **more)
    trained(tmp_path / "more", problem, "train.steps=12", f"resume={run}")


def test_observations_make_another_network_and_their_noise_none_without(problem):
    def of(**more):
        return identity(configured(**more), problem)

    plain = of(observe=None)
    assert plain == of(observe=None, noise=0.7) and not any("observe" in name for name in plain["settings"])
    known = [plain, of(), of(noise=0.7), of(observe=ROW | {"matrix": [[1.0, 2.5]]})]
    assert all(one not in known[:i] for i, one in enumerate(known))


# What a checkpoint says, and what it is good for


def test_a_checkpoint_says_what_was_observed(run):
    content = checkpoint.read(run / "checkpoints" / "last.pt")
    about = content["convention"]["observation"]
    assert about["operator"] == {"name": "models.Matrix", "parameters": {"matrix": [[1.0, 2.0]]}}
    assert about["noise_std"] == NOISE and about["shape"] == [1] and len(set(about["response"])) == 4
    assert "noise_std': 0.25" in describe(run / "checkpoints" / "last.pt", content)


def test_a_checkpoints_model_is_given_its_observations(loaded):
    model = loaded(observed=True)
    assert isinstance(model, ObservedModel)
    posterior = observed_model(model, OPERATOR, torch.tensor([[0.5], [-2.0], [1.0]]), NOISE)
    assert isinstance(posterior, Conditioned)
    x, t, y = torch.randn(3, 2), torch.tensor(0.4), torch.tensor([[0.5], [-2.0], [1.0]])
    assert torch.equal(posterior(x, t).x0, model.model(x, t, observation=y).x0)
    assert DDIM(steps=3)(posterior, shape=(3, 2), batch_size=2).x.shape == (3, 2)
    under = loaded("under._target_=sde.VE", observed=True)
    assert observed_model(under, OPERATOR, y[0], NOISE)(x, t).x0.shape == (3, 2)


def test_the_node_of_the_group_builds_it(loaded):
    node = OmegaConf.load("conf/guidance/learned.yaml")
    known = {"operator": OPERATOR, "observation": torch.tensor([0.5]), "noise_std": NOISE}
    assert isinstance(build(node, where="guidance", model=loaded(observed=True), **known), Conditioned)


OTHERS = {
    "another matrix": (Matrix([[1.0, 2.001]]), NOISE),
    "another order": (Matrix([[2.0, 1.0]]), NOISE),
    "of another shape": (Matrix([[1.0, 2.0], [0.0, 0.0]]), NOISE),
    "another noise": (OPERATOR, NOISE * 1.01),
    "no noise": (OPERATOR, 0.0),
    "of the same name and of x": (half_mask((2,)), NOISE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_operator_or_noise_is_refused(loaded, name):
    operator, noise = OTHERS[name]
    with pytest.raises(
        ConfigError, match=r"told observations by models\.Matrix\(matrix=.*noise of 0\.25, and this run"
    ):
        observed_model(loaded(observed=True), operator, torch.zeros(operator.observed), noise)


def test_what_needs_a_model_without_observations_refuses_this_one(loaded):
    with pytest.raises(ConfigError, match=r"checkpoint=.*trained to be told observations by models\.Matrix"):
        loaded()
    x, t = torch.randn(2, 2), torch.tensor(0.4)
    with pytest.raises(ConfigError, match="knows nothing without: use guidance=learned"):
        MMPS(loaded(observed=True), OPERATOR, torch.zeros(1), NOISE)(x, t)


def test_a_model_without_observations_is_none_with_them(tmp_path, problem, monkeypatch):
    trained(tmp_path / "plain", problem, observe=None)
    monkeypatch.setattr(session, "load_problem", lambda config: problem)
    config = configured(f"checkpoint={tmp_path / 'plain'}", observe=None)
    model = session.load_model(session.Session(config, Run(tmp_path / "x", "x")), observed=True)
    assert not isinstance(model, ObservedModel)
    with pytest.raises(ConfigError, match=r"was trained on observations, and this one was not: train one with"):
        observed_model(model, OPERATOR, torch.zeros(1), NOISE)


def test_tasks_that_ask_without_observations_refuse_the_setting_at_once(tmp_path, monkeypatch, problem):
    monkeypatch.setattr(session, "load_problem", lambda config: problem)
    for task in (tasks.everything, tasks.sample):
        with pytest.raises(ConfigError, match=r"observe= trains a model of x given y.*leave observe out"):
            task(configured(), Run(tmp_path / task.__name__, "x"))


WHOLE = [{}, [], {"shape": [1]}]
STRANGE = [
    *WHOLE,
    {"noise_std": "0.1"},
    {"shape": []},
    {"shape": [0]},
    {"shape": [1 << 40]},
    {"shape": [1 << 20, 1 << 20]},
    {"response": ["x"]},
    {"response": [math.nan]},
    {"operator": "models.Matrix"},
    {"more": 1},
]


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_a_file_that_says_nonsense_of_its_observations_is_refused(tmp_path, run, strange):
    from checkpoints import with_json

    file = tmp_path / "last.pt"
    file.write_bytes((run / "checkpoints" / "last.pt").read_bytes())

    def change(convention):
        whole = strange in WHOLE
        return convention | {"observation": strange if whole else convention["observation"] | strange}

    with_json(file, "convention", change)
    with pytest.raises(CheckpointError, match="its convention's observation makes no sense"):
        checkpoint.read(file)


def test_the_operator_in_a_file_is_words_alone(tmp_path, run):
    """Whatever name stands there, nothing is looked up; the shape alone is taken, and must fit the weights."""
    from checkpoints import with_json

    file = tmp_path / "last.pt"
    for change, words in (
        ({"operator": {"name": "os.system", "parameters": {"command": "false"}}}, None),
        ({"shape": [2]}, "weights don't fit"),
    ):
        file.write_bytes((run / "checkpoints" / "last.pt").read_bytes())
        with_json(file, "convention", lambda one, change=change: one | {"observation": one["observation"] | change})
        if words:
            with pytest.raises(CheckpointError, match=words):
                checkpoint.load(file, CPU)
        else:
            checkpoint.load(file, CPU)


# What can't be trained on

REFUSED = [
    ({"noise": -0.1}, (), r"observe_noise_std must be at least 0 and finite, found -0\.1"),
    ({"noise": math.inf}, (), "observe_noise_std must be"),
    ({"observe": ROW | {"matrix": [[1.0]]}}, (), r"observe: expected a matrix of shape \(m, D\)"),
    ({"observe": {"_target_": "models.Blur", "width": 2}}, (), r"observe\.width: models\.Blur has no such parameter"),
    ({"observe": {"_target_": "models.MLP"}}, (), "observe: expected a linear operator on data of shape .*models.MLP"),
    ({"observe": {"_target_": "os.system"}}, (), r"observe\._target_: expected one of"),
    ({}, ("train.watch_every=5",), r"train\.watch_every looks at samples without an observation"),
    ({}, ("net.observation=[1]",), "net.observation follows from what is observed"),
    ({}, ("net._target_=models.ClassifierNet",), r"observe: models\.ClassifierNet takes no observation="),
]


@pytest.mark.parametrize(("more", "overrides", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_observations_that_can_not_be_trained_on_are_refused_before_training(tmp_path, problem, more, overrides, words):
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path, problem, *overrides, **more)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("choice", ["blur", "half"])
def test_the_groups_choices_are_operators_on_images(images, choice):
    config = configuration(f"condition@observe={choice}")
    operator = observing.operator_of(config, images.data.shape)
    about = observing.convention(config, images)["observation"]
    assert operator.shape == (1, 8, 8) and about["shape"] == [1, 8, 8] and about["noise_std"] == 0.05
    observing.require_same(about, {"blur": Blur((1, 8, 8), std=1.0), "half": half_mask((1, 8, 8))}[choice], 0.05)


def test_the_preset_trains_a_network_that_takes_the_blurred_image_beside_its_channels(tmp_path, images):
    config = configuration("experiment=digits_deblur", "train.steps=2", "train.log_every=1", "train.batch_size=4")
    few = replace(images, data=replace(images.data, validation=images.data.validation[:8]))
    net = training.train(config, few, CPU, Run(tmp_path, "train")).net
    assert net.observed.channels == 1 and config.observe._target_ == "models.Blur"
