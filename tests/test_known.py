"""Samples against a density in closed form: the NLL gap and the exact flow, where both are known by hand."""

import math

import pytest
import torch

from experiments.build import ConfigError
from experiments.data import digits, mixture2d
from experiments.known import Known, exact_score
from models import GaussianMixture
from sde import EDM, VE, VP
from solvers import DDIM, EulerMaruyama, ExponentialAdams, ProbabilityFlow

COVARIANCE = torch.tensor([[[0.5, 0.3], [0.3, 0.4]]], dtype=torch.float64)
GAUSSIAN = {"weights": torch.ones(1).double(), "means": torch.tensor([[0.4, -0.2]]).double(), "covariances": COVARIANCE}
SHAPE = (2,)


def known(sde=None, density=GAUSSIAN):
    return Known(density, sde or VP(), SHAPE, seed=0)


def drawn(n, scale=1.0, seed=1):
    """Samples of the Gaussian with its deviations scaled."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return GAUSSIAN["means"] + scale * noise @ torch.linalg.cholesky(COVARIANCE[0]).T


def test_samples_of_the_density_have_no_gap():
    found = known().nll_gap([drawn(20_000, seed=i) for i in range(3)])
    assert abs(found.value) < 3 * found.stderr and found.stderr < 0.01


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_the_gap_of_samples_that_lie_too_close_or_too_far_out(scale):
    """E[-log p] - H = (scale^2 - 1) D / 2 for a Gaussian: negative where samples crowd."""
    found = known().nll_gap([drawn(50_000, scale)])
    assert found.value == pytest.approx(scale**2 - 1, abs=4 * found.stderr)


def test_the_standard_error_of_the_gap_is_its_spread():
    one = known()
    found = [one.nll_gap([drawn(200, seed=i)]) for i in range(60)]
    spread = torch.tensor([each.value for each in found]).std().item()
    assert 0.75 < spread / (sum(each.stderr for each in found) / 60) < 1.3


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()], ids=str)
def test_the_exact_flow_of_a_gaussian_is_affine(sde):
    """x(t_min) = m(t_min) + sqrt(V(t_min) / V(t_max)) (x_T - m(t_max)) along each axis of the covariance."""
    x_T, ends = sde.prior((50, 2)).sample(0, dtype=torch.float32).double(), []
    variances, axes = torch.linalg.eigh(COVARIANCE[0])
    for t in (sde.t_max, sde.t_min):
        t = torch.tensor(t, dtype=torch.float64)
        ends.append((sde.alpha(t), (sde.alpha(t) ** 2 * variances + sde.sigma(t) ** 2).sqrt()))
    (alpha_T, std_T), (alpha, std) = ends
    mean = GAUSSIAN["means"]
    exact = alpha * mean + (((x_T - alpha_T * mean) @ axes) * (std / std_T)) @ axes.T
    assert known(sde).flow_rmse([exact]).value < 1e-5
    shifted = known(sde).flow_rmse([exact + 0.3])
    assert shifted.value == pytest.approx(0.3, rel=1e-4)


def test_the_error_of_a_solver_falls_with_its_order():
    """Of DDIM by two for twice the steps, of a solver of high order by far more; its noise is that of the sampler."""
    sde = VP()
    model, one = GaussianMixture(**GAUSSIAN, sde=sde), known(sde)

    def error(solver):
        return one.flow_rmse([solver(model, shape=(200, 2), seed=i).x for i in range(2)]).value

    ddim = [error(DDIM(steps=n)) for n in (40, 80)]
    assert ddim[0] / ddim[1] == pytest.approx(2, rel=0.15)
    assert error(ExponentialAdams(steps=40, grid="balanced")) < 0.02 * ddim[0]


def test_only_solvers_without_noise_have_an_exact_end():
    one, x = known(), [drawn(50)]
    assert set(one.measure(EulerMaruyama(steps=5), x)) == {"nll_gap"}
    assert set(one.measure(EulerMaruyama(steps=5, stochasticity=0.0), x)) == {"nll_gap", "flow_rmse"}
    assert set(one.measure(ProbabilityFlow(), x)) == {"nll_gap", "flow_rmse"}


def test_the_error_of_the_rmse_is_that_of_a_root():
    """Squares m +- s give a root sqrt(m) +- s / (2 sqrt(m))."""
    one = known()
    end = one._end(0, 400)
    length = torch.linspace(0.5, 1.5, 400, dtype=torch.float64)[:, None]
    found, squares = one.flow_rmse([end + length]), length.square()
    assert found.value == pytest.approx(squares.mean().sqrt().item())
    assert found.stderr == pytest.approx((squares.std() / 20 / (2 * squares.mean().sqrt())).item())
    assert math.isfinite(one.flow_rmse([end]).stderr)


def test_the_exact_score_is_that_of_the_data():
    data = mixture2d(train=10, validation=10, test=10)
    model = exact_score(data, VP())
    t = torch.tensor(0.3)
    truth = GaussianMixture(**data.density, sde=VP())
    assert torch.allclose(model.score(data.test, t), truth.score(data.test.double(), t.double()).float(), atol=1e-4)
    with pytest.raises(ConfigError, match="digits is not: use data=mixture2d"):
        exact_score(digits(), VP())
