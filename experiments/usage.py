"""What a run took: wall and processor time, and the most memory of the process and of its device.

A plain dictionary for ``summary.json``, with the units in the names. What a platform or device doesn't tell is None.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

# Of Linux. What getrusage says there a process has from the one that started it, if that was larger.
_STATUS = Path("/proc/self/status")
_DEVICE = ("peak_device_allocated_bytes", "peak_device_reserved_bytes")
_highest: dict[str, int] = {}  # what was counted before a count was set back


class Usage:
    """Counts from its construction on: ``usage = Usage(device)``, and ``usage.found()`` at any time.

    The memory of the process is the most since that began, for no system tells less; that of the device is the most
    since construction, in tensors ("allocated") and in all that torch keeps for them ("reserved").
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._wall, self._processor = time.perf_counter(), _processor_seconds()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            for name in _DEVICE:
                _highest.pop(name, None)

    def found(self) -> dict[str, Any]:
        """Plain values: seconds and bytes so far, the device's name, and torch's threads.

        Processor time is that of all threads, and of child processes that have ended.
        """
        return {
            "wall_seconds": time.perf_counter() - self._wall,
            "cpu_seconds": _processor_seconds() - self._processor,
            "peak_memory_bytes": peak_memory(),
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            **self._of_device(),
            "threads": torch.get_num_threads(),
        }

    def _of_device(self) -> dict[str, int | None]:
        if self.device.type != "cuda":
            return dict.fromkeys(_DEVICE)
        return {name: max(peak, _highest.get(name, 0)) for name, peak in _device_peaks(self.device).items()}


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """The most memory while the context is open, in bytes: ``with peak_of(device) as peak: ...; peak()``.

    On a GPU that of torch's tensors; else of the process as a whole, where Linux lets its count be set back, and None
    elsewhere. What ``Usage`` and ``peak_memory`` tell is not changed by it.
    """
    if device.type == "cuda":
        _keep(_device_peaks(device))
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        _keep({"host": _high_water() or 0})
        told = _set_back()
        yield lambda: _high_water() if told else None


def _keep(peaks: dict[str, int]) -> None:
    for name, value in peaks.items():
        _highest[name] = max(value, _highest.get(name, 0))


def _device_peaks(device: torch.device) -> dict[str, int]:
    peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    return dict(zip(_DEVICE, peaks, strict=True))


def _set_back() -> bool:
    """Set the system's count of the most memory of this process back to what it holds now, and say whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _STATUS.is_file()


def peak_memory() -> int | None:
    """The most memory that the process ever held, in bytes; None where the system does not tell."""
    now = _high_water()
    return None if now is None else max(now, _highest.get("host", 0))


def _high_water() -> int | None:
    """What the system says is the most, since it was last set back."""
    if _STATUS.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
