r"""How the likelihood of each example is estimated, and everything that its estimate is made of.

For integer levels in D dimensions and K draws x_k of a dequantizer, with their log-weights w_k,

    log P >= mean of l_k    or, importance-weighted,    log P >= log mean exp l_k    (in expectation),
    l_k = log p_T(x_T) + integral of div v dt + endpoint + w_k

(Theis, van den Oord and Bethge, 2016; Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016, eq. 8;
Song et al., 2021, section 4.3). Each draw has its own probes, so that their error averages out too. Continuous data are
their own single draw. Every part is kept for each example, in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.dequantization import Dequantizer, Drawn, importance_weighted
from experiments.draw import Fitting
from experiments.processes import Processes, current
from sde import ScoreModel
from sde.base import require_count
from solvers import Divergence, Exact, log_likelihood
from solvers.base import first_weight
from solvers.integration import Integration, integration

PARTS = ("prior", "divergence", "dequantization", "endpoint", "importance")
_APART = 2**40  # the probes of draw k are those that an example k times so far away has


@dataclass(frozen=True, eq=False)
class Examples:
    """The log-likelihood of N examples by parts, nats, and its errors: float64 ``(N,)`` on the CPU.

    log_prob = prior + divergence + dequantization + endpoint + importance; without importance weighting the parts are
    means over draws, with it the last is what it adds to their sum. stderr_probes, stderr_draws: standard errors of
    log_prob from the divergence's probes and over the draws (which have their own probes), None where a single one
    leaves it unknown. nfe: calls of the model that an example took part in, int64.
    """

    prior: Tensor
    divergence: Tensor
    dequantization: Tensor
    endpoint: Tensor
    importance: Tensor
    stderr_probes: Tensor | None
    stderr_draws: Tensor | None
    nfe: Tensor

    def __len__(self) -> int:
        return len(self.nfe)

    @property
    def log_prob(self) -> Tensor:
        """Nats: of the density for continuous data, of the probability (a lower bound) for discrete data."""
        return sum(getattr(self, name) for name in PARTS)

    def arrays(self) -> dict[str, Tensor]:
        """What is known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, arrays: dict[str, Tensor]) -> "Examples":
        """The inverse of ``arrays``."""
        return cls(**{f.name: arrays.get(f.name) for f in fields(cls)})

    @classmethod
    def joined(cls, parts: "list[Examples]") -> "Examples":
        """All of them, in order."""
        columns = [part.arrays() for part in parts]
        return cls.of({name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def head(self, n: int) -> "Examples":
        """The first ``n``."""
        return Examples.of({name: value[:n] for name, value in self.arrays().items()})


@dataclass(frozen=True)
class Estimator:
    """How the likelihood of one example is estimated: the result depends on its number and these settings alone.

    Parameters
    ----------
    dequantizer: for data of integer levels; None for continuous data.
    draws, importance: K, and whether their weights are averaged (importance-weighted) or their logarithms.
    divergence, method, rtol, atol, steps, coordinates, prior, endpoint_correction: as for ``log_likelihood``.
    seed: of the dequantizer's draws; the divergence has its own.

    Raises ``ValueError`` for settings that can't work together.
    """

    dequantizer: Dequantizer | None = None
    draws: int = 1
    importance: bool = False
    divergence: Divergence = field(default_factory=Exact)
    method: str | None = None
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    coordinates: str = "auto"
    prior: Callable[[Tensor], Tensor] | None = None
    endpoint_correction: bool = False
    seed: int = 0

    def __post_init__(self):
        _ = self.way
        require_count(self.draws, "draws")
        if not isinstance(self.divergence, Divergence):
            raise ValueError(f"divergence must be a Divergence such as Exact(), found {self.divergence!r}")
        if self.dequantizer is None and self.draws > 1:
            raise ValueError(f"draws={self.draws}: continuous data have no dequantization to draw; leave draws at 1")
        if self.importance and self.draws == 1:
            raise ValueError("importance weighting needs draws of at least 2, found 1; raise draws")
        if self.endpoint_correction and self.dequantizer is not None and self.dequantizer.trained_on != "uniform":
            found = f"{type(self.dequantizer).__name__} draws x at t_min"
            raise ValueError(f"endpoint_correction is for clean x, and {found}; leave the correction out")

    def __call__(self, model: ScoreModel, values: Tensor, first: int = 0) -> Examples:
        """Parts for ``values`` ``(B, ...)``, levels or points, of which the first example has the number ``first``."""
        values = values.to(first_weight(model).device)
        return self._combined([self._one(model, values, number, first) for number in range(self.draws)])

    @property
    def way(self) -> Integration:
        """The integration by its settings, checked."""
        return integration(True, self.method, self.rtol, self.atol, self.steps, self.coordinates)

    def tighter(self) -> "Estimator":
        """The same with twice the steps or ten times smaller tolerances."""
        finer, names = self.way.finer(), ("method", "rtol", "atol", "steps")
        return replace(self, **{name: getattr(finer, name) for name in names})

    def describe(self) -> dict[str, Any]:
        """The settings in plain words and values, for reports."""
        way = self.way
        ode = f"{way.steps} steps" if way.steps else f"rtol {way.rtol:g}, atol {way.atol:g}"
        return {
            "dequantization": str(self.dequantizer) if self.dequantizer else "none",
            "draws": self.draws,
            "bound": "importance-weighted" if self.importance else "plain",
            "ode": f"{way.method}, {ode}, coordinates {way.coordinates}",
            "divergence": str(self.divergence),
            "prior": str(self.prior) if self.prior else "of the SDE",
            "endpoint_correction": self.endpoint_correction,
            "seed": self.seed,
        }

    def _one(self, model: ScoreModel, values: Tensor, number: int, first: int) -> dict[str, Tensor]:
        """The parts from one draw, ``(B,)`` each."""
        if self.dequantizer is None:
            x, weight = Drawn(values, torch.zeros(len(values)))
        else:
            x, weight = self.dequantizer.draw(values, self.seed, number, first)
        names = ("divergence", "method", "rtol", "atol", "steps", "coordinates", "prior", "endpoint_correction")
        options = {name: getattr(self, name) for name in names}
        found = log_likelihood(model, x, first=first + number * _APART, **options)
        endpoint = torch.zeros(len(x)) if found.endpoint is None else found.endpoint
        parts = {"prior": found.prior, "divergence": found.change, "dequantization": weight, "endpoint": endpoint}
        parts["nfe"] = torch.full((len(x),), found.nfe)
        parts |= {} if found.stderr is None else {"stderr_probes": found.stderr}
        return {
            name: part.detach().cpu().to(torch.int64 if name == "nfe" else torch.float64)
            for name, part in parts.items()
        }

    def _combined(self, draws: list[dict[str, Tensor]]) -> Examples:
        stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        k, parts = len(draws), {name: stacked[name].mean(0) for name in PARTS if name in stacked}
        single = sum(stacked[name] for name in parts)  # (K, B)
        share = single.softmax(0) if self.importance else torch.full_like(single, 1 / k)
        parts["importance"] = torch.zeros_like(single[0])
        if self.importance:
            parts["importance"] = importance_weighted(single) - single.mean(0)
        if "stderr_probes" in stacked:
            parts["stderr_probes"] = (share * stacked["stderr_probes"]).square().sum(0).sqrt()
        if k > 1:  # of a mean; of the logarithm of a mean to first order
            spread = share.std(0) if self.importance else single.std(0) / k
            parts["stderr_draws"] = k**0.5 * spread
        return Examples.of(parts | {"nfe": stacked["nfe"].sum(0).long()})


class Keeper(Protocol):
    """Where an evaluation keeps what is done after each batch."""

    def load(self) -> Examples | None:
        """What an earlier evaluation with the same settings left."""

    def save(self, done: Examples) -> None:
        """Everything that is done so far."""


def evaluate(
    model: ScoreModel,
    values: Tensor,
    estimator: Estimator,
    batch_size: int = 256,
    first: int = 0,
    keeper: Keeper | None = None,
    progress: bool | None = False,
    processes: Processes | None = None,
) -> Examples:
    """Every example's parts, batch by batch; those that the ``keeper`` holds are not computed again.

    Of several processes each takes one batch of a round, and all have the result; the first one's keeper counts. A
    batch that does not fit into the memory is halved, with the same result.

    ``progress``: True, False, or None for a bar only in a terminal. processes: by default the ``current()`` ones.
    """
    require_count(batch_size, "batch_size")
    processes, fit = processes or current(), Fitting("likelihood.batch_size")
    found = processes.broadcast(keeper.load() if keeper else None)
    done = [found] if found is not None and len(found) else []

    def batch(start: int, size: int) -> Examples:
        return estimator(model, values[start : start + size], first + start)

    def own(starts: range) -> list[Examples]:
        return [part for start in starts for part in fit(batch, start, min(batch_size, len(values) - start))]

    starts = range(sum(map(len, done)), len(values), batch_size)
    rounds = range(0, len(starts), processes.count)
    for turn in tqdm(rounds, desc="likelihood", disable=processes.hides(progress), leave=False):
        found = processes.gather_from(partial(own, starts[turn + processes.rank :][:1]))
        done = [Examples.joined([*done, *chain.from_iterable(found)])]
        if keeper and processes.is_first:
            keeper.save(done[0])
    return done[0]
