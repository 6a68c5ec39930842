"""The benchmark of conditional samples: its columns are right on cases that are known, and its tables are whole."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import posterior
from models import Mask
from sde import VP
from solvers import EulerMaruyama, ExponentialAdams


def moved(exact, mean, factor):
    """Moments of ``exact`` moved by ``mean`` and wider by ``factor``, without samples."""
    centre, covariance = posterior.moments(exact)
    return posterior.Moments(centre + mean, factor**2 * covariance)


def test_errors_are_in_deviations_of_the_exact_posterior():
    exact = posterior.gaussian16(VP(), 0)
    seen = torch.ones(16, dtype=torch.bool)
    root = torch.linalg.cholesky(posterior.moments(exact)[1])
    found = posterior.compare(exact, moved(exact, 0.3 * root.sum(1), 0.5), seen, 0)
    assert found[:4] == pytest.approx((0.3, 0.5, 0.5, 0.5))
    hidden = torch.arange(16) < 5
    assert posterior.compare(exact, moved(exact, 100.0 * ~hidden, 2.0), hidden, 0)[:4] == pytest.approx((0, 2, 2, 2))


def test_exact_samples_are_at_the_floor_and_those_of_one_mode_are_not():
    exact = posterior.mixture2(VP(), 0)
    seen = torch.ones(2, dtype=torch.bool)
    mean, covariance = posterior.moments(exact)
    x = exact.sample(20_000, 3)
    assert x.mean(0).numpy() == pytest.approx(mean.numpy(), abs=0.03)
    assert x.mT.cov().numpy() == pytest.approx(covariance.numpy(), abs=0.03)
    floor = posterior.compare(exact, posterior.Moments(x.mean(0), x.mT.cov(), x), seen, 0)
    assert floor.modes < 0.01 and floor.w2 < 0.05 and floor.mean < 0.02
    one = x[exact.log_class(x)[:, 1] > -0.7]
    found = posterior.compare(exact, posterior.Moments(one.mean(0), one.mT.cov(), one), seen, 0)
    assert found.modes == pytest.approx(0.3, abs=0.01) and found.w2 > 0.3


def test_moments_without_monte_carlo_are_those_of_samples():
    """Of PiGDM, which is biased, by a solver of few steps."""
    prior = posterior.gaussian2(VP(), 0)
    problem = posterior.linear(prior, "mask", Mask(torch.tensor([1, 0])), 0.3, 2, 0)
    method, solver = problem.methods["PiGDM"], ExponentialAdams(steps=8)
    exact, cost = posterior.affine(solver, problem, method, exact=False)
    drawn, same = posterior.drawn(solver, problem, method, 3000, 0)
    assert cost == same == (8, 8)
    assert drawn.mean.numpy() == pytest.approx(exact.mean.numpy(), abs=0.04)
    assert drawn.covariance.numpy() == pytest.approx(exact.covariance.numpy(), abs=0.04)


def test_a_table_has_a_row_for_each_method():
    prior = posterior.gaussian2(VP(), 0)
    problem = posterior.linear(prior, "mask", Mask(torch.tensor([1, 0])), 0.05, 2, 0)
    problem.methods["DPS"] = problem.methods["DPS"]._replace(best=None, quick=ExponentialAdams(steps=20))
    lines = posterior.table(problem, 50, 0).splitlines()
    assert [line[:23].strip() for line in lines[2:]] == [*problem.methods, "exact samples"]
    mmps, dps = (next(line for line in lines if line.startswith(name)).split() for name in ("MMPS", "DPS"))
    assert mmps[5:9] == ["0.000", "1.000", "1.000", "1.000"]
    assert dps[-1] == "diverges"
    assert len({line.index("|") for line in lines[1:-1]}) == 1


def test_all_problems_of_a_mixture_can_be_built():
    found = list(posterior.problems(posterior.mixture16(VP(), 0), 2, 0))
    assert [problem.name for problem in found][-2:] == ["mask, noise 0", "class"] and len(found) == 8
    kinds = [name for problem in found for name in problem.methods]
    assert kinds.count("DPS") == 6 and kinds.count("Replacement, RePaint") == 1 and "Guided" in kinds
    for problem in found:
        method = next(iter(problem.methods.values()))
        result, cost = posterior.measured(problem, method, EulerMaruyama(steps=2), False, 20, 0)
        assert cost.nfe == 2 and (result is None or result.modes is not None)
