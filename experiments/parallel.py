"""How the processes of a training hold its model: as a copy each, or a part each.

Both give the mean of all processes' gradients, and wrap objective and model together: calls of the network, products
with its Jacobian, and whatever an objective does inside are then one forward pass, of which the gradient of a parameter
is ready once.

``Replicas`` (``DistributedDataParallel``): a copy in each, and gradients are sent while the rest is still computed.
``Shards`` (FSDP2, ``fully_shard``): each keeps one part of every weight, gradient, moment and average, and gathers a
block's weights while it is needed; for networks that with all these do not fit into one device's memory. Then every
call of the network is a matter of all processes, and all must make the same ones. A block's weights are let go of after
a backward pass, which leaves none for a second one through it.
"""

import inspect
import sys
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.build import ConfigError
from experiments.processes import Processes
from models import Losses, Objective, ScoreNetwork
from models.share import Source

_DDP = inspect.signature(DistributedDataParallel).parameters


class _Loss(nn.Module):
    """The objective of the model, as one module."""

    def __init__(self, objective: Objective, model: ScoreNetwork):
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, source: Source, part: dict[str, Tensor]) -> Losses:
        return self.objective(self.model, generator=source, **part)


class Way(ABC):
    """How the model is held; made of an objective and the twin of a prepared model that is to be trained."""

    def __init__(self, objective: Objective, model: ScoreNetwork):
        self.loss = self.wrapped(_Loss(objective, model))

    @classmethod
    @abstractmethod
    def prepare(cls, model: ScoreNetwork, objective: Objective, processes: Processes) -> None:
        """Divide the model, before anything is made of its parameters. Raises ``ConfigError`` where it can't be."""

    @abstractmethod
    def wrapped(self, loss: _Loss) -> nn.Module:
        """What is called in place of the loss."""

    @abstractmethod
    def sending(self, last: bool) -> AbstractContextManager:
        """Where one part of a batch goes forward and back; its ``last`` ends with the mean of all gradients."""


class Alone(Way):
    """One process."""

    @classmethod
    def prepare(cls, model: ScoreNetwork, objective: Objective, processes: Processes) -> None:
        pass

    def wrapped(self, loss: _Loss) -> nn.Module:
        return loss

    def sending(self, last: bool) -> AbstractContextManager:
        return nullcontext()


class Replicas(Way):
    """A copy in each process, all of which start at the first one's weights."""

    @classmethod
    def prepare(cls, model: ScoreNetwork, objective: Objective, processes: Processes) -> None:
        pass

    def wrapped(self, loss: _Loss) -> nn.Module:
        # Buffers follow from what all processes know, and need not be sent; the word for it depends on torch's version.
        word = next(w for w in ("forward_sync_buffers", "broadcast_buffers") if w in _DDP)
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, **{word: False})

    def sending(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.loss.no_sync()


class Shards(Way):
    """A part of each weight in each process."""

    @classmethod
    def prepare(cls, model: ScoreNetwork, objective: Objective, processes: Processes) -> None:
        cure = "use train.distributed=ddp"
        if len(list(model.parameters())) > len(list(model.net.parameters())):
            raise ConfigError(f"train.distributed=fsdp divides the network alone, and the schedule learns too: {cure}")
        if objective.differentiates_twice:
            raise ConfigError(
                f"train.distributed=fsdp lets go of weights after a backward pass, and {type(objective).__name__} goes "
                f"back through one: {cure}"
            )
        from torch.distributed.device_mesh import init_device_mesh  # they cost a second, which few need to spend
        from torch.distributed.fsdp import fully_shard

        # Nothing writes in place into what a network returns, which FSDP warns of where that is a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        first = next(model.parameters())
        mesh = init_device_mesh(first.device.type, (processes.count,))
        for block in (*_blocks(model.net), model.net):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)  # the next pass may be that of other weights

    def wrapped(self, loss: _Loss) -> nn.Module:
        return loss

    def sending(self, last: bool) -> AbstractContextManager:
        self.loss.model.net.set_requires_gradient_sync(last)
        return nullcontext()


def _blocks(net: nn.Module) -> list[nn.Module]:
    """What a network repeats, the inner ones first."""
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
    found = [one for several in lists for one in several if not isinstance(one, nn.ModuleList)]
    return [one for one in reversed(found) if any(True for _ in one.parameters())]


WAYS = {"ddp": Replicas, "fsdp": Shards}
"""By the name in ``train.distributed``."""


def in_parts(value: Tensor) -> bool:
    """Whether a tensor lies in parts."""
    known = sys.modules.get("torch.distributed.tensor")  # none does before it is imported
    return known is not None and isinstance(value, known.DTensor)


def local(value: Tensor) -> Tensor:
    """What this process has of a tensor that lies in parts; of another, itself."""
    return value.detach().to_local() if in_parts(value) else value


def whole(tree: Any) -> Any:
    """A tensor that lies in parts, or nested dicts of such, as one on the CPU; all processes must ask."""
    if isinstance(tree, dict):
        return {name: whole(value) for name, value in tree.items()}
    return tree.full_tensor().cpu() if in_parts(tree) else tree  # all of them may be more than a device holds


def place(given: Tensor, into: Tensor) -> None:
    """Copy a whole tensor into one that may lie in parts, without a message."""
    if in_parts(into):
        from torch.distributed.tensor import distribute_tensor

        given = distribute_tensor(given.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(given)
