"""The counter-based generator: known answers, distribution, and independence of everything but seed and index."""

import math

import pytest
import torch
from scipy import stats

from sde import Noise
from sde.noise import philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(c, dtype=torch.int64) for c in counter), key)
    assert tuple(int(w) for w in words) == answer


def test_words_are_philox_of_seed_sample_and_draw():
    """The key is the seed; the counter is (block, low word of the sample, draw, high word of the sample)."""
    seed, first = PI[0] + (PI[1] << 32), (7 << 32) + 5
    found = Noise(seed, first).words((2, 6), draw=9)
    for i in range(2):
        expected = []
        for block in range(2):
            counter = tuple(torch.tensor(c) for c in (block, 5 + i, 9, 7))
            expected += [int(w) for w in philox(counter, (PI[0], PI[1]))]
        assert found[i].tolist() == expected[:6], i


def test_normal_numbers_are_normal():
    x = Noise(1).normal((20_000, 5), dtype=torch.float64).flatten()
    n = len(x)
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_signs_are_fair():
    x = Noise(1).rademacher((20_000, 5), dtype=torch.float64)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(lambda n: (Noise(0).normal((n, 2))[:, 0], Noise(0).normal((n, 2))[:, 1]), id="elements"),
        pytest.param(lambda n: (Noise(0).normal((n, 5))[:, 1], Noise(0).normal((n, 5))[:, 4]), id="blocks"),
        pytest.param(lambda n: (Noise(0).normal((n + 1, 1))[1:], Noise(0).normal((n + 1, 1))[:-1]), id="samples"),
        pytest.param(lambda n: (Noise(0).normal((n, 1), 3), Noise(0).normal((n, 1), 4)), id="draws"),
        pytest.param(lambda n: (Noise(0).normal((n, 1)), Noise(1).normal((n, 1))), id="seeds"),
        pytest.param(lambda n: (Noise(0).normal((n, 1)), Noise(1 << 32).normal((n, 1))), id="high words of the seed"),
        pytest.param(lambda n: (Noise(2).rademacher((n, 1)), Noise(2).normal((n, 1))), id="signs and normals"),
    ],
)
def test_streams_are_independent(pair):
    n = 40_000
    x, y = (z.flatten().double() for z in pair(n))
    for f in (lambda z: z, torch.square, torch.abs):
        a, b = f(x) - f(x).mean(), f(y) - f(y).mean()
        if float(a.std()) and float(b.std()):
            assert abs(float((a * b).mean() / (a.std() * b.std()))) < 4 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["normal", "rademacher", "words"])
@pytest.mark.parametrize("shape", [(6, 1), (6, 3), (6, 2, 5), (6, 1, 4, 4)], ids=str)
def test_a_sample_depends_on_its_own_index_alone(kind, shape):
    whole = getattr(Noise(5), kind)(shape, 2)
    for i in range(len(whole)):
        alone = getattr(Noise(5, first=i), kind)((1, *shape[1:]), 2)
        assert torch.equal(alone[0], whole[i]), i
    assert torch.equal(getattr(Noise(5), kind)((2, *shape[1:]), 2), whole[:2])


def test_shape_does_not_matter_and_float32_is_float64_rounded():
    x = Noise(3).normal((4, 12), 1, dtype=torch.float64)
    assert torch.equal(x.reshape(4, 3, 4), Noise(3).normal((4, 3, 4), 1, dtype=torch.float64))
    assert torch.allclose(Noise(3).normal((4, 12), 1).double(), x, atol=2e-6)


def test_the_largest_seed_is_taken():
    assert bool(torch.isfinite(Noise(2**64 - 1).normal((2, 2))).all())


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, None, "0"], ids=repr)
def test_what_is_not_a_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        Noise(seed)
