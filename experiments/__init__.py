"""What a run does: command line, data, training, checkpoints, comparison, likelihood, figures, report."""

from importlib import import_module
from typing import Any

__all__ = ["bits_per_dim", "verify"]
_HOMES = {"verify": "experiments.verification", "bits_per_dim": "experiments.audit"}


def __getattr__(name: str) -> Any:
    """``verify`` and ``bits_per_dim``, imported when asked for: ``--help`` must be answered without loading torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
