"""A training that is saved and taken up again goes on bit for bit, and bad steps are told apart and counted."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.build import ConfigError
from experiments.stepper import LossScale, Stepper, StepSettings
from experiments.tally import Tally
from models import MLP, DenoisingScoreMatching, LossAware, ScoreNetwork, UniformTime
from sde import VP

SETTINGS = StepSettings(batch_size=8, clip=0.5, ema=0.99)
CPU = torch.device("cpu")


def network(width=8):
    model = ScoreNetwork(MLP((2,), width=width, depth=1), VP())
    for i, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def stepper(settings, times=None, model=None):
    objective = DenoisingScoreMatching(times=times or UniformTime())
    return Stepper(model or network(), objective, settings, torch.Generator().manual_seed(5))


def run(one, steps):
    for i in steps:
        one(torch.randn(8, 2, generator=torch.Generator().manual_seed(i)), rate=1e-2)


def saved(one):
    """What a checkpoint holds, through a file that is read without executing it."""
    file = io.BytesIO()
    content = {"model": one.model.state_dict(), "ema": one.average.state, "stepper": one.state()}
    torch.save(content, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def leaves(tree):
    return [v for value in tree.values() for v in (leaves(value) if isinstance(value, dict) else [value])]


KINDS = {
    "fused": {},
    "plain": {"fused": False},
    "float16": {"precision": "float16", "accumulate": 2},
}


@pytest.mark.parametrize("times", [None, "aware"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_taken_up_again_is_the_one_that_was_never_interrupted(kind, times, monkeypatch):
    monkeypatch.setattr(LossScale, "PATIENCE", 5)
    settings = replace(SETTINGS, **KINDS[kind])

    def make():
        return stepper(settings, LossAware(bins=3, least=2) if times else None)

    through, before, after = make(), make(), make()
    run(through, range(16))
    run(before, range(8))
    content = saved(before)
    run(after, range(100, 103))  # it need not be fresh
    lies = [value.data_ptr() for value in leaves(after.average.state)]
    after.model.load_state_dict(content["model"])
    after.load(content["stepper"], content["ema"])
    run(after, range(8, 16))
    found, expected = saved(after), saved(through)
    assert found.keys() == expected.keys() and len(leaves(found)) > 20
    assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))
    assert lies == [value.data_ptr() for value in leaves(after.average.state)]
    assert after.tally.read() == through.tally.read()
    assert not all(torch.equal(a, b) for a, b in zip(leaves(content["ema"]), leaves(found["ema"]), strict=True))


@pytest.mark.parametrize("missing", ["moments", "scale", "objective", "updates", "tally", "generator"])
def test_each_part_of_the_state_matters(missing):
    def make():
        return stepper(replace(SETTINGS, precision="float16"), LossAware(bins=3, least=2))

    before, after, other = make(), make(), make()
    run(before, range(8))
    content = saved(before)
    spoilt = content["stepper"] | {missing: saved(other)["stepper"][missing]}
    after.load(spoilt, content["ema"])
    assert not all(torch.equal(a, b) for a, b in zip(leaves(after.state()), leaves(before.state()), strict=True))
    after.load(content["stepper"], content["ema"])
    assert all(torch.equal(a, b) for a, b in zip(leaves(after.state()), leaves(before.state()), strict=True))


def test_the_state_of_another_network_is_refused_and_changes_nothing():
    one, wide = stepper(SETTINGS), stepper(SETTINGS, model=network(width=16))
    run(wide, range(2))
    before, content = copy.deepcopy(one.state()), saved(wide)
    with pytest.raises(ConfigError, match=r"of another network or objective: .* resume with the configuration"):
        one.load(content["stepper"], content["ema"])
    aware = stepper(SETTINGS, LossAware())
    with pytest.raises(ConfigError, match=r"2 names or shapes differ \(objective/times.counts, obj"):
        one.load(aware.state(), aware.average.state)
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(one.state()), strict=True))


def test_a_loss_scale_begins_anew_in_another_precision():
    half, full = stepper(replace(SETTINGS, precision="float16")), stepper(SETTINGS)
    half.scale.value.fill_(8)
    for one, other, expected in ((full, half, 1.0), (stepper(replace(SETTINGS, precision="float16")), full, 2.0**16)):
        one.load(saved(other)["stepper"], other.average.state)
        assert one.scale.value.item() == expected


def add(tally, good, value=1.0, log_snr=0.0, **more):
    value, log_snr = (torch.tensor(v, dtype=torch.float64).reshape(-1) for v in (value, log_snr))
    tally.add(value.mean(), torch.tensor(1.0), torch.tensor(good), value, log_snr, **more)


def test_bad_steps_in_a_row_are_counted_across_readings():
    tally = Tally(-2.0, 2.0, CPU, bins=4)
    found = []
    for window in ("gbb", "bbg", "gg", "bgbb", "b", "g"):
        for one in window:
            add(tally, one == "g")
        read = tally.read()
        found.append((read.run, read.first))
    assert found == [(2, 2), (4, 1), (0, None), (2, 1), (3, 1), (0, None)]


def test_the_noise_levels_are_those_of_the_samples_that_were_not_finite_in_the_first_bad_step():
    tally, nan = Tally(-2.0, 2.0, CPU, bins=4), math.nan
    add(tally, True, [1.0, 2.0], [-9.0, 9.0])
    add(tally, False, [nan, 1.0, math.inf, nan], [0.5, 9.0, -1.5, 1.0])
    add(tally, False, [nan, 1.0], [7.0, 1.0])
    assert tally.read().levels == (-1.5, 1.0)
    add(tally, False, [nan, 1.0], [-math.inf, 1.0])
    assert tally.read().levels == (-math.inf, -math.inf)
    add(tally, False, [1.0, 1.0], [7.0, 1.0])  # the gradient alone
    add(tally, False, [nan, 1.0], [7.0, 1.0])
    read = tally.read()
    assert (read.first, read.levels) == (1, None)
    assert tally.read().levels is None


def test_a_scale_that_is_still_too_large_is_no_bad_step():
    one = stepper(replace(SETTINGS, precision="float16"))
    huge = torch.full((8, 2), 1e30)
    for _ in range(3):
        one(huge, rate=1e-3)
    read = one.tally.read()
    assert (read.steps, read.good, read.run, read.first) == (3, 0, 0, None) and one.scale.value.item() == 2.0**13
    one.scale.value.fill_(2)
    for _ in range(3):
        one(huge, rate=1e-3)
    read = one.tally.read()  # at 2, 1, and a half
    assert (read.run, read.first, one.scale.value.item()) == (2, 2, 0.25) and not one.scale.excuses()
    constant = stepper(SETTINGS)
    constant(torch.full((8, 2), math.nan), rate=1e-3)
    read = constant.tally.read()
    assert (read.run, read.first) == (1, 1) and read.levels is not None
