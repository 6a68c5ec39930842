r"""Sealed archives: tensors and plain values in one file that is complete, unharmed and free of code, or else refused.

The file is what ``torch.save`` writes, an uncompressed ZIP archive, whose comment holds the SHA-256 of all that comes
before it: other programs still read it by ``torch.load(weights_only=True)``, and any byte that changed is found before
anything is parsed. The digest finds accidents, not malice, for whoever changes a file can compute it anew. Hence what
is parsed is limited as well: entries that are not compressed and no longer than the file, and a pickle that names
tensors and dictionaries only and is not nested so deeply that Python would crash on it.
"""

import errno
import hashlib
import os
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from experiments.run import replacing

_MARK = b"sha256:"
_HEX = 64
_COMMENT = (len(_MARK) + _HEX).to_bytes(2, "little") + _MARK  # the length of a ZIP archive's comment, and its beginning
_SEAL = len(_COMMENT) + _HEX
_END = b"PK\x05\x06"  # how the last record of a ZIP archive begins, 22 bytes long without a comment
_CHUNK = 1 << 20
_LONGEST_PICKLE, _MOST_OPCODES, _DEEPEST = 1 << 26, 5_000_000, 200
_EXTENDING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_GLOBALS = re.compile(
    r"collections OrderedDict|torch Size|torch device|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch (\w+Storage|bool|[a-z]+\d+(_\w+)?)|torch\.storage UntypedStorage"
)
_SCALARS = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)
_MOST_LEAVES = 1_000_000
_CONTAINERS = (dict, OrderedDict, list, tuple)


class CheckpointError(ValueError):
    """A checkpoint that can't be used. ``path``: the file; ``reason``: what is wrong with it."""

    def __init__(self, path: Path | str | None, reason: str, cure: str = "take another checkpoint, or train again"):
        super().__init__(path, reason, cure)
        self.path, self.reason, self.cure = path, reason, cure

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.cure}" if self.path else f"{self.reason}; {self.cure}"


class _Hashing:
    """A file whose digest is known when it has been written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch may raise something else for it
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``; a crash at any moment leaves the old file or the new one.

    Raises ``TypeError`` for what can't be read again, ``OSError`` where the disk is full, say.
    """
    require_plain(content)
    file = None
    try:
        with replacing(path) as opened:
            file = _Hashing(opened)
            torch.save(content, file)
            opened.seek(-2, os.SEEK_END)
            opened.write(_COMMENT + file.digest.hexdigest().encode())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else file and file.error
        if cause is None:
            raise
        raise _unwritten(cause, path, size(content)) from error


def _unwritten(error: OSError, path: Path, needed: int) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    cure = "make room there, or choose another hydra.run.dir" if error.errno == errno.ENOSPC else "choose another path"
    text = f"{reason}: the checkpoint needs {needed:,} bytes and could not be written; what is there already is whole"
    return OSError(error.errno or errno.EIO, f"{text}; {cure}", str(path))


def leaves(value: Any, where: tuple = (), seen: set[int] | None = None) -> Iterator[tuple[tuple, Any]]:
    """What nested dicts, lists and tuples hold, each of which is looked into once, and the keys that lead there."""
    seen = set() if seen is None else seen
    if type(value) not in _CONTAINERS:
        yield where, value
    elif id(value) not in seen:
        seen.add(id(value))
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if type(key) not in (str, int):
                raise TypeError(f"{_path(where)} has {shown(key)} for a key, which is neither a string nor an integer")
            yield from leaves(child, (*where, key), seen)


def _path(where: tuple) -> str:
    return "checkpoint" + "".join(f"[{shown(key)}]" for key in where)


def shown(value: Any) -> str:
    """A value for a message. Only the kind of what may be large, or refers to itself, as in a file from elsewhere."""
    if type(value) in (type(None), bool, int, float, str):
        return repr(value) if type(value) is not str or len(value) < 60 else f"{value[:60]!r}..."
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace(" builtins.", " ")


def require_plain(value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor or a plain value, or a dict, list or tuple of these."""
    for i, (where, leaf) in enumerate(leaves(value)):
        if i == _MOST_LEAVES:
            raise TypeError(f"{_path(where)}: a checkpoint can hold {i:,} values; store long lists as tensors")
        if type(leaf) in (Tensor, Parameter):
            _require_dense(leaf, where)
        elif type(leaf) not in _SCALARS:
            cure = "store numbers, strings, tensors, and dicts, lists and tuples of these"
            raise TypeError(f"{_path(where)} is {shown(leaf)}, which a checkpoint can't hold: {cure}")


def _require_dense(value: Tensor, where: tuple) -> None:
    dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        reason = "is not a tensor with a number in memory for each of its elements; clone() makes one"
        raise TypeError(f"{_path(where)} {reason}")


def tensors(value: Any) -> list[Tensor]:
    """All tensors within nested dicts, lists and tuples."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def size(value: Any) -> int:
    """Bytes of all tensors within."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The verified content of a file, and its digest, None of one that was written before there were digests.

    Raises ``CheckpointError``, for whatever reason it can't be read.
    """
    try:
        with path.open("rb") as file:
            digest = _verified(path, file)
            _require_stored(path, file, digest is None)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        require_plain(content)
        return content, digest
    except CheckpointError:
        raise
    except Exception as error:  # torch's and zipfile's readers raise a dozen types
        reason = f"not a readable checkpoint ({type(error).__name__}: {_first_line(error)})"
        raise CheckpointError(path, reason) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _verified(path: Path, file: BinaryIO) -> str | None:
    """The digest, where it is that of the file; None where an archive has none."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _SEAL))
    end = file.read(_SEAL)
    if end[-22:].startswith(_END) and end.endswith(b"\0\0"):
        return None
    if not end.startswith(_COMMENT) or len(end) < _SEAL:
        raise CheckpointError(path, "not a readable checkpoint: it is cut short, damaged, or another kind of file")
    if end[-_HEX:].decode("latin1") != _digest(file, length - _SEAL):
        raise CheckpointError(path, "damaged: its content doesn't have the SHA-256 digest that was written with it")
    return end[-_HEX:].decode()


def _digest(file: BinaryIO, length: int) -> str:
    """SHA-256 of the archive as it was before its comment was written."""
    found = hashlib.sha256()
    file.seek(0)
    for start in range(0, length, _CHUNK):
        found.update(file.read(min(_CHUNK, length - start)))
    found.update(b"\0\0")  # the length of no comment
    return found.hexdigest()


def _require_stored(path: Path, file: BinaryIO, check_sums: bool) -> None:
    """Refuse an archive that would unpack to more than it is, or whose pickle is more than tensors and plain values."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        if not stored or sum(e.file_size for e in entries) > file.seek(0, os.SEEK_END):
            raise CheckpointError(path, "its entries are compressed, or longer than the file itself")
        if len({e.filename for e in entries}) < len(entries):
            raise CheckpointError(path, "two of its entries have one name")
        if check_sums and (bad := archive.testzip()):
            raise CheckpointError(path, f"damaged: the check sum of its entry {bad} is wrong")
        pickles = [e for e in entries if e.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LONGEST_PICKLE:
            raise CheckpointError(path, "not a readable checkpoint: it has not one pickle of a sensible size")
        _require_harmless(path, archive.read(pickles[0]))


def _require_harmless(path: Path, stream: bytes) -> None:
    """Refuse a pickle that names anything but tensors, or is nested absurdly; nothing of it is executed.

    To hash a tuple some 50,000 deep crashes Python, and one that holds the same tuple twice, and so on, takes forever.
    Hence the depth of what is on the stack is followed, and how much it is when it is unfolded.
    """
    stack: list[_Nesting | None] = []  # None is a mark
    memo: dict[int, _Nesting] = {}
    for i, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if i == _MOST_OPCODES:
            raise CheckpointError(path, f"refused: its pickle has more than {i:,} instructions")
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _GLOBALS.fullmatch(argument or ""):
            raise CheckpointError(path, f"refused: it names {shown(argument)} to be called, and that is no tensor")
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif not opcode.stack_before:  # most of them: a mark, a number, a string
            stack.extend([None if made is pickletools.markobject else _LEAF for made in opcode.stack_after])
        else:
            around = _Nesting.around(_popped(stack, opcode), opcode.name in _EXTENDING)
            stack.extend([around] * len(opcode.stack_after))
            if around.depth > _DEEPEST or around.unfolded > 2 * _LONGEST_PICKLE:
                raise CheckpointError(path, f"refused: its values are nested more than {_DEEPEST} deep, or endlessly")


class _Nesting(NamedTuple):
    """How deep a value is, and how many values it is, unfolded."""

    depth: int
    unfolded: int

    @classmethod
    def around(cls, parts: list["_Nesting"], extended: bool) -> "_Nesting":
        """What holds the parts: a new value, or the last of them where that one is ``extended`` by the others."""
        inner, depth = (parts[:-1], parts[-1].depth) if extended else (parts, 1)
        return cls(max([depth, *(1 + part.depth for part in inner)]), 1 + sum(part.unfolded for part in parts))


_LEAF = _Nesting(1, 1)


def _popped(stack: list[_Nesting | None], opcode: pickletools.OpcodeInfo) -> list[_Nesting]:
    """Take from the stack what the opcode takes."""
    taken = []
    for what in reversed(opcode.stack_before):
        if what is pickletools.stackslice:
            while stack[-1] is not None:
                taken.append(stack.pop())
        else:
            taken.append(stack.pop())
    return [part for part in taken if part is not None]
