"""The table of bounds: each row is the estimate that it names, in the right order for an exact score, in its unit."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from oracles import correlated, mixture

from experiments.bounds import CAPTION, bounds_table
from sde import VE, VP, DDPMChain, GaussianChain, linear_betas, log_snr_betas
from solvers import DiscretizedGaussian, GaussianReference, continuous_elbo, elbo


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_the_rows_are_in_the_right_order_for_an_exact_score(sde):
    """Gaps to log p by paired differences: continuous 0 up to the ends, discrete below by 5 standard errors, as 1/N."""
    model = mixture(sde)
    x0 = model.sample(300, seed=3)
    found = bounds_table(model, x0, None, (10, 40), flow_log_prob=model.log_prob(x0), flow_nfe=7, points=32)
    ode, continuous, coarse, fine = found.rows
    assert ode.nfe == 7 and [row.nfe for row in found.rows[1:]] == [33, 10, 40]
    assert ode.value == pytest.approx(float(model.log_prob(x0).mean())) and ode.gap is None
    assert abs(continuous.gap) < 5 * continuous.gap_stderr + 0.005
    assert coarse.gap < -5 * coarse.gap_stderr and fine.gap - coarse.gap > 5 * coarse.gap_stderr
    assert fine.gap < 0 and continuous.gap_stderr < continuous.stderr
    text = found.text()
    assert "300 examples, nats" in text and CAPTION in text and "discrete ELBO, N=40" in text


def test_the_rows_are_the_estimates_that_they_name():
    model = correlated(VP())
    x0 = model.sample(9)
    options = dict(seed=4, reference=GaussianReference.of(x0))
    chain = DDPMChain(linear_betas(25))
    found = bounds_table(model, x0, (-1.0, 0.3), (5,), chains=[chain], points=3, draws=2, seed=4, batch_size=4)
    expected = [
        continuous_elbo(model, x0, points=3, draws=2, **options),
        elbo(model, x0, DDPMChain(log_snr_betas(VP(), 5)), **options),
        elbo(model, x0, chain, **options),
    ]
    for row, bound in zip(found.rows[1:], expected, strict=True):
        mean, stderr = bound.mean()
        assert (row.value, row.stderr) == pytest.approx((mean, stderr), rel=1e-9), row
        assert row.gap == pytest.approx(mean + 1.0) and row.gap_stderr == pytest.approx(math.hypot(stderr, 0.3))
        assert row.nfe == bound.nfe
    assert found.rows[0].value == -1.0 and "DDPMChain(25 betas" in found.rows[-1].name
    alone = bounds_table(model, x0, chain_steps=(), points=3)
    assert len(alone.rows) == 1 and alone.rows[0].gap is None and "continuous ELBO" in alone.text()


def test_bits_per_dim_of_dequantized_data_and_of_bins():
    model, flow = correlated(VP()), torch.linspace(-2, 0, 8, dtype=torch.float64)
    x0 = model.sample(8)
    nats, bits = (
        bounds_table(model, x0, chain_steps=(5,), flow_log_prob=flow, points=3, bin_width=w) for w in (None, 0.25)
    )
    for one, other in zip(nats.rows, bits.rows, strict=True):
        assert other.value == pytest.approx(-one.value / (2 * math.log(2)) + 2), one
        assert other.stderr == pytest.approx(one.stderr / (2 * math.log(2)))
        if one.gap is not None:
            assert other.gap == pytest.approx(-one.gap / (2 * math.log(2)))
            assert other.gap_stderr == pytest.approx(one.gap_stderr / (2 * math.log(2)))
    assert (nats.unit, bits.unit) == ("nats", "bits/dim")
    decoder = DiscretizedGaussian(4)
    centres = decoder.centres(torch.arange(8).reshape(4, 2) % 4, torch.float64)
    found = bounds_table(model, centres, (2.0, 0.1), (5,), decoder=decoder, points=3)
    assert found.unit == "bits/dim" and found.rows[1].value == pytest.approx(
        continuous_elbo(model, centres, decoder, points=3).bits_per_dim()[0]
    )


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_the_levels_of_a_chain_are_evenly_spaced_in_log_snr(sde):
    chain = DDPMChain(log_snr_betas(sde, 40))
    levels = chain.log_snr(torch.arange(1, 41))
    low, high = sde.log_snr_range
    assert isinstance(chain, GaussianChain)
    assert torch.allclose(levels, torch.linspace(high, low, 40, dtype=torch.float64), atol=1e-9)


def test_the_benchmark_prints_the_table_beside_the_exact_value(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("bounds")
    monkeypatch.setattr(benchmark, "STEPS", (4,))
    text = benchmark.exact(VP(), 20, (DDPMChain(linear_betas(25)),))
    x0 = mixture(VP()).sample(20, seed=9)
    assert f"closed form: {float(mixture(VP()).log_prob(x0).mean()):.4f}" in text
    assert all(name in text for name in ("ODE", "continuous ELBO", "N=4", "DDPMChain(25 betas")), text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(flow=(0.0, 1.0), flow_log_prob=torch.zeros(3)), "either flow, .* or flow_log_prob of each sample, not"),
        (dict(flow_log_prob=torch.zeros(2)), r"flow_log_prob must have the shape \(3,\) of x0's samples, found \(2,\)"),
        (dict(decoder=DiscretizedGaussian(4), bin_width=0.5), "which has no bin_width and no log-density"),
    ],
)
def test_what_can_not_work_is_refused(options, message):
    model = mixture(VP())
    with pytest.raises(ValueError, match=message):
        bounds_table(model, model.sample(3), **options)
    with pytest.raises(ValueError, match="needs at least 2 samples, found 1"):
        bounds_table(model, model.sample(1))
