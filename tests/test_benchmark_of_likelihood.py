"""The benchmark of log p: its closed forms, its curves and bars, and that every way and library has the answer."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import density
import density_ends
import density_peers
import density_tables
import density_ways
import likelihood
import solvers
from measure import Record
from peers import available
from problem import Plan
from solvers import Exact, log_likelihood
from store import Store
from targets import TARGETS

PROCESSES = ("VP", "VE")


def times():
    return torch.tensor((1e-5, 0.3, 1.0), dtype=torch.float64)


def models(name, process):
    mixture = TARGETS[name](0).model(density.SDES[process], torch.float64)
    return density.Closed(mixture), density.Perturbed(mixture)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", TARGETS)
def test_divergences_in_closed_form_are_those_of_the_functions(name, process):
    for model in models(name, process):
        x = density.points(model.mixture, 3, seed=1)
        for t in times():
            trace = torch.autograd.functional.jacobian(lambda y, t=t, m=model: m.noise(y, t)[0].sum(0), x)
            expected = torch.einsum("dbd->b", trace)
            assert torch.allclose(model.noise(x, t)[1], expected, rtol=1e-10, atol=0), (model, t)


@pytest.mark.parametrize("name", ("b",))
def test_the_closed_form_is_the_mixture_with_its_exact_divergence(name):
    case = density.exact_case(TARGETS[name](0), "VP", seed=0, n=4)
    options = {"method": "rk4", "steps": 10, "prior": case.terminal}
    quick = log_likelihood(case.model, case.x, case.divergence, **options).log_prob
    plain = log_likelihood(case.model.mixture, case.x, Exact(), **options).log_prob
    assert torch.allclose(quick, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_perturbation_is_of_its_share_keeps_the_pair_and_is_no_gradient(process):
    exact, rough = models("b", process)
    x0 = exact.mixture.sample(200, seed=2)
    for t in times():
        x = exact.sde.perturb(x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).double())
        (_, eps), pair = exact(x, t), rough(x, t)
        share = (pair.eps - eps).square().mean().sqrt() / eps.square().mean().sqrt()
        assert 0.015 < share < 0.03, (t, share)
        again = exact.sde.alpha(t) * pair.x0 + exact.sde.sigma(t) * pair.eps
        assert torch.allclose(again, x, rtol=1e-12, atol=1e-12), t
    jacobian = torch.func.jacrev(lambda y: rough.noise(y[None], t)[0][0])(x[0])
    symmetric = torch.func.jacrev(lambda y: exact.noise(y[None], t)[0][0])(x[0])
    assert (symmetric - symmetric.mT).abs().max() < 1e-12 < 1e-4 < (jacobian - jacobian.mT).abs().max()


def test_errors_go_to_zero_with_the_tolerance_and_a_wrong_terminal_density_shows():
    case = density.exact_case(TARGETS["a"](0), "VP", seed=0, n=8)
    (method,) = (m for m in density_ways.adaptive() if m.name == density_ways.DEFAULT)
    errors = [case.error(method.run(case, Plan(1, tolerance))[0]) for tolerance in ("1e-2", "1e-4", "1e-6")]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-5, errors
    wrong = replace(case, terminal=lambda z: case.terminal(z) + 0.1)
    assert math.isclose(wrong.error(method.run(wrong, Plan(1, "1e-6"))[0]), 0.1, rel_tol=1e-3)


def test_a_perturbed_case_holds_its_own_density_and_not_that_of_the_exact_score():
    target = TARGETS["a"](0)
    rough, exact = density.perturbed_case(target, "VP", 0, 4, (1e-7, 1e-8)), density.exact_case(target, "VP", 0, 4)
    assert torch.equal(rough.x, exact.x)
    assert 1e-3 < exact.error(rough.truth) < 1
    options = {"prior": rough.terminal, "rtol": 1e-5, "atol": 1e-5}
    assert rough.error(log_likelihood(rough.model, rough.x, rough.divergence, **options).log_prob) < 5e-4


def test_ways_that_a_version_lacks_are_left_out():
    absent = (("rk4", {"method": "rk4"}), ("future", {"method": "future"}), ("clock", {"method": "rk4", "clock": 1}))
    assert [method.name for method in density_ways.fixed(absent)] == ["rk4"]
    assert [method.calls for method in density_ways.fixed(absent)] == [4]
    assert density_ways.DEFAULT in [method.name for method in density_ways.adaptive()]


def test_every_library_that_is_here_has_the_answer_and_its_calls_are_counted():
    methods, _ = available(libraries=density_peers.LIBRARIES)
    assert {"torchdiffeq", "score_sde's way"} <= {method.library for method in methods}
    for name, process in (("a", "VE"), ("c", "VP")):
        case = density.exact_case(TARGETS[name](0), process, seed=0, n=3)
        for method in methods:
            log_prob, nfe = method.run(case, Plan(1, "1e-5"))
            assert case.error(log_prob) < 5e-3 and nfe > 30, (method, name)


def curve():
    return [(20, 1e-1), (40, 1e-2), (80, 1e-4)]


def test_curves_are_read_between_their_points_in_the_logarithm():
    assert density_tables.needed(curve(), 1e-2) == pytest.approx(40)
    assert density_tables.needed(curve(), 1e-3) == pytest.approx(40 * math.sqrt(2))
    assert density_tables.needed(curve(), 1) == 20 and density_tables.needed(curve(), 1e-5) is None
    assert density_tables.at(curve(), 40 * math.sqrt(2)) == pytest.approx(1e-3)
    assert density_tables.at(curve(), 20) == pytest.approx(1e-1) and density_tables.at(curve(), 80) == 1e-4
    assert density_tables.at(curve(), 19) is None and density_tables.at(curve(), 81) is None
    assert density_tables.within(curve(), 79) == 1e-2 and density_tables.within(curve(), 19) is None


def records(method, points, library="ours", case="case"):
    return [Record(case, seed, 1, library, method, str(n), e, n, 0.0) for seed in (0, 1, 2) for n, e in points]


def test_tables_say_met_and_missed():
    good, bad = records("dopri5", [(60, 9e-3), (90, 9e-4), (160, 9e-6)]), records("dopri5", [(71, 1e-2), (400, 1e-3)])
    assert density_tables.adaptive(good, ["dopri5"]).count("met") == 6
    text = density_tables.adaptive(bad, ["dopri5"])
    assert text.count("missed") == 6 and "71 missed" in text and "- missed" in text
    steps = density_tables.fixed(records("rk4", [(100, 1e-3), (200, 1e-3)]), {"rk4": density_tables.RK4}, (100, 200))
    assert "1.0e-03 met" in steps and "1.0e-03 missed" in steps
    pair = records("dopri5", [(50, 1e-2), (200, 1e-4)]) + records(density_ways.ONE_PASS, [(50, 9e-4), (100, 9e-4)])
    text = density_tables.advantage(pair, (50, 100))
    assert "11.1 met" in text and "1.11 missed" in text


def test_ours_are_held_to_the_better_of_the_libraries_named():
    ours, peer = records("dopri5", [(50, 1e-2), (80, 1e-3)]), records("x", [(60, 1e-2), (70, 1e-3)], library="theirs")
    text = density_tables.against_peers(ours + peer, ["theirs"])
    assert "50 met" in text and "80 missed" in text
    further = records("dopri5", [(50, 1e-2), (69, 9e-6)]), records("dopri5", [(50, 1e-2), (71, 9e-6)])
    assert density_tables.against_peers(further[0] + peer, ["theirs"]).count("69 met") == 2
    assert density_tables.against_peers(further[1] + peer, ["theirs"]).count("71 missed") == 2


def test_medians_are_over_seeds():
    three = [r._replace(error=r.error * 10**r.seed) for r in records("dopri5", [(60, 1e-3)])]
    assert density_tables.curves(three, "case") == {"dopri5": [(60, pytest.approx(1e-2))]}


def test_the_moments_are_those_of_samples():
    mean, covariance = density_ends.moments(TARGETS["b"](0))
    samples = TARGETS["b"](0).model(density.SDES["VP"], torch.float64).sample(100_000, seed=1)
    assert torch.allclose(samples.mean(0), mean, atol=0.02)
    assert torch.allclose(torch.cov(samples.T), covariance, atol=0.03)


def test_the_floor_at_t_min_is_of_second_order_in_the_variance():
    mixture = TARGETS["a"](0).model(density.SDES["VE"], torch.float64)
    x, errors = mixture.sample(32, seed=0), []
    for sigma_min in (0.01, 0.005):
        model = density.Closed(TARGETS["a"](0).model(replace(mixture.sde, sigma_min=sigma_min), torch.float64))
        errors.append(float((density_ends.floor(model, x) - mixture.log_prob(x)).abs().mean()))
    assert 12 < errors[0] / errors[1] < 17 and errors[0] < 1e-3, errors


@pytest.mark.skipif(not hasattr(solvers, "matched_prior"), reason="this version has no matched prior")
def test_end_to_end_both_corrections_are_needed():
    found = density_ends.errors(TARGETS["c"](0), density.SDES["VE"], seed=0, n=8)
    both, floors = found["full", True], (found["standard", False], found["standard", True], found["full", False])
    assert math.isclose(found["floor", True], both, rel_tol=0.1)  # c is a Gaussian, whose matched prior is exact
    assert both < 5e-4 and all(floor > 3 * both for floor in floors), found


def test_the_parts_run_and_are_written_and_stored_runs_serve_again(tmp_path, monkeypatch):
    monkeypatch.setattr(density_ways.adaptive, "__defaults__", (density_ways.ADAPTIVE[:2], ("1e-2", "1e-3")))
    monkeypatch.setattr(likelihood, "STEPS", (20, 40))
    monkeypatch.setattr(likelihood, "available", lambda libraries: ([], ["nowhere: not installed"]))
    words = ["peers", "--targets", "c", "--sdes", "VP", "--seeds", "0", "--points", "4", "--out", str(tmp_path)]
    args = likelihood.arguments([*words, "--records", str(tmp_path / "records.csv"), "--reuse"])
    text = likelihood.peers(args)
    assert "nowhere: not installed" in text and "c: diagonal, 64-D, VP" in text
    assert (tmp_path / "likelihood.png").stat().st_size > 10_000
    before = (tmp_path / "records.csv").read_text()
    assert likelihood.peers(args) == text and (tmp_path / "records.csv").read_text() == before
    assert len(Store(args.records, reuse=True).kept) == len(before.splitlines())


def test_a_missing_checkpoint_is_named():
    with pytest.raises(SystemExit):
        likelihood.arguments(["trained"])
