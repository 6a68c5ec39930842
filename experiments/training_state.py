"""All that a training needs to go on as if it had never stopped, beside the weights and their average.

Optimizer, loss scale, running sums and what the objective learned (``Stepper.state``); every generator of random
numbers; the place in the data; the best validation loss so far. And what must be the same for going on to be the same
training: the settings, the examples, and for the last bit the machine.
"""

import hashlib
import logging
import math
import platform
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments import classes
from experiments.build import ConfigError
from experiments.checkpoint import resolved
from experiments.dataset import Data
from experiments.processes import Processes
from experiments.stepper import Stepper

log = logging.getLogger(__name__)

# Settings without an influence on the weights, by the beginnings of their names.
_FREE = (
    *("task", "resume", "checkpoint", "device", "logger", "plugins", "solver", "under", "likelihood", "compare", "ood"),
    *(
        "networks",
        "optimize",
        "interpolate",
        "condition",
        "guidance",
        "posterior",
        "data.path",
        "train.log_every",
        "train.save_every",
        "train.keep_every",
        "train.early_stop",
    ),
    *("train.max_bad_steps", "train.workers", "train.data_on_device", "train.watch"),
)
# Of these, those that a training's end depends on where it may stop early.
_JUDGE = ("train.early_stop", "train.save_every", "train.log_every")
_OF_OBSERVATIONS = ("observe", "observe_noise_std")  # of networks that are told of some
_OF_CLASSES = ("train.label_dropout",)  # of networks that are told of some
_FIXED = (
    "sde",
    "net",
    "parametrization",
    "label",
    "data",
    "dequantization",
    "objective",
    "observe",
    "observe_noise_std",
)
_FEW = 256


@dataclass
class Progress:
    """How far a training has come: what of it is plain numbers.

    samples: that were trained on, of all processes. seconds: of training, of all its runs. loss, validation_loss: of
    the last row. best, best_step: the lowest validation loss of a regular checkpoint; stale: regular checkpoints since.
    logger_id: for a logger to go on.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_loss: float = math.inf
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    logger_id: str | None = None

    def judge(self) -> bool:
        """Whether the validation loss of a regular checkpoint is the lowest yet."""
        better = self.validation_loss < self.best
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best, self.best_step = self.validation_loss, self.step
        return better


class State:
    """What a checkpoint holds beside the weights: its content, and going on from it."""

    def __init__(self, stepper: Stepper, examples: Tensor, group: Processes, labels: Tensor | None = None):
        self.stepper, self.number, self.group = stepper, len(examples), group
        self.examples = {"examples": fingerprint(examples)}
        self.examples |= {} if labels is None else {"labels": fingerprint(labels)}

    def content(self, progress: Progress) -> dict[str, Any]:
        """Tensors and plain values; every process must ask."""
        return {
            "progress": asdict(progress),
            "epoch_and_position": list(divmod(progress.samples, self.number)),
            **self.examples,
            "machine": machine(self.stepper.device),
            "random": self.group.gather(random_states()),
            "stepper": self.stepper.state(),
        }

    def restore(self, content: dict[str, Any]) -> Progress:
        """Take over a checkpoint's weights and all else; what can't be the same on this machine is warned of."""
        stored, here = content["training"], self.group.count
        warn_of_machine(stored["machine"], self.stepper.device)
        self.stepper.load_weights(content["model"])
        own, states, step = self.stepper.generator, stored["random"], stored["stepper"]
        if step["generator"].shape != own.get_state().shape:  # of another kind of device
            step["generator"] = own.manual_seed(own.initial_seed() + stored["progress"]["step"]).get_state()
        self.stepper.load(step, content["ema"])
        if len(states) == here:
            restore_random_states(states[self.group.rank])
        else:
            log.warning("going on in %d processes, not %d: dropout draws other numbers", here, len(states))
        return Progress(**stored["progress"])


def seed_everything(seed: int) -> None:
    """Seed every global generator of random numbers, whether a training draws from it or not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The state of every global generator of random numbers of this process, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    states = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    states["numpy"] = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of ``random_states``; a GPU's where there are as many."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def fingerprint(values: Tensor) -> str:
    """SHA-256 of the number, shape and type of the examples ``(N, ...)`` and of some that lie evenly among them."""
    some = values[torch.linspace(0, len(values) - 1, min(_FEW, len(values))).long()]
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(some.contiguous().numpy().tobytes())
    return found.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bit of a result depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def require_same_training(file: Path, content: dict[str, Any], config: DictConfig, data: Data) -> None:
    """Refuse to go on from a checkpoint of another model, data or objective; warn of other settings that matter."""
    if content.get("training") is None:
        raise ConfigError(f"resume: {file} holds weights alone; give the .pt file or the folder of a training")
    now = resolved(config)
    there, here = (flat({name: tree.get(name) for name in now}) for tree in (content["config"], now))
    other = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    told = {name: f"{name}={here.get(name)}, there {there.get(name)}" for name in other if not _is_free(name, here)}
    fixed = [words for name, words in told.items() if name.split(".")[0] in _FIXED]
    if fixed:
        cure = "take the settings that it was begun with, or leave resume out"
        raise ConfigError(f"resume: {file} is of another training: {'; '.join(fixed)}; {cure}")
    examples, labels = data.train, classes.labels(config, data, "train")
    if labels is not None and content["training"].get("labels") != fingerprint(labels):
        raise ConfigError(f"resume: {file} was trained on other labels; take the same files, or leave resume out")
    if content["training"]["examples"] != fingerprint(examples):
        found = f"other examples than the {len(examples)} that data= has now, in number, order or value"
        raise ConfigError(f"resume: {file} was trained on {found}; take the same files, or leave resume out")
    if told:
        log.warning("going on with other settings than the training began with: %s", "; ".join(told.values()))


def determining(config: DictConfig) -> dict[str, Any]:
    """The settings that the weights of a whole training depend on, by their dotted names."""
    settings = flat(resolved(config))
    found = {name: value for name, value in settings.items() if not _is_free(name, settings)}
    judged = {name: settings[name] for name in _JUDGE} if settings["train.early_stop"] is not None else {}
    return found | judged


def _is_free(name: str, settings: dict[str, Any]) -> bool:
    """Whether a setting has no influence on the weights, beside these others."""
    idle = () if settings.get("net.classes") else _OF_CLASSES
    idle += () if "observe._target_" in settings else _OF_OBSERVATIONS
    return name.startswith(_FREE) or name in idle


def warn_of_machine(stored: dict[str, Any], device: torch.device) -> None:
    """Say where the result may differ in its last bits from that of one run."""
    here = machine(device)
    told = [f"{name} {stored.get(name)}, now {value}" for name, value in here.items() if stored.get(name) != value]
    if told:
        log.warning("the training goes on to rounding, not to the last bit: %s", "; ".join(told))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
