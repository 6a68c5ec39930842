"""IDX files, the format of MNIST: two zero bytes, a type byte, the rank, big-endian uint32 sizes, then the values.

Format: the "IDX file format" of LeCun, Cortes and Burges' MNIST page. Files come from outside, so that nothing is
allocated on the word of a header alone: a plain file must have the size that its header implies, and a gzip file is
unpacked in pieces and never beyond one byte more than its header implies.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from experiments.dataset import DataError, explained, fault

__all__ = ["DataError", "read_at_most", "read_idx"]
_DAMAGED = ("gzip file", EOFError, zlib.error, gzip.BadGzipFile)

UNSIGNED_BYTE = 0x08
LIMIT = 2**30  # bytes of one unpacked file; the largest relatives of MNIST (814,255 images) hold 0.64e9
DEFLATE_RATIO = 1032  # deflate cannot expand a byte to more
PIECE = 2**20


def read_idx(path: Path, rank: int) -> Tensor:
    """The values of an IDX file of unsigned bytes, plain or (name ends in `.gz`) gzip.

    rank: the number of dimensions it must have (3 for images, 1 for labels).
    Returns uint8 of the shape in the header. Raises DataError for a file that is not exactly that.
    """
    with explained(path, *_DAMAGED), _open(path) as file:
        shape = _shape(path, file.read(4 + 4 * rank), rank)
        _check_size(path, 4 + 4 * rank, shape)
        content = read_at_most(file, math.prod(shape) + 1)
    _check_count(path, len(content), shape)
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _shape(path: Path, header: bytes, rank: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * rank:
        raise fault(path, f"an IDX header of {4 + 4 * rank} bytes", f"only {len(header)} bytes")
    magic = bytes([0, 0, UNSIGNED_BYTE, rank])
    if header[:4] != magic:
        expected = f"the magic number 0x{magic.hex()} (unsigned bytes, {rank} dimensions)"
        raise fault(path, expected, f"0x{header[:4].hex()}", "check that images and labels are not swapped")
    shape = struct.unpack(f">{rank}I", header[4:])
    if 0 in shape:
        raise fault(path, "at least one value", f"the shape {shape}")
    return shape


def _check_size(path: Path, header: int, shape: tuple[int, ...]) -> None:
    """Refuses, before anything is allocated, a header that the size of the file on disk rules out."""
    expected, found = header + math.prod(shape), path.stat().st_size
    if expected > LIMIT:
        raise fault(path, f"at most {LIMIT} bytes", f"a header that promises {expected} (shape {shape})")
    if path.suffix == ".gz" and expected > DEFLATE_RATIO * found:
        raise fault(path, f"{expected} bytes (shape {shape})", f"{found} bytes of gzip, too few to hold them")
    if path.suffix != ".gz" and expected != found:
        raise fault(path, f"{expected} bytes (shape {shape})", f"{found} bytes")


def read_at_most(file: BinaryIO, count: int) -> bytearray:
    """What a file still holds, in pieces, up to ``count`` bytes."""
    content = bytearray()
    while piece := file.read(min(PIECE, count - len(content))):
        content += piece
    return content


def _check_count(path: Path, found: int, shape: tuple[int, ...]) -> None:
    expected = math.prod(shape)
    if found != expected:
        words = "more than that" if found > expected else f"{found}"
        raise fault(path, f"{expected} bytes of values (shape {shape})", words)
