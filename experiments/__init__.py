"""What a run does: command line, data, training, evaluation, comparison, figures, report; and ``verify`` for an SDE."""

from typing import Any

__all__ = ["verify"]


def __getattr__(name: str) -> Any:
    """``verify``, imported when it is asked for: the command line must answer ``--help`` without loading torch."""
    if name == "verify":
        from experiments.verification import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
