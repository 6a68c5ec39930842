"""Time and memory: against work and allocations of known size."""

import json
import resource
import subprocess
import sys
import time

import pytest
import torch

from experiments import usage
from experiments.usage import Usage, peak_memory

CPU = torch.device("cpu")


def test_time_that_is_slept_costs_no_processor_and_work_does():
    slept = Usage(CPU)
    time.sleep(0.2)
    found = slept.found()
    assert found["wall_seconds"] >= 0.2 and found["cpu_seconds"] < 0.1
    worked = Usage(CPU)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    found = worked.found()
    assert 0.15 <= found["cpu_seconds"] < 0.6 and found["wall_seconds"] >= found["cpu_seconds"] - 0.02


def test_the_peak_is_in_bytes_and_of_the_process_alone():
    """In a process of its own, whose peak nothing else has raised, started by one that holds much more."""
    size, much = 200 * 2**20, bytearray(b"1") * (800 * 2**20)
    code = (
        "from experiments.usage import peak_memory\n"
        f"print(peak_memory()); held = bytearray(b'1') * {size}; del held; print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (int(line) for line in done.stdout.split())
    assert before < 0.8 * len(much) and 0.9 * size < after - before < 1.5 * size


def test_the_peak_of_a_part_and_that_of_the_whole():
    """A part that holds less than an earlier one has a lower peak, and the peak of the process stays."""
    code = (
        "import torch\n"
        "from experiments.usage import peak_memory, peak_of\n"
        "for size in (300, 100):\n"
        "    with peak_of(torch.device('cpu')) as peak:\n"
        "        held = bytearray(b'1') * (size * 2**20); del held\n"
        "        print(peak() or -1)\n"
        "print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, whole = (int(line) for line in done.stdout.split())
    if first == -1:
        pytest.skip("this system does not set its count back")
    assert 190 * 2**20 < first - second < 210 * 2**20 and whole >= first


def test_units_of_each_system(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "_highest", {})  # what parts of this process had, in bytes
    here, known = peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(usage, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(usage.sys, "platform", "darwin")
    assert known <= peak_memory() < 2 * known
    monkeypatch.setattr(usage.sys, "platform", "linux")
    assert known * 1024 <= peak_memory() < 2 * known * 1024 and here <= 1.1 * peak_memory()
    monkeypatch.setattr(usage, "resource", None)
    assert peak_memory() is None


def test_the_values_are_plain_and_say_their_units():
    found = Usage(CPU).found()
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert found["peak_device_allocated_bytes"] is found["peak_device_reserved_bytes"] is found["device_name"] is None


@pytest.mark.gpu
def test_the_peak_of_a_gpu():
    device = torch.device("cuda")
    counted = Usage(device)
    torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    found = counted.found()
    assert 64 * 2**20 <= found["peak_device_allocated_bytes"] <= found["peak_device_reserved_bytes"]
    assert found["device_name"]
