"""Another clock, another scale, a model under another process: nothing that can be measured changes."""

import math

import pytest
import torch
from oracles import CHANGED, SDES, correlated, gaussian, mixture, quick

from models import MLP, ScoreNetwork
from sde import EDM, VE, VP, Cosine, LearnedSchedule, Noise, RectifiedFlow, Rescaled, SubVP, TimeChanged, exploding
from sde.base import last_time
from solvers import DDIM, Ancestral, EulerMaruyama, ProbabilityFlow, log_likelihood

VPS = [VP(), SubVP(t_max=2.0), Cosine(), VE()]


def tensor(t):
    return torch.tensor(t, dtype=torch.float64)


def inner_times(sde):
    return [tensor(sde.t_min + u * (last_time(sde) - sde.t_min)) for u in (0.0, 0.1, 0.5, 1.0)]


@pytest.mark.parametrize("sde", [VP(), SubVP(t_max=2.0), VE()], ids=str)
def test_scores_of_x_over_alpha_are_alpha_times_the_scores(sde):
    """x_VE = x_VP / alpha: s_VE(x / alpha) = alpha s_VP(x), and EDM's velocity (x - D) / sigma in its own clock."""
    other = exploding(sde)
    model, changed = mixture(sde), mixture(other)
    x = Noise(1).normal((7, 2), dtype=torch.float64)
    for t in inner_times(sde):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        assert float(other.alpha(t)) == pytest.approx(1, rel=1e-14)
        assert torch.allclose(changed.score(x / alpha, t), alpha * model.score(x, t), rtol=1e-10), t
        edm = EDM(t_min=1e-6, t_max=1e3)
        assert torch.allclose(mixture(edm).score(x / alpha, sigma / alpha), alpha * model.score(x, t), rtol=1e-9), t


def test_vp_over_its_alpha_on_the_clock_of_its_noise_is_edm():
    """Both changes in one: sigma / alpha as the clock, x / alpha as the state."""
    vp = VP()
    low, high = (float(vp.sigma(t) / vp.alpha(t)) for t in map(tensor, (vp.t_min, vp.t_max)))
    edm = EDM(low, high)
    rise = vp.beta_max - vp.beta_min

    def clock(s):
        """B = log(1 + s^2) solved for t: B = beta_min t + rise t^2 / 2."""
        return 2 * torch.log1p(s**2) / (0.1 + (0.01 + 2 * rise * torch.log1p(s**2)).sqrt())

    clocked = TimeChanged(exploding(vp), clock)
    assert (clocked.t_min, clocked.t_max) == pytest.approx((low, high), rel=1e-9)
    for s in map(tensor, (0.01, 0.5, 3.0, 100.0)):
        assert float(clocked.sigma(s)) == pytest.approx(float(s), rel=1e-12)
        assert float(clocked.alpha(s)) == pytest.approx(1.0, rel=1e-14) and float(edm.sigma(s)) == float(s)
        assert float(clocked.diffusion(s) ** 2) == pytest.approx(2 * float(s), rel=1e-10)


@pytest.mark.parametrize("sde", quick([VP(), SubVP(), VE()]), ids=str)
def test_flow_paths_coincide_and_log_densities_differ_by_the_scale(sde):
    """log p(x / c) = log p(x) + D log c, from the same point of the flow and to it."""
    for other in (exploding(sde), Rescaled(sde, lambda t: torch.exp(t) * (1 + t**2))):
        model, changed = mixture(sde), mixture(other)
        (first, last) = (float(other.scale(tensor(t))) for t in (sde.t_min, sde.t_max))
        x = model.sample(4, seed=3)
        flow = ProbabilityFlow(1e-8, 1e-8)
        latent = flow.encode(model, x)
        assert torch.allclose(flow.encode(changed, first * x), last * latent, rtol=1e-6, atol=1e-6 * last), other
        assert torch.allclose(flow(changed, x_T=last * latent).x, first * flow(model, x_T=latent).x, atol=1e-6), other
        found, expected = (log_likelihood(m, y) for m, y in ((changed, first * x), (model, x)))
        assert torch.allclose(found.log_prob, expected.log_prob - 2 * math.log(first), atol=1e-6), other


@pytest.mark.parametrize(
    "clock",
    [torch.square, *(pytest.param(c, marks=pytest.mark.slow) for c in (torch.sqrt, torch.expm1, lambda t: 0.1 * t))],
    ids=["square", "sqrt", "expm1", "slow"],
)
def test_another_clock_leaves_end_points_and_likelihoods(clock):
    for sde, coordinates in ((VP(), "angle"), (VE(), "time")):
        other = TimeChanged(sde, clock)
        assert float(clock(tensor(other.t_min))) == pytest.approx(sde.t_min, rel=1e-12, abs=1e-17)
        assert float(clock(tensor(other.t_max))) == pytest.approx(sde.t_max, rel=1e-15)
        model, changed = mixture(sde), mixture(other)
        x = model.sample(4, seed=3)
        found, expected = (
            log_likelihood(m, x, rtol=1e-8, atol=1e-8, coordinates=coordinates) for m in (changed, model)
        )
        assert torch.allclose(found.latent, expected.latent, rtol=1e-6, atol=1e-6), sde
        assert torch.allclose(found.log_prob, expected.log_prob, atol=1e-6), sde


def test_the_diffusion_of_another_clock_carries_the_speed():
    """g^2 of TimeChanged is clock' g^2: at t -> t^2 it is 2 t g(t^2)^2."""
    sde, t = VP(), tensor([0.1, 0.5, 0.9])
    other = TimeChanged(sde, torch.square)
    assert torch.allclose(other.diffusion(t) ** 2, 2 * t * sde.diffusion(t**2) ** 2, rtol=1e-12)
    assert other.prior_std == sde.prior_std and exploding(sde).prior_std == 1 / float(sde.alpha(tensor(1.0)))


@pytest.mark.parametrize("sde", CHANGED, ids=str)
def test_changed_processes_compose(sde):
    """A change of a changed process is a process like any other."""
    twice = TimeChanged(exploding(sde), torch.square)
    t = tensor(0.7) * twice.t_max
    assert float(twice.log_snr(t)) == pytest.approx(float(sde.log_snr(t**2)), rel=1e-12)


# Models under other processes.


@pytest.mark.parametrize("other", [VP(), SubVP(t_min=1e-3), VE(), EDM(), RectifiedFlow(t_min=1e-3), Cosine()], ids=str)
@pytest.mark.parametrize("own", [VP(), VE(sigma_min=1e-3), EDM(t_min=1e-3), RectifiedFlow()], ids=str)
def test_the_exact_model_under_another_process_is_the_exact_model_of_that_process(own, other):
    """Pair and velocity, at all levels that its own process has."""
    if other.log_snr_range[1] > own.log_snr_range[1] + 1e-3:
        other = type(other)(t_min=float(other.time(tensor(own.log_snr_range[1]))) * 1.001)
    found, exact = mixture(own).under(other), mixture(other)
    x0, eps = exact.sample(9, seed=1), Noise(2).normal((9, 2), dtype=torch.float64)
    for u in (0.0, 0.02, 0.3, 0.7, 0.9):
        t = tensor(other.t_min + u * (last_time(other) - other.t_min))
        if float(other.log_snr(t)) < own.log_snr_range[0]:
            continue
        x = other.perturb(x0, t, eps)
        for name in ("x0", "eps"):
            a, b = (getattr(model(x, t), name) for model in (found, exact))
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), (name, t)
        # Velocity and score of the noisiest levels are as large as alpha'/alpha: relative to their size.
        a, b = found.velocity(x, t), exact.velocity(x, t)
        assert (a - b).abs().max() < 1e-5 * (1 + b.abs().max()), t


@pytest.mark.parametrize("solver", [EulerMaruyama(30, "log_snr"), DDIM(20, "karras"), Ancestral(20), ProbabilityFlow()])
def test_samples_and_likelihoods_under_another_process_are_those_of_its_model(solver):
    own, other = VP(), VE()
    found, exact = correlated(own).under(other), correlated(other)
    outs = [solver(m, shape=(8, 2), seed=1, dtype=torch.float64) for m in (found, exact)]
    assert torch.allclose(outs[0].x, outs[1].x, atol=1e-5) and outs[0].nfe == outs[1].nfe
    likelihoods = [log_likelihood(m, outs[1].x).log_prob for m in (found, exact)]
    assert torch.allclose(*likelihoods, atol=1e-5)


def test_a_network_goes_with_its_model():
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), VP())
    torch.nn.init.normal_(model.net.last[-1].weight)
    changed = model.under(EDM())
    assert {id(p) for p in changed.parameters()} == {id(p) for p in model.parameters()}
    x, t = torch.randn(4, 2), torch.tensor([0.01, 0.3, 5.0, 60.0])
    pair = changed(x, t)
    assert torch.allclose(pair.x0 + t[:, None] * pair.eps, x, rtol=1e-4, atol=1e-4)
    back = changed.under(VP(t_min=0.02, t_max=0.9))
    # Twice around is the model itself, at another speed of the clock.
    t = torch.tensor(0.5)
    for a, b in zip(back(x, t * 0.9), model(x, t), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_levels_past_the_noisiest_keep_the_invariant():
    """Under rectified flow a VP model is asked for pure noise, which it has never seen: its last x_0 is kept."""
    model = mixture(VP()).under(RectifiedFlow(t_min=1e-2))
    x = Noise(0).normal((5, 2), dtype=torch.float64)
    pair = model(x, tensor(1.0))
    assert torch.allclose(pair.eps, x, atol=1e-12)
    assert torch.allclose(pair.x0, mixture(VP())(x, tensor(1.0)).x0, rtol=1e-3)


def test_a_level_past_either_end_has_the_pair_of_the_end_corrected_to_the_invariant():
    """With less noise than at t_min eps is kept and x_0 follows; with more than at t_max it is the other way round."""
    model, x = mixture(VE(sigma_min=0.1, sigma_max=20.0)), Noise(0).normal((5, 2), dtype=torch.float64)
    for level, kept, own in ((0.02, "eps", 0.1), (100.0, "x0", 20.0)):
        alpha, sigma = tensor(1.0), tensor(level)
        pair = model.at_level(x, alpha, sigma)
        assert torch.allclose(pair.x0 + sigma * pair.eps, x, rtol=1e-12, atol=1e-12), level
        scale = math.hypot(1, own) / math.hypot(1, level)
        nearest = model(scale * x, tensor(model.sde.t_min if level < 1 else model.sde.t_max))
        assert torch.allclose(getattr(pair, kept), getattr(nearest, kept), rtol=0.05, atol=0.05), level


def test_less_noise_than_a_model_has_seen_is_refused():
    with pytest.raises(ValueError, match=r"VP\(.* begins at log-SNR 13.8.*raise its t_min to 0.000(9|8)"):
        gaussian(VE()).under(VP())
    with pytest.raises(TypeError, match="expected a GaussianSDE"):
        gaussian(VE()).under("vp")


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: TimeChanged(VP(), torch.neg), ValueError, "clock must show 1e-05 at some time"),
        (lambda: TimeChanged(VP(), lambda t: t + 0.2 * torch.sin(20 * t)), ValueError, "clock must increase strictly"),
        (lambda: TimeChanged("vp", torch.square), TypeError, "expected a GaussianSDE such as VP.., found str"),
        (
            lambda: TimeChanged(LearnedSchedule(), torch.square),
            ValueError,
            "of a schedule that learns would",
        ),
        (lambda: Rescaled(VP(), torch.neg), ValueError, "scale must be positive and finite; at t=1e-05 it is -1e-05"),
        (lambda: exploding(RectifiedFlow()), ValueError, "scale must be positive and finite; at t=1 it is inf"),
    ],
)
def test_what_is_no_change_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_every_process_is_one_up_to_scale_and_clock():
    """The log-SNR that one shows at t another shows at its own time, with alpha and sigma in proportion."""
    for sde in SDES:
        t = tensor(0.3 * sde.t_max)
        same = VP(t_min=1e-9).time(sde.log_snr(t))
        scale = sde.alpha(t) / VP().alpha(same)
        assert float(sde.sigma(t) / VP().sigma(same)) == pytest.approx(float(scale), rel=1e-7), sde
