"""What a training looks at in between: right numbers, no trace in the training, and no end of it."""

import logging
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

from experiments import watch
from experiments.build import ConfigError, build
from experiments.data import Data
from experiments.likelihood_tasks import prepared
from experiments.problem import Problem, build_model
from experiments.stepper import Stepper, StepSettings
from experiments.watch import Watch, untouched
from models import DenoisingScoreMatching, GaussianMixture

CPU = torch.device("cpu")
FEW = ("likelihood.steps=8", "solver.steps=3")
PLANE = ("net=mlp", "net.width=16", "net.depth=1", "data=mixture2d", "parametrization=noise", "likelihood=exact", *FEW)
IMAGES = ("net.channels=16", "net.dropout=0.3", *FEW)


@cache
def plain(overrides):
    return OmegaConf.to_container(configuration(*overrides))


def settings(*overrides, every=2, examples=6):
    config = OmegaConf.create(plain(overrides))
    config.train.update({"watch_every": every, "watch_examples": examples})
    return config


def watched(tmp_path, problem, *overrides, **numbers):
    config = settings(*overrides, **numbers)
    model = build_model(config, problem.convention(), problem.data.train)
    return Watch(config, problem, CPU, tmp_path), model


def test_the_likelihood_is_that_of_the_density(tmp_path, plane):
    """The exact score of the data's own density: nats to the solver's accuracy."""
    eye, _ = watched(tmp_path, plane, *PLANE, "likelihood.steps=100", examples=20)
    exact = GaussianMixture(**{name: v.float() for name, v in plane.data.density.items()}, sde=build(eye.config.sde))
    truth = exact.log_prob(plane.data.validation[:20]).double()
    found = eye.look(exact, 10).scalars
    assert found["log_likelihood"] == pytest.approx(truth.mean().item(), abs=1e-3)
    assert found["log_likelihood_stderr"] == pytest.approx(truth.std().item() / 20**0.5, rel=1e-2)
    assert found.keys() == {"log_likelihood", "log_likelihood_stderr"}


def test_discrete_data_are_in_bits_per_dimension(tmp_path, images):
    eye, model = watched(tmp_path, images, *IMAGES)
    settled, estimator = prepared(eye, model.eval())
    nats = estimator(settled, images.data.validation[:6]).log_prob.mean().item()
    assert eye.look(model, 2).scalars["bits_per_dim"] == pytest.approx(-nats / (64 * np.log(2)), rel=1e-9)


def test_the_picture_is_written_and_handed_over(tmp_path, plane, images):
    for problem, overrides in ((plane, PLANE), (images, IMAGES)):
        eye, model = watched(tmp_path / problem.data.name, problem, *overrides)
        grid = eye.look(model, 30).grid
        assert grid.dtype == torch.uint8 and grid.ndim == 3 and grid.shape[2] == 3 and grid.float().std() > 10
        assert [path.name for path in (eye.folder / "samples").iterdir()] == ["step_000030.png"]


def test_looks_differ_by_the_model_alone(tmp_path, plane, monkeypatch):
    eye, model = watched(tmp_path, plane, *PLANE)
    drawn, draw = [], watch.figures.samples_2d
    monkeypatch.setattr(watch.figures, "samples_2d", lambda x, *more: drawn.extend(x.values()) or draw(x, *more))
    first = eye.look(model, 2)
    torch.manual_seed(7)
    again = eye.look(model, 4)
    assert torch.equal(*drawn) and first.scalars == again.scalars
    assert torch.equal(drawn[0], build(eye.config.solver)(model, shape=(1000, 2), seed=0).x)
    with torch.no_grad():
        list(model.parameters())[-1].add_(0.5)
    other = eye.look(model, 6)
    assert not torch.equal(drawn[0], drawn[2]) and first.scalars != other.scalars


def trained(tmp_path, problem, looks, *overrides):
    """Weights, average, and every generator after four steps; dropout draws from torch's own generator."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    eye, model = watched(tmp_path, problem, "train.ema=0.5", *overrides)
    stepper = Stepper(model, DenoisingScoreMatching(), StepSettings.of(eye.config.train), torch.Generator())
    model.train()
    for step in range(1, 5):
        stepper(problem.x(problem.data.train[8 * step :][:8], stepper.generator), 1e-2)
        if looks and step % eye.every == 0:
            with stepper.average.applied(model):
                assert len(eye.look(model, step).scalars) == 2
    states = [torch.get_rng_state(), stepper.generator.get_state(), torch.tensor(np.random.get_state()[1].tolist())]
    moments = [value for p in stepper.parameters for value in stepper.optimizer.state[p].values()]
    weights = [v for state in (model.state_dict(), stepper.average.state) for v in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    modes = torch.tensor([m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()])
    return [v.clone() for v in (*states, *moments, *weights, *gradients, modes)], random.getstate()


@pytest.mark.parametrize(("data", "overrides"), [("plane", PLANE), ("images", (*IMAGES, "train.channels_last=true"))])
def test_a_training_that_is_watched_is_the_same(tmp_path, request, data, overrides):
    problem = request.getfixturevalue(data)
    alone, seen = (trained(tmp_path, problem, looks, *overrides) for looks in (False, True))
    assert len(alone[0]) == len(seen[0]) and alone[1] == seen[1]
    for one, other in zip(alone[0], seen[0], strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_whatever_happens_inside_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3).eval())

    def states():
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return generators, [m.training for m in model.modules()]

    before = states()
    with pytest.raises(ZeroDivisionError), untouched(model):
        assert not any(module.training for module in model.modules())
        for draw in (torch.rand, np.random.rand, lambda n: random.random()):
            draw(3)
        raise ZeroDivisionError
    assert states() == before


def test_what_diverges_is_logged_and_left_out(tmp_path, plane, caplog):
    eye, model = watched(tmp_path, plane, *PLANE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        found = eye.look(model.train(), 12)
    assert not found.scalars and found.grid is None and all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" (")[0] for text in said] == ["no samples of step 12", "no likelihood of step 12"]
    assert "SamplingDiverged" in said[0] and "ODEError" in said[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(28, "full")])
def test_a_look_for_which_there_is_no_room_is_left_out(tmp_path, plane, monkeypatch, caplog, error):
    eye, model = watched(tmp_path, plane, *PLANE)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(watch, "audit", fail)
    found = eye.look(model, 2)
    assert not found.scalars and found.grid is not None and type(error).__name__ in caplog.text


def test_an_error_of_the_code_is_not_hidden(tmp_path, plane, monkeypatch):
    eye, model = watched(tmp_path, plane, *PLANE)
    monkeypatch.setattr(watch, "audit", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        eye.look(model, 2)


def test_a_likelihood_left_to_its_defaults_is_cheaper_and_no_other(tmp_path, plane):
    def steps(*overrides):
        config = settings(*PLANE[:-2], *overrides)
        eye = Watch(config, plane, CPU, tmp_path)
        assert config.likelihood.steps == plain((*PLANE[:-2], *overrides))["likelihood"]["steps"]
        return eye.config.likelihood.steps

    assert steps() == watch.STEPS and steps("likelihood.steps=7") == 7 and steps("likelihood.rtol=1e-4") is None


def test_data_without_a_picture_have_a_likelihood(tmp_path):
    series = [torch.randn(n, 1, 4, generator=torch.Generator().manual_seed(n)) for n in (50, 20, 20)]
    eye, model = watched(tmp_path, Problem.of(Data("series", *series)), *PLANE)
    eye.check(model)
    found = eye.look(model, 2)
    assert found.grid is None and "log_likelihood" in found.scalars and not (tmp_path / "samples").exists()


def test_of_how_many_examples(tmp_path, plane):
    eye, model = watched(tmp_path, plane, *PLANE, examples=0)
    assert eye.look(model, 1).scalars == {}
    one, model = watched(tmp_path, plane, *PLANE, examples=1)
    assert one.look(model, 1).scalars.keys() == {"log_likelihood"}  # and no error of one example


def test_what_can_not_be_looked_at_is_refused_at_once(tmp_path, plane):
    for words, override in (
        ("needs a model that predicts it.*watch_every=0", ("solver=ddpm", "solver.variance=learned")),
        (r"likelihood\.split must be", ("likelihood.split=best",)),
        (
            "give steps >= 1",
            (
                "likelihood.steps=null",
                "likelihood.method=rk4",
            ),
        ),
    ):
        eye, model = watched(tmp_path, plane, *PLANE[:-1], *override)
        with pytest.raises(ConfigError, match=words):
            eye.check(model)
        watched(tmp_path, plane, *PLANE[:-1], *override, every=0)[0].check(model)


def test_the_whole_validation_split_is_enough(tmp_path, plane):
    few = replace(plane, data=replace(plane.data, validation=plane.data.validation[:3]))
    eye, model = watched(tmp_path, few, *PLANE, examples=100)
    assert eye.look(model, 1).scalars.keys() == {"log_likelihood", "log_likelihood_stderr"}
