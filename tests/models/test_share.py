"""The shares of several processes are together what one process draws, bit for bit, whatever is drawn."""

import pytest
import torch

from experiments.dequantization import Uniform
from models import AtLevels, LogNormal, LossAwareIndex, Share, UniformIndex, UniformTime
from models.implicit import PROBES
from models.level_sampling import spread
from models.objective import noise_like
from models.share import gathered, share_of
from models.time_sampling import SPREADS
from sde import VP, DDPMChain

B, SDE, CHAIN = 12, VP(), DDPMChain(torch.linspace(1e-3, 0.1, 40).tolist())


def generator():
    return torch.Generator().manual_seed(3)


def probes(name):
    return lambda n, source: share_of(
        lambda shape, g: PROBES[name](shape, g, torch.zeros(())), (5, n, 2, 3), source, axis=1
    ).transpose(0, 1)


DRAWS = {
    "noise": lambda n, source: noise_like(torch.zeros(n, 2, 3), source),
    "circle": lambda n, source: spread(n, source, "cpu"),
    "dequantization": lambda n, source: Uniform(4).dequantize(torch.zeros(n, 2, 3, dtype=torch.uint8), source),
    "log-normal": lambda n, source: LogNormal().sample(n, SDE, source),
    "levels": lambda n, source: AtLevels(CHAIN).sample(n, SDE, source),
    **{name: lambda n, source, name=name: UniformTime(name).sample(n, SDE, source) for name in SPREADS},
    **{name: probes(name) for name in PROBES},
    "index": lambda n, source: torch.stack(UniformIndex(40).sample(n, source)).T,
    "aware index": lambda n, source: torch.stack(LossAwareIndex(40).sample(n, source)).T,
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", DRAWS)
def test_the_shares_are_together_the_whole_and_all_generators_go_on_alike(name, count):
    make, one, many = DRAWS[name], generator(), [generator() for _ in range(count)]
    for _ in range(2):  # the second time they start where the first one left them
        found = torch.cat([make(B // count, Share(g, i, count)) for i, g in enumerate(many)])
        assert torch.equal(found, make(B, one)) and len(set(found.flatten().tolist())) > 1


def test_of_a_batch_in_parts_each_process_has_its_share_of_every_part():
    whole = torch.arange(B)
    first, second = (Share(generator(), i, 2, parts=3).take(whole) for i in (0, 1))
    assert first.tolist() == [0, 1, 4, 5, 8, 9] and second.tolist() == [2, 3, 6, 7, 10, 11]
    for part, (a, b) in zip(whole.chunk(3), zip(first.chunk(3), second.chunk(3), strict=True), strict=True):
        assert torch.equal(torch.cat((a, b)), part)
    wide = torch.arange(2 * B).reshape(2, B)
    assert torch.equal(Share(generator(), 1, 3).take(wide, axis=1), wide[:, 4:8])


def test_one_process_sends_no_message():
    t = torch.ones(3)
    assert gathered(None, t) == (t,) and gathered(generator(), t) == (t,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Share(generator(), 0, 2, parts=2).take(torch.zeros(6)), "a batch of 6 can't be divided among 2"),
        (lambda: Share(generator(), 2, 2), r"index must lie in 0\.\.1, found 2"),
        (lambda: Share(generator(), -1, 2), r"index must lie in 0\.\.1, found -1"),
    ],
)
def test_shares_that_can_not_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
