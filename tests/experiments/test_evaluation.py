"""Bits per dimension, end to end, against numbers known beforehand."""

import math

import pytest
import torch
from configurations import configuration
from experiments.evaluation import evaluate

from experiments.baselines import pixel_histogram
from experiments.data import Data, digits
from experiments.problem import Problem, build_model

TINY = ("net=mlp", "net.width=8", "net.depth=1")


def test_the_untrained_level_head_has_the_likelihood_of_the_pixel_histogram():
    problem, config = (
        Problem.of(digits()),
        configuration(*TINY, "likelihood.divergence.probes=1", "likelihood.samples=100"),
    )
    model = build_model(config, problem.convention(), problem.data.train)
    report, _ = evaluate(model, problem, config, torch.device("cpu"))
    first = Data("digits", problem.data.train, problem.data.validation, problem.data.test[:100], levels=17)
    exact = pixel_histogram(first).bits_per_dim
    assert exact <= report.value < exact + 0.01
    assert report.value - exact < report.truncation
    assert sum(report.parts().values()) == pytest.approx(report.value, abs=1e-9)
    assert report.stderr_probes is None  # one probe


def test_the_report_does_not_depend_on_the_batch_size():
    problem, reports = Problem.of(digits()), []
    for size in (12, 5):
        config = configuration(*TINY, "likelihood.samples=12", f"likelihood.batch_size={size}", "likelihood.rtol=1e-5")
        torch.manual_seed(0)
        model = build_model(config, problem.convention(), problem.data.train)
        torch.nn.init.normal_(model.net.last[-1].weight, std=0.3)
        reports.append(evaluate(model, problem, config, torch.device("cpu"))[0])
    assert reports[0].value == pytest.approx(reports[1].value, abs=1e-4)
    assert reports[0].stderr_probes == pytest.approx(reports[1].stderr_probes, rel=1e-2)
    assert reports[0].stderr_probes > 1e-3


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_data_have_log2_levels_bits(levels):
    flat = torch.arange(levels, dtype=torch.uint8 if levels <= 256 else torch.int32)
    data = Data("uniform", *(flat.repeat(40)[:, None] for _ in range(3)), levels=levels)
    config = configuration(*TINY, "sde=subvp", "likelihood=exact", "likelihood.samples=512")
    problem = Problem.of(data)
    model = build_model(config, problem.convention(), data.train)
    report, _ = evaluate(model, problem, config, torch.device("cpu"))
    # The only departures are the noise at t_min and the prior, both below 1e-3 here.
    assert report.value == pytest.approx(math.log2(levels), abs=2e-3)
