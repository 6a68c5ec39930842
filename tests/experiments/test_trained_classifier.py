"""A classifier of noised data that is trained in seconds: as good as Bayes at both ends of the noise, and kept."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from experiments.archive import CheckpointError
from experiments.build import ConfigError
from experiments.data import digits, mixture2d
from experiments.dataset import Data
from experiments.noisy_classifier import accuracy_by_level, trained_classifier
from experiments.problem import Problem
from models import GaussianMixture
from sde import VE, VP

SHARES, MEANS, STD = torch.tensor([0.25, 0.75]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.8
SHORT = {"steps": 600, "width": 16}


@cache
def points():
    """Two overlapping components of unequal weight, which are the classes."""

    def split(n, seed):
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(SHARES, n, replacement=True, generator=generator)
        return MEANS[k] + STD * torch.randn(n, 2, generator=generator), k

    splits = {name: split(n, i) for i, (name, n) in enumerate({"train": 4000, "validation": 10, "test": 4000}.items())}
    x, labels = ({name: pair[i] for name, pair in splits.items()} for i in (0, 1))
    return Problem.of(Data("points", **x, labels=labels))


@cache
def trained(sde):
    return trained_classifier(points(), sde, **SHORT)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_it_is_as_good_as_bayes_where_there_is_no_noise_and_as_the_prior_where_there_is_nothing_else(sde):
    found, data = accuracy_by_level(trained(sde), points(), levels=5), points().data
    parts = [GaussianMixture(torch.ones(1), m[None], STD**2 * torch.eye(2)[None], sde) for m in MEANS]
    joint = torch.stack([part.log_prob(data.test) for part in parts], 1) + SHARES.log()
    bayes = (joint.argmax(1) == data.labels["test"]).double().mean().item()
    majority = (data.labels["test"] == 1).double().mean().item()
    assert bayes > 0.9 > majority + 0.1
    assert found[0].accuracy == pytest.approx(bayes, abs=0.01)
    assert found[-1].accuracy == pytest.approx(majority, abs=0.01)
    assert found[0].stderr == pytest.approx((bayes * (1 - bayes) / 4000) ** 0.5, rel=0.1)
    assert [level.log_snr for level in found] == sorted((level.log_snr for level in found), reverse=True)
    with torch.no_grad():  # and all probabilities are the shares of the classes
        t = torch.tensor(sde.t_max)
        p = trained(sde).log_prob(sde.perturb(data.test, t, torch.randn(4000, 2)), t).exp()
    assert torch.allclose(p.mean(0), SHARES, atol=0.05) and p.std(0).max() < 0.06  # measured: 0.02 and 0.04


def test_it_is_a_function_of_the_seed_and_leaves_no_trace():
    x, t = torch.randn(5, 2), torch.tensor(0.3)
    few = {"steps": 3, "width": 8}
    with torch.inference_mode():
        first = trained_classifier(points(), VP(), **few)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = (trained_classifier(points(), VP(), seed=seed, **few) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(x, t), again(x, t)) and not torch.equal(first(x, t), other(x, t))
    assert not first.training and not any(p.requires_grad for p in first.net.parameters())


def test_it_is_kept_and_read_and_never_taken_for_another(tmp_path):
    x, t, few, file = torch.randn(5, 2), torch.tensor(0.3), {"steps": 3, "width": 8}, tmp_path / "classifier.pt"
    first = trained_classifier(points(), VP(), file, **few)
    written, place = file.read_bytes(), file.stat().st_ino
    assert torch.equal(trained_classifier(points(), VP(), str(file), **few)(x, t), first(x, t))
    assert file.stat().st_ino == place  # and it is not written again
    labels = points().data.labels
    relabelled = Problem.of(replace(points().data, labels=labels | {"train": labels["train"].flip(0)}))
    others = {
        "steps 3 instead of 4": (points(), VP(), few | {"steps": 4}),
        "seed 0 instead of 1": (points(), VP(), few | {"seed": 1}),
        r"sde 'VP\(.*instead of 'VE": (points(), VE(), few),
        "examples '": (relabelled, VP(), few),
    }
    for words, (problem, sde, settings) in others.items():
        with pytest.raises(CheckpointError, match=f"belongs to other data or another recipe: .*{words}"):
            trained_classifier(problem, sde, file, **settings)
    assert file.read_bytes() == written
    file.write_bytes(b"no archive")
    with pytest.raises(CheckpointError):
        trained_classifier(points(), VP(), file, **few)
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; make it"):
        trained_classifier(points(), VP(), tmp_path / "nowhere" / "a.pt", **few)


def test_data_without_classes_are_refused():
    with pytest.raises(ConfigError, match="a classifier: mixture2d has no labels: take data"):
        trained_classifier(Problem.of(mixture2d(10, 5, 5)), VP())
    with pytest.raises(ValueError, match="trained_classifier: steps must be a positive integer"):
        trained_classifier(points(), VP(), steps=0)


@pytest.mark.slow
def test_it_knows_the_digits_until_the_noise_hides_them():
    """Measured: 0.98 of the test images at log-SNR 2 and above, 0.1 at the end."""
    problem = Problem.of(digits())
    found = accuracy_by_level(trained_classifier(problem, VP()), problem, levels=13)
    assert all(level.accuracy > 0.95 for level in found if level.log_snr > 3)
    assert abs(found[-1].accuracy - 0.1) < 4 * (0.09 / 300) ** 0.5
