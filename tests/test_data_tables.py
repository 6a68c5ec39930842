"""Tables: the numbers as they stand in the file, their standardization, and rows that are no numbers."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from refusals import refused

from experiments.data import Data, mixture2d, table
from experiments.problem import Problem

SPLITS = ("train", "validation", "test")
N = 400
CHOLESKY = torch.tensor([[2.0, 0, 0], [-30.0, 40.0, 0], [1e-3, 2e-3, 5e-3]], dtype=torch.float64)
MEAN = torch.tensor([5.0, -1000.0, 0.02], dtype=torch.float64)
GAUSSIAN = torch.distributions.MultivariateNormal(MEAN, scale_tril=CHOLESKY)


@pytest.fixture
def rows():
    normal = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + normal @ CHOLESKY.T


def written(folder, rows, header="a,b,c", delimiter=",", **options):
    lines = [delimiter.join(repr(value) for value in row) for row in rows.tolist()]
    (folder / "t.csv").write_text("\n".join([header] * bool(header) + lines) + "\n", **options)
    return folder / "t.csv"


def text(folder, content):
    (folder / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "t.csv"


def original(data):
    mean, std = (torch.tensor(data.standardization[name], dtype=torch.float64) for name in ("mean", "std"))
    return torch.cat([getattr(data, split) for split in SPLITS]).double() * std + mean


@pytest.mark.parametrize("header", ["a,b,c", "", '"a", b ,c', "2020,b,c"])
def test_every_row_is_in_one_split_whatever_the_header(tmp_path, rows, header):
    data = table(written(tmp_path, rows, header), validation=50, test=60)
    assert (data.name, data.shape, data.levels, data.train.dtype) == ("t", (3,), None, torch.float32)
    assert [len(getattr(data, split)) for split in SPLITS] == [290, 50, 60]
    found = original(data)
    assert torch.allclose(found[found[:, 0].argsort()], rows[rows[:, 0].argsort()], rtol=1e-5)


def test_columns_are_standardized_by_the_training_rows(tmp_path, rows):
    data = table(written(tmp_path, rows), test=0.5)
    train = data.train.double()
    assert train.mean(0).abs().max() < 1e-6 and (train.std(0, correction=0) - 1).abs().max() < 1e-6
    assert data.test.double().mean(0).abs().max() > 1e-3, "the others by the training rows' moments, not by their own"


def test_densities_in_the_units_of_the_file_by_the_log_determinant(tmp_path, rows):
    """A Gaussian's density at the rows of the file is that of the standardized Gaussian plus log_det."""
    data = table(written(tmp_path, rows))
    mean, std = (torch.tensor(data.standardization[name], dtype=torch.float64) for name in ("mean", "std"))
    standardized = torch.distributions.MultivariateNormal((MEAN - mean) / std, scale_tril=CHOLESKY / std[:, None])
    found = standardized.log_prob(data.test.double()) + data.log_det
    x = data.test.double() * std + mean
    assert torch.allclose(found, GAUSSIAN.log_prob(x), atol=1e-9)
    assert data.log_det == pytest.approx(-sum(math.log(s) for s in data.standardization["std"]))
    assert mixture2d(train=5).log_det == 0.0


def test_the_seed_alone_decides_the_test_rows(tmp_path, rows):
    path = written(tmp_path, rows)
    few, many = (original(table(path, validation=v, test=7))[-7:] for v in (5, 200))
    assert torch.allclose(few, many, rtol=1e-5) and not torch.allclose(few, original(table(path, test=7, seed=1))[-7:])


def test_the_convention_holds_the_standardization_and_survives_json(tmp_path, rows):
    data = table(written(tmp_path, rows))
    convention = Problem.of(data).convention()
    assert convention["standardization"] == data.standardization and json.loads(json.dumps(convention)) == convention
    assert convention != Problem.of(table(tmp_path / "t.csv", seed=1)).convention()
    assert "standardization" not in Problem.of(mixture2d(train=5)).convention()


def test_one_table_in_the_units_of_another(tmp_path, rows):
    own, other = table(written(tmp_path, rows)), table(written(tmp_path, rows * 3 + 1))
    moved = other.in_units_of(own)
    assert moved.standardization == own.standardization and torch.allclose(original(moved), original(other), rtol=1e-4)
    assert own.in_units_of(own) is own
    bare = Data("bare", own.train, own.validation, own.test)
    refused(lambda: bare.in_units_of(own), "bare and t", "both standardized")
    assert replace(bare, name="x").in_units_of(bare).name == "x"


def test_some_columns_by_name_and_another_delimiter(tmp_path, rows):
    path = written(tmp_path, rows, header="a;b b;c", delimiter=";")
    some = table(path, columns=["c", "b b"], delimiter=";")
    assert torch.allclose(original(some), original(table(path, delimiter=";"))[:, [2, 1]], rtol=1e-6)
    refused(lambda: table(path, columns=["d"], delimiter=";"), "'d'", "a, b b, c", "data.delimiter")
    refused(lambda: table(path, columns=[], delimiter=";"), "data.columns")
    refused(lambda: table(path), "t.csv", "line 2", "data.delimiter")
    for wrong in ("", "ab", 3):
        refused(lambda wrong=wrong: table(path, delimiter=wrong), "data.delimiter", "one character")
    assert table(text(tmp_path, "x,y\n1,2\n3,5\n4,1\n9,9\n"), columns=["y"]).shape == (1,)


def test_columns_beside_those_taken_may_hold_anything(tmp_path):
    path = text(tmp_path, "name,x\nann,1\nbob,\ncy,3\n")
    refused(lambda: table(path, columns=["x"]), "missing value '' in line 3, column 'x'")
    assert table(text(tmp_path, "name,x\nann,1\n,2\ncy,3\ndi,7\n"), columns=["x"]).shape == (1,)


GOOD = "1,2\n3,5\n4,1\n9,9\n8,6\n"
BAD = {
    "ragged": ("a,b\n" + GOOD + "3\n", ("2 cells", "found 1 in line 7")),
    "longer": (GOOD + "3,4,5\n", ("2 cells", "found 3 in line 6")),
    "text": ("a,b\n" + GOOD + "3,tall\n", ("'tall'", "line 7, column 'b'", "data.columns")),
    "empty cell": ("a,b\n1,2\n,3\n", ("missing value ''", "line 3, column 'a'")),
    "NaN": (GOOD + "nan,3\n", ("missing value 'nan'", "line 6, column '1'")),
    "NA first": ("1,NA\n" + GOOD, ("missing value 'NA'", "line 1, column '2'")),
    "question mark": (GOOD + "3, ? \n", ("missing value", "column '2'")),
    "infinite": (GOOD + "inf,3\n", ("'inf'", "line 6")),
    "huge": (GOOD + "1e999,3\n", ("'1e999'",)),
    "underscores": (GOOD + "1_000,3\n", ("'1_000'",)),
    "constant": ("a,b\n1,7\n2,7\n3,7\n4,7\n", ("columns that vary", "rows of b", "data.columns")),
    "variance": ("1e200\n2e200\n-1e200\n5e200\n", ("variance is finite", "unit")),
    "header alone": ("a,b\n", ("rows of numbers", "none")),
    "empty": ("", ("rows of numbers", "none")),
    "blank": ("\n\n\n", ("rows of numbers", "none")),
    "not text": (b"a,b\n\xff\xfe,3\n", ("UTF-8",)),
    "zeros": (b"1,2\n3,\0\n", ("t.csv",)),
    "endless quote": ('1,2\n"3,4\n5,6\n', ("CSV file", "unexpected end")),
    "huge cell": ("1,2\n3," + "9" * 200000 + "\n", ("CSV file", "field larger")),
    "two rows": ("1,2\n3,4\n", ("left to train on", "2 examples")),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_are_no_numbers_are_refused(tmp_path, case):
    content, words = BAD[case]
    refused(lambda: table(text(tmp_path, content)), "expected", "found", *words)


def test_blank_lines_and_a_byte_order_mark_are_nothing(tmp_path):
    plain, marked = table(text(tmp_path, GOOD)), table(text(tmp_path, "\ufeff\r\n" + GOOD.replace("\n", "\r\n\r\n")))
    assert torch.equal(original(plain), original(marked))


def test_paths_and_sizes(tmp_path, monkeypatch):
    refused(lambda: table(), "data.path=FILE is needed", "a CSV file")
    refused(lambda: table(tmp_path), "found a folder")
    monkeypatch.setattr("experiments.tables.BYTES", 10)
    refused(lambda: table(text(tmp_path, GOOD)), "at most 10 bytes", len(GOOD), "data=npy")


def test_columns_of_few_values_are_warned_of(tmp_path, rows, caplog):
    rows[:, 1] = (rows[:, 1] > -1000).double()
    table(written(tmp_path, rows))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "few distinct values in b;" in record.getMessage()
