"""Networks for images: size, cost and speed of one forward pass, beside another library's.

    python benchmarks/network.py

Processor time of one thread, without gradients, weights random: all networks and a matrix product of order 1024 take
turns in every round, ratios are taken within a round, and medians over the rounds are shown. Operations count 2 for a
multiplication and an addition, those of attention included. "channels" is the memory format, first or last. "per
operation" is the time for one over that of the other library in the same format, "as it comes" over that of the other
in its default format; "filter" is the time over that of the network without the filter; "efficiency" is the speed over
that of the matrix product. "MiB" is what autograd keeps of one image for the gradient of the parameters: unique bytes,
parameters not counted. The other library is optional (see ``peers_network``).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import peers_network
from experiments.report import table
from models import UNet

RESULT = Path(__file__).parent / "results" / "network.txt"
ROUNDS, PEER, PRODUCT = 7, "diffusers", 1024
PER_OPERATION, FILTER = 0.95, 1.05
"""Bars: time per operation over the other library's as it comes, and time with the filter over that without."""
FILTERED = ", filter"
HEADER = (
    "network",
    "channels",
    "M parameters",
    "GFLOP",
    "ms / image",
    "per operation",
    "as it comes",
    "filter",
    "efficiency",
    "MiB",
)
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
DDPMPP = dict(resample="residual", skip_rescale=True, modulation="shift")
OURS = {
    "DDPM++": DDPMPP,
    f"DDPM++{FILTERED}": DDPMPP | dict(fir=True),
    "NCSN++": DDPMPP | dict(fir=True, progressive_input=True, embedding="fourier"),
    "conv": {},
}


class Case(NamedTuple):
    """An image size, a batch and a configuration."""

    title: str
    batch: int
    shape: tuple[int, int, int]
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]


SMALL = Case("nf 32", 16, (1, 28, 28), 32, (1, 2, 2), 2, (False, True, False))
LARGE = Case("nf 128", 2, (3, 32, 32), 128, (1, 2, 2, 2), 4, (False, True, False, False))


class Network(NamedTuple):
    """A network in a memory format, and its parameters, operations and kept bytes, all of one image."""

    name: str
    format: str
    call: Callable[[Tensor, Tensor], Tensor]
    parameters: int
    operations: int
    kept: int


def networks(case: Case) -> list[Network]:
    """Ours, and the other library's if it is there, in both formats."""
    settings = dict(zip(Case._fields[2:], case[2:], strict=True))
    settings_ours = settings | dict(embedding_features=case.channels)
    makers = {name: lambda o=options: UNet(**settings_ours, **o) for name, options in OURS.items()}
    makers[PEER] = lambda: peers_network.diffusers(**settings)
    found = []
    for name, make in makers.items():
        try:
            found += [_network(name, kind, make, case.shape) for kind in FORMATS]
        except ImportError:
            print(f"{PEER}: not installed")
    return found


def _network(name: str, kind: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Network:
    net = make().eval()
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    net.to(memory_format=FORMATS[kind])

    def call(x: Tensor, label: Tensor) -> Tensor:
        y = net(x.to(memory_format=FORMATS[kind]), label)
        return y if isinstance(y, Tensor) else y.sample

    one = (torch.zeros(1, *shape), torch.zeros(1))
    size = sum(p.numel() for p in net.parameters())
    return Network(name, kind, call, size, operations(lambda: call(*one)), kept(net, lambda: call(*one)))


def operations(call: Callable[[], object]) -> int:
    """Of a call without gradients."""
    # The counter knows the products of attention, not every fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def kept(net: nn.Module, call: Callable[[], Tensor]) -> int:
    """Unique bytes of storage that autograd keeps for the gradient, without those of parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    assert y.requires_grad
    return sum(sizes.values())


def measured(case: Case, found: list[Network], rounds: int = ROUNDS) -> list[list[float]]:
    """Processor seconds an image, by network and round; at the end those an operation of the matrix product."""
    x, label = torch.randn(case.batch, *case.shape), torch.linspace(-7, 4, case.batch)
    matrix = torch.randn(PRODUCT, PRODUCT)
    calls = [*(lambda one=one: one.call(x, label) for one in found), lambda: [matrix @ matrix for _ in range(10)]]
    sizes = [case.batch] * len(found) + [20 * PRODUCT**3]
    with torch.no_grad():
        for call in calls:
            call()
        seconds = [[_seconds(call) / size for call, size in zip(calls, sizes, strict=True)] for _ in range(rounds)]
    return [list(column) for column in zip(*seconds, strict=True)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def rows(case: Case, found: list[Network], seconds: list[list[float]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    *columns, product = seconds
    keys = [(one.name, one.format) for one in found]
    total = dict(zip(keys, columns, strict=True))
    each = {key: [s / one.operations for s in total[key]] for key, one in zip(keys, found, strict=True)}
    lines = []
    for key, one in zip(keys, found, strict=True):
        relative = [_ratio(each[key], each.get((PEER, kind))) for kind in (one.format, "first")]
        plain = total[one.name.removesuffix(FILTERED), one.format] if one.name.endswith(FILTERED) else None
        sizes = (f"{one.parameters / 1e6:.3f}", f"{one.operations / 1e9:.3f}")
        speed = (f"{1e3 * statistics.median(total[key]):.2f}", *relative, _ratio(total[key], plain))
        ends = (_ratio(product, each[key]), f"{one.kept / 2**20:.1f}")
        lines.append((f"{case.title}, {one.name}", one.format, *sizes, *speed, *ends))
    return lines


def _ratio(a: list[float], b: list[float] | None) -> str:
    """Median of the ratios within a round."""
    return "-" if b is None else f"{statistics.median(one / other for one, other in zip(a, b, strict=True)):.2f}"


def verdicts(lines: list[tuple[str, ...]]) -> str:
    """Whether the bars are held, by row."""
    found = []
    for bar, column, name in ((PER_OPERATION, 6, "per operation"), (FILTER, 7, "filter")):
        judged = [(f"{line[0]}, {line[1]}", float(line[column])) for line in lines if line[column] != "-"]
        missed = [f"{who} ({value:.2f})" for who, value in judged if value > bar and PEER not in who]
        found.append(f"{name} <= {bar}: " + ("held by all" if not missed else "missed by " + "; ".join(missed)))
    return "\n".join(found)


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for case in (SMALL, LARGE):
        found = networks(case)
        lines += rows(case, found, measured(case, found, args.rounds))
    batches = ", ".join(f"{case.title}: {case.shape} in batches of {case.batch}" for case in (SMALL, LARGE))
    title = f"One forward pass; CPU, 1 thread, medians of {args.rounds} interleaved rounds. {batches}"
    text = "\n\n".join((title, table(HEADER, lines), verdicts(lines))) + "\n"
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
