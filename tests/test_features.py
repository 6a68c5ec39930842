"""Features: of a network that learns the data's classes, of a plugin, of Inception; and what is refused."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from configurations import configuration

from experiments import build
from experiments.archive import CheckpointError
from experiments.build import ConfigError
from experiments.data import digits, mixture2d, moons
from experiments.distances import Frechet
from experiments.features import FeatureMap, Inception, Trained, build_features
from experiments.problem import Problem
from experiments.quality import measure


@pytest.fixture(scope="module")
def images():
    return Problem.of(digits())


@pytest.fixture(scope="module")
def trained(images):
    """Half of the steps that are the default."""
    return Trained(images, steps=300)


def labelled(data, labels=None):
    """Points with the class of their first coordinate's sign."""
    found = {name: (getattr(data, name)[:, 0] > 0).long() for name in ("train", "validation", "test")}
    return Problem.of(replace(data, labels=labels or found))


def test_a_trained_network_knows_the_digits(trained, images):
    assert trained.accuracy >= 0.95
    z = FeatureMap(trained)(images.x(images.data.test, torch.Generator().manual_seed(1)))
    assert z.shape == (300, 64) and z.isfinite().all() and not z.requires_grad
    assert 0.9 < z.square().mean().sqrt() < 1.1


@pytest.mark.slow
def test_the_network_of_the_shipped_recipe_knows_the_digits(images):
    settings = configuration("features@compare.features=trained").compare
    assert build_features(settings, images).network.accuracy >= 0.96


def test_features_are_of_all_classes_and_tell_them_from_noise(trained, images):
    """Digits without the last five classes, and noise, are further from the test split than as many digits."""
    of, data = FeatureMap(trained), images.data
    reference, index = of(images.x(data.test)), torch.randperm(len(data.train))
    some = index[data.labels["train"][index] < 5][:300]
    noise = images.x(torch.randint(0, 17, (300, 1, 8, 8)))
    far = {name: Frechet()(of(x), reference)["frechet"]
           for name, x in (("real", images.x(data.train[index[:300]])), ("some", images.x(data.train[some])),
                           ("noise", noise))}  # fmt: skip
    assert 5 * far["real"] < far["some"] < far["noise"]


def test_training_is_a_function_of_the_seed_and_leaves_no_trace(images):
    x = images.x(images.data.test[:20], torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first = FeatureMap(Trained(images, steps=3))(x)
    torch.manual_seed(5)  # of the rest of the program, of which the network must not depend
    before = torch.get_rng_state()
    assert torch.equal(FeatureMap(Trained(images, steps=3))(x), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(FeatureMap(Trained(images, steps=3, seed=1))(x), first)


def test_points_and_classes_of_any_number_can_be_learned():
    problem = labelled(moons(train=600, validation=50, test=200))
    odd = {name: 7 * each - 3 for name, each in problem.data.labels.items()}
    for each in (problem, labelled(problem.data, odd)):
        found = Trained(each, steps=60, size=5)
        assert found.accuracy > 0.95
        assert FeatureMap(found)(problem.data.test).shape == (200, 5)


@pytest.mark.parametrize("labels", [None, {"train": torch.zeros(50).long(), "test": torch.zeros(9).long()}])
def test_data_without_classes_are_refused(labels):
    data = replace(mixture2d(train=50, validation=9, test=9), labels=labels)
    with pytest.raises(
        ConfigError, match=r"compare.features: features=trained learns .* mixture2d has none; take data"
    ):
        build_features(configuration("features@compare.features=trained").compare, Problem.of(data))


def test_a_file_is_written_once_and_read_ever_after(tmp_path, images, monkeypatch):
    path, x = tmp_path / "features.pt", images.x(images.data.test[:9])
    first = FeatureMap(Trained(images, str(path), steps=3))(x)
    written = path.read_bytes()
    monkeypatch.setattr(Trained, "_train", None)
    assert torch.equal(FeatureMap(Trained(images, str(path), steps=3))(x), first)
    assert path.read_bytes() == written


def test_a_file_of_other_data_or_another_recipe_is_refused_at_once(tmp_path, images):
    path = tmp_path / "features.pt"
    FeatureMap(Trained(images, str(path), steps=3))(images.x(images.data.test[:9]))
    for problem, steps, words in (
        (images, 4, "steps 3 instead of 4"),
        (Problem.of(replace(images.data, train=16 - images.data.train)), 3, "examples '"),
        (Problem.of(digits(), "centres"), 3, "dequantization 'uniform' instead of 'centres'"),
    ):
        with pytest.raises(CheckpointError, match=f"other data or another recipe: {words}"):
            Trained(problem, str(path), steps=steps)
    path.write_bytes(path.read_bytes()[:-90])
    with pytest.raises(CheckpointError, match="cut short"):
        Trained(images, str(path), steps=3)


def test_a_checkpoint_is_no_network_of_features(tmp_path, images):
    from experiments import archive

    archive.write(tmp_path / "other.pt", {"model": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not the features' network"):
        Trained(images, str(tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match=r"there is no folder .*gone; make it"):
        Trained(images, str(tmp_path / "gone" / "features.pt"))


def test_a_network_of_a_plugin(tmp_path, monkeypatch, images):
    """A module is put into evaluation mode; one that asks for the problem gets it; what it returns is checked."""
    code = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, width), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.layer(x.flatten(1)))

def wise(problem, power):
    return lambda x: x.flatten(1) ** power + problem.dimensions

def flat():
    return lambda x: x.flatten()

def broken():
    return lambda x: x.flatten(1) / 0

def number():
    return 5

def picky():
    raise ValueError("no")
"""
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    build.trust(["my_features"], ["plugins=[my_features]"])
    x = images.x(images.data.test[:7])

    def made(name, *more):
        return build_features(configuration(f"+compare.features._target_=my_features.{name}", *more).compare, images)

    net = made("MyNet", "+compare.features.width=4")
    assert net(x).shape == (7, 4) and torch.equal(net(x), net(x)) and not net(x).requires_grad
    assert torch.equal(made("wise", "+compare.features.power=2")(x), x.flatten(1) ** 2 + 64)
    with pytest.raises(ValueError, match=r"must give a tensor of shape \(7, F\), found \(448,\)"):
        made("flat")(x)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        made("broken")(x)
    with pytest.raises(ConfigError, match=r"compare.features must be callable, found int"):
        made("number")
    with pytest.raises(ConfigError, match=r"compare.features: no"):
        made("picky")
    build.trust([], [])
    with pytest.raises(ConfigError, match=r"compare.features._target_: expected one of"):
        made("MyNet")


def test_batches_do_not_matter(trained, images):
    x = images.x(images.data.train[:1100], torch.Generator().manual_seed(0))
    assert torch.allclose(FeatureMap(trained)(x), trained(x), atol=1e-4)


def test_features_can_be_measured(trained, images):
    of, draw = FeatureMap(trained), torch.Generator().manual_seed(0)
    found = measure(Frechet(), [of(images.x(images.data.validation, draw))], of(images.x(images.data.test, draw)))
    assert 0 < found["frechet"].stderr < found["frechet"].value


class Standin(torch.nn.Module):
    """What torch-fidelity's extractor does with its arguments, without its layers."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.given = torch.load(feature_extractor_weights_path, weights_only=True)
        self.size = int(features_list[0])

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.flatten(1).half()[:, : self.size] + self.given["bias"],)


@pytest.fixture
def fidelity(monkeypatch):
    part = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    part.FeatureExtractorInceptionV3 = Standin
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, part.__name__, part)


def test_inception_is_given_bytes_of_three_channels_and_weights_without_code(fidelity, tmp_path, images):
    torch.save({"bias": torch.ones(())}, tmp_path / "weights.pth")
    over = [f"compare.features.weights={tmp_path / 'weights.pth'}", "compare.features.layer='64'"]
    of = build_features(configuration("features@compare.features=inception", *over).compare, images)
    levels = torch.arange(17, dtype=torch.uint8).repeat(4)[:64].view(1, 1, 8, 8)
    x = images.dequantizer.centres(levels)
    assert torch.equal(of(x)[0], ((x + 1) * 127.5).round().flatten().float() + 1)
    assert of(torch.full((1, 1, 8, 8), 9.0)).unique().tolist() == [256.0]


def test_a_file_that_would_run_code_is_not_given_to_the_package(fidelity, tmp_path, images):
    torch.save({"bias": Standin}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not a file of weights"):
        FeatureMap(Inception(images, str(tmp_path / "weights.pth")))(images.x(images.data.test[:2]))


def test_inception_refuses(monkeypatch, tmp_path, images):
    torch.save({}, tmp_path / "weights.pth")
    for none in (None, str(tmp_path / "none.pth")):
        with pytest.raises(ConfigError, match=r"there is no such file; give compare.features.weights=FILE"):
            Inception(images, none)
    with pytest.raises(ConfigError, match="layer must be one of 64, 192, 768, 2048, found '100'"):
        Inception(images, str(tmp_path / "weights.pth"), layer="100")
    with pytest.raises(ConfigError, match=r"images of known levels, found mixture2d \(2,\)"):
        Inception(Problem.of(mixture2d(train=50, validation=9, test=9)), str(tmp_path / "weights.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"needs the package torch-fidelity .*unified-score-sde\[fid\]"):
        Inception(images, str(tmp_path / "weights.pth"))


def test_without_features_there_is_no_map(images):
    assert build_features(configuration().compare, images) is None
