"""Bits per dimension, end to end, against numbers known beforehand, and what an audit must say of its own errors."""

import json
import math

import pytest
import torch
from configurations import configuration

from experiments.audit import audit, bits_per_dim, starting_at
from experiments.baselines import pixel_histogram
from experiments.data import Data, digits, mixture2d
from experiments.dequantization import Dequantizer, Drawn, Uniform
from experiments.estimator import PARTS, Estimator, Examples, evaluate
from experiments.problem import Problem, build_model
from models import MLP, GaussianMixture, ScoreNetwork
from models.parametrization import ROWS
from sde import VE, VP, SubVP
from sde.diagnosis import TRUNCATION_BOUND, DiagnosisWarning, truncation
from solvers import Exact, Hutchinson, log_likelihood
from solvers.ode import ODEError

TINY = ("net=mlp", "net.width=8", "net.depth=1")
LEVELS = Uniform(4)


def images(n=12, levels=4, dimensions=2, seed=0):
    return torch.randint(0, levels, (n, dimensions), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def network(sde=None, shape=(2,), seed=0):
    """A network with a correlated Jacobian, as training might leave it."""
    torch.manual_seed(seed)
    model = ScoreNetwork(MLP(shape, width=16, depth=1), sde or VP(t_min=1e-3), ROWS["v"]())
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.3)
    return model


def test_the_untrained_level_head_has_the_likelihood_of_the_pixel_histogram():
    data, problem = digits(), Problem.of(digits())
    model = build_model(configuration(*TINY), problem.convention(), data.train)
    options = {"rtol": 1e-4, "convention": problem.convention(), "batch_size": 100, "ode_subset": 0}
    found = bits_per_dim(model, data.test[:100], divergence=Hutchinson(probes=1), **options)
    first = Data("digits", data.train, data.validation, data.test[:100], levels=17)
    exact = pixel_histogram(first).bits_per_dim
    assert exact <= found.value < exact + 0.01
    assert found.value - exact < found.truncation
    assert found.stderr_probes is None  # one probe
    assert found.nfe > 50 and found.n == 100 and found.dimensions == 64


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_data_have_log2_levels_bits(levels):
    flat = torch.arange(levels, dtype=torch.uint8 if levels <= 256 else torch.int32)
    data = Data("uniform", *(flat.repeat(40)[:, None] for _ in range(3)), levels=levels)
    problem = Problem.of(data)
    model = build_model(configuration(*TINY, "sde=subvp"), problem.convention(), data.train)
    found = bits_per_dim(model, data.test[:512], Uniform(levels), ode_subset=0)
    # The only departures are the noise at t_min and the prior, both below 1e-3 here.
    assert found.value == pytest.approx(math.log2(levels), abs=2e-3)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("endpoint", [False, True])
def test_the_parts_sum_to_the_total_for_each_example_and_on_average(importance, endpoint):
    divergence, options = Hutchinson(probes=2), {"importance": importance, "endpoint_correction": endpoint}
    found = bits_per_dim(network(), images(), LEVELS, draws=3, divergence=divergence, ode_subset=0, **options)
    each = found.per_example()
    assert (sum(each[name] for name in PARTS) - each["value"]).abs().max() < 1e-6
    assert sum(found.parts().values()) == pytest.approx(found.value, abs=1e-6)
    assert found.value == pytest.approx(each["value"].mean().item(), abs=1e-9)
    assert ("importance" in found.parts()) == importance and ("endpoint" in found.parts()) == endpoint
    assert found.stderr_probes > 1e-4 and found.stderr_draws > 1e-4


def test_the_value_is_that_of_log_likelihood_by_hand():
    model, k = network(), images()
    found = bits_per_dim(model, k, LEVELS, seed=5, first=100, ode_subset=0)
    x, _ = LEVELS.draw(k, seed=5, first=100)
    by_hand = -(log_likelihood(model, x, Exact()).log_prob.double() + 2 * math.log(0.5)) / (2 * math.log(2))
    assert torch.allclose(found.per_example()["value"], by_hand, atol=1e-6)
    assert found.stderr == pytest.approx(by_hand.std().item() / 12**0.5, rel=1e-5)
    assert found.stderr_probes == 0 and found.stderr_draws is None


class OneDraw(Dequantizer):
    """Draws that do not depend on their number."""

    levels, low, high, trained_on = 4, -1.0, 1.0, "uniform"

    def draw(self, k, seed=0, number=0, first=0):
        return LEVELS.draw(k, seed, 0, first)


class Weighted(OneDraw):
    """The same x with log-weights that depend on the draw."""

    def draw(self, k, seed=0, number=0, first=0):
        return Drawn(super().draw(k, seed, 0, first).x, torch.full((len(k),), float(number)))


def test_equal_draws_are_one_draw_also_when_importance_weighted():
    options = {"draws": 5, "ode_subset": 0}
    one = bits_per_dim(network(), images(), LEVELS, ode_subset=0).per_example()["value"]
    for importance in (False, True):
        found = bits_per_dim(network(), images(), OneDraw(), importance=importance, **options)
        assert torch.allclose(found.per_example()["value"], one, atol=1e-12)


def test_importance_weighting_is_the_logarithm_of_the_mean():
    model, k = network(), images()
    found = [bits_per_dim(model, k, Weighted(), draws=3, importance=i, ode_subset=0) for i in (False, True)]
    plain, weighted = (f.examples.log_prob for f in found)
    of_weights = math.log((1 + math.e + math.e**2) / 3)
    assert torch.allclose(weighted - plain, torch.full_like(plain, of_weights - 1), atol=1e-9)
    assert found[1].importance == pytest.approx(-(of_weights - 1) / (2 * math.log(2)))
    deviations = torch.tensor([0.0, 1.0, 2.0]).exp() / (1 + math.e + math.e**2) * 3
    assert torch.allclose(found[0].examples.stderr_draws, torch.tensor(3**-0.5).double(), atol=1e-6)
    assert torch.allclose(found[1].examples.stderr_draws, (deviations.std() / 3**0.5).double(), atol=1e-6)


def test_importance_weights_with_random_probes_get_a_note():
    options = {"draws": 2, "importance": True, "ode_subset": 0}
    assert bits_per_dim(network(), images(), LEVELS, **options).notes == ()
    (note,) = bits_per_dim(network(), images(), LEVELS, divergence=Hutchinson(probes=2), **options).notes
    assert "raise an importance-weighted value" in note


def test_each_draw_has_its_own_probes():
    options = {"rtol": 1e-4, "atol": 1e-4, "ode_subset": 0}
    found = bits_per_dim(network(), images(), OneDraw(), draws=20, divergence=Hutchinson(), **options)
    exact = bits_per_dim(network(), images(), LEVELS, **options)
    z = (found.examples.log_prob - exact.examples.log_prob) / found.examples.stderr_draws
    assert found.stderr_draws > 1e-4 and z.square().mean() < 3
    assert found.stderr_probes is None


def test_the_stated_error_of_the_probes_is_their_spread():
    """Over seeds of the probes the value scatters as the audit says."""
    model, k, options = network(), images(), {"ode_subset": 0, "rtol": 1e-3, "atol": 1e-3}
    found = [bits_per_dim(model, k, LEVELS, divergence=Hutchinson(4, seed=s), **options) for s in range(30)]
    spread = torch.tensor([f.value for f in found]).std().item()
    stated = torch.tensor([f.stderr_probes for f in found]).square().mean().sqrt().item()
    assert 0.7 < spread / stated < 1.35  # the spread of 30 has a relative error of 13 %


@pytest.mark.parametrize(
    "method", [{"rtol": 1e-2, "atol": 1e-2}, {"method": "rk4", "steps": 6}, {"method": "one_pass", "steps": 8}], ids=str
)
def test_the_error_of_the_ode_is_seen_and_shrinks(method):
    model, k = network(), images()
    better = {"rtol": 1e-4, "atol": 1e-4} if "rtol" in method else method | {"steps": 8 * method["steps"]}
    truth = bits_per_dim(model, k, LEVELS, rtol=1e-6, atol=1e-6, ode_subset=0)
    coarse, fine = (bits_per_dim(model, k, LEVELS, ode_subset=8, **options) for options in (method, better))
    error = (coarse.per_example()["value"] - truth.per_example()["value"])[:8]
    assert coarse.ode_rms > 1e-5 and fine.ode_rms < coarse.ode_rms / 5 and coarse.ode_subset == 8
    assert coarse.ode_rms == pytest.approx(error.square().mean().sqrt().item(), rel=0.35)
    assert coarse.ode_error == pytest.approx(error.mean().item(), abs=0.35 * coarse.ode_rms)


def test_a_tighter_pass_that_fails_is_told():
    class Fails(Estimator):
        def __call__(self, model, values, first=0):
            if self.steps == 200:
                raise ODEError("step too small")
            return super().__call__(model, values, first)

    found = audit(network(), images(4), Fails(LEVELS), ode_subset=2)
    assert found.ode_error is None and "tighter pass failed" in found.notes[0] and "note: " in str(found)


def test_the_report_does_not_depend_on_the_batch_size():
    data, problem, found = digits(), Problem.of(digits()), []
    torch.manual_seed(0)
    model = build_model(configuration(*TINY), problem.convention(), data.train)
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.3)
    for size in (12, 5):
        options = {"batch_size": size, "ode_subset": 0, "convention": problem.convention()}
        found.append(bits_per_dim(model, data.test[:12], rtol=1e-4, **options))
    assert found[0].value == pytest.approx(found[1].value, abs=1e-4)
    assert found[0].stderr_probes == pytest.approx(found[1].stderr_probes, rel=1e-2)
    assert found[0].stderr_probes > 1e-3


def test_examples_in_parts_are_those_in_one():
    model, k, estimator = network(), images(10), Estimator(LEVELS, draws=2, divergence=Hutchinson(2))
    whole, parts = evaluate(model, k, estimator), [evaluate(model, k[:4], estimator), None]
    parts[1] = evaluate(model, k[4:], estimator, first=4)
    assert torch.allclose(whole.log_prob, Examples.joined(parts).log_prob, atol=1e-3)
    assert torch.allclose(whole.log_prob, evaluate(model, k, estimator, batch_size=4).log_prob, atol=1e-3)
    assert not torch.allclose(whole.log_prob[4:], evaluate(model, k[4:], estimator).log_prob, atol=1e-2)


def test_continuous_data_are_in_nats():
    data = mixture2d(train=1, validation=1, test=64)
    exact = GaussianMixture(**{name: value.float() for name, value in data.density.items()}, sde=VP())
    found = audit(exact, data.test, Estimator(endpoint_correction=True))
    truth = exact.log_prob(data.test).double()
    assert found.unit == "nats" and found.dequantization == 0 and found.truncation is None
    assert found.value == pytest.approx(truth.mean().item(), abs=2e-3)
    assert (found.per_example()["value"] - truth).abs().max() < 0.01
    assert found.parts().keys() == {"prior", "divergence", "dequantization", "endpoint"}
    assert "unknown" not in str(found)


def test_the_audit_prints_its_parts_and_errors_and_is_plain_in_a_summary():
    found = bits_per_dim(network(), images(), LEVELS, divergence=Hutchinson(probes=2), ode_subset=4)
    text = str(found)
    for words in (
        "prior",
        "(probes)",
        "unknown (one draw)",
        "(12 examples)",
        "ODE error",
        "noise at t_min",
        "plain bound",
    ):
        assert words in text, words
    assert f"{found.value:.4f} " in text and str(VP(t_min=1e-3)) in text
    assert json.loads(json.dumps(found.summary()))["value"] == found.value
    assert found.ode_subset == 4 and found.truncation == truncation(VP(t_min=1e-3), 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.full((4, 2), 0.5)}, "bits/dim exists only for data declared discrete.*float32"),
        ({"images": torch.zeros(4, 2, dtype=torch.bool)}, "torch.bool"),
        ({"images": torch.zeros(4, dtype=torch.uint8)}, r"shape \(4,\)"),
        ({"images": torch.zeros(0, 2, dtype=torch.uint8)}, r"shape \(0, 2\)"),
        ({"images": torch.full((4, 2), 9)}, r"expected levels 0\.\.3, found 9"),
        ({"dequantizer": None}, "dequantizer: needed"),
        ({"draws": 0}, "draws must be a positive integer"),
        ({"importance": True}, "draws of at least 2"),
        ({"divergence": "exact"}, "must be a Divergence"),
        ({"method": "rk4"}, "give steps"),
        ({"coordinates": "polar"}, "coordinates must be one of"),
        ({"t_min": "soon"}, "'auto' or None, found 'soon'"),
        ({"t_min": 1e-4}, "with less noise than"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
    ids=str,
)
def test_what_can_not_work_is_refused(change, words):
    given = {"images": images(), "dequantizer": LEVELS} | change
    with pytest.raises(ValueError, match=words):
        bits_per_dim(network(), given.pop("images"), given.pop("dequantizer"), **given)


TRAINED = {"name": "toy", "shape": [2], "levels": 4, "range": [-1.0, 1.0]}


class Centres(OneDraw):
    trained_on = "centres"


@pytest.mark.parametrize(
    ("dequantizer", "convention", "words"),
    [
        (Uniform(17), TRAINED, "levels 4, and not 17"),
        (Uniform(4, 0.0, 1.0), TRAINED, r"range \[-1.0, 1.0\], and not \[0.0, 1.0\]"),
        (LEVELS, TRAINED | {"shape": [1, 2]}, r"shape \[1, 2\], and not \[2\]"),
        (LEVELS, TRAINED | {"dequantization": "centres"}, "dequantization centres, and not uniform"),
        (Centres(), TRAINED, "dequantization uniform, and not centres"),
        (LEVELS, {"shape": [2], "levels": None, "range": None}, "levels None, and not 4"),
        (None, {"shape": [2], "levels": None, "range": None}, "dequantizer: needed"),
    ],
    ids=range(7),
)
def test_another_convention_than_the_models_is_refused(dequantizer, convention, words):
    with pytest.raises(ValueError, match=words):
        bits_per_dim(network(), images(), dequantizer, convention=convention)


def test_the_convention_gives_the_dequantizer():
    options = {"convention": TRAINED, "ode_subset": 0}
    one, other = (bits_per_dim(network(), images(), quantized, **options) for quantized in (None, LEVELS))
    assert one.value == other.value and one.protocol == other.protocol


def test_a_draw_at_t_min_takes_no_correction_from_there_and_has_no_bound_of_that_noise():
    assert bits_per_dim(network(), images(), Centres(), ode_subset=0).truncation is None
    with pytest.raises(ValueError, match="Centres draws x at t_min"):
        bits_per_dim(network(), images(), Centres(), endpoint_correction=True)
    with pytest.raises(ValueError, match="t_min='auto' goes by the bins of uniform dequantization, found Centres"):
        bits_per_dim(network(), images(), Centres(), t_min="auto")


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(sigma_min=1e-4)], ids=str)
def test_the_automatic_end_costs_what_it_may_and_no_more(sde):
    model = starting_at(network(sde), "auto", Uniform(17))
    width, latest = 2 / 17, model.sde.t_min
    assert latest >= sde.t_min and 0.97 * TRUNCATION_BOUND < truncation(model.sde, width) <= TRUNCATION_BOUND
    assert type(model.sde) is type(sde)
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    assert torch.allclose(model(x, t).x0, network(sde)(x, t).x0, atol=1e-4)


def test_the_automatic_end_is_never_below_what_the_model_knows():
    with pytest.warns(DiagnosisWarning, match=r"t_min='auto': the noise at 0.001, the least that the model knows"):
        model = starting_at(network(VP(t_min=1e-3)), "auto", Uniform(256))
    assert model.sde == VP(t_min=1e-3)


def test_a_given_end_of_time_is_the_one_evaluated():
    found = bits_per_dim(network(), images(), LEVELS, t_min=0.01, ode_subset=0)
    assert found.t_min == 0.01 and found.truncation == truncation(VP(t_min=0.01), 0.5)


def test_the_audit_is_printed_unless_it_is_to_be_quiet(capsys):
    found = bits_per_dim(network(), images(), LEVELS, ode_subset=0, steps=10)
    assert capsys.readouterr().out == f"{found}\n"
    bits_per_dim(network(), images(), LEVELS, ode_subset=0, steps=10, quiet=True)
    assert capsys.readouterr().out == ""
