"""A classifier of noised data that is trained in seconds, for guidance by its gradient (``models.noisy_classifier``).

Adam, batches of 128 training examples as training sees them, times uniform over the process. How well it tells the
classes apart falls with the noise, from that of a classifier of clean data to the share of the largest class.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from experiments import stored
from experiments.classes import number_of
from experiments.problem import Problem
from experiments.processes import current
from models import ClassifierNet, NoisyClassifier, noisy_cross_entropy
from models.objective import noise_like
from sde import GaussianSDE
from sde.base import require_count

log = logging.getLogger(__name__)
_BATCH, _RATE, _EVALUATED = 128, 3e-3, 500


class Accuracy(NamedTuple):
    """Of a classifier at one noise level: the share of examples whose class it knows, with its standard error."""

    log_snr: float
    accuracy: float
    stderr: float


def trained_classifier(
    problem: Problem,
    sde: GaussianSDE,
    path: str | Path | None = None,
    steps: int = 800,
    seed: int = 0,
    width: int = 32,
) -> NoisyClassifier:
    """A classifier of the classes 0 to K - 1 of ``problem.data`` under ``sde``, in evaluation mode on the CPU.

    Of the digits it takes 14 seconds on one core. It is the same for the same seed on one machine, and leaves torch's
    global random numbers alone.

    Parameters
    ----------
    path: a file that it is read from; where there is none yet, it is written. None: trained anew.
    steps: of Adam. width: of ``ClassifierNet``. seed: of the weights, the order and the noise.

    Raises ``ConfigError`` for data without classes, ``CheckpointError`` for a file of other data or another recipe.
    """
    classes, file = number_of(problem.data, "a classifier"), stored.place(path)
    require_count(steps, "trained_classifier: steps")
    about = {"steps": steps, "width": width, "seed": seed, "sde": str(sde)} | stored.described(problem)
    # It may be asked for where samples are drawn, without gradients.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = NoisyClassifier(ClassifierNet(problem.data.shape, classes, width), sde)
        if file and file.exists():
            stored.restore(file, classifier.net, about, "a classifier of noised data", "path")
        else:
            _train(classifier, problem, steps, seed)
    if file and not file.exists() and current().is_first:
        stored.keep(file, classifier.net, about)
    classifier.net.requires_grad_(False)  # and not the process, which may be that of a model that learns it
    return classifier.eval()


def _train(classifier: NoisyClassifier, problem: Problem, steps: int, seed: int) -> None:
    data, generator = problem.data, torch.Generator().manual_seed(seed)
    log.info("training a classifier of noised data: the %d classes of %s", classifier.net.classes, data.name)
    optimizer = torch.optim.Adam(classifier.net.parameters(), lr=_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(data.train), (_BATCH,), generator=generator)
        x0 = problem.x(data.train[index], generator).float()
        optimizer.zero_grad()
        noisy_cross_entropy(classifier, x0, data.labels["train"][index].long(), generator=generator).mean().backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy_by_level(
    classifier: NoisyClassifier, problem: Problem, split: str = "test", levels: int = 9, seed: int = 0
) -> list[Accuracy]:
    """How well it knows a split's classes at levels that lie evenly in log-SNR over the process, the least noise first.

    Each example has noise of its own at each level; the standard error is the binomial one over the examples.
    """
    data, generator = problem.data, torch.Generator().manual_seed(seed)
    low, high = classifier.sde.log_snr_range
    x0, labels = problem.x(getattr(data, split), generator).float(), data.labels[split]
    found = []
    for log_snr in torch.linspace(high, low, levels):
        x = classifier.sde.perturb(x0, t := classifier.sde.time(log_snr), noise_like(x0, generator))
        right = torch.cat([classifier(part, t).argmax(dim=1) for part in x.split(_EVALUATED)]) == labels
        p = right.double().mean().item()
        found.append(Accuracy(log_snr.item(), p, (p * (1 - p) / len(right)) ** 0.5))
    return found
