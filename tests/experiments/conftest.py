"""What several tests of runs begin with."""

import pytest
from checkpoints import save

from experiments.data import digits, mixture2d
from experiments.problem import Problem


@pytest.fixture(scope="module")
def plane():
    return Problem.of(mixture2d(train=500, validation=50, test=50))


@pytest.fixture(scope="module")
def images():
    return Problem.of(digits())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save(folder / "last.pt")
    return (folder / "last.pt").read_bytes()


@pytest.fixture
def file(tmp_path, sound):
    """A sound checkpoint of the test's own."""
    (tmp_path / "last.pt").write_bytes(sound)
    return tmp_path / "last.pt"
