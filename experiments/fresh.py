"""Jobs that share a process: each finds what it would find alone, and leaves nothing to the next.

The generators of random numbers are seeded before each job; threads, the default type, the flags of backends and
matplotlib's settings are those of before the first one again; figures, garbage, compiled graphs and a GPU's cache are
let go.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from experiments.training_state import seed_everything


class _Setting(NamedTuple):
    """How to read one of a process's settings, and how to set it."""

    get: Callable[[], Any]
    set: Callable[[Any], None]


def _flag(owner: Any, name: str) -> _Setting:
    return _Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


_SETTINGS = (
    _Setting(torch.get_num_threads, torch.set_num_threads),
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _Setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    *(_flag(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _flag(torch.backends.cuda.matmul, "allow_tf32"),
)


@contextmanager
def fresh(seed: int) -> Iterator[None]:
    """Inside, a job whose ``seed`` this is finds the process as new; after it the settings are as they were before."""
    import matplotlib

    before, drawn = [setting.get() for setting in _SETTINGS], dict(matplotlib.rcParams)
    seed_everything(seed)
    try:
        yield
    finally:
        for setting, value in zip(_SETTINGS, before, strict=True):
            if setting.get() != value:
                setting.set(value)
        _let_go()
        if dict(matplotlib.rcParams) != drawn:
            matplotlib.rcParams.update(drawn)


def _let_go() -> None:
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
