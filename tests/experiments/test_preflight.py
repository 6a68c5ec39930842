"""Values that can't work are refused by key before anything is written or read, all at once."""

import math

import pytest
from configurations import configuration
from omegaconf import OmegaConf

from experiments.build import ConfigError
from experiments.cli import suggest
from experiments.preflight import preflight

NAN, INF = math.nan, math.inf
POSITIVE, NOT_NEGATIVE = "must be positive and finite", "must be at least 0 and finite"
BAD = [
    *((f"train.{name}", value, POSITIVE) for name in ("steps", "log_every", "save_every") for value in (0, -1)),
    *((f"train.{name}", value, POSITIVE) for name in ("learning_rate", "clip") for value in (0.0, -1.0, NAN, INF)),
    *(
        (f"train.{name}", value, POSITIVE)
        for name in ("batch_size", "accumulate", "max_bad_steps")
        for value in (0, -3)
    ),
    *((f"train.{name}", -1, NOT_NEGATIVE) for name in ("warmup", "workers", "keep_every", "watch_every")),
    *(("train.ema", value, "must lie in [0, 1)") for value in (1.0, -0.1, NAN, INF)),
    ("train.watch_examples", -1, NOT_NEGATIVE),
    ("train.early_stop", 0, "must be at least 1, or null for none"),
    ("train.precision", "half", "must be one of float32, bfloat16, float16, found 'half'"),
    ("train.distributed", "zero", "must be one of ddp, fsdp, found 'zero'"),
    ("train.data_on_device", "often", "must be auto, true or false"),
    ("train.accumulate", 7, "must divide train.batch_size"),
    ("seed", -1, NOT_NEGATIVE),
    ("label", "sigma", "must be one of log_snr, log_sigma, time"),
    ("dequantization", "none", "must be one of uniform, centres"),
    ("sde.beta_min", 30.0, "beta_min must be smaller than beta_max"),
    ("sde.beta_min", NAN, "sde"),
    ("sde.beta_max", INF, "sde"),
    ("sde.t_min", 2.0, "sde"),
    ("sde.t_min", 0.0, "sde"),
    ("solver.steps", 0, "steps must be a positive integer"),
    ("solver.grid", "quadratic", "grid must be one of"),
    ("objective.weighting", "best", "weighting must be one of"),
    ("objective.times.spread", "even", "spread must be one of"),
    ("likelihood.split", "tset", "must be one of train, validation, test"),
    ("likelihood.batch_size", 0, POSITIVE),
    ("likelihood.samples", 1, "must be at least 2, or null for all"),
    ("likelihood.ode_subset", -1, NOT_NEGATIVE),
    ("likelihood.method", "dopri9", "method must be one of"),
    ("likelihood.rtol", 0.0, "rtol"),
    ("likelihood.atol", -1.0, "atol"),
    ("likelihood.steps", 1, "steps"),
    ("likelihood.coordinates", "polar", "coordinates"),
    ("likelihood.divergence.probes", 0, "probes"),
    ("compare.samples", 1, "must be at least 2"),
    ("compare.seeds", 0, POSITIVE),
    ("compare.batch_size", 0, "must be a positive number of samples, or null"),
    ("compare.budgets", [], "must be positive numbers of network calls"),
    ("compare.budgets", [10, 0], "must be positive numbers of network calls"),
    ("compare.names", ["ddmi"], "no solver 'ddmi'; choose from"),
    ("compare.solvers.ddim.eta", -1.0, "compare.solvers.ddim"),
    ("interpolate.pairs", 0, POSITIVE),
    ("posterior.noise_std", -0.1, NOT_NEGATIVE),
    ("posterior.examples", 0, POSITIVE),
    ("posterior.examples", -3, POSITIVE),
    ("posterior.first", -1, NOT_NEGATIVE),
    ("posterior.samples", 1, "must be at least 2"),
    ("posterior.split", "tset", "must be one of train, validation, test"),
    ("interpolate.points", 1, "must be at least 2"),
]


@pytest.fixture(scope="module")
def base():
    config = configuration()
    OmegaConf.set_struct(config, False)
    return config


@pytest.mark.parametrize(("key", "value", "words"), BAD, ids=lambda value: str(value).replace("\n", " "))
def test_a_value_that_can_not_work_is_refused_by_its_key(base, key, value, words):
    config = base.copy()
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError) as caught:
        preflight(config, [])
    assert words in str(caught.value) and key.split(".")[0] in str(caught.value)
    assert len(caught.value.problems) == 1


def test_what_is_wrong_is_told_at_once(base):
    config = base.copy()
    for key, value in (("train.steps", 0), ("train.ema", 1.0), ("sde.beta_min", 30.0), ("compare.seeds", 0)):
        OmegaConf.update(config, key, value)
    with pytest.raises(
        ConfigError, match=r"^4 settings can't work:\n  train\.steps must .*\n  train\.ema must "
    ) as caught:
        preflight(config, [])
    assert "compare.seeds must" in str(caught.value) and "beta_min must be smaller" in str(caught.value)


def test_the_defaults_have_nothing_to_refuse(base):
    preflight(base, [])


def test_a_misspelt_key_is_told_what_it_is_like(capsys):
    suggest(["train.stepz=3", "sde=ve", "sde.sigma_mxa=3", "seed=1", "+train.mine=1", "hydra.run.dri=x"])
    said = capsys.readouterr().err
    assert "train.stepz: do you mean train.steps?" in said and "sde.sigma_mxa: do you mean sde.sigma_max" in said
    assert said.count("do you mean") == 2
    suggest(["sde=vpp", "train.stepz=3"])  # Hydra lists the choices itself
    assert not capsys.readouterr().err
