"""CIFAR-10 in both official versions, of few images: made here as they are made there, and tampered with."""

import gzip
import io
import os
import struct
import tarfile

import pytest
import torch
from refusals import refused

from experiments import cifar
from experiments.cifar_batches import read_batch
from experiments.data import DataError, cifar10
from experiments.tar import tar_members

NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
ROWS = 4
generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (6, ROWS, 3072), generator=generator, dtype=torch.uint8)
LABELS = torch.randint(0, 10, (6, ROWS), generator=generator, dtype=torch.uint8)


def binary(part):
    return torch.cat((LABELS[part][:, None], IMAGES[part]), dim=1).numpy().tobytes()


class Python2:
    """The stream that Python 2.7's cPickle writes of a batch by protocol 2, memo after memo."""

    def __init__(self):
        self.memos = 0

    def memo(self):
        self.memos += 1
        return b"q" + bytes([self.memos]) if self.memos < 256 else b"r" + struct.pack("<I", self.memos)

    def text(self, value):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<I", len(value))) + value + self.memo()

    def number(self, value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    def strings(self, values):
        return b"]" + self.memo() + b"(" + b"".join(self.text(value) for value in values) + b"e"

    def numbers(self, values):
        return b"]" + self.memo() + b"(" + b"".join(map(self.number, values)) + b"e"

    def array(self, rows, raw, columns_first=False, dtype=b"u1", module=b"numpy.core.multiarray"):
        out = b"c" + module + b"\n_reconstruct\n" + self.memo() + b"cnumpy\nndarray\n" + self.memo()
        out += b"K\x00\x85" + self.memo() + self.text(b"b") + b"\x87" + self.memo() + b"R" + self.memo()
        out += b"(K\x01" + self.number(rows) + self.number(3072) + b"\x86" + self.memo()
        out += (
            b"cnumpy\ndtype\n" + self.memo() + self.text(dtype) + b"K\x00K\x01\x87" + self.memo() + b"R" + self.memo()
        )
        out += b"(K\x03" + self.text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + self.memo() + b"b"
        return out + (b"\x88" if columns_first else b"\x89") + self.text(raw) + b"t" + self.memo() + b"b"

    def batch(self, part, columns_first=False, **options):
        raw = (IMAGES[part].T.contiguous() if columns_first else IMAGES[part]).numpy().tobytes()
        out = b"\x80\x02}" + self.memo() + b"("
        out += self.text(b"batch_label") + self.text(b"training batch 1 of 5")
        out += self.text(b"labels") + self.numbers(LABELS[part].tolist())
        out += self.text(b"data") + self.array(ROWS, raw, columns_first, **options)
        out += self.text(b"filenames") + self.strings([b"a_%d.png" % i for i in range(ROWS)])
        return out + b"u."


def python(part, **options):
    return Python2().batch(part, **options)


VERSIONS = {
    "binary": ("cifar-10-batches-bin", ".bin", binary),
    "python": ("cifar-10-batches-py", "", python),
    "python, columns first": ("cifar-10-batches-py", "", lambda part: python(part, columns_first=True)),
}


def members(version):
    folder, end, make = VERSIONS[version]
    files = {f"{folder}/{name}{end}": make(i) for i, name in enumerate(NAMES)}
    return files | {f"{folder}/readme.html": b"<html>", f"{folder}/batches.meta": b"not read"}


def archived(path, files, *more, compress=True):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in more:
            archive.addfile(member)
    path.write_bytes(gzip.compress(buffer.getvalue()) if compress else buffer.getvalue())
    return path


def unpacked(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("where", ["archive", "plain archive", "folder", "folder above"])
@pytest.mark.parametrize("version", VERSIONS)
def test_all_images_and_labels_in_the_official_order(tmp_path, version, where):
    files = members(version)
    path = tmp_path / "a.tar.gz"
    if "archive" in where:
        archived(path, files, compress=where == "archive")
    else:
        path = unpacked(tmp_path, files) / ("." if where == "folder above" else VERSIONS[version][0])
    data = cifar10(path, validation=3)
    assert (data.name, data.shape, data.levels, data.flips) == ("cifar10", (3, 32, 32), 256, True)
    assert torch.equal(torch.cat((data.train, data.validation)), IMAGES[:5].reshape(-1, 3, 32, 32))
    assert torch.equal(data.test, IMAGES[5].view(-1, 3, 32, 32)) and len(data.validation) == 3
    assert torch.equal(torch.cat((data.labels["train"], data.labels["validation"])), LABELS[:5].flatten().long())
    assert torch.equal(data.labels["test"], LABELS[5].long())
    assert not cifar10(path, validation=3, flip=False).flips


def test_red_comes_before_green_and_rows_before_columns(tmp_path):
    image = cifar10(unpacked(tmp_path, members("binary")), validation=1).train[0]
    assert image[1, 2, 5] == IMAGES[0, 0, 1024 + 2 * 32 + 5]


# --- archives that are not what they should be


def test_paths_and_missing_batches(tmp_path):
    refused(lambda: cifar10(), "data.path=PATH is needed", "cifar-10-binary.tar.gz")
    refused(lambda: cifar10(tmp_path / "no"), "nothing there")
    refused(lambda: cifar10(tmp_path), "data_batch_1 to data_batch_5", "none of them")
    files = members("binary")
    del files["cifar-10-batches-bin/data_batch_3.bin"]
    for path in (archived(tmp_path / "a.tar.gz", files), unpacked(tmp_path / "b", files)):
        refused(lambda path=path: cifar10(path), path, "data_batch_5.bin, test_batch.bin")
    refused(lambda: cifar10(unpacked(tmp_path / "c", members("binary")), validation=20), "1 to 19", "20")


def link(name, kind, target="target"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../../evil"),
        tarfile.TarInfo("/etc/evil"),
        tarfile.TarInfo("a/../../data_batch_1.bin"),
        link("data_batch_1.bin", tarfile.SYMTYPE, "/etc/passwd"),
        link("x/other", tarfile.LNKTYPE),
        link("pipe", tarfile.FIFOTYPE),
        link("device", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_members_outside_and_links_are_refused_and_nothing_is_written(tmp_path, member):
    path = archived(tmp_path / "a.tar.gz", members("binary"), member)
    refused(lambda: cifar10(path), path, member.name)
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_members_twice_or_too_large_are_refused(tmp_path, monkeypatch):
    files = members("binary")
    path = archived(tmp_path / "a.tar.gz", files | {"other/test_batch.bin": binary(0)})
    refused(lambda: cifar10(path), "a second test_batch.bin")
    archived(path, files)
    limit = len(binary(0))
    assert len(tar_members(path, ["test_batch.bin"], limit, 2**20)["test_batch.bin"]) == limit
    refused(lambda: tar_members(path, ["test_batch.bin"], limit - 1, 2**20), f"test_batch.bin of {limit} bytes")
    monkeypatch.setattr(cifar, "LIMIT", limit - 1)
    refused(lambda: cifar10(unpacked(tmp_path / "b", files)), "data_batch_1.bin", f"at most {limit - 1} bytes")


def test_a_bomb_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb") as file:
        member = tarfile.TarInfo("x")
        member.size = 2**30
        file.write(member.tobuf())
        file.write(bytes(2**24))
    refused(lambda: tar_members(path, ["y"], 2**20, 2**21), f"at most {2**21} bytes when unpacked")


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -30])
@pytest.mark.parametrize("compress", [True, False])
def test_truncated_archives_are_refused(tmp_path, keep, compress):
    path = archived(tmp_path / "a.tar.gz", members("binary"), compress=compress)
    end = keep if compress or keep >= 0 else 30000
    path.write_bytes(path.read_bytes()[:end])
    refused(lambda: cifar10(path), path, "expected")


def test_batches_of_another_size_or_other_labels_are_refused(tmp_path):
    files, name = members("binary"), "cifar-10-batches-bin/data_batch_2.bin"
    for content in (b"", binary(0)[:-1], binary(0) + b"\0"):
        folder = unpacked(tmp_path, files | {name: content})
        refused(lambda folder=folder: cifar10(folder), "data_batch_2.bin", "a multiple of 3073 bytes", len(content))
    folder = unpacked(tmp_path, files | {name: b"\x0a" + binary(0)[1:]})
    refused(lambda: cifar10(folder), "labels 0 to 9", "found 10", "not CIFAR-10")


# --- the streams of Python


def refused_stream(tmp_path, content, *words):
    refused(lambda: read_batch(tmp_path / "data_batch_1", content), "data_batch_1", "expected", "found", *words)


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"\x80\x02cposix\nsystem\nU\x0ctouch MARKER\x85R.",
        b"\x80\x02c__builtin__\nfile\nU\x06MARKERU\x01w\x86R.",
        b"\x80\x02cnumpy\nload\nU\x06MARKER\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
        b"(ios\nsystem\nU\x0ctouch MARKER.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02\x82\x01.",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
    ],
    ids=range(9),
)
def test_streams_that_name_or_call_anything_else_are_refused(tmp_path, stream, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_stream(tmp_path, stream)
    assert not os.listdir(tmp_path)


def test_the_official_stream_changed_in_one_name_is_refused(tmp_path):
    read_batch(tmp_path, python(0))
    read_batch(tmp_path, python(0, module=b"numpy._core.multiarray"))
    refused_stream(tmp_path, python(0, module=b"os"), "os _reconstruct", "could run code")
    refused_stream(tmp_path, python(0, dtype=b"O8"), "unsigned bytes")
    refused_stream(tmp_path, python(0, dtype=b"u2"), "unsigned bytes")


def test_a_stream_cut_anywhere_is_refused(tmp_path):
    content = python(0)
    raw = content.index(IMAGES[0].numpy().tobytes())
    assert read_batch(tmp_path, content)[0].shape == (ROWS, 3072)
    for length in [*range(raw), *range(raw, len(content) - 200, 997), *range(len(content) - 200, len(content))]:
        refused_stream(tmp_path, content[:length])


def test_a_stream_changed_anywhere_is_read_or_refused(tmp_path):
    """A thousand streams with a byte or four changed outside of the pixels: nothing else is raised."""
    content, draw = python(0), torch.Generator().manual_seed(1)
    raw = content.index(IMAGES[0].numpy().tobytes())
    outside = [*range(raw), *range(raw + ROWS * 3072, len(content))]
    where = torch.randint(len(outside), (1000, 4), generator=draw)
    what = torch.randint(256, (1000, 4), generator=draw)
    good = 0
    for i, (at, to) in enumerate(zip(where.tolist(), what.tolist(), strict=True)):
        changed = bytearray(content)
        for place, value in list(zip(at, to, strict=True))[: 1 + 3 * (i % 2)]:
            changed[outside[place]] = value
        try:
            images, labels = read_batch(tmp_path, bytes(changed))
        except DataError:
            continue
        assert images.shape == (ROWS, 3072) and labels.dtype == torch.int64
        good += 1
    assert 0 < good < 1000


def test_a_stream_of_nested_lists_costs_nothing(tmp_path):
    """Each list holds the one before it twice: 2^60 values to whoever walks through them."""
    bomb = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    refused_stream(tmp_path, bomb + b".")
    refused_stream(tmp_path, b"\x80\x02}(U\x04data" + bomb[2:] + b"U\x06labels]u.")
