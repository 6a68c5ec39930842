"""How a step of the optimizer is made: its settings, and what can't work with what."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from experiments.build import POSITIVE, ConfigError, Limit, require_all, require_limits
from experiments.parallel import WAYS
from experiments.processes import current


class Precision(NamedTuple):
    """The type of the network's forward pass, and the scale of the loss to begin with: 1 for one that never changes."""

    dtype: torch.dtype
    scale: float = 1.0


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16, 2.0**16),
}


_LIMITS = {
    **dict.fromkeys(("batch_size", "clip", "accumulate"), POSITIVE),
    "ema": Limit(lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "precision": Limit(lambda value: value in PRECISIONS, f"be one of {', '.join(PRECISIONS)}"),
    "distributed": Limit(lambda value: value in WAYS, f"be one of {', '.join(WAYS)}"),
}


@dataclass(frozen=True)
class StepSettings:
    """How a step is made. Raises ``ConfigError`` for values that can't work.

    Parameters
    ----------
    batch_size, accumulate: samples of a step, of all processes, and in how many parts.
    clip: the largest norm of the gradient. ema: decay of the average, in [0, 1).
    precision: "float32", "bfloat16" or "float16".
    channels_last: memory format of images and weights. compile: the network, by torch.compile.
    cuda_graphs: record the step once and replay it; only on a CUDA device.
    fused: Adam's fused kernels; without them the host waits for the device in every step.
    distributed: how several processes hold the model, "ddp" (a copy each) or "fsdp" (a part each).
    """

    batch_size: int
    clip: float
    ema: float
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    fused: bool = True
    accumulate: int = 1
    distributed: str = "ddp"

    def __post_init__(self):
        require_all((self._require_limits, self._require_fit))

    def _require_limits(self) -> None:
        require_limits("train.", vars(self), _LIMITS)

    def _require_fit(self) -> None:
        """Settings that don't go together."""
        wrong = []
        if self.distributed == "fsdp" and not self.fused:
            wrong.append("train.distributed=fsdp needs train.fused=true, which divides the parts of gradients in place")
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            found = f"found batch_size={self.batch_size}, accumulate={self.accumulate}"
            wrong.append(f"train.accumulate must divide train.batch_size, {found}")
        if self.cuda_graphs and not self.fused:
            wrong.append("train.cuda_graphs needs train.fused=true: without it the host takes part in every step")
        if wrong:
            raise ConfigError(*wrong)

    @classmethod
    def of(cls, settings: DictConfig) -> "StepSettings":
        """What ``train`` of a configuration says of a step."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def require(self, device: torch.device, shape: tuple[int, ...], learned: bool = False) -> None:
        """Refuse, by ``ConfigError``, a device, a shape of a sample, or a schedule that learns, for these settings.

        Likewise the number of the ``current()`` processes.
        """
        self._require_divisible(current().count)
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(f"train.cuda_graphs needs a CUDA device, found {device}: use train.cuda_graphs=false")
        if self.cuda_graphs and learned:
            raise ConfigError(
                "train.cuda_graphs can't record a schedule that learns, whose ends the host computes in every step: "
                "use train.cuda_graphs=false, or an SDE without parameters"
            )
        if self.channels_last and len(shape) != 3:
            raise ConfigError(
                f"train.channels_last is for images (C, H, W), found samples of shape {tuple(shape)}: "
                "use train.channels_last=false"
            )
        if self.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError(f"train.precision=bfloat16 is more than {device} can do: use float16 or float32")

    def _require_divisible(self, count: int) -> None:
        if self.batch_size % (count * self.accumulate):
            raise ConfigError(
                f"train.batch_size={self.batch_size} is of all {count} processes together and can't be divided among "
                f"them in {self.accumulate} parts: choose a multiple of {count * self.accumulate}"
            )
        if self.cuda_graphs and count > 1:
            raise ConfigError(
                f"train.cuda_graphs can't record what {count} processes say to each other: use train.cuda_graphs=false"
            )
