"""The python batches of CIFAR-10, read without running anything in them.

They are protocol 2 streams of Python 2's object serialization, which can name and call any function there is. Here the
standard library only parses the stream; a small machine executes the few operations that a dictionary of strings,
numbers, lists and one NumPy array needs. The only names it knows are those by which such an array was written, and for
it they are mere marks: nothing is imported and nothing is called. Whatever else a stream holds is refused.
"""

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.dataset import fault

_RECONSTRUCT, _NDARRAY, _DTYPE = object(), object(), object()
_NAMES = {
    "numpy.core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _DTYPE,
}
_MARK, _UINT8 = object(), object()


class _Array:
    """An array whose state is still to come: (version, shape, dtype, column by column, bytes)."""

    state: tuple | None = None


class _Refused(Exception):
    """What the stream asked for, and does not get."""


class _Machine:
    """Stack, marks and memory; one method for each operation."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def tuple_of(self, size: int) -> None:
        values = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.push(values)

    def put(self, index: int) -> None:
        self.memory[index] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        _expect(self.stack[-1], dict).update(zip(map(_key, values[0::2]), values[1::2], strict=True))

    def name(self, argument: str) -> None:
        if argument not in _NAMES:
            raise _Refused(f"the name {argument!a}, which could run code")
        self.push(_NAMES[argument])

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is _RECONSTRUCT and arguments[0] is _NDARRAY:
            self.push(_Array())
        elif function is _DTYPE and arguments[0] == "u1":
            self.push(_UINT8)
        else:
            raise _Refused("a call of something other than an array of unsigned bytes")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if target is not _UINT8:  # whose state says its byte order, and bytes have none
            _expect(target, _Array).state = _expect(state, tuple)


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "MARK": lambda m, _: m.push(_MARK),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), lambda m, value: m.push(value)),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING", "BINUNICODE"), lambda m, value: m.push(value)),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES"), lambda m, value: m.push(value)),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memory[index])),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "GLOBAL": _Machine.name,
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "STOP": lambda m, _: None,
}


def read_batch(path: Path, content: bytes) -> tuple[Tensor, Tensor]:
    """Images (N, 3072), uint8, and labels (N,), int64, of one python batch; ``path`` is for messages.

    Raises DataError for a stream that is damaged, holds anything else, or asks for anything to be called.
    """
    try:
        found = _run(content)
        return _images(found["data"]), _labels(found["labels"])
    except _Refused as error:
        expected = "a dictionary with 'data', an array of unsigned bytes (N, 3072), and 'labels'"
        raise fault(path, expected, str(error), "take the official archive, or the binary version") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        words = f"a damaged one ({type(error).__name__}: {error})"
        raise fault(path, "a whole python batch of CIFAR-10", words) from None


def _run(content: bytes) -> dict[str, Any]:
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise _Refused(f"the operation {operation.name}")
        _OPERATIONS[operation.name](machine, argument)
    return _expect(machine.stack.pop(), dict)


def _images(array: Any) -> Tensor:
    _, shape, dtype, columns_first, raw = _expect(array, _Array).state
    raw, rows = raw if isinstance(raw, bytes) else raw.encode("latin-1"), shape[0]
    if dtype is not _UINT8 or not raw or type(rows) is not int or len(raw) != 3072 * rows or shape[1:] != (3072,):
        raise _Refused(f"an array of another kind or shape, of {len(raw)} bytes")
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return values.view(3072, -1).T if columns_first else values.view(-1, 3072)


def _labels(labels: Any) -> Tensor:
    if not all(type(label) is int and 0 <= label < 256 for label in _expect(labels, list)):
        raise _Refused("labels that are not small integers")
    return torch.tensor(labels, dtype=torch.int64)


def _key(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else _expect(value, str)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"{type(value).__name__} where {kind.__name__.strip('_')} belongs")
    return value
