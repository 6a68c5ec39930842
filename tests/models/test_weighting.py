"""Every weighting against the formula of its paper, for every process and parametrization, at both ends of time."""

import pytest
import torch
from oracles import ROWS, SDES, SOME_SDES, ExactNet, gaussian, mixture

from models import (
    CustomWeighting,
    DenoisingScoreMatching,
    EDMRow,
    EDMWeighting,
    LevelHead,
    LikelihoodWeighting,
    MinSNR,
    ScoreNetwork,
    SimpleWeighting,
    SingleTime,
    UniformTime,
)
from models.parametrization import ROWS as PARAMETRIZATIONS
from models.weighting import weighting_of
from sde import VP, Prediction, ScoreModel
from sde.base import expand, last_time

S = 0.5
ROW_FREE = [LikelihoodWeighting(), EDMWeighting(S), MinSNR(), MinSNR(0.3), CustomWeighting(lambda t, sde: 1 + t, "v")]


class Wrong(ScoreModel):
    """Keeps the invariant, with an error of eps that is known."""

    def __init__(self, sde, error):
        super().__init__(sde)
        self.error = error

    def forward(self, x, t):
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        eps = self.error * x
        return Prediction((x - sigma * eps) / alpha, eps)


def times(sde, n=9):
    """From t_min to the last time, as a batch."""
    return sde.t_min + (last_time(sde) - sde.t_min) * torch.linspace(0, 1, n, dtype=torch.float64) ** 3


def loss(objective, model, x0, eps, t):
    """w(t) times the squared error at given times and noise."""
    return objective.weighting(t, model.sde, model) * objective.squared_error(model, x0, eps, t, None)


def data(n=9, d=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_weightings_are_those_of_the_papers(sde):
    """Stated there for the error of eps, of x_0 in units of the data, or of the score."""
    t, (x0, eps) = times(sde), data()
    model = Wrong(sde, 0.3)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    noise = (eps - 0.3 * sde.perturb(x0, t, eps)).square().mean(1)
    level, snr = sigma / alpha, (alpha / sigma) ** 2
    clean = noise * level**2
    stated = {
        LikelihoodWeighting(): 0.5 * sde.diffusion(t) ** 2 * noise / sigma**2,
        EDMWeighting(S): (level**2 + S**2) / (level * S) ** 2 * clean,
        MinSNR(): torch.clamp(snr, max=5) * clean,
        CustomWeighting(lambda t, sde: 2 + t): (2 + t) * noise,
        CustomWeighting(lambda t, sde: 2 + t, error="data"): (2 + t) * clean,
    }
    for weighting, expected in stated.items():
        found = loss(DenoisingScoreMatching(weighting), model, x0, eps, t)
        assert torch.allclose(found, expected, rtol=1e-9), (sde, weighting)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_losses_of_all_parametrizations_agree_under_one_weighting(sde):
    exact, x0 = mixture(sde), mixture(sde).sample(9, seed=1)
    t, (_, eps) = times(sde), data()
    rows = [*(PARAMETRIZATIONS[name]() for name in ROWS), EDMRow(S)]
    for weighting in ROW_FREE:
        objective = DenoisingScoreMatching(weighting)
        expected = loss(objective, exact, x0, eps, t)
        for row in rows:
            model = ScoreNetwork(ExactNet(exact, row.row, row.data_std), sde, row)
            assert torch.allclose(loss(objective, model, x0, eps, t), expected, rtol=1e-5), (weighting, row)


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_simple_is_the_error_of_the_row_and_edm_that_of_the_network(sde):
    exact, x0 = mixture(sde), mixture(sde).sample(9, seed=1)
    t, (_, eps) = times(sde), data()
    for row in (*(PARAMETRIZATIONS[name]() for name in ROWS), EDMRow(S)):
        net = ExactNet(exact, row.row, row.data_std)
        model = ScoreNetwork(net, sde, row)
        a, b = (expand(c, x0) for c in row.row(t, sde))
        x = sde.perturb(x0, t, eps)
        label = torch.log(sde.sigma(t) / sde.alpha(t))
        output = net(x / expand(torch.hypot(row.data_std * sde.alpha(t), sde.sigma(t)), x), label)
        expected = (output - a * x0 - b * eps).square().mean(1)
        found = loss(DenoisingScoreMatching("simple"), model, x0, eps, t)
        assert torch.allclose(found, expected, rtol=1e-5), (sde, row)
    assert torch.allclose(loss(DenoisingScoreMatching("edm"), model, x0, eps, t), found, rtol=1e-12), sde


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_float32_is_accurate_at_both_ends(sde):
    """Of a pair that is: a wrong Gaussian in closed form. An error of eps alone, or of x_0 alone, would be noise."""
    x0, eps = (part.float() for part in data(3, 1))
    for time in (sde.t_min, 0.5 * last_time(sde), last_time(sde)):
        t = torch.full((3,), time, dtype=torch.float32)
        for weighting in ROW_FREE:
            objective = DenoisingScoreMatching(weighting)
            double = loss(objective, gaussian(sde, 0.3), x0.double(), eps.double(), t.double())
            single = loss(objective, gaussian(sde, 0.3, dtype=torch.float32), x0, eps, t)
            assert torch.allclose(single.double(), double, rtol=1e-4, atol=0), (weighting, time)


def test_the_level_head_has_the_weight_of_noise():
    sde, t = VP(), times(VP())
    model = ScoreNetwork(torch.nn.Identity(), sde, LevelHead(torch.zeros(3, 2)))
    assert torch.equal(SimpleWeighting()(t, sde, model), SimpleWeighting()(t, sde))


def test_names_functions_and_objects_are_weightings():
    assert weighting_of("min_snr") == MinSNR(5.0) and weighting_of(MinSNR(2.0)) == MinSNR(2.0)
    one = weighting_of(lambda t, sde: torch.ones_like(t))
    t, sde = times(VP()), VP()
    share = (sde.alpha(t) / torch.hypot(sde.alpha(t), sde.sigma(t))) ** 2
    assert torch.allclose(one(t, sde), share) and not one.integral


def test_a_custom_integral_does_not_depend_on_the_times():
    """Its loss at one time is in proportion to 1 / density; the mean's is not."""
    model = gaussian(VP(), 0.4)
    x0 = torch.zeros(5, 1, dtype=torch.float64)
    for integral in (True, False):
        objective = DenoisingScoreMatching(CustomWeighting(lambda t, sde: 1 + t, integral=integral), UniformTime())
        wide, narrow = (
            objective(gaussian(VP(t_max=t_max), 0.4), x0, torch.Generator().manual_seed(0)).value
            for t_max in (2.0, 1.0)
        )
        assert bool((wide > 1.9 * narrow).all()) == integral
    with pytest.raises(ValueError, match="has no density, which an integral over time needs"):
        DenoisingScoreMatching("likelihood", SingleTime())(model, x0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MinSNR(0.0), "MinSNR: gamma must be a positive number, found 0.0"),
        (lambda: EDMWeighting(-1.0), "EDMWeighting: data_std must be a positive number, found -1.0"),
        (lambda: CustomWeighting(torch.square, error="x0"), "error must be one of noise, data.*found 'x0'"),
        (lambda: weighting_of("best"), "weighting must be one of simple, likelihood, edm, min_snr or a Weighting"),
    ],
)
def test_bad_weightings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError, match="function must be callable"):
        CustomWeighting(3.0)
