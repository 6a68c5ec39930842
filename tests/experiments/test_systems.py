"""The systems of the literature, each in short: trained, sampled by its own sampler, measured by its own number."""

import json
import math

import pytest
from configurations import configuration

from experiments import tasks
from experiments.run import Run

SHORT = (
    "net.channels=8",
    "train.steps=3",
    "train.batch_size=16",
    "train.log_every=1",
    "train.warmup=1",
    "compare.samples=4",
    "compare.solvers.probability_flow.rtol=1e-1",
    "compare.solvers.probability_flow.atol=1e-1",
    "likelihood.samples=4",
    "likelihood.steps=8",
    "likelihood.ode_subset=0",
    "likelihood.divergence.probes=1",
)
FEW_CORRECTED = ("solver.predictor.steps=6", "compare.budgets=[12]")
SYSTEMS = {
    "score_sde_vp": (FEW_CORRECTED, "predictor_corrector", 12),
    "score_sde_subvp": (FEW_CORRECTED, "predictor_corrector", 12),
    "score_sde_ve": (FEW_CORRECTED, "predictor_corrector", 12),
    "scoreflow": ((), "probability_flow", None),
    "rectified_flow": (("solver.steps=6", "compare.budgets=[6]"), "euler", 6),
}
BOUNDS = {"scoreflow": ["continuous ELBO"]}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_samples_and_reports_its_own_number(tmp_path, name):
    overrides, sampler, calls = SYSTEMS[name]
    tasks.everything(configuration(f"experiment={name}", *SHORT, *overrides), Run(tmp_path, "all"))
    found = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["sampler"]: row["nfe"] for row in found["comparison"]["rows"]}
    assert sampler in rows and calls in (None, rows[sampler])
    assert found["training"]["steps"] == 3 and found["likelihood"]["unit"] == "bits/dim"
    assert math.isfinite(found["likelihood"]["value"])
    assert [row["name"].partition(", DDPMChain")[0] for row in found.get("bounds", [])][1:] == BOUNDS.get(name, [])
    assert (tmp_path / "figures" / "samples.png").is_file()
