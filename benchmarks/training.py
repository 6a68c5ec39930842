"""What a training step costs, beside another library's network under the usual recipe.

    python benchmarks/training.py                # processor time, one thread
    python benchmarks/training.py --gpu          # images per second of the presets on a CUDA device

"ours" is ``Stepper`` on a network of ``models.UNet``; the peer is diffusers' ``UNet2DModel`` in the same configuration
(see ``peers_network``) with the recipe of most training loops: torch's default Adam, ``clip_grad_norm_``, a loop over
the tensors for the average, the loss read at every step. Both have the same objective. All take turns in every round,
ratios are taken within a round, and medians are shown with the lowest and the highest. Operations are those of a
forward pass, counted as in ``network``: a step has three times as many for both.

"Around the network" is what is paid once a step, whatever the batch: clipping, Adam and the average, on given gradients
of the very tensors of our network. "Objective" is times, noise, perturbation and loss with the identity for a network.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import network
import peers_network
from experiments.report import table
from experiments.stepper import Stepper, StepSettings
from models import DenoisingScoreMatching, ScoreNetwork, UNet
from sde import VP

RESULT = Path(__file__).parent / "results" / "training.txt"
ROUNDS, DECAY, RATE, LAST = 7, 0.999, 1e-4, ", channels last"
HEADER = ("case", "what", "median", "least .. most", "bar", "held")
PER_OPERATION, PER_FORWARD, OBJECTIVE, AROUND = 0.90, 3.3, 0.01, 2.5
"""Bars: step per operation over the peer's, step over forward, objective over step, the peer's rest over ours."""
SETTINGS = StepSettings(batch_size=1, clip=1.0, ema=DECAY)


class Identity(nn.Module):
    """A network that costs nothing but has a parameter to learn."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x * self.scale


class Peer(nn.Module):
    """The other library's network, called like ours."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x, label).sample


class Recipe:
    """The usual training step: default Adam, ``clip_grad_norm_``, and the average tensor by tensor."""

    def __init__(self, model: nn.Module):
        self.model, self.objective = model, DenoisingScoreMatching()
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.objective(self.model, x, self.generator).value.mean()
        loss.backward()
        self.rest()
        return loss.item()

    def rest(self) -> None:
        """What follows the backward pass."""
        torch.nn.utils.clip_grad_norm_(self.parameters, SETTINGS.clip)
        self.optimizer.step()
        with torch.no_grad():
            for mean, p in zip(self.average, self.parameters, strict=True):
                mean.sub_((1 - DECAY) * (mean - p))


class Ours(Stepper):
    """Our step, and its end alone."""

    def rest(self) -> None:
        """What follows the backward pass."""
        norm = self._norm()
        good = torch.isfinite(norm)
        self._adam(self.scale.value * (norm / SETTINGS.clip).clamp_min(1), good)
        self.average.update(good)


class Case(NamedTuple):
    """Networks of one configuration, by name, and the batch that they are measured on; of ``LAST``, channels last."""

    title: str
    x: Tensor
    nets: dict[str, nn.Module]


def case(size: network.Case) -> Case:
    """Ours by resolutions that change by convolutions and by residual blocks, and the peer's if it is installed."""
    settings = dict(zip(network.Case._fields[2:], size[2:], strict=True))
    ours = settings | dict(embedding_features=size.channels)
    kinds = {"conv": {}, "DDPM++": network.DDPMPP}
    nets = {f"ours, {name}{last}": UNet(**ours, **kind) for last in ("", LAST) for name, kind in kinds.items()}
    try:
        nets[network.PEER] = Peer(peers_network.diffusers(**settings))
    except ImportError:
        print(f"{network.PEER}: not installed")
    for net in nets.values():
        for i, parameter in enumerate(net.parameters()):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    return Case(f"{size.title}, batch {size.batch}", torch.randn(size.batch, *size.shape), nets)


def ours(net: nn.Module, settings: StepSettings = SETTINGS, device: str = "cpu") -> Ours:
    """A stepper of ours for a network on a device."""
    model = ScoreNetwork(net, VP()).to(device)
    return Ours(model, DenoisingScoreMatching().to(device), settings, torch.Generator(device).manual_seed(0))


def operations(net: nn.Module, x: Tensor) -> int:
    """Of one forward pass for one image."""
    return network.operations(lambda: net(x[:1], torch.zeros(1)))


def timed(calls: dict[str, Callable[[], object]], rounds: int, least: float = 0.1) -> dict[str, list[float]]:
    """Processor seconds of each call in every round, after two to warm up; short ones as often as fill ``least``."""
    times = {}
    for name, call in calls.items():
        call()
        times[name] = max(1, math.ceil(least / max(_seconds(call, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(_seconds(call, times[name]))
    return found


def _seconds(call: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def _over(a: Sequence[float], b: Sequence[float], factor: float = 1.0) -> list[float]:
    """The ratio within each round."""
    return [factor * one / other for one, other in zip(a, b, strict=True)]


def line(title: str, what: str, values: Sequence[float], bar: float | None = None, least: bool = False) -> tuple:
    """A row of the table; ``least``: the bar is to be reached, not to be kept under."""
    median = statistics.median(values)
    held = "" if bar is None else "yes" if (median >= bar if least else median <= bar) else "NO"
    spread = f"{min(values):.3g} .. {max(values):.3g}"
    return title, what, f"{median:.3g}", spread, "" if bar is None else f"{'>=' if least else '<='} {bar:g}", held


def steps(one: Case, rounds: int) -> list[tuple]:
    """Whole steps, their forward passes, and the objective by itself."""
    peer, n = network.PEER, len(one.x)
    label = torch.linspace(-7, 4, n)
    makers = {name: _stepper(name, net) for name, net in one.nets.items()}
    objective = ours(Identity())
    calls = {f"step {name}": lambda step=step: step(one.x, RATE) for name, step in makers.items()}
    for name, net in one.nets.items():
        x = one.x.contiguous(memory_format=network.FORMATS["last" if name.endswith(LAST) else "first"])
        calls[f"forward {name}"] = lambda net=net, x=x: _forward(net, x, label)
    calls["objective"] = lambda: _objective(objective, one.x)
    found = timed(calls, rounds)
    size = {name: operations(net, one.x) for name, net in one.nets.items()}
    lines = []
    for name in one.nets:
        step = found[f"step {name}"]
        lines.append(line(one.title, f"{name}: step, ms/image", [1e3 * s / n for s in step]))
        if peer in one.nets and name != peer:
            relative = _over(step, found[f"step {peer}"], size[peer] / size[name])
            lines.append(line(one.title, f"{name}: step per operation, of the peer's", relative, PER_OPERATION))
        bar = None if name == peer else PER_FORWARD
        lines.append(line(one.title, f"{name}: step / forward", _over(step, found[f"forward {name}"]), bar))
        if name != peer:
            lines.append(line(one.title, f"{name}: objective / step", _over(found["objective"], step), OBJECTIVE))
    return lines


def _stepper(name: str, net: nn.Module) -> Callable[[Tensor, float], object]:
    if name == network.PEER:
        return Recipe(ScoreNetwork(net, VP()))
    return ours(net, replace(SETTINGS, channels_last=name.endswith(LAST)))


@torch.no_grad()
def _forward(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return net(x, label)


def _objective(one: Stepper, x: Tensor) -> None:
    one.objective(one.model, x, one.generator).value.mean().backward()


def around(one: Case, rounds: int) -> list[tuple]:
    """Clipping, Adam and average on our network's tensors, with gradients of ones."""
    net = one.nets["ours, conv"]
    mine, recipe = ours(net), Recipe(ScoreNetwork(net, VP()))
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e-3)
    found = timed({"ours": mine.rest, "recipe": recipe.rest}, rounds)
    lines = [line(one.title, f"around the network, {name}: ms", [1e3 * s for s in v]) for name, v in found.items()]
    return [
        *lines,
        line(one.title, "around: the recipe over ours", _over(found["recipe"], found["ours"]), AROUND, True),
    ]


GPU = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "bfloat16, compiled": {"precision": "bfloat16", "channels_last": True, "compile": True},
    "bfloat16, graphs": {"precision": "bfloat16", "channels_last": True, "cuda_graphs": True},
    "bfloat16, compiled, graphs": {
        "precision": "bfloat16",
        "channels_last": True,
        "compile": True,
        "cuda_graphs": True,
    },
}


def on_gpu(size: network.Case, batch: int, iterations: int = 30) -> list[tuple]:
    """Images a second in training and through the network alone, the share of a matrix product's speed, and memory."""
    settings = dict(zip(network.Case._fields[2:], size[2:], strict=True))
    x = torch.randn(batch, *size.shape, device="cuda")
    peak, lines = matmul_peak(), []
    for name, options in GPU.items():
        torch.cuda.reset_peak_memory_stats()
        net = UNet(**settings, embedding_features=size.channels, **network.DDPMPP)
        count = operations(net, x[:1].cpu())
        one = ours(net, StepSettings(batch_size=batch, clip=1.0, ema=DECAY, **options), "cuda")
        trained = batch / _waited(lambda o=one: o(x, RATE), iterations)
        memory = torch.cuda.max_memory_allocated() / 2**30
        sampled = batch / _waited(lambda o=one: _evaluated(o, x), iterations)
        share = 3 * count * trained / peak
        cells = (f"{trained:.0f}", f"{share:.2f}", f"{sampled:.0f}", f"{memory:.1f}")
        lines.append((f"{size.title}, batch {batch}", name, *cells))
    return lines


def matmul_peak(order: int = 8192) -> float:
    """Operations a second of a product of matrices in bfloat16."""
    a = torch.randn(order, order, device="cuda", dtype=torch.bfloat16)
    return 2 * order**3 / _waited(lambda: a @ a, 20)


@torch.no_grad()
def _evaluated(one: Stepper, x: Tensor) -> Tensor:
    """One call of the network as a sampler makes it, in the precision that it was trained in."""
    dtype = one.precision.dtype
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return one.trained.net(x.contiguous(memory_format=one.format), x.new_zeros(len(x)))


def _waited(call: Callable[[], object], iterations: int) -> float:
    """Seconds of a call on the device, after ten to warm up."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / iterations


def gpu_report() -> str:
    """The table of a CUDA device."""
    head = ("network", "precision", "trained images/s", "of the product's speed", "sampled calls x images/s", "GiB")
    lines = [*on_gpu(network.SMALL, 512), *on_gpu(network.LARGE, 128)]
    return f"Training on {torch.cuda.get_device_name()}, DDPM++ by ours\n\n{table(head, lines)}\n"


def cpu_report(rounds: int) -> str:
    """The table of one thread."""
    lines = []
    for size in (network.SMALL, network.LARGE):
        one = case(size)
        lines += steps(one, rounds) + around(one, rounds)
    return f"Training steps; CPU, 1 thread, medians of {rounds} interleaved rounds\n\n{table(HEADER, lines)}\n"


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--save", action="store_true", help="also write the table into results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = gpu_report() if args.gpu else cpu_report(args.rounds)
    print(text)
    if args.save:
        RESULT.with_stem("training_gpu" if args.gpu else "training").write_text(text)


if __name__ == "__main__":
    main()
