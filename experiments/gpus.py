"""A GPU of its own for each process of a sweep, where a machine has several.

A process takes the first GPU that no other process of the sweep holds, by a lock in the sweep's folder that it keeps
until it ends, and makes it the current one. Where all are held, its job's number decides.
"""

import socket
from pathlib import Path
from typing import BinaryIO

import torch

from experiments.run import locked

FOLDER = ".gpus"
_held: dict[Path, tuple[int, BinaryIO]] = {}


def device_for(name: str, sweep: Path, job: int, count: int | None = None) -> str:
    """The device for a job of the sweep in a folder: ``name``, or a GPU of its own in place of "auto" and "cuda".

    ``job``: its number. ``count``: of the GPUs to choose from; those that torch sees, by default.
    """
    count = torch.cuda.device_count() if count is None else count
    if name not in ("auto", "cuda") or count < 2:
        return name
    chosen = _choose(sweep / FOLDER, job, count)
    if torch.cuda.is_available():
        torch.cuda.set_device(chosen)
    return f"cuda:{chosen}"


def _choose(folder: Path, job: int, count: int) -> int:
    """The number of the GPU that this process holds, takes now, or shares."""
    if folder in _held:
        return _held[folder][0]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        lock = locked(folder, f"{socket.gethostname()}-{number}")
        if lock is not None:
            _held[folder] = number, lock
            return number
    return job % count
