"""The order of the training data: a function of the seed, the epoch and the position in it, and of nothing else.

Of n examples, sample number g of a training is the one at position g mod n of epoch g // n, in a permutation of its own
for each epoch; images are mirrored, and labels left out, by coins for each epoch and position. All are counter-based
(``sde.noise``): there is no state to keep, so that a training goes on anywhere, in any number of processes and with any
number of workers.
"""

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from experiments.problem import Problem
from experiments.processes import current
from models.share import Source
from sde import Noise

_PERMUTATION, _MIRROR, _UNIFORM = 0, 1, 2


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of ``n`` examples in an epoch, int64 ``(n,)``."""
    return Noise(seed, epoch).words((1, n), _PERMUTATION)[0].argsort(stable=True)


@lru_cache(maxsize=2)
def mirrored(seed: int, epoch: int, n: int) -> Tensor:
    """Which positions of an epoch hold mirrored images, bool ``(n,)``."""
    return Noise(seed, epoch).words((1, n), _MIRROR)[0] % 2 == 1


@lru_cache(maxsize=2)
def uniform(seed: int, epoch: int, n: int) -> Tensor:
    """A uniform number in [0, 1) for each position of an epoch, float64 ``(n,)``."""
    return Noise(seed, epoch).words((1, n), _UNIFORM)[0].double() * 2.0**-32


@dataclass(frozen=True)
class Order:
    """Which of ``n`` examples the samples of a training are, in batches.

    Parameters
    ----------
    seed: of the order. n: number of examples. batch_size: of all processes together. flips: mirror images at random.
    """

    seed: int
    n: int
    batch_size: int
    flips: bool = False

    def batch(self, first: int) -> tuple[Tensor, Tensor | None]:
        """Indices ``(B,)`` of the samples from number ``first`` on, and which are mirrored, None where none ever is."""
        number = torch.arange(first, first + self.batch_size)
        return self._at(permutation, number), self._at(mirrored, number) if self.flips else None

    def uniform(self, first: int) -> Tensor:
        """A uniform number in [0, 1) for each of these samples, ``(B,)``, independent of all else."""
        return self._at(uniform, torch.arange(first, first + self.batch_size))

    def place(self, first: int) -> tuple[int, int]:
        """Epoch and position of the sample of that number."""
        return divmod(first, self.n)

    def _at(self, table: Callable[[int, int, int], Tensor], number: Tensor) -> Tensor:
        epochs = range(int(number[0]) // self.n, int(number[-1]) // self.n + 1)
        return torch.cat([table(self.seed, e, self.n)[number[number // self.n == e] % self.n] for e in epochs])


def flipped(values: Tensor, mirror: Tensor | None) -> Tensor:
    """Values ``(B, ..., W)``: those that ``mirror`` ``(B,)`` names with their last axis reversed."""
    if mirror is None:
        return values
    return torch.where(mirror.view(-1, *[1] * (values.dim() - 1)), values.flip(-1), values)


class Batches(Dataset):
    """Batches of data values ``(N, ...)``: number i holds the samples from ``first + i B`` on.

    ``take``: of the B samples of a batch, the ones for this process. ``pin``: in memory that a GPU can read by itself.
    """

    def __init__(self, values: Tensor, order: Order, first: int = 0, take: Callable[[Tensor], Tensor] = lambda x: x):
        self.values, self.order, self.first, self.take = values, order, first, take

    def __getitem__(self, i: int) -> Tensor:
        chosen = self.order.batch(self.first + i * self.order.batch_size)
        index, mirror = (None if part is None else self.take(part).to(self.values.device) for part in chosen)
        return flipped(self.values[index], mirror)

    def stream(self, workers: int = 0, pin: bool = False) -> Iterator[Tensor]:
        """All batches from the first on, without an end; made by this process, or ahead of it by ``workers`` others."""
        if workers:
            return iter(self._loader(workers, pin))
        return (self[i].pin_memory() if pin else self[i] for i in itertools.count())

    def _loader(self, workers: int, pin: bool) -> DataLoader:
        own = torch.Generator()  # it seeds the workers by this; torch's global numbers stay as they are
        fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        options = {"num_workers": workers, "pin_memory": pin, "generator": own, "multiprocessing_context": fork}
        return DataLoader(self, batch_size=None, sampler=_Numbers(), worker_init_fn=_leave_it_to_the_parent, **options)


class _Numbers(Sampler):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _leave_it_to_the_parent(_: int) -> None:
    """A signal may go to all processes of a terminal or a job; the training finishes its step, and needs its batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def fits(values: Tensor, device: torch.device) -> bool:
    """Whether data may lie on a device: on a GPU in a quarter of its free memory, on any other always."""
    if device.type != "cuda":
        return True
    return values.nbytes <= torch.cuda.mem_get_info(device)[0] // 4


def batches(
    problem: Problem, config: DictConfig, device: torch.device, source: Source, first: int = 0
) -> Iterator[Tensor]:
    """Endless batches of x for this process, on its device, from sample number ``first`` on.

    The data lie on the device, where they fit or ``train.data_on_device`` says so, or else on the host, which then
    sends each batch from pinned memory, without waiting for it. The noise of dequantization comes from ``source``.
    """
    settings, values = config.train, problem.data.train
    resident = fits(values, device) if settings.data_on_device == "auto" else settings.data_on_device
    if resident and not settings.workers:
        values = values.to(device)
    order = Order(config.seed, len(values), settings.batch_size, problem.data.flips)
    away = values.device.type != device.type
    take = partial(current().take, parts=settings.accumulate)
    for batch in Batches(values, order, first, take).stream(settings.workers, pin=away):
        yield problem.x(batch.to(device, non_blocking=True), source)
