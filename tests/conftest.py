"""One thread for all tests: on small tensors it is as fast, and a busy processor can't stall it."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the command line's processes, likewise


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped without a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
