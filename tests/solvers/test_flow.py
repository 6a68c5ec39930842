"""The probability flow as a map between data and latents, and its integration by every method that is admitted."""

import math

import pytest
import torch
from oracles import CORE_SDES, SDES, Watch, correlated, gaussian, marginal, mixture, quick
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from models import GaussianMixture
from sde import VE, VP, RectifiedFlow, ScoreModel
from solvers import ODEError, ProbabilityFlow
from solvers.flow import AngleFlow
from solvers.ode import ADAPTIVE, FIXED, integrate
from solvers.probability_flow import great_circle

ORDER = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "adaptive_heun": 2}
"""Their orders: what tolerance each can meet in few enough steps."""
TIGHT = {name: 1e-8 if order > 3 else 1e-5 for name, order in ORDER.items()}


def state(n=2):
    return (torch.ones(n, 1, dtype=torch.float64),)


def test_the_admitted_methods_are_all_adaptive_ones_but_one():
    adaptive = {name for name, cls in SOLVERS.items() if issubclass(cls, RKAdaptiveStepsizeODESolver)}
    assert adaptive - {"fehlberg2"} == set(ADAPTIVE) == set(ORDER)


def test_the_one_that_is_left_out_does_not_meet_its_tolerance(monkeypatch):
    """A hundred times over, where those admitted stay within ten."""
    monkeypatch.setattr("solvers.ode.ADAPTIVE", (*ADAPTIVE, "fehlberg2"))
    sde = VP()
    model, x = mixture(sde), sde.prior((8, 2)).sample(1, dtype=torch.float64)
    exact = ProbabilityFlow(1e-10, 1e-10).decode(model, x)
    errors = {name: float((ProbabilityFlow(1e-4, 1e-4, name).decode(model, x) - exact).abs().max()) for name in TIGHT}
    left_out = float((ProbabilityFlow(1e-4, 1e-4, "fehlberg2").decode(model, x) - exact).abs().max())
    assert max(errors.values()) < 1e-3 and left_out > 1e-2, (errors, left_out)


# Decoding.


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_decoding_is_the_call_on_given_noise(sde):
    model, flow = mixture(sde), ProbabilityFlow(1e-6, 1e-6)
    latent = sde.prior((4, 2)).sample(0, dtype=torch.float64)
    assert torch.equal(flow.decode(model, latent), flow(model, x_T=latent).x)


@pytest.mark.parametrize("sde", quick([VP(), VE(), RectifiedFlow()], VE), ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_b30_encoding_widens_the_data_to_the_prior_and_decoding_brings_them_back(sde, method):
    """x_T - m_T = sqrt(V_T / V_0) (x_0 - m_0) for a Gaussian, in both directions of time."""
    tolerance = TIGHT[method]
    model, flow = gaussian(sde, 0.25, 0.4), ProbabilityFlow(tolerance, tolerance, method)
    (m0, v0), (m1, v1) = marginal(model, sde.t_min), marginal(model, sde.t_max)
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    latent = flow.encode(model, x)
    expected = m1 + (v1 / v0).sqrt() * (x - m0)
    assert torch.allclose(latent, expected, rtol=50 * tolerance, atol=50 * tolerance)
    assert torch.allclose(flow.decode(model, expected), x, rtol=0, atol=50 * tolerance)
    assert torch.allclose(flow.decode(model, latent), x, rtol=0, atol=50 * tolerance)


@pytest.mark.parametrize("coordinates", ["angle", pytest.param("time", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_b31_fixed_steps_have_their_order_in_both_directions_of_time(coordinates, method, order, direction):
    sde = VP(t_min=0.1)
    model, x = correlated(sde), torch.tensor([[0.3, -0.9]], dtype=torch.float64)
    exact = getattr(ProbabilityFlow(1e-12, 1e-12, coordinates=coordinates), direction)(model, x)

    def error(steps):
        flow = ProbabilityFlow(method=method, steps=steps, coordinates=coordinates)
        return float((getattr(flow, direction)(model, x) - exact).norm())

    steps = 160 if coordinates == "time" else 40
    assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.25)


# Interpolation.


@pytest.mark.parametrize("sde", quick(SDES), ids=str)
def test_interpolation_starts_and_ends_at_the_data(sde):
    model, flow = mixture(sde), ProbabilityFlow(1e-7, 1e-7)
    x_a, x_b = model.sample(10, seed=0).split(5)
    between = flow.interpolate(model, x_a, x_b, 4)
    assert between.shape == (4, 5, 2)
    assert torch.allclose(between[0], x_a, atol=1e-4) and torch.allclose(between[-1], x_b, atol=1e-4)
    round_trip = flow.decode(model, flow.encode(model, x_a))
    assert torch.allclose(between[0], round_trip, atol=1e-4)


@pytest.mark.parametrize("sde", CORE_SDES, ids=str)
def test_interpolation_is_on_the_circle_of_the_latents(sde):
    """For an isotropic Gaussian the flow is a scaling, so that the data lie on a circle too, at equal angles."""
    isotropic = torch.ones(1), torch.zeros(1, 2), 0.25 * torch.eye(2)[None]
    model, flow = GaussianMixture(*(part.double() for part in isotropic), sde), ProbabilityFlow(1e-9, 1e-9)
    a, b = 0.3, 2.5
    x_a, x_b = (torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64) for angle in (a, b))
    found = flow.interpolate(model, x_a, 3 * x_b, 5)[:, 0]
    angles = torch.linspace(a, b, 5, dtype=torch.float64)
    expected = torch.linspace(1, 3, 5)[:, None] * torch.stack((angles.cos(), angles.sin()), 1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_interpolation_of_any_rank_treats_each_sample_alone():
    a, b = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = great_circle(a, b, 6)
    assert whole.shape == (6, 3, 2, 4, 4)
    assert torch.allclose(whole[:, 1:2], great_circle(a[1:2], b[1:2], 6), atol=1e-14)
    assert torch.allclose(whole.flip(0), great_circle(b, a, 6), atol=1e-14)
    assert torch.allclose(whole[0], a, atol=1e-14) and torch.allclose(whole[-1], b, atol=1e-14)
    lengths = whole.flatten(2).norm(dim=2)
    assert torch.allclose(lengths, torch.lerp(lengths[:1], lengths[-1:], torch.linspace(0, 1, 6)[:, None].double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_there_is_no_one_circle_interpolation_is_straight(dtype):
    """The same direction, opposite ones (so all data of one value), and a latent of zero."""
    a = torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    b = torch.tensor([[2.0, 4.0], [-2.0, 4.0], [1.0, 1.0], [3.0, 4.0]], dtype=dtype)
    share = torch.linspace(0, 1, 5, dtype=dtype)[:, None, None]
    assert torch.allclose(great_circle(a, b, 5), torch.lerp(a, b, share), atol=1e-6)
    near = great_circle(torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[1.0, 1e-3]], dtype=dtype), 3)
    assert torch.allclose(near[1], torch.tensor([[1.0, 5e-4]], dtype=dtype), atol=1e-6)


@pytest.mark.parametrize(
    "x_b, n, message",
    [
        (torch.zeros(3, 2), 3, r"x_a and x_b must have one shape, found \(2, 2\) and \(3, 2\)"),
        (torch.zeros(2, 1), 3, r"one shape, found \(2, 2\) and \(2, 1\)"),
        (torch.zeros(2, 2), 1, "n must be an integer of at least 2, the two ends among them, found 1"),
        (torch.zeros(2, 2), 2.0, "n must be an integer of at least 2"),
        (torch.zeros(2, 2), True, "n must be an integer of at least 2"),
    ],
    ids=["batch", "values", "one", "float", "bool"],
)
def test_what_can_not_be_interpolated_is_refused_before_the_first_call(x_b, n, message):
    model = Watch(mixture(VP()))
    with pytest.raises(ValueError, match=message):
        ProbabilityFlow().interpolate(model, torch.zeros(2, 2), x_b, n)
    assert not model.times


# Every adaptive method through the same traps.


class NaNBelow(ScoreModel):
    """NaN below a time."""

    def __init__(self, inner, below):
        super().__init__(inner.sde)
        self.inner, self.below = inner, below

    def forward(self, x, t):
        return type(self.inner(x, t))(*(part / (t > self.below) for part in self.inner(x, t)))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_b28_nan_late_on_the_way_raises(method):
    model = NaNBelow(mixture(VP()), 0.2)
    with pytest.raises(ODEError, match=r"right-hand side is not finite at t=0\.[012].*check the network's weights"):
        ProbabilityFlow(1e-4, 1e-4, method)(model, shape=(3, 2))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("method", ADAPTIVE)
def test_b28_a_step_that_shrinks_to_nothing_raises(method):
    """y' = y^2 from 1 blows up at t = 1: "underflow in dt", or steps without end."""
    words = rf"{method} stopped near t=(1|0\.9\d*) after .*(underflow in dt|max_num_steps)|not finite at t=1"
    with pytest.raises(ODEError, match=words):
        integrate(lambda t, y: (y[0] ** 2,), state(), 0.0, 2.0, method, 1e-5, 1e-5, max_steps=2000)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_b28_too_many_steps_raise(method):
    with pytest.raises(
        ODEError, match=rf"{method} stopped near t=[\d.e-]+ after \d+ evaluations \(max_num_steps exceeded"
    ):
        integrate(lambda t, y: (torch.cos(1e4 * t) * y[0],), state(), 0.0, 1.0, method, 1e-9, 1e-9, max_steps=50)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_no_evaluation_lies_beyond_the_interval(sde, method, direction):
    model = Watch(mixture(sde))
    flow = ProbabilityFlow(1e-3, 1e-3, method, steps=5 if method in FIXED else None)
    getattr(flow, direction)(model, torch.ones(2, 2, dtype=torch.float64))
    assert sde.t_min * (1 - 1e-9) <= min(model.times) and max(model.times) <= sde.t_max
    assert len(model.times) > 4


@pytest.mark.parametrize("method", FIXED)
def test_the_calls_of_fixed_steps_are_known(method):
    flow = ProbabilityFlow(method=method, steps=3)
    assert flow(mixture(VP()), shape=(2, 2)).nfe == flow.calls
    assert ProbabilityFlow().calls is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_quarter_turn_is_the_end_of_time(dtype):
    """pi / 2 is past it in float32, where the tangent is negative."""
    end = torch.tensor(math.pi / 2, dtype=dtype)
    for sde in (RectifiedFlow(), VP()):
        assert float(AngleFlow(mixture(sde, dtype)).time(end)) == sde.t_max


@pytest.mark.parametrize("method", ADAPTIVE)
def test_b29_a_sample_does_not_depend_on_its_companions(method):
    """Within ten tolerances, with companions a hundred times further out; and it meets the tolerance alone."""
    sde, tolerance = VP(), 1e-5
    model, flow = mixture(sde), ProbabilityFlow(tolerance, tolerance, method)
    x_T = sde.prior((16, 2)).sample(0, dtype=torch.float64)
    x_T[1:] *= 100
    assert (flow(model, x_T=x_T).x[:1] - flow(model, x_T=x_T[:1]).x).abs().max() < 10 * tolerance


@pytest.mark.parametrize("method", ADAPTIVE)
def test_b32_the_integration_ends_at_the_end(method):
    """Not where an error estimate that is no number would stop it: a field that is infinite at once for one sample."""

    def field(t, y):
        return (torch.where((t > 0.5) & (torch.arange(2)[:, None] == 1), math.inf, 1.0) * torch.ones_like(y[0]),)

    with pytest.raises(ODEError, match=r"not finite at t=(0\.[5-9]|1 )"):
        integrate(field, state(), 0.0, 1.0, method)
    (y,) = integrate(lambda t, y: (torch.ones_like(y[0]),), state(), 0.0, 1.0, method)
    assert torch.allclose(y, torch.full_like(y, 2.0), rtol=1e-12)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_tolerance_bounds_the_error_and_a_tighter_one_lowers_it(method):
    sde = VP()
    model, x = mixture(sde), sde.prior((8, 2)).sample(1, dtype=torch.float64)
    exact = ProbabilityFlow(1e-10, 1e-10).decode(model, x)
    loose, tight = (float((ProbabilityFlow(e, e, method).decode(model, x) - exact).abs().max()) for e in (1e-3, 1e-5))
    assert tight < 1e-3 and tight < 0.2 * loose, (loose, tight)
