"""The count of network calls, forwards and backwards apart, at the modules that do the work."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from tqdm import tqdm

from sde import ScoreField
from solvers.compiled import Compiled


@contextmanager
def counting(model: torch.nn.Module, bar: tqdm | None = None, backward: bool = False) -> Iterator[SimpleNamespace]:
    """Count the calls of a model while the context is open: ``with counting(model) as calls: calls.n``.

    Of a model around others, such as a guided one, the calls of those are counted, which do the work. With ``backward``
    the passes back through them are, too: ``calls.backward``. A progress ``bar`` moves by one at each call.
    """
    calls = SimpleNamespace(n=0, backward=0)

    def count(*_):
        calls.n += 1
        if bar is not None:
            bar.update()

    def count_back(*_):
        calls.backward += 1

    def follow(module, args, output):
        parts = [part for part in (output if isinstance(output, tuple) else (output,)) if part.requires_grad]
        if parts:
            torch.autograd.graph.register_multi_grad_hook(parts, count_back, mode="any")

    handles = [module.register_forward_pre_hook(count) for module in innermost(model)]
    handles += [module.register_forward_hook(follow) for module in innermost(model) if backward]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def innermost(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The score models that calls of ``model`` come down to: itself, or those that it is around."""
    inner = [] if isinstance(model, Compiled) else [part for child in model.children() for part in _fields(child)]
    return list(dict.fromkeys(inner)) or [model]


def _fields(module: torch.nn.Module) -> list[torch.nn.Module]:
    if isinstance(module, ScoreField):
        return innermost(module)
    return [part for child in module.children() for part in _fields(child)]
