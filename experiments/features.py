"""Features: a map of x to numbers that mean something, for the measures that are taken of features.

Distances between images of many pixels say little of what people see. A network that learned to tell classes apart
keeps, in its last layer but one, what matters for that (Heusel et al. 2017 take Inception's). Here it is

    Trained     a small network that learns the data set's own classes; every data set with labels has it
    Inception   Inception v3, whose weights the user has in a file, for numbers like those of the papers
    a plugin's  any callable x (N, *shape) -> (N, F), as a network of your own

x is in the model's units, as training sees it: images of known levels lie in [-1, 1].
"""

import inspect
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments import stored
from experiments.archive import CheckpointError
from experiments.build import ConfigError, build
from experiments.problem import Problem
from experiments.processes import current

log = logging.getLogger(__name__)
_BATCH = 500
_LAYERS = ("64", "192", "768", "2048")


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A map of x (N, *shape) to features (N, F), a batch at a time, and checked. network: any callable that is one."""

    network: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *shape) to (N, F) on the CPU. Raises ValueError for another shape and for numbers that are not finite."""
        with torch.no_grad():
            return torch.cat([self._checked(self.network(part), len(part)) for part in x.split(_BATCH)])

    def _checked(self, found: Any, n: int) -> Tensor:
        name = type(self.network).__name__
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != n:
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"compare.features: {name} must give a tensor of shape ({n}, F), found {shown}")
        if not found.isfinite().all():
            raise ValueError(f"compare.features: {name} gave numbers that are not finite")
        return found.cpu()


def build_features(settings: DictConfig, problem: Problem) -> FeatureMap | None:
    """The map that ``compare.features`` describes; None where there is none.

    A class or function that has a parameter ``problem`` is given the ``Problem``; what it returns is called with x.
    Modules are put into evaluation mode. Raises ConfigError for what can't work, before anything is trained.
    """
    if settings.features is None:
        return None
    node = OmegaConf.to_container(settings.features, resolve=True)
    make = build(node | {"_partial_": True}, where="compare.features")
    more = {"problem": problem} if "problem" in inspect.signature(make.func).parameters else {}
    try:
        network = make(**more)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"compare.features: {error}") from error
    if not callable(network):
        raise ConfigError(f"compare.features must be callable, found {type(network).__name__}")
    return FeatureMap(network.eval() if isinstance(network, nn.Module) else network)


class Classifier(nn.Module):
    """From x (N, *shape) through ``body`` (N, size) to logits of K classes.

    ``features`` are the output of ``body`` over ``scale``, their root mean square, which is set after the training.
    """

    def __init__(self, shape: tuple[int, ...], size: int, classes: int):
        super().__init__()
        first = _convolutions(shape) if len(shape) == 3 and min(shape[1:]) >= 4 else _layers(math.prod(shape))
        width = first(torch.zeros(1, *shape)).shape[1]
        self.body = nn.Sequential(first, nn.Linear(width, size), nn.SiLU())  # of which none dies
        self.head = nn.Linear(size, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def features(self, x: Tensor) -> Tensor:
        """(N, size)."""
        return self.body(x) / self.scale


def _convolutions(shape: tuple[int, ...]) -> nn.Sequential:
    """Three of them, to a fourth of the sides, and to 8 x 8 of larger images."""
    parts = [nn.Conv2d(shape[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    parts += [nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()]
    parts.append(nn.AdaptiveAvgPool2d(tuple(min(8, -(-side // 4)) for side in shape[1:])))
    return nn.Sequential(*parts, nn.Flatten())


def _layers(dimensions: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(dimensions, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())


@dataclass(frozen=True, eq=False)
class Trained:
    """The last layer but one of a small network that learned the classes of the training data; (N, size).

    Its training takes 7 seconds on the digits, of whose test images it then knows 96 to 97 %, and 50 on MNIST (98 %),
    on one core; it gives the same network for the same seed on one machine.

    Parameters
    ----------
    path: a file that it is read from; where there is none yet, it is written. None: trained anew in every run.
    steps: of Adam, with batches of 128. size: the number of features. seed: of the weights, the order and the noise.

    Raises ConfigError for data without classes, and for a file that belongs to other data or another recipe.
    """

    problem: Problem
    path: str | None = None
    steps: int = 600
    size: int = 64
    seed: int = 0

    def __post_init__(self):
        labels, name = self.problem.data.labels, self.problem.data.name
        if not labels or not {"train", "test"} <= labels.keys() or len(labels["train"].unique()) < 2:
            cure = "take data with labels, features of your own, or compare.features=null"
            raise ConfigError(f"features=trained learns the classes of the data, and {name} has none; {cure}")
        if min(self.steps, self.size) < 1:
            raise ConfigError(f"steps and size must be positive, found {self.steps} and {self.size}")
        if self._file and self._file.exists():
            _ = self.classifier

    def __call__(self, x: Tensor) -> Tensor:
        return self.classifier.features(x.float())

    @cached_property
    def classifier(self) -> Classifier:
        """The trained network, in evaluation mode; trained or read where it is first needed."""
        # It may be asked for where samples are measured, without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            network = self._initial()
            if self._file and self._file.exists():
                stored.restore(self._file, network, self._about(), "the features' network", "compare.features.path")
            else:
                self._train(network)
        if self._file and not self._file.exists() and current().is_first:
            stored.keep(self._file, network, self._about())
        return network.eval()

    @cached_property
    def accuracy(self) -> float:
        """The share of the test split whose class it knows."""
        data = self.problem.data
        x = self.problem.x(data.test, torch.Generator().manual_seed(self.seed))
        with torch.no_grad():
            found = torch.cat([self.classifier(part.float()).argmax(dim=1) for part in x.split(_BATCH)])
        return (self._classes[found] == data.labels["test"]).double().mean().item()

    @property
    def _file(self) -> Path | None:
        return stored.place(self.path)

    @property
    def _classes(self) -> Tensor:
        return self.problem.data.labels["train"].unique()

    def _initial(self) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Classifier(self.problem.data.shape, self.size, len(self._classes))

    def _train(self, network: Classifier) -> None:
        data, generator = self.problem.data, torch.Generator().manual_seed(self.seed)
        log.info("training a network for features: the %d classes of %s", len(self._classes), data.name)
        target = torch.searchsorted(self._classes, data.labels["train"])
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            index = torch.randint(len(target), (128,), generator=generator)
            x = self.problem.x(data.train[index], generator).float()
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), target[index]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            some = self.problem.x(data.train[: 4 * _BATCH], generator).float()
            network.scale.copy_(network.body(some).square().mean().sqrt().clamp_min(1e-12))

    def _about(self) -> dict[str, Any]:
        """What the network is of: one that differs in any of this is another one."""
        return {"steps": self.steps, "size": self.size, "seed": self.seed} | stored.described(self.problem)


@dataclass(frozen=True, eq=False)
class Inception:
    """Features of Inception v3 as the FID of the papers takes them, by the package torch-fidelity (extra "fid").

    weights: its weights in a local file, as torch-fidelity has them (``pt_inception-2015-12-05-...pth``); nothing is
    downloaded. layer: "64", "192", "768" or "2048", the number of features. device: where it is computed.
    Grey images become three equal channels. Raises ConfigError for data that are no images of known levels, and where
    the package or the file is missing.
    """

    problem: Problem
    weights: str | None = None
    layer: str = "2048"
    device: str = "cpu"

    def __post_init__(self):
        data = self.problem.data
        if not data.levels or len(data.shape) != 3 or data.shape[0] not in (1, 3):
            raise ConfigError(f"features=inception is for images of known levels, found {data.name} {data.shape}")
        if self.layer not in _LAYERS:
            raise ConfigError(f"layer must be one of {', '.join(_LAYERS)}, found {self.layer!r}")
        if not self.weights or not Path(self.weights).expanduser().is_file():
            cure = "give compare.features.weights=FILE; nothing is downloaded"
            raise ConfigError(f"weights={self.weights}: there is no such file; {cure}")
        _ = self._package

    def __call__(self, x: Tensor) -> Tensor:
        low, high = self.problem.dequantizer.low, self.problem.dequantizer.high
        pixels = ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        return self.network(pixels.expand(-1, 3, -1, -1).to(self.device))[0].float()

    @property
    def _package(self) -> Any:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision that doesn't match torch raises the latter
            cure = 'pip install "unified-score-sde[fid]", with a torchvision that matches torch'
            raise ConfigError(f"features=inception needs the package torch-fidelity ({error}); {cure}") from error
        return FeatureExtractorInceptionV3

    @cached_property
    def network(self) -> nn.Module:
        """The network, with the weights of the file."""
        try:
            weights = torch.load(Path(self.weights).expanduser(), map_location="cpu", weights_only=True)
        except Exception as error:  # torch's readers raise a dozen types
            reason = f"not a file of weights ({type(error).__name__})"
            raise CheckpointError(self.weights, reason, "get the file again") from error
        # The package would run whatever code a file holds: it is given what was read without any.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(weights, Path(folder, "weights.pth"))
            made = self._package("inception", [self.layer], feature_extractor_weights_path=f"{folder}/weights.pth")
        return made.eval().to(self.device)
