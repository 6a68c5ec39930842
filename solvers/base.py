"""What all solvers share: the call, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from sde import Density, Noise, ScoreField, ScoreModel, of_samples
from sde.base import require_count
from solvers.calls import counting
from solvers.compiled import Compiled


@dataclass(frozen=True)
class Output:
    """``x``: samples, ``(B, ...)``. ``nfe``: calls of the model. ``trajectory``: the states at ``times``, if kept.

    ``backward``: passes back through the model, for its gradient with respect to x; only guided models make any.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None = None
    times: Tensor | None = None
    backward: int = 0

    @classmethod
    def joined(cls, parts: "list[Output]") -> "Output":
        """The outputs of micro-batches as one; ``nfe`` and ``backward`` are the most for any of them."""
        x, times = torch.cat([part.x for part in parts]), parts[0].times
        trajectory = None if times is None else torch.cat([part.trajectory for part in parts], dim=1)
        nfe, backward = (max(getattr(part, name) for part in parts) for name in ("nfe", "backward"))
        return cls(x, nfe, trajectory, times, backward)


class SamplingDiverged(RuntimeError):
    """A sampler met a value that is not finite."""


class Solver(ABC):
    """Anything that turns noise at t_max into data at t_min."""

    compile: bool
    """Whether to compile the model."""
    needs_variance: bool = False
    """Whether it reads the variance of a chain's steps, which only a model has that predicts it."""
    needs_density: bool = False
    """Whether it reads the log-density, which only a ``Density`` has."""

    @property
    @abstractmethod
    def needs_pair(self) -> bool:
        """Whether it reads the pair (x_0, eps), which only a model under a Gaussian process has."""

    @property
    @abstractmethod
    def calls(self) -> int | None:
        """Calls of the model for a batch; None where the solver chooses its own steps."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether it adds noise on the way: without, a sample is a function of the noise that it starts from."""

    def __call__(
        self,
        model: ScoreField,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
        x_T: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trajectory: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        first: int = 0,
    ) -> Output:
        """Draw samples.

        Parameters
        ----------
        model: score model; its ``sde`` is the one that is reversed.
        shape: ``(B, ...)``, to start from the SDE's prior; or
        x_T: ``(B, ...)``, to start from given noise.
        seed: of all random numbers. Sample i depends on ``seed`` and i, and neither on B nor on the device.
        device, dtype: of the samples; those of ``x_T`` or of the model's parameters by default.
        trajectory: keep every k-th state, and the last; 0 for none. Where the solver chooses its own steps, its ends.
        callback: called as ``callback(i, x)`` after step i, 0 before the first; for each micro-batch by itself.
        batch_size: samples to draw at a time, to bound the memory; the samples are the same.
        progress: show a bar of the model's calls.
        first: number of the first sample: those from it on are drawn. ``x_T`` is the noise of these.

        Returns ``Output``; its ``nfe`` counts the calls for one batch, with micro-batches the most for any of them.

        Raises
        ------
        TypeError: the solver needs the pair (x_0, eps) and the model, under a process that is not Gaussian, has none;
            or it needs the log-density, and the model is no ``Density``.
        SamplingDiverged (or ``ODEError``): a value is not finite.
        """
        self.check_model(model)
        if batch_size is not None:
            require_count(batch_size, "batch_size")
        if type(first) is not int or first < 0:
            raise ValueError(f"first must be an integer of at least 0, found {first!r}")
        if type(trajectory) is not int or trajectory < 0:
            raise ValueError(f"trajectory must be an integer of at least 0, found {trajectory!r}")
        x_T = starting_noise(model, shape, seed, x_T, device, dtype, first)
        parts, done = x_T.split(batch_size or max(1, len(x_T))), []
        bar = tqdm(
            total=self.calls and self.calls * len(parts),
            desc=type(self).__name__,
            unit="call",
            leave=False,
            disable=not progress,
        )
        with torch.no_grad(), bar:
            for part in parts:
                noise, kept = Noise(seed, first), Trajectory(trajectory, callback)
                run = of_samples(model, noise, len(part))
                run = Compiled(run) if self.compile else run
                with counting(run, bar, backward=True) as calls:
                    x = self._solve(run, part, noise, kept)
                done.append(Output(x, calls.n, *kept.stacked(), calls.backward))
                first += len(part)
        return Output.joined(done)

    def check_model(self, model: ScoreField) -> None:
        """Refuse, with ``TypeError``, a model without the pair or the density where they are needed."""
        if self.needs_pair and not isinstance(model, ScoreModel):
            raise TypeError(
                f"{self} needs the pair (x_0, eps) of a ScoreModel under a GaussianSDE, found {type(model).__name__}; "
                "under other processes use EulerMaruyama, AdaptiveSDE, Langevin or ProbabilityFlow"
            )
        if self.needs_variance:
            require_variance(model, type(self).__name__)
        if self.needs_density and not isinstance(model, Density):
            raise TypeError(
                f"{self} needs the log-density of a Density such as GaussianMixture, found {type(model).__name__}, "
                "which has a score alone; leave out adjusted=True, or state its log_prob(x, t) in a subclass of "
                "sde.Density"
            )

    @abstractmethod
    def _solve(
        self, model: ScoreField, x: Tensor, noise: Noise, visit: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        """Carry ``x`` from t_max to t_min, telling ``visit(i, t, x)`` of each state on the way."""


def require_variance(model: ScoreModel, title: str) -> None:
    """Refuse, with ``TypeError``, a model that predicts no variance."""
    if not model.predicts_variance:
        raise TypeError(
            f"{title}: variance='learned' needs a model that predicts it, found {type(model).__name__} without: train "
            "ScoreNetwork(net, sde, LearnedVariance(row)), or choose variance='beta' or 'beta_tilde'"
        )


def starting_noise(
    model: ScoreField,
    shape: tuple[int, ...] | None,
    seed: int,
    x_T: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    first: int = 0,
) -> Tensor:
    """What a solver starts from, by its call's arguments; ``ValueError`` unless given one of ``shape`` and ``x_T``."""
    if (shape is None) == (x_T is None):
        raise ValueError("give either shape, to start from the prior, or x_T, to start from given noise")
    if x_T is not None:
        return x_T.to(device=device, dtype=dtype)
    like = first_weight(model)
    numbered = {"first": first} if first else {}  # a prior of an earlier day does not know the word
    return model.sde.prior(tuple(shape)).sample(seed, device or like.device, dtype or like.dtype, **numbered)


def first_weight(model: torch.nn.Module) -> Tensor:
    """A tensor on the device and in the type of a model; a schedule that learns has its own, and decides neither."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    own = (p for name, p in tensors if p.is_floating_point() and "sde" not in name.split("."))
    return next(own, torch.empty(()))


@dataclass
class Trajectory:
    """Keeps every ``every``-th state, and the last, and tells ``callback`` of each."""

    every: int
    callback: Callable[[int, Tensor], None] | None
    states: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, i: int, t: Tensor, x: Tensor):
        if self.callback:
            self.callback(i, x)
        if self.every:
            if self.states and self.states[-1][0] % self.every:
                self.states.pop()  # it was kept as the last so far
            self.states.append((i, t, x))

    def stacked(self) -> tuple[Tensor | None, Tensor | None]:
        """The states and their times, if any were kept."""
        if not self.states:
            return None, None
        return torch.stack([x for _, _, x in self.states]), torch.stack([t for _, t, _ in self.states])
