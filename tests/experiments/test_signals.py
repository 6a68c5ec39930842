"""Signals are put off where work can be finished, never lost, and the second one is obeyed at once."""

import os
import signal
import time

import pytest

from experiments import signals
from experiments.signals import Interrupted, deferred, handled, requested

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@BOTH
def test_outside_of_a_loop_a_signal_ends_at_once(number, code):
    with handled(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code and isinstance(caught.value, KeyboardInterrupt)


@BOTH
def test_inside_it_is_put_off_and_remembered_after(number, code):
    with handled():
        with deferred():
            assert requested() is None
            os.kill(os.getpid(), number)
            assert requested() == number
        assert requested() == number


def test_the_second_one_is_obeyed_and_an_echo_of_the_first_is_not(monkeypatch):
    with handled(), deferred():
        try:
            for _ in range(2):  # at once: passed on by a launcher
                os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            pytest.fail("an echo is no impatience")
        now = time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 1)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), handled():
        assert signal.getsignal(signal.SIGTERM) not in before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_new_job_forgets_the_signal_of_the_last():
    with handled(), deferred():
        os.kill(os.getpid(), signal.SIGINT)
    with handled():
        assert requested() is None
