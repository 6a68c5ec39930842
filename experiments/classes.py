"""Classes in training: the label that a network is told with each example, and those that it is not told.

A network s(x, t, c) of K classes learns p(x | c) from labelled examples, and p(x) too where the label is left out now
and then: class K then stands for none given (Ho and Salimans, "Classifier-free diffusion guidance", 2022, algorithm 1;
their p_uncond is ``train.label_dropout``, best at 0.1 to 0.2 in their table 1). Both scores from one network are what
guidance needs, log p(x | c) alone is what a generative classifier needs.

Which labels are left out is decided by a coin for each epoch and position, as the order of the data is
(``experiments.order``): a training goes on anywhere, and no number of processes, workers or parts of a batch matters.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.build import ConfigError, takes
from experiments.dataset import SPLITS, Data
from experiments.order import Order
from experiments.processes import current

log = logging.getLogger(__name__)
_TOLD = "class_label"
_FEW = 12


def count(config: DictConfig) -> int:
    """The number of classes that the configured network is told of, 0 for none."""
    return config.net.get("classes") or 0


def labels(config: DictConfig, data: Data, split: str) -> Tensor | None:
    """The classes of a split, int64 ``(N,)``, where the network is told of them; else None."""
    return data.labels[split].long() if count(config) and data.labels else None


def number_of(data: Data, where: str = "net.classes") -> int:
    """How many classes data have, 0 to K - 1, all of which occur in training. Raises ``ConfigError`` for others."""
    if not data.labels:
        raise ConfigError(f"{where}: {data.name} has no labels: take data that have some, or do without classes")
    found, split = data.labels["train"].unique(), "train"
    if torch.equal(found, torch.arange(len(found))):
        strange = {name: each.unique() for name, each in data.labels.items()}
        split = next((name for name in SPLITS if (strange[name] < 0).any() or (strange[name] >= len(found)).any()), "")
    if split:
        shown = ", ".join(map(str, data.labels[split].unique()[:_FEW].tolist()))
        raise ConfigError(
            f"{where}: expected the labels of {data.name} to be 0 to K - 1, each of them in its training split; "
            f"found {shown} in {split}: number the classes from 0, without gaps"
        )
    return len(found)


def check(config: DictConfig, data: Data, net: nn.Module) -> None:
    """Refuse classes that can't be trained on, and looks at a model that is not: raises ``ConfigError``."""
    classes, settings = count(config), config.train
    if not classes:
        return
    if not takes(net.forward, _TOLD):
        raise ConfigError(
            f"net.classes={classes}: {type(net).__name__} takes no {_TOLD}= in its forward pass: use another net="
        )
    there = number_of(data)
    if classes != there:
        raise ConfigError(f"net.classes={classes}: {data.name} has {there} classes: use net.classes={there}")
    if settings.watch_every and not settings.label_dropout:
        raise ConfigError(
            "train.watch_every looks at the model without a class, which train.label_dropout=0 never trains: use "
            "train.watch_every=0, or a label_dropout above 0"
        )


def conditions(config: DictConfig, data: Data, device: torch.device, first: int = 0) -> Iterator[dict[str, Tensor]]:
    """What the network is told with each batch of ``experiments.order.batches``, for this process: without an end.

    Of K classes "class_label", int64 ``(B,)`` on ``device``, K where it is left out; nothing for a network of none.
    """
    told, settings = labels(config, data, "train"), config.train
    if told is None:
        yield from itertools.repeat({})
    order, take = Order(config.seed, len(told), settings.batch_size), partial(current().take, parts=settings.accumulate)
    for number in itertools.count(first, settings.batch_size):
        kept = order.uniform(number) >= settings.label_dropout
        label = torch.where(kept, told[order.batch(number)[0]], count(config))
        yield {_TOLD: take(label).to(device, non_blocking=True)}


def held_out(config: DictConfig, data: Data, some: int, device: torch.device) -> dict[str, Tensor]:
    """What the network is told with the first validation examples: all of their classes."""
    told = labels(config, data, "validation")
    return {} if told is None else {_TOLD: told[:some].to(device)}


def only_with_class(config: Mapping[str, Any]) -> bool:
    """Whether a network of this configuration, which a file may hold, was always told a class; no if it is not said."""
    net, settings = config.get("net"), config.get("train")
    known = isinstance(net, Mapping) and isinstance(settings, Mapping)
    return known and bool(net.get("classes")) and settings.get("label_dropout") == 0


def warn_without_class(config: Mapping[str, Any]) -> None:
    """Say that a model is used without a class which no training has seen without."""
    if only_with_class(config):
        log.warning(
            "this model was trained with train.label_dropout=0, always with a class: without one it is a model of "
            "nothing; train it with a label_dropout such as 0.1, or give it a class"
        )
