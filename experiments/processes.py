"""Several processes that train, sample or evaluate together: which of them this one is, and what they tell each other.

``torchrun`` and SLURM's ``srun`` start the same command many times and tell each copy its number in the environment
(RANK, WORLD_SIZE, LOCAL_RANK; SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID). A shell or a batch script of SLURM
that was not started by ``srun`` has some of these variables too, and is one process all the same.

All processes must make the same calls in the same order. What each does by itself goes through ``gather_from``, which
raises one's error in all. If one fails elsewhere it must end, with an exit code other than 0: ``torchrun``, and
``srun --kill-on-bad-exit``, then end the others; without either, they wait for it until ``TIMEOUT``, or until they see
that it is gone, and end with an error of torch's. So an error passes through ``joined`` as it is, and nothing waits.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.build import ConfigError
from experiments.problem import device_of
from models import Share

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for another, which may be drawing samples or writing a checkpoint."""


@dataclass(frozen=True)
class Processes:
    """This process's number among ``count``, and that on its machine; alone, by default.

    Its methods speak to the others inside ``joined``; of one process they give back what they are given.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def hides(self, progress: bool | None) -> bool | None:
        """Whether to hide a progress bar, as ``tqdm`` takes it: None leaves it to whether there is a terminal."""
        return not self.is_first or (None if progress is None else not progress)

    def share(self, generator: torch.Generator, parts: int = 1) -> torch.Generator | Share:
        """What objectives and dequantizers draw from, for this process's share of a batch that is stepped in parts."""
        return generator if self.count == 1 else Share(generator, self.rank, self.count, parts)

    def take(self, whole: Tensor, parts: int = 1) -> Tensor:
        """This process's share of a batch, or of the numbers of its examples, ``(B, ...)`` to ``(B / count, ...)``."""
        return whole if self.count == 1 else Share(torch.Generator(), self.rank, self.count, parts).take(whole)

    def broadcast(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order, in all of them. Tensors must lie on the CPU."""
        box = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(box, value)
        return box

    def gather_from(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work()`` gives in each, likewise; where it fails in one, its error is raised in all."""
        if self.count == 1:
            return [work()]
        try:
            mine = work(), None
        except Exception as error:
            mine = None, error
        found = self.gather(mine)
        failed = next((rank for rank, (_, error) in enumerate(found) if error is not None), None)
        if failed is not None:
            raise mine[1] if failed == self.rank else found[failed][1]  # one's own knows where it came from
        return [result for result, _ in found]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on any device, without a wait for it."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, likewise."""
        return self.sum(value) / self.count if self.count > 1 else value

    def largest(self, value: Tensor) -> Tensor:
        """The largest of all processes, value by value, likewise."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.count == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, operation)
        return value

    def device(self, name: str) -> torch.device:
        """The device by its name: of several processes "auto" and "cuda" give each a GPU of its own.

        Raises ``ConfigError`` for one GPU for all, and for more processes on a machine than GPUs.
        """
        if self.count == 1 or not re.match("auto|cuda", name) or not torch.cuda.is_available():
            return device_of(name)
        if ":" in name:
            raise ConfigError(f"device={name}: {self.count} processes need a GPU each; use device=auto or device=cuda")
        seen = torch.cuda.device_count()
        if 1 < seen <= self.local_rank:
            raise ConfigError(
                f"device={name}: process {self.local_rank} of this machine finds {seen} GPUs; start as many processes "
                "as there are GPUs, or use device=cpu"
            )
        return torch.device("cuda", self.local_rank if seen > 1 else 0)  # a launcher may show each process its own


_RESERVED = 2**32 - 10
"""From here on the numbers of SLURM's steps are those of batch scripts and interactive shells."""


ALONE = Processes()
"""One process."""


class Launch(NamedTuple):
    """How this process was started, and where the processes meet, as ``torch.distributed`` writes it."""

    processes: Processes = ALONE
    meeting: str = "env://"


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """By torchrun, by srun, or alone. Raises ``ConfigError`` for an environment that does not say where to meet."""
    number = {name: int(value) for name, value in environment.items() if re.fullmatch(r"\d+", value)}
    if {"RANK", "WORLD_SIZE"} <= number.keys():  # torchrun's word counts, in a step of SLURM too
        found = Processes(number["RANK"], number["WORLD_SIZE"], number.get("LOCAL_RANK", number["RANK"]))
        return _meeting(found, environment, None, None) if found.count > 1 else Launch()
    # A step is known by its number; a job's number of tasks stands in shells and batch scripts too.
    tasks = number.get("SLURM_STEP_NUM_TASKS", number.get("SLURM_NTASKS", 1))
    if "SLURM_PROCID" not in number or number.get("SLURM_STEP_ID", _RESERVED) >= _RESERVED or tasks == 1:
        return Launch()
    hosts = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
    port = 20000 + (number.get("SLURM_JOB_ID", 0) * 10 + number["SLURM_STEP_ID"]) % 40000
    found = Processes(number["SLURM_PROCID"], tasks, number.get("SLURM_LOCALID", 0))
    return _meeting(found, environment, hosts and first_host(hosts), port)


def _meeting(found: Processes, environment: Mapping[str, str], host: str | None, port: int | None) -> Launch:
    """Where the first process is: the environment's own words count most."""
    host, port = environment.get("MASTER_ADDR", host), environment.get("MASTER_PORT", port)
    if not host or not port:
        raise ConfigError(
            f"one of {found.count} processes, and neither MASTER_ADDR and MASTER_PORT nor SLURM say where the first "
            "one is: start them by torchrun or srun, or set both"
        )
    if "RANK" in environment:
        return Launch(found)  # torchrun may keep the meeting place open itself, which torch looks up
    return Launch(found, f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first name of SLURM's short form of a list of hosts.

    >>> first_host("gpu[003-005,010],login1"), first_host("a1,a2"), first_host("rack[2,4]-n[07-09].site")
    ('gpu003', 'a1', 'rack2-n07.site')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


_present = ALONE


def current() -> Processes:
    """The processes that are joined now; this one alone where none are."""
    return _present


@contextmanager
def joined(device: str = "auto", launch: Launch | None = None, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """The processes that were started together, joined inside the block; ``current()`` are these there.

    ``device``: the configured one; a GPU of each is made the current one. What fails inside fails at once, and must end
    the process. Raises ``ConfigError`` for devices that can't be shared out.
    """
    global _present
    processes, meeting = launch or launched()
    if processes.count == 1:
        yield processes
        return
    own = processes.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, meeting, timeout=timeout, world_size=processes.count, rank=processes.rank)
    _present = processes
    try:
        yield processes
        dist.destroy_process_group()  # it waits for the others: not after an error
    finally:
        _present = ALONE
