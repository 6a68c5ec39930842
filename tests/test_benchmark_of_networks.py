"""The benchmark of networks: what it counts, and that its table stands without the library it compares with."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import network

TINY = network.Case("tiny", 2, (1, 8, 8), 8, (1, 2), 1, (False, True))


def test_kept_bytes_are_those_of_the_inputs_that_a_gradient_needs():
    """Of linear, SiLU, linear in single precision: x, and the input and the output of SiLU."""
    net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    assert network.kept(net, lambda: net(torch.zeros(2, 5))) == 4 * 2 * (5 + 7 + 7)


def test_a_table_of_all_networks():
    found = network.networks(TINY)
    lines = network.rows(TINY, found, network.measured(TINY, found, rounds=1))
    assert len(lines) == len(found) >= 2 * len(network.OURS)
    assert all(len(line) == len(network.HEADER) for line in lines)
    assert [line[7] != "-" for line in lines[:4]] == [False, False, True, True]
    assert all(one.operations > 0 and one.kept > 0 and one.parameters > 0 for one in found)
    assert network.verdicts(lines).count("<=") == 2
