"""The benchmark of samplers: its targets, its references, and what it does without the libraries it compares with."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import measure
import ours
import peers
import problem
import samplers
import store
import targets

SEEDS = (0, 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", targets.TARGETS)
def test_targets_are_standardized(name, seed):
    target = targets.TARGETS[name](seed)
    mean = target.weights @ target.means
    spread = (target.means - mean).square() + target.covariances.diagonal(dim1=1, dim2=2)
    variances = target.weights @ spread
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12), target
    expected = torch.ones_like(variances) if name != "c" else variances / variances.mean()
    assert torch.allclose(variances, expected, atol=1e-12), target


@pytest.mark.parametrize(("name", "low", "high"), [("a", 0.06, 0.17), ("b", 0.09, 0.80)])
def test_components_have_the_stated_deviations(name, low, high):
    for seed in SEEDS:
        stds = torch.linalg.eigvalsh(targets.TARGETS[name](seed).covariances).sqrt()
        found = torch.stack((stds.min(), stds.max()))
        assert torch.allclose(found, torch.tensor([low, high]).double()), (name, seed)


def test_the_gaussian_has_the_stated_condition_number():
    variances = targets.diagonal(1).covariances[0].diagonal()
    assert math.isclose(float(variances.max() / variances.min()), 1000, rel_tol=1e-9)


def test_targets_are_functions_of_the_seed():
    for make in targets.TARGETS.values():
        assert torch.equal(make(2).covariances, make(2).covariances), make
        assert not torch.equal(make(2).covariances, make(3).covariances), make


def noise(target, s, n=8):
    return s * torch.randn(n, target.means.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_integrated_flow_is_the_closed_form_of_a_gaussian():
    target = targets.diagonal(0)
    y = noise(target, 50.0)
    found = targets.integrate(target.denoise(torch.float64), y, 50.0, 1e-9)
    assert torch.allclose(found, targets.flow(target, y, 50.0), atol=1e-7)


def test_the_flow_of_a_mixture_does_not_depend_on_its_tolerances():
    target = targets.circle(0)
    y = noise(target, 50.0)
    coarse = targets.integrate(target.denoise(torch.float64), y, 50.0, 1e-8)
    assert torch.allclose(targets.flow(target, y, 50.0), coarse, atol=1e-5)


def test_a_reference_that_is_not_converged_is_refused():
    with pytest.raises(RuntimeError, match="not converged"):
        targets.converged(lambda tolerance: torch.tensor(tolerance), tolerances=(1e-3, 1e-4))


@pytest.mark.parametrize("start", problem.STARTS)
def test_the_error_of_ddim_is_that_of_its_recursion(start):
    now = problem.exact_problem(targets.diagonal(0), start, seed=0, n=16)
    ddim = next(method for method in ours.methods(ours.ODE) if method.name == "DDIM")
    y, nfe = ddim.run(now, problem.Plan(20, "log_snr", 0.01))
    levels = torch.logspace(math.log10(now.s), -2, 21, dtype=torch.float64)
    variances = targets.diagonal(0).covariances[0].diagonal()
    factor = torch.ones_like(variances)
    for s, t in zip(levels[1:], levels[:-1], strict=True):
        factor = factor * (variances + s * t) / (variances + t**2)
    expected = now.error(now.y.double() * factor)
    assert nfe == 20
    assert math.isclose(now.error(y), expected, rel_tol=1e-3)


def test_endings_are_right_to_their_order():
    def node(s):  # the exact path of a Gaussian of unit variance
        y = torch.full((1, 1), math.sqrt(1 + s**2), dtype=torch.float64)
        return problem.Node(y, s, y / (1 + s**2))

    nodes = (node(0.04), node(0.02))
    errors = {kind: float((problem.ending(kind, nodes) - 1).abs()) for kind in ("half", "two")}
    assert math.isclose(errors["half"], 0.02**4 / 8, rel_tol=0.01)
    assert errors["two"] < 1e-3 * 0.04**4


def test_libraries_that_are_not_installed_are_named():
    def absent():
        raise ImportError("nowhere")

    methods, lines = peers.available(libraries={"nowhere": (absent, absent)})
    assert (methods, lines) == ([], ["nowhere: not installed"])
    assert all(line.endswith(": not installed") for line in peers.available()[1])


def test_methods_keep_to_their_budget_and_the_tables_name_the_best(tmp_path):
    now = problem.exact_problem(targets.diagonal(0), "VE", seed=0, n=4)
    found = list(measure.measure(now, ours.methods(ours.ODE), (4, 9)))
    assert found and all(0 < record.nfe <= record.budget for record in found)
    peer = [record._replace(library="other", error=2 * record.error) for record in found]
    text = samplers.pages("title", found + peer, (4, 9), ["nowhere: not installed"])
    assert "2.00  1 of 1" in text and "nowhere: not installed" in text


def test_stored_runs_of_others_are_read_back_and_ours_are_not(tmp_path):
    now = problem.exact_problem(targets.diagonal(0), "VE", seed=0, n=4)
    mine = ours.methods(ours.ODE)[0]
    runs = []

    def run(library, *arguments):
        runs.append(library)
        return mine.run(*arguments)

    methods = [problem.Method(name, name, partial(run, name), ("log_snr",)) for name in ("ours", "other")]
    first = store.Store(tmp_path / "records.csv").measure(now, methods, (5,))
    before = len(runs)
    again = store.Store(tmp_path / "records.csv").measure(now, methods, (5,))
    assert set(runs[before:]) == {"ours"} and before == 2 * len(runs[before:])
    before = len(runs)
    third = store.Store(tmp_path / "records.csv", reuse=True).measure(now, methods, (5,))
    assert len(runs) == before
    for found in (again, third):
        assert {(r.method, r.plan, r.error) for r in first} == {(r.method, r.plan, r.error) for r in found}
