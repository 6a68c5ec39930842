"""What SIGINT (Ctrl-C) and SIGTERM do: the work at hand is finished where it can be; the second time, nothing is.

Inside ``deferred()`` the first signal only sets ``requested()``, for a loop to look at between two steps; the second
raises ``Interrupted`` where the program is. Outside, the first does. A program ends with 128 + the signal's number.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 0.3  # seconds: a terminal and a launcher may both pass on one Ctrl-C


class Interrupted(KeyboardInterrupt):
    """A signal asks the program to end. ``number``: the signal's."""

    def __init__(self, number: int):
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class _State:
    deferring = False
    first: tuple[int, float] | None = None  # number and time of the signal that was put off


def requested() -> int | None:
    """The number of the signal that was put off, if there was one."""
    return _State.first and _State.first[0]


@contextmanager
def handled() -> Iterator[None]:
    """The handlers are in place inside, and those of before again after it; in other threads nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    _State.first = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal is put off."""
    _State.deferring, _State.first = True, None
    try:
        yield
    finally:
        _State.deferring = False


def _handle(number: int, _frame) -> None:
    now = time.monotonic()
    if _State.deferring and _State.first is None:
        _State.first = (number, now)
    elif _State.first is None or now - _State.first[1] > _ECHO:
        raise Interrupted(number)
