"""What a divergence costs, in forward passes of the same field without gradients.

    python benchmarks/divergence.py

The field is the probability-flow velocity of a network, or a bare perceptron of three hidden layers: nothing but its
matrices, the dearest case (a network's features of the noise level are in the forward pass alone). Perceptrons have
batches of 512. Every number is the field and its divergence together, as the likelihood calls them, with the parameters
frozen. Processor time of one thread: all ways take turns in every round, the ratio is taken within a round, and the
median over the rounds is shown with the lowest and the highest. With f the forward pass and b a product J^T z on its
graph, k products cost f + k b; b is about f.

Everything is measured twice, in processes of their own: with the C library's allocator as it comes, which gives the
memory of every graph back to the system and asks for it again, page by page, and told to keep it (glibc's variables).
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.report import table
from models import MLP, ScoreNetwork, UNet
from sde import VP
from solvers import Divergence, Exact, Hutchinson, HutchPlusPlus
from solvers.divergence import Field
from solvers.likelihood import frozen

RESULT = Path(__file__).parent / "results" / "divergence.txt"
ROUNDS, SECONDS = 11, 0.1
"""Rounds, and about how long a way runs in each."""
ALLOCATORS = {
    "as it comes": {},
    "that keeps freed memory": {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"},
}


class Case(NamedTuple):
    """A field, a batch, and the ways to take its divergence, each with the bar that it must not pass or None."""

    title: str
    module: nn.Module
    field: Field
    x: Tensor
    ways: dict[str, tuple[Divergence, float | None]]


def _random(net: nn.Module) -> nn.Module:
    """With random weights everywhere: layers that start as nothing would leave zeros to multiply."""
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    return net.eval()


def images(batch: int = 8) -> Case:
    """The U-Net of conf/net/unet_mnist.yaml."""
    net = UNet((1, 28, 28), channels=32, multipliers=(1, 2, 2), blocks=1, attention=(False, False, True), heads=2)
    ways = {
        "1 probe": (Hutchinson(), 2.3),
        "4 probes": (Hutchinson(4), 5.5),
        "4 probes, orthogonal": (Hutchinson(4, "orthogonal"), 5.5),
        "Hutch++, 4 products": (HutchPlusPlus(4), None),
    }
    model, t = ScoreNetwork(_random(net), VP()), torch.tensor(0.3)
    x = torch.randn(batch, 1, 28, 28)
    return Case(f"U-Net, 1 x 28 x 28, batch {batch}", model, lambda x: model.velocity(x, t), x, ways)


def points(size: int, width: int, bar: float, bare: bool, batch: int = 512) -> Case:
    """The perceptron of this library, or a ``bare`` one."""
    ways = {
        "1 probe": (Hutchinson(), None),
        "exact": (Exact(), bar),
        f"exact, {size} at a time": (Exact(chunk=size), None),
    }
    x, t = torch.randn(batch, size), torch.tensor(0.3)
    title = f"{'bare ' * bare}MLP, {size}-D, width {width}"
    if bare:
        layers = [layer for pair in pairwise([size, width, width, width]) for layer in (nn.Linear(*pair), nn.SiLU())]
        net = _random(nn.Sequential(*layers, nn.Linear(width, size)))
        return Case(title, net, net, x, ways)
    model = ScoreNetwork(_random(MLP((size,), width=width)), VP())
    return Case(title, model, lambda x: model.velocity(x, t), x, ways)


def _seconds(call: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def measured(case: Case, rounds: int = ROUNDS, seconds: float = SECONDS) -> dict[str, list[float]]:
    """By way, the ratio to a forward pass in each round; "forward" itself in seconds."""
    calls: dict[str, Callable[[], object]] = {"forward": lambda: case.field(case.x)}
    for name, (divergence, _) in case.ways.items():
        directions = divergence.directions(case.x)
        calls[name] = lambda d=divergence, z=directions: d.along(case.field, case.x, z)
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad(), frozen(case.module):
        times = {name: max(1, round(seconds / _seconds(call, 2))) for name, call in calls.items()}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(_seconds(call, times[name]))
    forward = found["forward"]
    return {"forward": forward} | {
        name: [one / f for one, f in zip(values, forward, strict=True)]
        for name, values in found.items()
        if name != "forward"
    }


def rows(case: Case, ratios: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    head = (case.title, "forward", f"{1e3 * statistics.median(ratios['forward']):.2f} ms", "", "", "")
    lines = [head]
    for name, (_, bar) in case.ways.items():
        median, spread = statistics.median(ratios[name]), f"{min(ratios[name]):.2f} .. {max(ratios[name]):.2f}"
        verdict = "" if bar is None else "yes" if median <= bar else "NO"
        lines.append(("", name, f"{median:.2f}", spread, "" if bar is None else f"{bar:g}", verdict))
    return lines


def here() -> str:
    """The table of this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = [(size, width, bar) for size, bar in ((2, 4.0), (16, 18.5)) for width in (128, 256)]
    cases = [images(4), images(8), *(points(*size, bare) for bare in (False, True) for size in sizes)]
    lines = [line for case in cases for line in rows(case, measured(case))]
    return table(("field", "way", "forwards", "least .. most", "bar", "held"), lines)


def main() -> None:
    """Measure with every allocator, print the tables, and write them."""
    parts = [f"Cost in forwards: field and divergence together; CPU, 1 thread, medians of {ROUNDS} interleaved rounds"]
    for name, variables in ALLOCATORS.items():
        command = [sys.executable, __file__, "--here"]
        done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True)
        parts += [f"Allocator {name}:", done.stdout.rstrip()]
    text = "\n\n".join(parts) + "\n"
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    print(here()) if "--here" in sys.argv else main()
