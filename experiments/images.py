"""Folders of pictures, read through Pillow into unsigned bytes.

The headers are read first: the sizes must agree, and memory is taken only for what they come to. Files are taken in
the order of their names, byte by byte, and the seed then draws the splits from it; hidden files and what is no picture
by its suffix are passed over, and links to folders are not followed. The picture as it is stored counts: alpha is
dropped, and a camera's note on its orientation is not obeyed.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.dataset import LIMIT, Data, DataError, cut, existing, fault, permutation, shown, sizes

log = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff")
PIXELS = 2**26  # of one file
_GREY, _DEEP = ("1", "L", "LA"), ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Header(NamedTuple):
    """Width and height of a picture, and whether it is grey."""

    size: tuple[int, int]
    grey: bool


def image_folder(
    path: str | None = None,
    size: int | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    on_error: str = "error",
    flip: bool = False,
    name: str | None = None,
) -> Data:
    """The pictures of a folder: (1 or 3, H, W), 256 levels; grey where all are, and RGB otherwise.

    path: the folder; where it has sub-folders with pictures, these are the classes, in the order of their names.
    size: the centre square of each picture, resized (antialiased) to size x size; null: all must be of one size.
    validation, test: fractions, or numbers of pictures, that the seed draws for these splits.
    on_error: "error", or "skip" files that can't be read, which are counted and named in the log.
    flip: whether training may mirror images. name: of the data set, the folder's own by default.
    Raises DataError that names the file, what was expected and found, and the cure.
    """
    _check(size, on_error)
    folder = existing(path, "a folder of pictures", folder=True)
    files, found = _files(folder), _Skipped(on_error)
    headers = {file: header for file in files if (header := found.of(_header, file))}
    images, kept = _decoded(folder, _in_order(list(headers), seed), headers, size, found)
    found.report(len(files))
    wanted = sizes(len(kept), validation, test)
    classes = _classes(folder, kept)
    labels = cut(classes, wanted) if classes is not None else None
    return Data(name or shown(folder.resolve().name), **cut(images, wanted), levels=256, labels=labels, flips=flip)


def _check(size: int | None, on_error: str) -> None:
    if on_error not in ("error", "skip"):
        raise DataError(f"data.on_error: expected error or skip, found {on_error!r}.")
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"data.size: expected a positive number of pixels or null, found {size!r}.")


def _files(folder: Path) -> list[Path]:
    """All pictures below the folder, sorted by the bytes of their paths."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        pictures = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [Path(place, name) for name in pictures]
    found = sorted((file for file in found if os.path.isfile(file)), key=os.fsencode)
    if not found:
        raise fault(folder, f"pictures ({', '.join(SUFFIXES)})", "none", "change data.path")
    return found


def _unreadable(error: OSError) -> None:
    raise fault(Path(error.filename), "a readable folder", error.strerror, "check its permissions") from None


def _in_order(files: list[Path], seed: int) -> list[Path]:
    return [files[i] for i in permutation(len(files), seed).tolist()]


class _Skipped:
    """What becomes of files that can't be read."""

    def __init__(self, on_error: str):
        self.on_error, self.errors = on_error, []

    def of(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """What ``read`` makes of a file, or None where it can't and that is allowed."""
        try:
            return read(*arguments)
        except DataError as error:
            if self.on_error == "error":
                raise
            self.errors.append(error)
            return None

    def report(self, count: int) -> None:
        if self.errors:
            log.warning("%d of %d files skipped; the first: %s", len(self.errors), count, self.errors[0])


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image

    cure = "take it out, or say data.on_error=skip"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are counted here
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise fault(file, f"at most {PIXELS} pixels", "a header that promises far more", cure) from None
    except Exception as error:  # a decoder may raise anything on damaged files
        raise fault(file, "a whole picture", f"{type(error).__name__}: {shown(str(error))}"[:300], cure) from None


def _header(file: Path) -> Header:
    cure = "take it out, or say data.on_error=skip"
    with _opened(file) as image:
        if image.width * image.height > PIXELS:
            raise fault(file, f"at most {PIXELS} pixels", f"{image.width}x{image.height}", cure)
        if image.mode in _DEEP:
            raise fault(file, "8 bits a channel", f"the mode {image.mode}", "convert it, or save the set as .npy")
        return Header(image.size, image.mode in _GREY)


def _decoded(
    folder: Path, files: list[Path], headers: dict[Path, Header], size: int | None, found: _Skipped
) -> tuple[Tensor, list[Path]]:
    """The pictures (N, C, H, W), and the files that they are from."""
    if not files:
        raise fault(folder, "pictures that can be read", f"none; the first: {found.errors[0]}", "change data.path")
    grey = all(header.grey for header in headers.values())
    width, height = _common(files, headers) if size is None else (size, size)
    needed = len(files) * (1 if grey else 3) * width * height
    if needed > LIMIT:
        cure = "give a smaller data.size, or save them as one .npy file, which data=npy maps and does not read"
        raise fault(folder, f"at most {LIMIT} bytes of pictures", f"{needed}", cure)
    images, kept = torch.empty(len(files), 1 if grey else 3, height, width, dtype=torch.uint8), []
    for file in files:
        pixels = found.of(_pixels, file, "L" if grey else "RGB", size)
        if pixels is not None:
            images[len(kept)] = pixels
            kept.append(file)
    return images[: len(kept)], kept


def _common(files: list[Path], headers: dict[Path, Header]) -> tuple[int, int]:
    first = headers[files[0]].size
    for file in files:
        if headers[file].size != first:
            here, there = ("x".join(map(str, found)) for found in (headers[file].size, first))
            like = shown(files[0].name)
            raise fault(file, f"{there} pixels, as in {like}", here, "give data.size=N to crop and resize")
    return first


def _pixels(file: Path, mode: str, size: int | None) -> Tensor:
    from PIL import Image

    with _opened(file) as image:
        image = image.convert(mode)
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # Cropped first: a resize of a box would mix in what lies around it.
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def _classes(folder: Path, files: list[Path]) -> Tensor | None:
    """The class of each file by its sub-folder; None where there are fewer than two."""
    names = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    known = sorted({name for name in names if name is not None}, key=os.fsencode)
    if None in names and known:
        loose = next(file for file, name in zip(files, names, strict=True) if name is None)
        raise fault(loose, f"all pictures in sub-folders, as in {shown(known[0])}", "one beside them", "move it")
    return torch.tensor([known.index(name) for name in names]) if len(known) > 1 else None
