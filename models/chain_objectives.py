r"""The variational bound of a discrete chain as an objective, with fixed or learned variances of its steps back.

    L_vlb = L_T + sum_{k=1..N} L_{k-1}        (Ho et al., 2020, eq. 5; the terms are those of ``sde.bound_terms``)

is minus the bound of ``solvers.elbo``. One k ~ p for each sample estimates it without bias by L_T + L_{k-1} / p_k.
L_simple = |eps - eps_hat|^2 is L_{k-1} without its weight beta^2 / (2 variance alpha (1 - alpha_bar)) (eqs. 12 and 14),
and so has nothing to say of the variance. Nichol and Dhariwal ("Improved denoising diffusion probabilistic models",
2021, eq. 16) train both at once,

    L_hybrid = L_simple + weight L_vlb,

where the mean is a constant to L_vlb, so that it trains the variance alone. For a given mean the best variance of a
value is that of x_{k-1} about it, beta_tilde_k + E (mean of q - mean of p)^2, or the nearest end of
[beta_tilde, beta] (Bao et al., "Analytic-DPM", 2022, eq. 8).
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from models.level_sampling import IndexSampler, LevelTable, UniformIndex
from models.network import ScoreNetwork
from models.objective import Losses, Objective, noise_like
from models.share import Source, gathered
from models.weighting import require_positive
from sde import Decoder, DiscretizedGaussian, GaussianChain, Prediction
from sde.base import expand
from sde.bound_terms import WEIGHTS, last_divergence, reconstruction, transition_divergence
from sde.discrete import LEARNED, check_variance
from sde.levels import Levels, level_times


class _Draw(NamedTuple):
    """One call of the model: a level for each sample of clean data, its noise, and what the model says."""

    x0: Tensor
    eps: Tensor
    k: Tensor
    at: Levels
    pair: Prediction
    v: float | Tensor


class ChainObjective(Objective):
    """A loss at one random level of a chain for each sample; a concrete class states the loss of a level."""

    detached: bool = False
    """Whether the pair is a constant to the bound."""

    def __init__(
        self, chain: GaussianChain, decoder: Decoder | None, variance: str | float, index: IndexSampler | None
    ):
        super().__init__()
        title = type(self).__name__
        self.levels, self.chain, self.decoder = LevelTable(chain), chain, decoder
        if decoder is not None and not isinstance(decoder, DiscretizedGaussian):
            raise TypeError(f"{title}: decoder must be a DiscretizedGaussian or None, found {decoder!r}")
        if variance != LEARNED:
            check_variance(variance, title)
        self.variance, self.index = WEIGHTS.get(variance, variance), index or UniformIndex(chain.steps)
        if self.index.steps != chain.steps:
            raise ValueError(f"{title}: index has {self.index.steps} steps, the chain {chain.steps}; give it as many")
        self.checked = False

    def check(self, model: ScoreNetwork) -> None:
        """Refuse a schedule that learns, a model that lacks the variance, and one of more noise than level 1 has."""
        self._check_kind(model)
        level_times(model.sde, self.chain)

    def _check_kind(self, model: ScoreNetwork) -> None:
        if model.sde.learned:
            raise ValueError(
                f"{model.sde} has parameters to learn, of which an objective at the levels of a chain knows nothing; "
                "use VariationalDiffusion, or sde.requires_grad_(False)"
            )
        if self.variance == LEARNED and not model.predicts_variance:
            raise ValueError(
                f"{type(self).__name__} trains the variance, and the model predicts none: give it the parametrization "
                "LearnedVariance(row), or use VariationalBound(chain, variance='beta') or DenoisingScoreMatching"
            )

    def forward(self, model: ScoreNetwork, x0: Tensor, generator: Source = None, **condition) -> Losses:
        self._check_kind(model)
        k, p = self.index.sample(len(x0), generator, x0.device)
        draw = self._draw(model, x0, k, generator, condition)
        term = self._term(draw)
        self.checked = True
        if self.index.learns and self.training and torch.is_grad_enabled():  # held-out losses are not for learning
            self.index.observe(*gathered(generator, k, term.detach()))
        rate = 1 / (self.chain.steps * p).to(x0)
        return Losses(rate * self.loss(model, draw, term) + self.constant(x0), draw.at.log_snr)

    @abstractmethod
    def loss(self, model: ScoreNetwork, draw: _Draw, term: Tensor) -> Tensor:
        """The loss of each sample at its level, for a uniform k; ``(B,)``, from L_{k-1} = ``term`` in nats."""

    @abstractmethod
    def constant(self, x0: Tensor) -> Tensor:
        """What the loss has besides, whatever the level, ``(B,)``."""

    def _draw(self, model: ScoreNetwork, x0: Tensor, k: Tensor, generator, condition: dict) -> _Draw:
        at, learned = self.levels(model.sde, x0).at(k), self.variance == LEARNED
        eps = noise_like(x0, generator)
        x_k = expand(at.alpha, x0) * x0 + expand(at.sigma, x0) * eps
        extra = {"with_variance": True} if learned else {}
        x0_hat, eps_hat, *v = model.at_level(x_k, at.alpha, at.sigma, at.t, **extra, **condition)
        return _Draw(x0, eps, k, at, Prediction(x0_hat, eps_hat), v[0] if learned else self.variance)

    def _term(self, draw: _Draw) -> Tensor:
        """L_{k-1}, ``(B,)``, in nats; L_0 at k = 1."""
        pair = Prediction(*(part.detach() for part in draw.pair)) if self.detached else draw.pair
        std = self.chain.variance(1, draw.v).sqrt().to(draw.x0)
        # A look at all values is a wait for a GPU: there the first batch alone is looked at.
        check = draw.x0.device.type == "cpu" or not self.checked
        last = reconstruction(self.decoder, draw.x0, pair.x0, std, check)
        return torch.where(draw.k == 1, last, transition_divergence(draw.x0, draw.eps, pair, draw.at, draw.v))

    def prior(self, x0: Tensor) -> Tensor:
        """L_T, ``(B,)``, in nats."""
        return last_divergence(x0, self.chain)


class VariationalBound(ChainObjective):
    """L_vlb in nats per dimension: minus the bound of ``solvers.elbo``, from one level for each sample.

    Parameters
    ----------
    chain: the levels. decoder: of known levels, for data at the centres of their bins; None for a density.
    variance: "beta", "beta_tilde", a weight in [0, 1], or "learned", for a model of ``LearnedVariance``.
    index: draws the levels; ``UniformIndex(chain.steps)`` by default.
    """

    def __init__(
        self,
        chain: GaussianChain,
        decoder: DiscretizedGaussian | None = None,
        variance: str | float = "beta",
        index: IndexSampler | None = None,
    ):
        super().__init__(chain, decoder, variance, index)

    def loss(self, model: ScoreNetwork, draw: _Draw, term: Tensor) -> Tensor:
        return self.chain.steps * term / draw.x0[0].numel()

    def constant(self, x0: Tensor) -> Tensor:
        return self.prior(x0) / x0[0].numel()


class Hybrid(ChainObjective):
    """L_hybrid = L_simple + ``weight`` L_vlb, for a model of ``LearnedVariance``; one call of it.

    L_simple is the mean over the dimensions of the squared error of the unit row of the model's parametrization, for
    noise prediction |eps - eps_hat|^2 / D. L_vlb is in nats per dimension, the whole sum: N times the term of a uniform
    k, whose gradient the pair does not see. (The paper's is in bits.)
    """

    detached = True

    def __init__(
        self,
        chain: GaussianChain,
        decoder: DiscretizedGaussian | None = None,
        weight: float = 0.001,
        index: IndexSampler | None = None,
    ):
        super().__init__(chain, decoder, LEARNED, index)
        require_positive("Hybrid: weight", weight)
        self.weight = weight

    def loss(self, model: ScoreNetwork, draw: _Draw, term: Tensor) -> Tensor:
        a, b = (expand(c, draw.x0) for c in model.parametrization.row(draw.at.t, model.sde))
        target = a * (draw.pair.x0 - draw.x0) + b * (draw.pair.eps - draw.eps)
        return target.square().flatten(1).mean(1) + self.weight * self.chain.steps * term / draw.x0[0].numel()

    def constant(self, x0: Tensor) -> Tensor:
        return self.weight * self.prior(x0) / x0[0].numel()
