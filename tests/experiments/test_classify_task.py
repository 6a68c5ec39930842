"""A class-conditional likelihood as a classifier: Bayes' rule in closed form, common random numbers, refusals."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

from experiments import classify_task, session, training
from experiments.build import ConfigError
from experiments.classify_task import Classified, classified, classify
from experiments.data import digits, mixture2d
from experiments.dataset import Data
from experiments.dequantization import Uniform
from experiments.estimator import Estimator
from experiments.likelihood_figures import confusion
from experiments.problem import Problem
from experiments.run import Run
from models import GaussianMixture
from sde import VP, ScoreModel
from solvers import Hutchinson

CPU = torch.device("cpu")
MEANS, STD, SHARES = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]]), 0.7, (0.2, 0.3, 0.5)
NET = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise", "train.steps=3", "seed=3")
QUICK = ("likelihood.method=rk4", "likelihood.steps=6", "likelihood.samples=12", "likelihood.batch_size=5")


class ExactClasses(ScoreModel):
    """The exact score of a Gaussian for each class, and of their mixture."""

    def __init__(self, sde):
        super().__init__(sde)
        cov = STD**2 * torch.eye(2).expand(3, 2, 2)
        self.each = torch.nn.ModuleList(
            GaussianMixture(torch.ones(1), MEANS[c : c + 1], cov[:1], sde) for c in range(3)
        )
        self.all = GaussianMixture(torch.tensor(SHARES), MEANS, cov, sde)

    def forward(self, x, t, class_label=None):
        return self.all(x, t) if class_label is None else self.each[int(class_label[0])](x, t)


def points(n=200):
    generator = torch.Generator().manual_seed(0)
    k = torch.multinomial(torch.tensor(SHARES), n, replacement=True, generator=generator)
    k[: round(n / 10)] = torch.arange(round(n / 10)) % 3
    x = MEANS[k] + STD * torch.randn(n, 2, generator=generator)
    return Problem.of(Data("points", x, x[:40], x[:60], labels={"train": k, "validation": k[:40], "test": k[:60]}))


def told(problem, trained=None, **settings):
    likelihood = {"split": "test", "samples": None, "batch_size": 25} | settings
    config = OmegaConf.create({"likelihood": likelihood})
    return SimpleNamespace(config=config, problem=problem, trained=trained or {})


def test_it_is_the_rule_of_bayes_with_the_shares_of_the_training_examples():
    problem, model = points(), ExactClasses(VP(beta_max=50.0))  # whose prior knows nothing of the class
    found = classified(told(problem), model, Estimator(), 3)
    x, shares = problem.data.test, torch.bincount(problem.data.labels["train"]).double() / 200
    exact = torch.stack([each.log_prob(x) for each in model.each], 1).double()
    assert torch.allclose(found.prior, shares) and torch.allclose(found.log_prob, exact, atol=2e-3)
    posterior = (exact + shares.log()).log_softmax(1)
    assert torch.equal(found.predicted, posterior.argmax(1))
    assert torch.allclose(
        found.log_posterior, posterior.gather(1, problem.data.labels["test"][:, None])[:, 0], atol=4e-3
    )
    right = (posterior.argmax(1) == problem.data.labels["test"]).double().mean().item()
    assert found.accuracy == pytest.approx((right, (right * (1 - right) / 60) ** 0.5))
    # The marginal is the density of the mixture with those shares, which the model without a class nearly has.
    assert torch.allclose(found.marginal, (exact + shares.log()).logsumexp(1), atol=3e-3)
    assert torch.allclose(found.without, model.all.log_prob(x).double(), atol=2e-3)
    assert found.costs()["without"][0] == pytest.approx(-found.without.mean().item())
    assert found.summary()["unit"] == "-nats" and "-log p(x), nats, sum over classes" in str(found)


def test_a_rare_class_needs_more_evidence():
    prior, labels = torch.tensor([0.9, 0.1]), torch.tensor([0, 1])
    log_prob = torch.tensor([[0.0, 2.0], [0.0, 2.5]]).double()  # the odds are 9 = exp(2.197)
    found = Classified(log_prob, prior, labels)
    assert found.predicted.tolist() == [0, 1] and found.accuracy == (1.0, 0.0)
    assert Classified(log_prob, torch.full((2,), 0.5), labels).predicted.tolist() == [1, 1]
    assert found.marginal[0].item() == pytest.approx(math.log(0.9 + 0.1 * math.exp(2)))
    assert found.costs().keys() == {"sum over classes"} and "no mistakes" in str(found)
    bits = replace(found, dimensions=4).costs()["sum over classes"][0]
    assert bits == pytest.approx(-found.marginal.mean().item() / (4 * math.log(2)))


def test_confusions_are_counted_by_the_true_class_first():
    log_prob = torch.eye(3).double()[torch.tensor([0, 1, 1, 2, 2, 2])]
    found = Classified(log_prob, torch.full((3,), 1 / 3), torch.tensor([0, 0, 0, 1, 2, 2]))
    assert found.confusion.tolist() == [[1, 2, 0], [0, 0, 1], [0, 0, 2]]
    assert "most frequent mistakes: 0 as 1 (2), 1 as 2 (1)" in str(found)
    assert found.summary()["confusion"] == found.confusion.tolist() and found.summary()["accuracy"] == 0.5


def test_all_classes_see_the_same_draws_and_probes_whatever_the_batches_are():
    """With one model for all classes their likelihoods are equal bit for bit, though each is a random estimate."""
    data = digits()
    data = replace(data, test=data.test[:7], labels=data.labels | {"test": data.labels["test"][:7]})

    class Same(ScoreModel):
        def forward(self, x, t, class_label=None):
            flat = GaussianMixture(torch.ones(1), torch.zeros(1, 64), 0.3 * torch.eye(64)[None], self.sde)
            pair = flat(x, t)
            shift = 0.1 * torch.sin(3 * x).flip(-1)  # whose divergence has a part that only probes see
            return pair._replace(x0=pair.x0 - self.sde.sigma(t) * shift, eps=pair.eps + self.sde.alpha(t) * shift)

    def found(batch_size, seed=0):
        estimator = Estimator(Uniform(17), divergence=Hutchinson(1), method="rk4", steps=4, seed=seed)
        return classified(told(Problem.of(data), batch_size=batch_size), Same(VP()), estimator, 10)

    first = found(7)
    assert torch.equal(first.log_prob, first.log_prob[:, :1].expand(7, 10)) and first.dimensions == 64
    assert torch.equal(first.without, first.log_prob[:, 0])
    assert torch.allclose(found(3).log_prob, first.log_prob, rtol=1e-6)
    assert not torch.allclose(found(7, seed=1).log_prob, first.log_prob, rtol=1e-6)


def labelled(classes=2):
    data = mixture2d(train=60, validation=20, test=20)
    labels = {split: torch.arange(len(getattr(data, split))) % classes for split in ("train", "validation", "test")}
    return Problem.of(replace(data, labels=labels))


def run(tmp_path, monkeypatch, *overrides, problem=None, classes=2, name="run"):
    """A training of three steps, and the task on what it came to; its summary."""
    problem = problem or labelled()
    monkeypatch.setattr(session, "load_problem", lambda config: problem)
    config = configuration(*NET, f"net.classes={classes}", *[o for o in overrides if o.startswith("train.")])
    training.train(config, labelled(classes or 2), CPU, Run(tmp_path / "trained", "train"))
    given = [o for o in overrides if not o.startswith("train.")]
    config = configuration(*NET, *QUICK, "task=classify", f"checkpoint={tmp_path / 'trained'}", *given)
    classify(config, Run(tmp_path / name, "classify"))
    return json.loads((tmp_path / name / "summary.json").read_text())


def test_the_task_writes_what_it_found(tmp_path, monkeypatch):
    summary = run(tmp_path, monkeypatch)["classification"]
    with (tmp_path / "run" / "likelihood" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 == summary["n"] and summary["split"] == "test" and summary["classes"] == 2
    assert list(rows[0]) == ["index", "true", "predicted", "log_prob_0", "log_prob_1", "log_prob_without"]
    problem = labelled()
    assert [int(row["true"]) for row in rows] == problem.data.labels["test"][:12].tolist()
    prior = torch.bincount(problem.data.labels["train"]).double() / 60
    joint = torch.tensor([[float(row[f"log_prob_{c}"]) for c in (0, 1)] for row in rows]).double() + prior.log()
    assert [int(row["predicted"]) for row in rows] == joint.argmax(1).tolist()
    assert summary["log_prob"]["sum over classes"]["value"] == pytest.approx(
        -joint.logsumexp(1).mean().item(), rel=1e-5
    )
    assert len({row["log_prob_0"] for row in rows}) == 12 and any(
        row["log_prob_0"] != row["log_prob_1"] for row in rows
    )
    assert (tmp_path / "run" / "figures" / "confusion.png").stat().st_size > 2000
    text = (tmp_path / "run" / "report.txt").read_text()
    assert "accuracy" in text and "-log p(x), nats, without" in text


def test_settings_of_the_likelihood_hold_and_what_was_never_trained_is_left_out(tmp_path, monkeypatch, caplog):
    given = ("likelihood.split=validation", "likelihood.samples=5", "train.label_dropout=0")
    summary = run(tmp_path, monkeypatch, *given)["classification"]
    assert summary["n"] == 5 and summary["split"] == "validation" and summary["log_prob"].keys() == {"sum over classes"}
    assert "always with a class" not in caplog.text


@pytest.mark.parametrize(
    ("classes", "change", "words"),
    [
        (0, {}, r"the model is one that is told no classes, and .* has 2: train one with net\.classes=2"),
        (2, {"train": torch.arange(60) % 3}, r"the model is one of 2 classes, and .* has 3: .*net\.classes=3"),
        (2, None, "task=classify: .* has no labels"),
        (3, {}, r"the model is one of 3 classes, and .* has 2: .*net\.classes=2"),
    ],
)
def test_models_and_data_without_classes_are_refused(tmp_path, monkeypatch, classes, change, words):
    own = labelled()
    labels = None if change is None else own.data.labels | change
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, monkeypatch, problem=Problem.of(replace(own.data, labels=labels)), classes=classes)
    assert not (tmp_path / "run" / "likelihood").exists()


def test_the_picture_of_confusions_checks_its_numbers(tmp_path):
    with pytest.raises(ValueError, match="counts: expected shape"):
        confusion(torch.zeros(2, 3), tmp_path / "a.png")
    assert confusion(torch.tensor([[3, 0], [0, 0]]), tmp_path / "b.png", "title").is_file()


def test_the_task_is_found_by_its_name():
    assert configuration("task=classify").task._target_ == f"{classify_task.__name__}.{classify.__name__}"
