"""The faults of ``tests/mutants.py`` can still be made; whether the tests notice them is for that script to say."""

import ast
import shutil

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_the_text_of_every_mutant_is_there_once(tmp_path, mutant):
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, path)
    mutant.apply(tmp_path)
    changed = path.read_text()
    assert changed != (ROOT / mutant.file).read_text()
    ast.parse(changed)
    with pytest.raises(ValueError, match="found 0 times"):
        mutant._replace(old="no such text").apply(tmp_path)


def test_every_mutant_has_a_name_and_tests_of_its_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    for mutant in MUTANTS:
        assert (ROOT / mutant.tests[0]).exists(), mutant
