"""One thread and one seed for all tests.

On small tensors one thread is as fast, and a busy processor can't stall it. torch seeds itself at random: without a
seed a test that fails for one start in a thousand would fail some day.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
torch.manual_seed(0)  # what modules make as they are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the command line's processes, likewise


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test, and every fixture made for it, starts at the same seed, whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped without a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
