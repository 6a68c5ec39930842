"""Classes in training: the label that goes with each example, the coins that leave it out, and what is refused."""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

import conf
from experiments import classes, order, session, training
from experiments.build import ConfigError, build
from experiments.data import digits, mixture2d
from experiments.dataset import Data
from experiments.networks import identity
from experiments.problem import Problem, build_model
from experiments.processes import Processes
from experiments.run import Run
from experiments.stepper import Stepper
from models import MLP, DenoisingScoreMatching, EDMRow, LearnedVariance, NoiseRow, ScoreNetwork, VRow
from sde import VE, VP, LearnedSchedule

CPU = torch.device("cpu")
SMALL = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise")
SHORT = (*SMALL, "net.classes=3", "train.steps=10", "train.log_every=5", "train.warmup=1", "train.batch_size=20")
OBJECTIVES = sorted(path.stem for path in Path(conf.__path__[0], "objective").glob("*.yaml"))
ROWS = {"hybrid": LearnedVariance(NoiseRow()), "vlb": LearnedVariance(NoiseRow()), "edm": EDMRow(0.5)}
PROCESSES = {"ncsn": VE, "vdm": lambda: LearnedSchedule(learn_ends=True), "bound": LearnedSchedule}


@cache
def numbered(n=50, k=3):
    """Examples whose every value is their class, in the training split and in the others."""
    label = torch.arange(n) % k
    x = label[:, None].float().expand(n, 2).clone()
    return Data("numbered", x, x[:10], x[:10], labels={"train": label, "validation": label[:10], "test": label[:10]})


def settings(*overrides):
    return configured("train.batch_size=8", *overrides)


def configured(*overrides, base=SHORT):
    """As the command line composes it, at a hundredth of the time; no choices of groups."""
    return OmegaConf.merge(configuration(*base), OmegaConf.from_dotlist(list(overrides)))


def told(config, batches, first=0, data=None):
    stream = classes.conditions(config, data or numbered(), CPU, first)
    return torch.cat([next(stream)["class_label"] for _ in range(batches)])


@pytest.mark.parametrize("override", ["seed=0", "train.workers=2", "train.data_on_device=false"])
def test_each_example_is_told_its_own_class_or_none(override):
    config, problem = settings(override), Problem.of(numbered())
    for first in (0, 16):
        x = order.batches(problem, config, CPU, torch.Generator(), first)
        label = classes.conditions(config, problem.data, CPU, first)
        for _ in range(30):
            own, given = next(x)[:, 0].long(), next(label)["class_label"]
            assert given.dtype == torch.int64 and bool(((given == own) | (given == 3)).all())
            assert (given == own).sum() > 0


def test_the_coins_are_a_function_of_the_position_alone():
    whole = told(settings("train.batch_size=1"), 200)
    for size, first in ((8, 0), (20, 40), (100, 100)):
        config = settings(f"train.batch_size={size}")
        assert torch.equal(told(config, 1, first), whole[first : first + size])
    assert not torch.equal(told(settings("train.batch_size=1", "seed=1"), 200), whole)
    epochs = torch.stack([order.uniform(0, epoch, 50) for epoch in range(4)])
    assert len(epochs.unique()) == 200  # each epoch has its own


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.7])
def test_labels_are_left_out_as_often_as_is_asked_for(probability):
    config = settings(f"train.label_dropout={probability}", "train.batch_size=1000")
    left_out = (told(config, 20, data=numbered(999)) == 3).double().mean()
    assert abs(left_out - probability) <= 4 * (probability * (1 - probability) / 20000) ** 0.5


def test_the_coins_are_uniform_and_independent_of_order_and_mirrors():
    coins = torch.stack([order.uniform(0, epoch, 1000) for epoch in range(20)])
    assert coins.dtype == torch.float64 and coins.min() >= 0 and coins.max() < 1
    assert abs(coins.mean() - 0.5) < 4 / (12 * 20000) ** 0.5
    places = torch.stack([order.permutation(0, epoch, 1000) for epoch in range(20)])
    mirrors = torch.stack([order.mirrored(0, epoch, 1000) for epoch in range(20)])
    last_bits = (coins * 2.0**32).long() % 2
    for one, other in ((coins, places), (coins, places.argsort()), (coins, mirrors), (last_bits, mirrors)):
        pair = torch.stack([one.double().flatten(), other.double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / 20000**0.5


@pytest.mark.parametrize("parts", [1, 2])
def test_processes_have_the_labels_of_their_examples(monkeypatch, parts):
    config, problem = settings(f"train.accumulate={parts}"), Problem.of(numbered())
    whole = told(config, 1)
    shares = []
    for rank in (0, 1):
        for module in (order, classes):
            monkeypatch.setattr(module, "current", lambda rank=rank: Processes(rank, 2, rank))
        label = told(config, 1)
        x = next(order.batches(problem, config, CPU, torch.Generator()))[:, 0].long()
        assert bool(((label == x) | (label == 3)).all())
        shares.append(label)
    assert torch.equal(torch.stack([s.unflatten(0, (parts, -1)) for s in shares], 1).flatten(), whole)


def test_a_network_of_no_classes_is_told_nothing_and_trains_as_before(tmp_path):
    config = configured("net.classes=0")
    assert next(classes.conditions(config, numbered(), CPU)) == {}
    assert classes.held_out(config, numbered(), 5, CPU) == {}
    runs = [
        trained(tmp_path / name, "net.classes=0", dropout, data=data)
        for name, data, dropout in (
            ("a", numbered(), "train.label_dropout=0.1"),
            ("b", replace(numbered(), labels=None), "train.label_dropout=0.9"),
        )
    ]
    for name, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[1].state_dict()[name]), name


def trained(folder, *overrides, data=None):
    return training.train(configured(*overrides), Problem.of(data or numbered()), CPU, Run(folder, "train"))


@pytest.mark.parametrize("options", [(), ("train.accumulate=2", "train.precision=bfloat16"), ("train.fused=false",)])
def test_training_tells_the_objective_and_validation_leaves_nothing_out(tmp_path, monkeypatch, options):
    seen = {True: [], False: []}

    class Listening(DenoisingScoreMatching):
        def forward(self, model, x0, generator=None, **condition):
            assert condition.keys() == {"class_label"} and len(condition["class_label"]) == len(x0)
            seen[self.training].append((x0[:, 0].long(), condition["class_label"]))
            return super().forward(model, x0, generator, **condition)

    monkeypatch.setattr(training, "build_objective", lambda config, model: Listening())
    trained(tmp_path, "train.label_dropout=0.5", *options)
    for own, given in seen[False]:
        assert torch.equal(given, own)
    own, given = (torch.cat(parts) for parts in zip(*seen[True], strict=True))
    assert len(own) == 200 and bool(((given == own) | (given == 3)).all()) and 60 < (given == 3).sum() < 140
    assert torch.equal(given, told(configured("train.label_dropout=0.5"), 10))


def test_what_is_learned_is_the_classes_mean_and_the_mean_of_all(tmp_path):
    """At t_max x tells nothing: the best x_0 is the mean of the class, or without one that of all examples."""
    data, options = numbered(), ("train.steps=300", "train.learning_rate=1e-2", "train.label_dropout=0.3")
    options += ("objective=simple", "parametrization=data", "train.batch_size=100", "train.ema=0.98")
    model = training.train(configuration(*SHORT, *options), Problem.of(data), CPU, Run(tmp_path, "train"))
    x, t = torch.randn(200, 2), torch.tensor(1.0)
    with torch.no_grad():
        found = [model(x, t, class_label=torch.full((200,), c)).x0.mean().item() for c in range(4)]
    assert found[:3] == pytest.approx([0, 1, 2], abs=0.15)
    assert found[3] == pytest.approx(data.train.mean().item(), abs=0.15)
    assert torch.equal(model(x, t).x0, model(x, t, class_label=torch.full((200,), 3)).x0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_tells_the_network(name):
    """Told class c, the loss is that of a network whose vector for no class is that of c and which is told nothing."""
    loss, model = losses_of(name)
    label = torch.tensor([0, 1, 2, 3] * 4)
    each = loss(model, class_label=label)
    assert torch.equal(loss(model), loss(model, class_label=torch.full((16,), 3)))
    vectors = model.net.embed.classes.weight.data
    rest = vectors[3].clone()
    for c in range(4):
        vectors[3] = rest if c == 3 else vectors[c]
        assert torch.allclose(loss(model)[label == c], each[label == c], rtol=1e-12), c
        assert not torch.allclose(loss(model)[label != c], each[label != c], rtol=1e-3), c


def losses_of(name):
    objective = build(OmegaConf.load(Path(conf.__path__[0], "objective", f"{name}.yaml")), where="objective").double()
    row = ROWS.get(name, VRow())
    net = MLP((2,), width=16, depth=1, outputs=row.outputs, classes=3)
    model = ScoreNetwork(net, PROCESSES.get(name, VP)(), row).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x0 = 0.5 * torch.randn(16, 2, dtype=torch.float64).clamp(-1, 1)

    def loss(model, **condition):
        return objective.eval()(model, x0, torch.Generator().manual_seed(3), **condition).value.detach()

    return loss, model


class Deaf(torch.nn.Module):
    """Has a parameter for classes, and no ear for them."""

    def __init__(self, shape, outputs, classes=0):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, label):
        return self.layer(x)


def changed(**labels):
    return replace(numbered(), labels=numbered().labels | labels)


GAPPED = numbered().labels["train"] * 2
REFUSED = [
    (
        ("net.classes=3",),
        replace(numbered(), labels=None),
        r"net\.classes: numbered has no labels: take data",
    ),
    (("net.classes=4",), numbered(), r"net\.classes=4: numbered has 3 classes: use net\.classes=3"),
    (("net.classes=3",), changed(train=GAPPED), r"found 0, 2, 4 in train: number the classes from 0"),
    (("net.classes=3",), changed(train=numbered().labels["train"] - 1), "found -1, 0, 1 in train"),
    (("net.classes=3",), changed(validation=torch.full((10,), 3)), "found 3 in validation"),
    (("net.classes=3",), changed(test=torch.full((10,), -1)), "found -1 in test"),
    (("net.classes=3", "train.label_dropout=1.0"), numbered(), r"train\.label_dropout must be a prob.*found 1\.0"),
    (("net.classes=3", "train.label_dropout=-0.1"), numbered(), r"label_dropout must be a probability in \[0, 1\)"),
    (("net.classes=3", "train.label_dropout=nan"), numbered(), "label_dropout must be"),
    (("net.classes=3", "train.label_dropout=0", "train.watch_every=5"), numbered(), r"watch_every looks .* without"),
]


@pytest.mark.parametrize(("overrides", "data", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_classes_that_can_not_be_trained_are_refused_before_training(tmp_path, overrides, data, words):
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path, *overrides, data=data)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_network_that_takes_no_classes_is_refused():
    config = configured()
    with pytest.raises(ConfigError, match=r"net\.classes=3: Deaf takes no class_label= in its forward pass"):
        classes.check(config, numbered(), Deaf((2,), 1, 3))
    classes.check(config, numbered(), MLP((2,), classes=3))


def test_the_labels_and_their_dropout_make_another_network_and_only_of_classes():
    def of(*overrides, data=None):
        return identity(configured("net.classes=0", *overrides), Problem.of(data or numbered()))

    other = changed(train=numbered().labels["train"].flip(0))
    plain = of()
    assert plain == of("train.label_dropout=0.5") == of(data=other) == of(data=replace(other, labels=None))
    assert "labels" not in plain and "train.label_dropout" not in plain["settings"]
    known = [of("net.classes=3"), of("net.classes=3", "train.label_dropout=0.5"), of("net.classes=3", data=other)]
    assert all(one not in known[:i] and one != plain for i, one in enumerate(known))


def test_a_training_goes_on_with_its_own_labels_alone(tmp_path):
    trained(tmp_path / "first")
    more = ("train.steps=12", f"resume={tmp_path / 'first'}")
    with pytest.raises(ConfigError, match=r"was trained on other labels; take the same files"):
        trained(tmp_path / "other", *more, data=changed(train=numbered().labels["train"].flip(0)))
    trained(tmp_path / "more", *more)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_that_knows_nothing_without_a_class_says_so_once(tmp_path, monkeypatch, caplog, dropout):
    labels = {name: torch.arange(n) % 3 for name, n in (("train", 60), ("validation", 10), ("test", 10))}
    problem = Problem.of(replace(mixture2d(train=60, validation=10, test=10), labels=labels))
    monkeypatch.setattr(session, "load_problem", lambda config: problem)
    training.train(configured(f"train.label_dropout={dropout}"), problem, CPU, Run(tmp_path / "a", "train"))
    for name, options in (("plain", {}), ("told", {"told": True})):
        caplog.clear()
        run = session.Session(configured(f"checkpoint={tmp_path / 'a'}"), Run(tmp_path / name, "sample"))
        with caplog.at_level(logging.WARNING):
            session.load_model(run, **options)
        expected = dropout == 0 and name == "plain"
        assert caplog.text.count("trained with train.label_dropout=0, always with a class") == expected
        assert classes.only_with_class(run.trained) == (dropout == 0)


@pytest.mark.parametrize("strange", [{}, {"net": None}, {"net": [3], "train": 0}, {"net": {"classes": 3}, "train": []}])
def test_what_a_file_does_not_say_is_not_warned_of(strange):
    assert not classes.only_with_class(strange)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the compiler's own
def test_two_ways_of_the_step_agree_with_classes(tmp_path):
    """Compiled or not, the step is told the same."""
    one, two = (trained(tmp_path / name, f"train.compile={name}") for name in ("false", "true"))
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], atol=1e-5), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_is_told_each_batch_its_own_classes():
    device, found = torch.device("cuda"), []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = ScoreNetwork(MLP((2,), width=16, depth=1, classes=3), VP()).to(device)
        config = settings(f"train.cuda_graphs={recorded}")
        generator = torch.Generator(device).manual_seed(0)
        step = Stepper(model, DenoisingScoreMatching(), training.StepSettings.of(config.train), generator)
        label = classes.conditions(config, numbered(), device)
        for i in range(10):
            x = torch.full((8, 2), float(i), device=device)
            step(x, 1e-2, **next(label))
        found.append(model.net.embed.classes.weight.detach().clone())
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_the_preset_is_of_the_digits_classes():
    config = configuration("experiment=digits_conditional")
    net = build_model(config, Problem.of(digits()).convention()).net
    classes.check(config, digits(), net)
    assert classes.count(config) == 10 and 0 < config.train.label_dropout < 1
