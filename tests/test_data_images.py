"""Folders of pictures: what is read in which order, and files that are damaged, huge or out of place."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from experiments import images as image_module
from experiments.data import image_folder

SPLITS = ("train", "validation", "test")


def picture(path, value=0, size=(6, 4), mode="RGB"):
    """A picture whose pixels tell what it is: red is ``value``, green the column, blue the row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = value, np.arange(size[0]), np.arange(size[1])[:, None]
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in (3, 0, 9, 1, 8, 2, 7, 4, 6, 5):
        picture(tmp_path / "set" / f"{i}.png", value=10 * i)
    return tmp_path / "set"


def whole(data):
    return torch.cat([getattr(data, split) for split in SPLITS])


def test_every_picture_is_in_one_split_pixel_by_pixel(folder):
    data = image_folder(folder, validation=2, test=3)
    assert (data.name, data.shape, data.levels, data.labels, data.flips) == ("set", (3, 4, 6), 256, None, False)
    assert [len(getattr(data, split)) for split in SPLITS] == [5, 2, 3]
    images = whole(data)
    assert sorted(images[:, 0, 0, 0].tolist()) == [10 * i for i in range(10)]
    assert torch.equal(images[:, 1], torch.arange(6, dtype=torch.uint8).expand(10, 4, 6))
    assert torch.equal(images[:, 2], torch.arange(4, dtype=torch.uint8)[:, None].expand(10, 4, 6))


def test_the_splits_are_the_seeds_whatever_the_order_of_the_file_system(folder, monkeypatch):
    data, other = image_folder(folder, flip=True), image_folder(folder, seed=1)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda place, onerror: ((a, b[::-1], c[::-1]) for a, b, c in walk(place)))
    again = image_folder(folder)
    assert all(torch.equal(getattr(data, split), getattr(again, split)) for split in SPLITS)
    assert not torch.equal(whole(data), whole(other)) and data.flips


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(("L", "1", "LA"), 1), (("L", "RGB", "L"), 3), (("P", "RGBA", "RGB"), 3)],
)
def test_grey_where_all_are(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        picture(tmp_path / f"{i}.png", mode=mode)
    assert image_folder(tmp_path, validation=1, test=1).shape == (channels, 4, 6)


def test_other_formats(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.bmp", "d.ppm", "e.webp", "f.tif", "g.gif"):
        picture(tmp_path / name, value=200)
    images = whole(image_folder(tmp_path)).float()
    assert len(images) == 7 and (images[:, 0] - 200).abs().mean() < 8


def test_sub_folders_are_classes(tmp_path):
    for i in range(12):
        picture(tmp_path / ("cat", "ant", "bee")[i % 3] / "deep" / f"{i}.png", value=i % 3)
    data = image_folder(tmp_path, validation=3, test=3)
    of_value = torch.tensor([2, 0, 1])  # ant 0, bee 1, cat 2
    for split in SPLITS:
        assert torch.equal(data.labels[split], of_value[getattr(data, split)[:, 0, 0, 0].long()])
    loose = picture(tmp_path / "z.png")
    refused(lambda: image_folder(tmp_path), loose, "sub-folders, as in ant", "move it")


def test_one_sub_folder_is_no_class(tmp_path):
    for i in range(3):
        picture(tmp_path / "only" / f"{i}.png")
    assert image_folder(tmp_path).labels is None


def test_the_centre_is_cut_out_and_resized_with_antialiasing(tmp_path):
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96] = np.where(np.arange(64) % 2, 255, 0)[None, :, None]  # the centre square, finer than the result
    stripes[:, :32, 0] = 255  # what is cut off
    for i in range(3):
        Image.fromarray(stripes).save(tmp_path / f"{i}.png")
    images = whole(image_folder(tmp_path, size=16)).float()
    assert images.shape == (3, 3, 16, 16)
    assert (images[..., 1:-1] - 127.5).abs().max() < 5, "without antialiasing they are 0 or 255"
    assert torch.equal(images[:, 0], images[:, 1])


# --- faults


def test_paths_and_settings(tmp_path, folder):
    refused(lambda: image_folder(), "data.path=FOLDER is needed", "pictures")
    refused(lambda: image_folder(folder / "3.png"), "found a file")
    (tmp_path / "empty").mkdir()
    refused(lambda: image_folder(tmp_path / "empty"), "empty", "pictures (.png", "found none")
    refused(lambda: image_folder(folder, on_error="ignore"), "error or skip", "ignore")
    refused(lambda: image_folder(folder, size=0), "data.size", "0")
    refused(lambda: image_folder(folder, validation=10), "left to train on", "10 examples")


def test_sizes_that_differ_want_a_size(folder):
    other = picture(folder / "z.png", size=(5, 4))
    refused(lambda: image_folder(folder), "6x4", "5x4", "data.size=N")
    assert image_folder(folder, size=3).shape == (3, 3, 3)
    other.unlink()


def png(width, height, content=b"", text=b""):
    """A PNG file of one's own making: a header of this size, this much text, then this content."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    extra = chunk(b"zTXt", b"a\0\0" + zlib.compress(text)) if text else b""
    return start + extra + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def truncated(folder):
    return (folder / "0.png").read_bytes()[:-40]


DAMAGED = {
    "empty": lambda _: b"",
    "text": lambda _: b"<html>" * 99,
    "truncated": truncated,
    "without pixels": lambda _: png(6, 4),
    "a bomb by its header": lambda _: png(60000, 60000),
    "a smaller bomb": lambda _: png(9000, 12000),
    "at Pillow's own limit": lambda _: png(9459, 9460),
    "a bomb by its text": lambda _: png(6, 4, bytes(4 * 19), bytes(2**21)),
    "another format": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_or_skipped_and_counted(folder, case, caplog):
    (folder / "5.png").write_bytes(DAMAGED[case](folder))
    refused(lambda: image_folder(folder), folder / "5.png", "expected", "found", "data.on_error=skip")
    if case in ("a bomb by its header", "a smaller bomb", "at Pillow's own limit"):
        refused(lambda: image_folder(folder), f"at most {image_module.PIXELS} pixels")
    data = image_folder(folder, on_error="skip", size=4)
    assert len(whole(data)) == 9
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "1 of 10 files skipped" in record.getMessage() and "5.png" in record.getMessage()


def test_the_labels_of_what_is_left_stay_right(tmp_path):
    for i in range(10):
        picture(tmp_path / f"c{i % 2}" / f"{i}.png", value=i % 2)
    (tmp_path / "c1" / "3.png").write_bytes((tmp_path / "c1" / "3.png").read_bytes()[:-40])
    data = image_folder(tmp_path, on_error="skip")
    for split in SPLITS:
        assert torch.equal(data.labels[split], getattr(data, split)[:, 0, 0, 0].long())


def test_nothing_left_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    refused(lambda: image_folder(tmp_path, on_error="skip"), "pictures that can be read", "0.png")


def test_a_folder_that_may_not_be_read_is_not_passed_over(folder, monkeypatch):
    (folder / "secret").mkdir()
    scan = os.scandir

    def refuse(place):
        if os.fspath(place).endswith("secret"):
            raise PermissionError(13, "Permission denied", os.fspath(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(lambda: image_folder(folder), folder / "secret", "a readable folder", "Permission denied")


def test_sixteen_bits_are_not_cut_to_eight(folder):
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(folder / "5.png")
    refused(lambda: image_folder(folder), "5.png", "8 bits a channel", "I;16")


def test_more_than_memory_is_refused_before_it_is_taken(folder, monkeypatch):
    monkeypatch.setattr(image_module, "LIMIT", 10 * 72 - 1)
    taken = []
    monkeypatch.setattr(torch, "empty", lambda *a, **_: taken.append(a))
    refused(lambda: image_folder(folder), "at most 719 bytes", "720", ".npy")
    assert not taken


def test_links_in_a_circle_hidden_files_and_odd_names_do_no_harm(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / ".hidden.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(b"no picture")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    odd = os.fsencode(folder) + b"/\xff\xfe.png"
    try:
        os.rename(folder / "5.png", odd)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    assert len(whole(image_folder(folder))) == 10
    with open(odd, "wb") as file:
        file.write(b"no")
    refused(lambda: image_folder(folder), r"\xff\xfe.png").encode()
