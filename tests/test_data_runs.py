"""Data sets of every kind as a run sees them: configuration files, pictures, and a table's own units."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf

import conf
from experiments import data as data_module
from experiments import pictures, training
from experiments.build import ConfigError, build
from experiments.data import Data, checkerboard, npy, table
from experiments.likelihood_tasks import likelihood, other_data
from experiments.problem import Problem, load_problem
from experiments.run import Run

FILES = {path.stem: path for path in sorted((Path(conf.__file__).parent / "data").glob("*.yaml"))}
SMALL = ("net=mlp", "net.width=8", "net.depth=1", "parametrization=v", "train.steps=2", "train.batch_size=8")


def test_every_data_set_has_a_file():
    assert {name for name in data_module.__all__ if name[0].islower()} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_file_names_every_parameter_and_builds_or_asks_for_its_path(name):
    node = OmegaConf.load(FILES[name])
    assert node._target_ == f"experiments.data.{name}"
    assert set(node) - {"_target_"} == set(getattr(data_module, name).__annotations__) - {"return"}
    if "path" not in node:
        assert build(node, where="data").name == name
        return
    with pytest.raises(ConfigError, match=r"data: data\.path=(FOLDER|FILE|PATH) is needed"):
        build(node, where="data")


def test_a_path_may_hold_spaces_and_signs(tmp_path):
    np.save(tmp_path / "a b=c.npy", np.zeros((9, 2), np.float32))
    config = configuration("data=npy", f'data.path="{tmp_path}/a b=c.npy"')
    assert load_problem(config).data.name == "a b=c"


SHAPES = {"series": (2, 8), "volume": (1, 4, 4, 4), "table": (5,), "many channels": (4, 4, 4), "floats": (3, 4, 4)}


@pytest.mark.parametrize("kind", SHAPES)
def test_data_that_are_no_pictures_get_none(tmp_path, kind):
    x = torch.zeros(6, *SHAPES[kind])
    problem = Problem.of(Data(kind, x, x, x))
    assert pictures.of_samples({"ours": x}, problem, Run(tmp_path, "sample")) == []
    assert pictures.of_flow(None, problem, None, None, 0) == []


def test_colours_and_points_get_theirs(tmp_path):
    levels, points = torch.zeros(6, 3, 4, 4, dtype=torch.uint8), checkerboard(9, 9, 9)
    (first,) = pictures.of_samples(
        {"a": torch.zeros(6, 3, 4, 4)}, Problem.of(Data("rgb", *[levels] * 3, 256)), Run(tmp_path / "a", "")
    )
    (second,) = pictures.of_samples({"a": points.test}, Problem.of(points), Run(tmp_path / "b", ""))
    assert first.is_file() and second.is_file()


def test_a_mapped_file_is_trained_on_and_stays_as_it_was(tmp_path):
    np.save(tmp_path / "series.npy", np.random.default_rng(0).normal(size=(40, 2, 4)).astype(np.float32))
    before = (tmp_path / "series.npy").read_bytes()
    problem = Problem.of(npy(tmp_path / "series.npy"))
    model = training.train(configuration(*SMALL), problem, torch.device("cpu"), Run(tmp_path / "run", "train"))
    assert model(problem.data.test, torch.tensor(0.5)).x0.shape == problem.data.test.shape
    assert (tmp_path / "series.npy").read_bytes() == before


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two tables in different units, and a model trained, hardly, on the first."""
    folder, rows = tmp_path_factory.mktemp("tables"), np.random.default_rng(0).normal(size=(60, 2))
    np.savetxt(folder / "a.csv", rows * [1e-3, 50] + [1, 2], delimiter=",")
    np.savetxt(folder / "b.csv", rows * [1e-3, 50] + [1.5, 2], delimiter=",")
    data = f"data.path={folder}/a.csv"
    config = configuration(*SMALL, "data=table", data)
    training.train(config, load_problem(config), torch.device("cpu"), Run(folder / "run", "train"))
    return folder


def of_table(tables, *more):
    own = ("data=table", f"data.path={tables}/a.csv", f"checkpoint={tables}/run", "likelihood.ode_subset=0")
    return configuration(*SMALL, "task=likelihood", *own, *more)


def test_the_likelihood_of_a_table_is_reported_in_its_own_units(tables, tmp_path):
    likelihood(of_table(tables), Run(tmp_path, "likelihood"))
    found = json.loads((tmp_path / "summary.json").read_text())
    log_det = table(tables / "a.csv").log_det
    assert found["original_units"]["log_det"] == log_det and abs(log_det - np.log(1e3 / 50)) < 0.5
    assert found["original_units"]["log_prob"] == pytest.approx(found["likelihood"]["value"] + log_det)
    assert f"log p = {found['original_units']['log_prob']:.4f}" in (tmp_path / "report.txt").read_text()


def test_a_checkpoint_refuses_a_table_standardized_otherwise(tables, tmp_path):
    with pytest.raises(ConfigError, match="standardization"):
        likelihood(of_table(tables, "data.seed=1"), Run(tmp_path, "likelihood"))


def test_another_table_is_seen_in_the_units_of_the_model(tables):
    config = of_table(tables, "data@ood.against=table", f"ood.against.path={tables}/b.csv")
    other = other_data(SimpleNamespace(config=config, problem=load_problem(config)))
    assert other.train[:, 0].mean() > 100, "half a unit is 500 deviations of the first column"
    assert other.standardization == table(tables / "a.csv").standardization
