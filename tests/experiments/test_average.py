"""The average of the weights: closed forms, what it takes in and what not, and that a model gets its own back."""

import pytest
import torch
from torch import nn

from experiments.average import Average


def one(value=0.0):
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(value)
    return model


def test_after_k_updates_of_a_constant_decay_the_share_is_one_minus_d_to_the_k():
    model = one(0.0)
    average = Average(model, decay=0.9)
    average.updates.fill_(10**6)  # long after the warm-up
    model.weight.data.fill_(1.0)
    for k in range(1, 60):
        average.update()
        assert average.state["weight"].item() == pytest.approx(1 - 0.9**k, rel=1e-6), k


def test_the_decay_warms_up():
    golden = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.35, 0.35]
    model = one(0.0)
    average = Average(model, decay=0.35)
    for decay in golden:
        model.weight.data.fill_(1.0)
        average.state["weight"].zero_()
        average.update()
        assert average.state["weight"].item() == pytest.approx(1 - decay, rel=1e-6)
    assert average.updates.item() == len(golden)


def test_a_decay_close_to_one_keeps_its_digits():
    model = one(1.0)
    average = Average(model, decay=0.99999)
    average.updates.fill_(10**9)
    model.weight.data.fill_(2.0)
    average.update()
    assert average.state["weight"].item() - 1 == pytest.approx(1e-5, rel=1e-6)


def test_all_that_floats_is_averaged_in_float32_and_the_rest_is_copied():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    average = Average(model, decay=0.9)
    model(torch.randn(8, 2, dtype=torch.bfloat16))
    before = average.state["1.running_mean"].clone()
    average.update()
    types = {name: value.dtype for name, value in average.state.items()}
    assert types.pop("1.num_batches_tracked") == torch.int64 and set(types.values()) == {torch.float32}
    assert average.state["1.num_batches_tracked"].item() == 1
    expected = before.lerp(model[1].running_mean.float(), 0.9)
    assert torch.allclose(average.state["1.running_mean"], expected, rtol=1e-6)


def test_a_bad_step_leaves_every_bit():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, decay=0.9)
    average.update()
    before = {name: value.clone() for name, value in average.state.items()}
    model[0].weight.data += 1
    model(torch.full((8, 2), torch.nan))  # spoils the running moments
    average.update(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.state.items())
    assert average.updates.item() == 1
    model[1].reset_running_stats()
    average.update(torch.tensor(True))
    assert not torch.equal(average.state["0.weight"], before["0.weight"]) and average.updates.item() == 2


def test_a_model_gets_its_own_storages_back_whatever_happens():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, decay=0.9)
    model[0].weight.data += 1
    own = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    mean = {name: value.clone() for name, value in average.state.items()}
    with pytest.raises(KeyboardInterrupt), average.applied(model):
        assert all(torch.equal(value, average.state[name]) for name, value in model.state_dict().items())
        assert not torch.equal(model[0].weight, own["0.weight"][1])
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert value.data_ptr() == own[name][0] and torch.equal(value, own[name][1]), name
        assert torch.equal(average.state[name], mean[name]), name


def test_tied_weights_are_exchanged_once_and_come_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    average, before = Average(model, decay=0.0), model[0].weight.clone()
    model[0].weight.data += 1
    own = model[0].weight.clone()
    with average.applied(model):
        assert torch.equal(model[0].weight, before) and model[1].weight is model[0].weight
    assert torch.equal(model[1].weight, own)


@pytest.mark.parametrize("other", [nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Bilinear(2, 2, 2)], ids=str)
def test_another_network_is_refused(other):
    average = Average(nn.Linear(2, 2), decay=0.9)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    words = r"the average is of another network: \d names or shapes differ"
    with pytest.raises(ValueError, match=words), average.applied(other):
        raise AssertionError("it was applied")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Average(nn.Linear(1, 1), decay)
