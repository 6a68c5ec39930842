"""Samples given something: what holds of exact posteriors, whose sample is whose, what is drawn, and refusals."""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import configuration

from experiments import posterior_figures, posterior_tasks, session
from experiments.build import ConfigError
from experiments.conditions import box, labels, mask_file, noise, projection
from experiments.data import digits
from experiments.dataset import Data
from experiments.posteriors import Posteriors
from experiments.problem import Problem
from experiments.run import Run
from experiments.told import Share, Told
from models import Blur, GaussianMixture, Grayscale, Mask, half_mask
from sde import VP

PLANE = ("net=exact", "data=mixture2d", "data.train=500", "data.validation=50", "data.test=50")
SIMPLE = ("condition=half", "guidance.iterations=1", "solver=sde_dpm_solver", "solver.steps=25")
FEW = ("posterior.examples=3", "posterior.samples=4")
TASKS = {name: getattr(posterior_tasks, name) for name in ("inpaint", "restore", "conditional")}


def run(task, folder, *overrides):
    given = Run(folder, task)
    TASKS[task](configuration(f"task={task}", *overrides), given)
    return json.loads((folder / "summary.json").read_text())


def saved(folder, name="posterior.npz"):
    with np.load(folder / "samples" / name) as file:
        return dict(file)


def gaussian():
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 0.6]]).double()
    return {
        "weights": torch.ones(1).double(),
        "means": torch.tensor([[0.5, -1.0, 0.2]]).double(),
        "covariances": (factor @ factor.T)[None],
    }


@cache
def exact_posteriors(operator, std, n=250, k=4):
    """Examples of a Gaussian, and samples of the exact posterior of each."""
    model = GaussianMixture(**gaussian(), sde=VP())
    truth = model.sample(n, seed=1)
    observation = operator.simulate(truth, std, seed=2)
    seen = operator(torch.eye(3).double()).mT
    rows = seen.norm(dim=1) > 0
    draws = [model.given(seen[rows], y[rows], std).sample(k, seed=10 + i) for i, y in enumerate(observation)]
    return Posteriors(operator, std, truth, observation, torch.stack(draws), truth.mean(0), gaussian())


OPERATORS = [Mask(torch.tensor([1, 0, 0])), projection((3,), share=0.66), noise((3,))]


@pytest.mark.parametrize("operator", OPERATORS, ids=["mask", "projection", "denoising"])
def test_what_is_expected_of_exact_posteriors_is_what_they_have(operator):
    found = exact_posteriors(operator, 0.3)
    values = found.values()
    assert {name for name, value in values.items() if value.expected is not None} == {
        "misfit of the samples",
        "error of one sample",
        "truth within the samples",
        "distance to the exact mean",
    }
    for name, value in values.items():
        if value.expected is not None:
            assert abs(value.value - value.expected) < 4 * value.stderr, (name, value)
            assert value.stderr < 0.12 * value.expected, (name, value)
    assert values["error of the mean of the samples"].value < values["error of the average of the data"].value


def test_samples_of_the_prior_are_none_of_the_posterior():
    found = exact_posteriors(OPERATORS[1], 0.3)
    prior = GaussianMixture(**gaussian(), sde=VP()).sample(1000, seed=3).view(250, 4, 3)
    wrong = Posteriors(found.operator, 0.3, found.truth, found.observation, prior, found.average, gaussian())
    for name in ("misfit of the samples", "distance to the exact mean"):
        value = wrong.values()[name]
        assert value.value > value.expected + 10 * value.stderr, name
    narrow = found.mean[:, None] + 0.3 * (found.samples - found.mean[:, None])
    wrong = Posteriors(found.operator, 0.3, found.truth, found.observation, narrow, found.average)
    assert wrong.coverage.value < wrong.coverage.expected - 4 * wrong.coverage.stderr
    assert (
        wrong.errors["one sample"].value < wrong.errors["one sample"].expected - 4 * wrong.errors["one sample"].stderr
    )


def test_what_no_observation_depends_on_is_judged_and_no_noise_behind_a_mask():
    mask = half_mask((1, 4, 4))
    found = Posteriors(mask, 0.1, *(torch.zeros(2, 1, 4, 4),) * 2, torch.ones(2, 3, 1, 4, 4), torch.zeros(1, 4, 4))
    assert torch.equal(found.hidden, ~mask.mask)
    behind = mask.simulate(torch.zeros(2, 1, 4, 4), 0.0) + 7.0 * ~mask.mask
    samples = torch.zeros(2, 3, 1, 4, 4)
    told = Posteriors(mask, 0.0, torch.zeros(2, 1, 4, 4), behind, samples, torch.zeros(1, 4, 4))
    assert told.misfit.value == 0
    assert bool(Posteriors(Blur((1, 4, 4), 1.0, 1), 0.1, *(torch.zeros(2, 1, 4, 4),) * 2, samples, None).hidden.all())
    alone = Posteriors(mask, 0.1, *(torch.zeros(1, 1, 4, 4),) * 2, torch.ones(1, 3, 1, 4, 4), torch.zeros(1, 4, 4))
    assert alone.misfit.stderr is None and "–" in str(alone)


def one_gaussian():
    """Correlated points in the plane, of which moment matching is exact."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]]).double()
    density = {"weights": torch.ones(1).double(), "means": torch.zeros(1, 2).double(), "covariances": covariance[None]}
    x = GaussianMixture(**density, sde=VP()).sample(200, seed=0).float()
    return Problem.of(Data("gaussian", x, x[:20], x[20:60], density=density))


def test_every_sample_is_of_its_own_observation_and_of_the_exact_posterior(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_problem", lambda config: one_gaussian())
    found = run("inpaint", tmp_path / "a", *PLANE, *SIMPLE, "posterior.examples=4", "posterior.samples=40")["posterior"]
    assert found["nfe"] == found["passes_back"] == 25 and found["values_judged"] == 1
    misfit, exact = found["misfit_of_the_samples"], found["distance_to_the_exact_mean"]
    assert abs(misfit["value"] - 0.05) < 0.01 and exact["value"] < 2 * exact["expected"] < 0.2
    arrays = saved(tmp_path / "a")
    assert arrays["samples"].shape == (4, 40, 2) and arrays["mean"].shape == arrays["std"].shape == (4, 2)
    assert np.abs(arrays["samples"][:, :, 0] - arrays["truth"][:, None, 0]).max() < 0.35
    assert (tmp_path / "a" / "figures" / "posterior.png").is_file()
    text = (tmp_path / "a" / "report.txt").read_text()
    assert "MMPS, SDEDPMSolver" in text and "25 calls and 25 passes back" in text and "known='1 of 2'" in text


def test_an_example_is_the_same_whichever_is_the_first_and_however_many_are_drawn_at_once(tmp_path):
    given = ("data=digits", "net=exact", "condition=box", "solver.steps=2", "posterior.samples=2")
    model = GaussianMixture(torch.ones(1), torch.zeros(1, 64), torch.eye(64)[None], VP()).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior_tasks, "load_model", lambda session, observed: model)
        patch.setattr(posterior_figures, "posterior_images", lambda found, path: path)
        run("inpaint", tmp_path / "a", *given, "posterior.examples=4", "compare.batch_size=3")
        run("inpaint", tmp_path / "b", *given, "posterior.examples=2", "posterior.first=2")
        run("inpaint", tmp_path / "c", *given, "posterior.examples=4")
    a, b, c = (saved(tmp_path / name) for name in "abc")
    for name in ("truth", "observation"):
        assert np.array_equal(a[name][2:], b[name]), name
    assert not np.array_equal(a["truth"][0], a["truth"][1])
    assert np.allclose(a["samples"], c["samples"], atol=1e-5)
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["posterior"]["first"] == 2


def test_replacement_ends_at_what_is_known(tmp_path):
    given = ("guidance=replacement", "posterior.noise_std=0", "condition=half", "solver.steps=20")
    run("inpaint", tmp_path / "a", *PLANE, *FEW, *given)
    arrays = saved(tmp_path / "a")
    assert np.abs(arrays["samples"][..., 0] - arrays["truth"][:, None, 0]).max() < 0.02
    assert np.abs(arrays["samples"][..., 1] - arrays["truth"][:, None, 1]).max() > 0.1


def classes_of_digits(monkeypatch):
    """Exact scores of ten Gaussians about the classes' means, and a classifier by the nearest of them."""
    data = Problem.of(digits())
    means = torch.stack([data.x(data.data.train[data.data.labels["train"] == c]).mean(0).flatten() for c in range(10)])
    model = GaussianMixture(torch.ones(10), means, 0.02 * torch.eye(64).expand(10, 64, 64), VP()).eval()
    judge = SimpleNamespace(classifier=lambda x: -torch.cdist(x.flatten(1), means), accuracy=0.9)
    monkeypatch.setattr(posterior_tasks, "load_model", lambda session, told: model)
    monkeypatch.setattr(posterior_tasks, "Trained", lambda problem: judge)
    return model


@pytest.mark.parametrize("guidance", ["classifier_free", "conditioned", "classifier"])
def test_every_sample_is_of_its_own_class(tmp_path, monkeypatch, guidance):
    model = classes_of_digits(monkeypatch)
    monkeypatch.setattr(posterior_tasks, "trained_classifier", lambda *_, **__: model.log_class)
    given = (
        f"guidance={guidance}",
        "posterior.samples=3",
        "posterior.labels=[7,1,4]",
        "solver=ddim",
        "solver.steps=12",
    )
    found = run("conditional", tmp_path / "a", *given)["conditional"]
    assert found["labels"] == [7, 1, 4] and found["agreement"] == 1 and found["samples_per_class"] == 3
    assert found["accuracy_of_the_classifier"] == 0.9 and (found["passes_back"] == 0)
    arrays = saved(tmp_path / "a", "conditional.npz")
    assert arrays["samples"].shape == (3, 3, 1, 8, 8) and (arrays["predicted"] == [[7], [1], [4]]).all()
    assert (tmp_path / "a" / "figures" / "conditional.png").is_file()


def test_a_share_is_told_with_an_error_that_is_never_0():
    assert Share(0.5, 100).stderr == pytest.approx(0.05)
    assert Share(1.0, 80).stderr == pytest.approx((81 / 82 * 1 / 82 / 80) ** 0.5)
    told = Told(torch.tensor([3, 5]), torch.zeros(2, 4, 1, 2, 2), torch.tensor([[3, 3, 3, 0], [5, 5, 3, 0]]), 0.97)
    assert told.agreement.value == 5 / 8 and {c: s.value for c, s in told.by_class.items()} == {3: 0.75, 5: 0.5}
    assert "real test examples" in str(told)


REFUSED = [
    ("inpaint", ["condition=blur"], "task=inpaint needs a mask, found Blur; use condition=half"),
    ("inpaint", ["condition=label"], "needs a condition on data, found experiments.conditions.labels"),
    ("inpaint", ["~condition"], "task=inpaint needs a condition, found none"),
    (
        "inpaint",
        ["~guidance"],
        "task=inpaint needs a guidance, found none; use guidance=mmps, pigdm, dps, learned or replacement",
    ),
    ("inpaint", ["guidance=classifier_free"], "a condition by Mask: guidance=ClassifierFree needs label"),
    ("inpaint", ["guidance=conditioned"], "guidance=Conditioned takes no operator or known"),
    ("inpaint", ["guidance=replacement"], r"posterior.noise_std=0.05: Replacement takes .*; use posterior.noise_std=0"),
    (
        "inpaint",
        ["guidance=replacement", "posterior.noise_std=0", "solver=probability_flow"],
        "guidance.fresh=true draws anew .* ProbabilityFlow .*use a solver of fixed steps",
    ),
    ("inpaint", ["guidance=dps", "posterior.noise_std=0"], "guidance: noise_std must be positive"),
    ("inpaint", ["posterior.first=298", "posterior.examples=5"], "need 303 examples, found 300 in the test split"),
    ("inpaint", ["condition.size=9"], "condition: expected a size of the hidden box from 1 to"),
    ("inpaint", ["condition=mask_file", "condition.path=nowhere.npy"], "path=nowhere.npy: .*found no file"),
    (
        "restore",
        ["guidance=replacement", "posterior.noise_std=0"],
        "condition by Blur: guidance=Replacement needs known",
    ),
    ("restore", ["condition=greyscale"], "condition: Grayscale takes data .* of 2 channels or more"),
    ("restore", ["condition=downsample", "condition.factor=3"], "condition: expected a factor that divides 8 and 8"),
    ("conditional", ["guidance=mmps"], "has classes: guidance=MMPS needs operator and observation and noise_std"),
    ("conditional", ["condition=half"], "needs a condition on classes, found models.half_mask; use condition=label"),
    ("conditional", ["posterior.labels=[3,11]"], r"posterior.labels: expected different classes in 0 .. 9, found 11"),
    ("conditional", ["posterior.labels=[]"], r"posterior.labels: expected different classes .* found \[\]"),
    ("conditional", ["data=moons", "data.train=50"], "task=conditional: moons has no labels"),
]


@pytest.mark.parametrize(("task", "overrides", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_can_not_work_is_refused_before_a_model_is_read(tmp_path, task, overrides, words):
    with pytest.raises(ConfigError, match=words):
        run(task, tmp_path / "a", *overrides)


def test_a_model_without_classes_and_one_of_other_data_are_refused(tmp_path, file, monkeypatch):
    with pytest.raises(ConfigError, match=r"the checkpoint was trained on .* choose the same data="):
        run("inpaint", tmp_path / "a", f"checkpoint={file}")
    model = classes_of_digits(monkeypatch)
    model.classes = 0
    with pytest.raises(ConfigError, match=r"guidance: the model knows no classes: train its network with classes="):
        run("conditional", tmp_path / "b")


def test_a_mask_is_read_from_a_file_of_numbers_alone(tmp_path):
    place, known = str(tmp_path / "mask.npy"), np.eye(4)
    np.save(place, known)
    assert torch.equal(mask_file((3, 4, 4), place).mask, torch.eye(4).bool().expand(3, 4, 4))
    for wrong, words in (
        (np.ones((4, 5)), r"expected a mask of shape \(3, 4, 4\) or \(4, 4\) or \(4,\), found \(4, 5\)"),
        (np.full((4, 4), 0.5), r"expected 1 \(known\) and 0 \(hidden\) alone, found 0.5"),
        (np.full((4, 4), np.nan), "alone, found nan"),
    ):
        np.save(place, wrong)
        with pytest.raises(ConfigError, match=words):
            mask_file((3, 4, 4), place)
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00"):
        (tmp_path / "mask.npy").write_bytes(content)
        with pytest.raises(ConfigError, match=r"expected a \.npy file of a mask"):
            mask_file((3, 4, 4), place)


def test_conditions_choose_their_size_by_the_shape():
    assert box((1, 28, 28)).mask.sum() == 784 - 14 * 14 and box((1, 8, 8), size=2).mask.sum() == 60
    assert projection((1, 8, 8), 0.25).observed == (16,) and projection((2,), 0.1).observed == (1,)
    assert noise((2, 3)).mask.all() and torch.equal(labels(3), torch.arange(3))
    with pytest.raises(ValueError, match="share"):
        projection((2,), 0.0)


def test_what_is_hidden_is_shown_in_a_colour_that_data_do_not_have(tmp_path):
    mask, x = half_mask((1, 4, 4)), torch.zeros(1, 1, 4, 4)
    found = Posteriors(mask, 0.1, x, x, torch.randn(1, 2, 1, 4, 4), x[0])
    title, pixels = posterior_figures._observation(found, 1)
    assert title == "observation" and (pixels[0, :, :2] == 0.5).all()
    assert torch.allclose(pixels[0, :, 2:], posterior_figures._HIDDEN.double())
    flat = projection((1, 4, 4))
    title, pixels = posterior_figures._observation(Posteriors(flat, 0.1, x, flat(x + 1), x[None], x[0]), 1)
    assert title == "$A^T y$" and pixels.shape == (1, 4, 4, 3)
    grey, x = Grayscale((3, 4, 4)), torch.rand(2, 3, 4, 4)
    colour = Posteriors(grey, 0.1, x, grey(x), torch.rand(2, 2, 3, 4, 4), x[0])
    assert posterior_figures.posterior_images(colour, tmp_path / "a.png").is_file()
    points = torch.randn(2, 5, 2)
    assert posterior_figures.class_points(points, torch.tensor([0, 3]), points[0], tmp_path / "b.png").is_file()
