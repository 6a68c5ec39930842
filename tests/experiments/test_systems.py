"""The systems of the literature, each in short: trained, sampled by its own sampler, measured by its own number."""

import json
import math
from pathlib import Path

import pytest
from configurations import configuration

import conf
from experiments import tasks
from experiments.likelihood_tasks import likelihood
from experiments.run import Run

SHORT = (
    "net.channels=8",
    "train.steps=3",
    "train.batch_size=16",
    "train.log_every=1",
    "train.warmup=1",
    "compare.samples=4",
    "compare.metrics=[sliced_w2]",
    "compare.solvers.probability_flow.rtol=1e-1",
    "compare.solvers.probability_flow.atol=1e-1",
    "likelihood.samples=4",
    "likelihood.steps=8",
    "likelihood.ode_subset=0",
    "likelihood.divergence.probes=1",
)
FEW_CORRECTED = ("solver.predictor.steps=6", "compare.budgets=[12]")
SYSTEMS = {
    "ddpm": (("objective.times.chain.betas.steps=25", "compare.budgets=[25]"), "ddpm", 25),
    "iddpm": (("objective.chain.betas.steps=25", "compare.budgets=[25]"), "ddpm", 25),
    "ncsn": (("solver.steps_per_level=2", "compare.budgets=[20]"), "annealed_langevin", 20),
    "ncsnv2": (("solver.steps_per_level=2", "compare.budgets=[43]"), "annealed_langevin", 43),
    "score_sde_vp": (FEW_CORRECTED, "predictor_corrector", 12),
    "score_sde_subvp": (FEW_CORRECTED, "predictor_corrector", 12),
    "score_sde_ve": (FEW_CORRECTED, "predictor_corrector", 12),
    "scoreflow": ((), "probability_flow", None),
    "vdm": (("solver.steps=6", "compare.budgets=[6]"), "ancestral", 6),
    "edm": (("solver.steps=3", "compare.budgets=[7]"), "heun", 7),
    "rectified_flow": (("solver.steps=6", "compare.budgets=[6]"), "euler", 6),
    "sliced_score_matching": (FEW_CORRECTED, "predictor_corrector", 12),
}
BOUNDS = {
    "ddpm": ["continuous ELBO", "discrete ELBO, DDPMChain(25 betas, 0.004 to 0.8)"],
    "iddpm": ["continuous ELBO", "discrete ELBO, DDPMChain(25 betas, 0.00543 to 0.999)"],
    "ncsn": ["continuous ELBO", "discrete ELBO, NCSNLevels(10 sigmas, 4 to 0.02)"],
    "ncsnv2": ["continuous ELBO", "discrete ELBO, NCSNLevels(21 sigmas, 9.04 to 0.02)"],
    "scoreflow": ["continuous ELBO"],
    "vdm": ["continuous ELBO"],
}


def test_every_system_is_tried():
    names = {path.stem for path in (Path(conf.__file__).parent / "experiment").glob("*.yaml")}
    others = {
        "cifar10",
        "digits",
        "digits_conditional",
        "digits_deblur",
        "mixture2d",
        "mnist",
        "study_digits",
        "study_mnist",
    }
    assert names == others | SYSTEMS.keys()


QUICK = ("ddpm", "ncsn", "score_sde_ve", "vdm", "edm")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SYSTEMS])
def test_a_system_trains_samples_and_reports_its_own_number(tmp_path, name):
    overrides, sampler, calls = SYSTEMS[name]
    tasks.everything(configuration(f"experiment={name}", *SHORT, *overrides), Run(tmp_path, "all"))
    found = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["sampler"]: row["nfe"] for row in found["comparison"]["rows"]}
    assert sampler in rows and calls in (None, rows[sampler])
    assert found["training"]["steps"] == 3 and found["likelihood"]["unit"] == "bits/dim"
    assert math.isfinite(found["likelihood"]["value"])
    bounds = found.get("bounds", [])[1:]
    assert [row["name"] for row in bounds] == BOUNDS.get(name, [])
    assert all(math.isfinite(row["value"]) for row in bounds)
    assert (tmp_path / "figures" / "samples.png").is_file()


def test_a_checkpoint_of_a_system_is_evaluated_alone(tmp_path):
    """Its own chain is that of the objective, which the settings of the likelihood refer to."""
    overrides = (*SHORT, *SYSTEMS["ddpm"][0], "experiment=ddpm")
    tasks.train(configuration(*overrides), Run(tmp_path / "train", "train"))
    likelihood(configuration(*overrides, f"checkpoint={tmp_path / 'train'}"), Run(tmp_path / "alone", "likelihood"))
    found = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert [row["name"] for row in found["bounds"]][1:] == BOUNDS["ddpm"]
