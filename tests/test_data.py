import gzip
import math
import struct

import pytest
import torch
from refusals import refused

from experiments.data import digits, digits_inverted, digits_shuffled, fashion_mnist, mixture2d, mnist
from experiments.idx import read_idx


def idx(values: torch.Tensor, magic: bytes | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    shape = tuple(values.shape) if shape is None else shape
    magic = bytes([0, 0, 8, values.ndim]) if magic is None else magic
    return magic + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()


IMAGES = torch.randint(0, 256, (12, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(12, dtype=torch.uint8) % 10


def write(folder, name, content):
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.fixture(params=["train-images-idx3-ubyte", "train-images.idx3-ubyte.gz"])
def folder(request, tmp_path):
    style = request.param.replace("train-images", "{}").replace("idx3", "idx{}")
    for prefix, size in (("train", 12), ("t10k", 5)):
        write(tmp_path, style.format(f"{prefix}-images", 3), idx(IMAGES[:size]))
        write(tmp_path, style.format(f"{prefix}-labels", 1), idx(LABELS[:size]))
    return tmp_path


# --- digits


def test_digits_are_the_documented_split():
    data = digits()
    assert (data.name, data.shape, data.levels) == ("digits", (1, 8, 8), 17)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1297, 200, 300]
    assert data.train.dtype == torch.uint8 and int(data.train.max()) == 16
    assert all(len(labels) == len(getattr(data, name)) for name, labels in data.labels.items())
    assert all(labels.dtype == torch.int64 for labels in data.labels.values())


def test_digits_are_stratified_and_cover_everything_once():
    from sklearn.datasets import load_digits

    data = digits()
    assert data.labels["test"].bincount().sub(30).abs().max() <= 1
    assert data.labels["validation"].bincount().sub(20).abs().max() <= 1
    rows = torch.cat([data.train, data.validation, data.test]).flatten(1)
    whole = torch.from_numpy(load_digits().data).to(torch.uint8)
    assert sorted(rows.tolist()) == sorted(whole.tolist())


def test_digits_seed_decides_the_split():
    assert torch.equal(digits(seed=3).test, digits(seed=3).test)
    assert not torch.equal(digits(seed=3).test, digits(seed=4).test)


def test_digits_labels_belong_to_their_images():
    data = digits()
    means = torch.stack([data.train[data.labels["train"] == c].double().mean(0).flatten() for c in range(10)])
    guess = torch.cdist(data.test.flatten(1).double(), means).argmin(1)
    assert (guess == data.labels["test"]).double().mean() > 0.85


# --- mnist


def test_mnist_keeps_the_official_order(folder):
    data = mnist(folder, validation=4)
    assert (data.shape, data.levels) == ((1, 28, 28), 256)
    assert torch.equal(torch.cat([data.train, data.validation]).squeeze(1), IMAGES)
    assert torch.equal(data.test.squeeze(1), IMAGES[:5])
    assert torch.equal(torch.cat([data.labels["train"], data.labels["validation"]]), LABELS.long())
    assert len(data.validation) == len(data.labels["validation"]) == 4


def test_fashion_mnist_differs_in_its_name_alone(folder):
    ours, theirs = fashion_mnist(folder, validation=4), mnist(folder, validation=4)
    assert (ours.name, ours.levels, ours.flips) == ("fashion_mnist", 256, False)
    assert all(torch.equal(getattr(ours, s), getattr(theirs, s)) for s in ("train", "validation", "test"))
    assert all(torch.equal(ours.labels[s], theirs.labels[s]) for s in ours.labels)
    refused(lambda: fashion_mnist(None), "data.path=FOLDER is needed", "fashion_mnist")


@pytest.mark.parametrize("validation", [0, 12, -1, 2.5, True])
def test_mnist_refuses_a_useless_validation_split(folder, validation):
    refused(lambda: mnist(folder, validation), "data.validation", "1 to 11", validation)


def test_mnist_refuses_wrong_folders(tmp_path):
    refused(lambda: mnist(None), "data.path=FOLDER is needed")
    refused(lambda: mnist(tmp_path / "no"), "nothing there", tmp_path / "no")
    (tmp_path / "file").touch()
    refused(lambda: mnist(tmp_path / "file"), "found a file")
    refused(lambda: mnist(tmp_path), "train-images-idx3-ubyte", "found none", "data.path")


def test_mnist_refuses_a_missing_file_counts_that_differ_and_another_size(folder):
    style = next(path.name for path in folder.iterdir() if "t10k-images" in path.name)
    write(folder, style, idx(IMAGES[:4]))
    refused(lambda: mnist(folder, 2), "t10k-labels", "4 images and 5 labels")
    write(folder, style, idx(IMAGES[:5, :8, :8].contiguous()))
    refused(lambda: mnist(folder, 2), "t10k-images", "28x28", "8x8")
    (folder / style).unlink()
    refused(lambda: mnist(folder, 2), "t10k-images", "found none")


GOOD = idx(IMAGES)
BAD = {
    "empty": (b"", ("IDX header of 16 bytes", "0 bytes")),
    "short header": (GOOD[:9], ("16 bytes", "9 bytes")),
    "truncated": (GOOD[:-1], (16 + IMAGES.numel(),)),
    "too long": (GOOD + b"\0", (16 + IMAGES.numel(),)),
    "labels": (idx(LABELS) + bytes(20), ("0x00000803", "0x00000801", "swapped")),
    "wrong type": (idx(IMAGES, magic=bytes([0, 0, 0x0D, 3])), ("unsigned bytes", "0x00000d03")),
    "not IDX": (b"<html>" * 100, ("0x3c68746d",)),
    "no images": (idx(IMAGES[:0]), ("at least one value",)),
    "claims 8 TB": (idx(IMAGES, shape=(2**33 // 784 % 2**32, 2**20, 28)), ("promises",)),
    "claims 500 MB": (idx(IMAGES, shape=(5 * 10**8 // 784, 28, 28)), ("499999936 bytes",)),
}


@pytest.mark.parametrize("case", BAD)
def test_idx_refuses_plain_files(case, tmp_path):
    content, words = BAD[case]
    write(tmp_path, "file", content)
    refused(lambda: read_idx(tmp_path / "file", 3), tmp_path / "file", "expected", "found", *words)


@pytest.mark.parametrize("case", BAD)
def test_idx_refuses_gzip_files(case, tmp_path):
    write(tmp_path, "file.gz", BAD[case][0])
    refused(lambda: read_idx(tmp_path / "file.gz", 3), tmp_path / "file.gz", "expected", "found")


@pytest.mark.parametrize(
    "content",
    [GOOD, gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:200] + b"\xff" * 500, gzip.compress(GOOD) + b"more"],
    ids=["plain", "cut", "damaged", "trailing"],
)
def test_idx_refuses_damaged_gzip(content, tmp_path):
    (tmp_path / "file.gz").write_bytes(content)
    refused(lambda: read_idx(tmp_path / "file.gz", 3), "whole gzip file", "get the file again")


def test_idx_never_unpacks_more_than_the_header_promises(tmp_path, monkeypatch):
    write(tmp_path, "bomb.gz", GOOD + bytes(2**24))
    taken, original = [], gzip.GzipFile.read

    def read(self, size=-1):
        taken.append(size)
        return original(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    refused(lambda: read_idx(tmp_path / "bomb.gz", 3), "more than that")
    assert min(taken) >= 0 and sum(taken) <= len(GOOD) + 1


def test_idx_refuses_an_unreadable_path(tmp_path):
    refused(lambda: read_idx(tmp_path, 3), "readable file")


# --- mixture2d


def test_mixture_density_is_a_density():
    density = mixture2d(10, 10, 10).density
    weights, means, covariances = (density[key] for key in ("weights", "means", "covariances"))
    assert math.isclose(weights.sum(), 1.0, abs_tol=1e-12) and weights.unique().numel() > 1
    assert all(value.dtype == torch.float64 for value in density.values())
    assert torch.linalg.eigvalsh(covariances).min() > 0
    assert covariances[:, 0, 1].abs().min() > 0.01, "every component is correlated"
    mean = weights @ means
    moment = torch.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None, :])
    assert mean.abs().max() < 0.05 and (moment - torch.eye(2)).abs().max() < 0.05


def test_mixture_samples_follow_the_density():
    data = mixture2d()
    assert (data.shape, data.levels, data.train.dtype) == ((2,), None, torch.float32)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [20000, 1000, 1000]
    weights, means, covariances = data.density.values()
    mean = weights @ means
    moment = torch.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None, :])
    x = data.train.double()
    assert (x.mean(0) - mean).abs().max() < 5 / 20000**0.5
    assert (x.T @ x / len(x) - moment).abs().max() < 10 / 20000**0.5


def test_mixture_log_density_of_samples_is_the_negative_entropy():
    """Mean log p of two independent sets agree: ties the correlations' signs of samples and density."""
    data = mixture2d()
    weights, means, covariances = data.density.values()
    components = torch.distributions.MultivariateNormal(means, covariances)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), components)
    torch.manual_seed(0)
    ours, theirs = mixture.log_prob(data.train.double()), mixture.log_prob(mixture.sample((20000,)))
    assert abs(ours.mean() - theirs.mean()) < 5 * (ours.var() / 20000 * 2) ** 0.5


def test_mixture_test_split_ignores_the_amount_of_training_data():
    few, many = mixture2d(train=10), mixture2d(train=1000)
    assert torch.equal(few.test, many.test) and torch.equal(few.validation, many.validation)
    assert not torch.equal(few.test, mixture2d(train=10, seed=1).test)
    refused(lambda: mixture2d(train=0), "data.train", "found 0")


# --- digits to compare with


@pytest.mark.parametrize("other", [digits_inverted, digits_shuffled])
def test_altered_digits_have_the_form_of_the_digits(other):
    own, altered = digits(), other()
    assert (altered.shape, altered.levels, altered.name) == (own.shape, own.levels, other.__name__)
    for split in ("train", "validation", "test"):
        a, b = getattr(own, split), getattr(altered, split)
        assert b.dtype == a.dtype and b.shape == a.shape and not torch.equal(a, b)
        assert torch.equal(own.labels[split], altered.labels[split])
    assert torch.equal(other().test, altered.test)


def test_what_is_altered():
    own, inverted, shuffled = digits(), digits_inverted(), digits_shuffled()
    assert (own.test + inverted.test == 16).all()
    assert torch.equal(own.test.flatten(1).sort().values, shuffled.test.flatten(1).sort().values)
    order = [own.test[i].flatten().argsort().tolist() for i in (0, 1)]
    assert order != [shuffled.test[i].flatten().argsort().tolist() for i in (0, 1)]
    assert not torch.equal(shuffled.test, digits_shuffled(seed=1).test)
