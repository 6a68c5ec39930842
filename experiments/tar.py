"""Members of archives, read into memory by their names: nothing is ever unpacked onto the disk.

The names wanted form a closed list. A tar archive is read once from its start to its end, so that a gzip bomb costs no
more than the limit on the unpacked whole; any member that is neither a regular file nor a folder, or that lies outside
the archive (an absolute path, or one with ..), is the mark of a made-up archive and refused.
"""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from experiments.dataset import explained, fault

GZIP = b"\x1f\x8b"
_DAMAGED = ("tar archive", tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError)


class _Limited:
    """A file of which no more than ``limit`` bytes can be read."""

    def __init__(self, path: Path, file: BinaryIO, limit: int):
        self.path, self.file, self.left, self.limit = path, file, limit, limit

    def read(self, size: int) -> bytes:
        content = self.file.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise fault(self.path, f"at most {self.limit} bytes when unpacked", "more")
        return content


def tar_members(path: Path, wanted: Collection[str], limit: int, whole: int) -> dict[str, bytes]:
    """The contents of the members of a tar archive, gzipped or not, whose last name is one of ``wanted``.

    limit, whole: bytes that a member, and the unpacked archive, may have at most. Raises DataError.
    """
    found: dict[str, bytes] = {}
    with explained(path, *_DAMAGED), _opened(path) as file, _tar(_Limited(path, file, whole)) as archive:
        for member in archive:
            name = _checked(path, member).name
            if member.isdir() or name not in wanted:
                continue
            if name in found or member.size > limit:
                words = f"a second {name}" if name in found else f"{name} of {member.size} bytes"
                raise fault(path, f"each member once, of at most {limit} bytes", words)
            found[name] = archive.extractfile(member).read()
    return found


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")


def _tar(file: _Limited) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|")


def _tar(file: _Limited) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|")


def _checked(path: Path, member: tarfile.TarInfo) -> PurePosixPath:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise fault(path, "members inside the archive", f"the path {member.name!a}")
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise fault(path, "regular files and folders", f"{member.name!a}, a link or a device")
    return name
