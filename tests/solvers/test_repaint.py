"""Resampling: what one round is, what it costs, what many do to the bias of replacement, and what it refuses."""

import pytest
import torch
from oracles import CENTRE, CORRELATED, SOME_SDES, correlated, marginal, mixture, response

from models import Replacement
from sde import VP
from sde.base import last_time
from solvers import DDIM, Ancestral, EulerMaruyama, Heun, RePaint, UniPC


@pytest.mark.parametrize("sampler", [Ancestral(steps=6), DDIM(steps=6), EulerMaruyama(steps=6), Heun(steps=6)], ids=str)
@pytest.mark.parametrize("jump", [1, 3])
def test_one_round_is_the_sampler_itself(sampler, jump):
    model = mixture(VP())
    a, b = (s(model, shape=(4, 2), seed=3, dtype=torch.float64) for s in (sampler, RePaint(sampler, 1, jump)))
    assert torch.allclose(a.x, b.x, atol=1e-12) and a.nfe == b.nfe


@pytest.mark.parametrize(("rounds", "jump"), [(1, 1), (3, 1), (2, 4), (5, 2)])
@pytest.mark.parametrize("final", ["mean", "denoise"])
def test_calls_are_those_of_all_rounds(rounds, jump, final):
    sampler = RePaint(Heun(steps=8, final=final), rounds, jump)
    out = sampler(mixture(VP()), shape=(2, 2))
    assert out.nfe == sampler.calls == 8 * rounds * 2 + (final == "denoise")
    assert sampler.with_steps(sampler.steps) == sampler
    assert RePaint(DDIM(steps=8), 1).stochastic is False and RePaint(DDIM(steps=8), 2).stochastic is True


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("jump", [1, 4])
def test_the_order_of_the_sampler_stays(sde, jump, monkeypatch):
    """A round leaves p_t as it is but for the error of the steps: moments of a Gaussian, without Monte Carlo."""
    errors = []
    for steps in (40, 80):
        model, sampler = correlated(sde), RePaint(Heun(steps=steps, grid="log_snr"), 2, jump)
        mean, covariance = response(monkeypatch, sampler, model, dimension=2).moments(*marginal(model, last_time(sde)))
        assert torch.allclose(mean, CENTRE, atol=1e-4), mean
        errors.append((covariance - CORRELATED).abs().max().item())
    assert errors[1] < 0.35 * errors[0] and errors[1] < 0.006, errors


def test_rounds_take_the_bias_of_the_mean_away():
    """Measured with 4,000 samples: -.823 after one round, -.724 after ten of stretches of ten; exact is -.7."""
    known = torch.tensor([1.0, 0.0], dtype=torch.float64)
    model = Replacement(correlated(VP()), known, torch.tensor([1, 0]))
    ends = [
        RePaint(DDIM(steps=100), rounds, 10)(model, shape=(4000, 2), dtype=torch.float64).x[:, 1].mean().item()
        for rounds in (1, 10)
    ]
    exact = CENTRE[1].item() + CORRELATED[0, 1].item() / CORRELATED[0, 0].item() * (1 - CENTRE[0].item())
    once, often = (abs(end - exact) for end in ends)
    assert once > 0.08 and often < 0.045, ends


def test_the_known_part_has_other_noise_in_each_round():
    seen = []

    class Seen(Replacement):
        def _predict(self, x, t, **condition):
            seen.append((self.noise.seed, float(t)))
            return super()._predict(x, t, **condition)

    model = Seen(correlated(VP()), torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1, 0]))
    RePaint(DDIM(steps=2), 3)(model, shape=(2, 2), seed=5)
    assert len(seen) == len(set(seen)) == 6


def test_the_last_step_of_all_alone_is_silent(monkeypatch):
    silent, original = [], Ancestral.step

    def spy(self, x, step, carry):
        silent.append(not step.draw(x).any())
        return original(self, x, step, carry)

    monkeypatch.setattr(Ancestral, "step", spy)
    RePaint(Ancestral(steps=4), 2, 2)(mixture(VP()), shape=(2, 2))
    assert silent == [False] * 7 + [True]


def test_what_cannot_work_is_refused():
    for sampler, words in (
        (UniPC(), "starts from earlier states"),
        (DDIM(steps=10, compile=True), "one noise for all rounds"),
    ):
        with pytest.raises(ValueError, match=words):
            RePaint(sampler)
    with pytest.raises(ValueError, match="jump must divide the 10 steps of DDIM, found 3"):
        RePaint(DDIM(steps=10), jump=3)
    with pytest.raises(ValueError, match="rounds must be a positive integer"):
        RePaint(DDIM(steps=10), rounds=0)
    with pytest.raises(TypeError, match="must be a Sampler"):
        RePaint("ddim")
    with pytest.raises(ValueError, match="adds noise"):
        RePaint(DDIM(steps=10)).encode(mixture(VP()), torch.zeros(1, 2, dtype=torch.float64))
