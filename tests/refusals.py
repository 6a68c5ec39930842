"""What a refusal of data must say."""

from collections.abc import Callable

import pytest

from experiments.data import DataError


def refused(call: Callable, *words: object) -> str:
    """``call`` raises one DataError, in which all the words are found; returns it."""
    with pytest.raises(DataError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)
