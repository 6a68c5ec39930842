r"""At which levels of a chain a bound is trained: uniformly, or by how much each contributes.

A sum over k of losses L_k is estimated by L_k / p_k at one k ~ p for each sample. Its variance is least for p_k
proportional to sqrt(E L_k^2) (Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 18),
of which the last ten losses of each k tell.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.share import Source, share_of
from models.time_sampling import FixedTimes
from sde import GaussianChain, GaussianSDE
from sde.base import require_count
from sde.levels import Levels


def spread(n: int, generator: Source, device, dtype=torch.float64) -> Tensor:
    """``n`` points in [0, 1), evenly spaced on the circle, each of them uniform (Kingma et al., 2021, appendix I.1)."""

    def make(shape: tuple[int], g: torch.Generator | None) -> Tensor:
        offset = torch.rand((), generator=g, device=device, dtype=dtype)
        return (torch.arange(*shape, device=device, dtype=dtype) / shape[0] + offset) % 1

    return share_of(make, (n,), generator)


class LevelTable:
    """The levels of a chain under the process of a model, made once for each process, device and type."""

    def __init__(self, chain: GaussianChain):
        if not isinstance(chain, GaussianChain):
            raise TypeError(f"chain must be a GaussianChain, found {chain!r}")
        self.chain, self._sde, self._key, self._levels = chain, None, None, None

    def __call__(self, sde: GaussianSDE, like: Tensor) -> Levels:
        """All levels k = 1..N on the device and in the type of ``like``."""
        # The parameters of a schedule may be loaded while it stays the same object.
        parameters = sde.parameters() if isinstance(sde, nn.Module) else ()
        key = (like.device, like.dtype, *((id(p), p._version) for p in parameters))
        if self._sde is not sde or self._key != key:
            self._sde, self._key, self._levels = sde, key, Levels.of(sde, self.chain, like)
        return self._levels


class AtLevels(FixedTimes):
    """The times at which the process of the model has the log-SNR of a chain's levels k = 1..N, all equally often.

    With the simple weighting it is the objective of DDPM over ``DDPMChain`` (Ho et al., 2020, eq. 14, t uniform in
    1..T), and over ``NCSNLevels`` that of NCSN with lambda = sigma^2 (Song and Ermon, 2019, eq. 6; 2 / D times it).
    """

    def __init__(self, chain: GaussianChain, spread: str = "stratified"):
        self.levels, self.spread = LevelTable(chain), spread
        self.__post_init__()

    def __repr__(self) -> str:
        return f"AtLevels({self.levels.chain})"

    def quantile(self, u: Tensor, sde: GaussianSDE) -> Tensor:
        times = self.levels(sde, u).t
        return times[(u * len(times)).long().clamp(max=len(times) - 1)]

    def cumulative(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        times = self.levels(sde, t).t
        return torch.searchsorted(times, t, right=True).to(t) / len(times)

    def density(self, t: Tensor, sde: GaussianSDE) -> Tensor:
        raise ValueError(f"{self} draws from finitely many times, without a density: use weighting='simple'")


class IndexSampler(nn.Module, ABC):
    """Draws a level k = 1..``steps`` for each sample."""

    learns: bool = True
    """Whether ``observe`` does anything."""

    def __init__(self, steps: int):
        super().__init__()
        require_count(steps, f"{type(self).__name__}: steps")
        self.steps = steps

    def sample(self, n: int, generator: Source = None, device=None) -> tuple[Tensor, Tensor]:
        """k, ``(n,)``, spread evenly over the distribution, and the probability of each in float64."""
        p = self.probabilities().to(device)
        last = p.cumsum(0)
        k = torch.searchsorted(last / last[-1], spread(n, generator, device), right=True).clamp(max=self.steps - 1)
        return k + 1, p[k]

    @abstractmethod
    def probabilities(self) -> Tensor:
        """p_k for k = 1..N, ``(N,)``, in float64; they sum to 1."""

    @abstractmethod
    def observe(self, k: Tensor, losses: Tensor) -> None:
        """Learn of the ``losses`` L_k, ``(B,)``, that were found at ``k``."""


class UniformIndex(IndexSampler):
    """All levels equally often."""

    learns = False

    def __init__(self, steps: int):
        super().__init__(steps)
        self.register_buffer("equal", torch.full((steps,), 1 / steps, dtype=torch.float64), persistent=False)

    def probabilities(self) -> Tensor:
        return self.equal

    def observe(self, k: Tensor, losses: Tensor) -> None:
        pass


class LossAwareIndex(IndexSampler):
    """p_k proportional to the root mean square of the last losses at k; uniform until all k have ``history`` of them.

    Parameters
    ----------
    history: losses kept for each k, 10 in the paper.
    uniform: the share of the draws that stays uniform, so that no level is forgotten.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001):
        super().__init__(steps)
        require_count(history, "LossAwareIndex: history")
        if isinstance(uniform, bool) or not 0 < uniform <= 1:
            raise ValueError(f"LossAwareIndex: uniform must be a share in (0, 1], found {uniform!r}")
        self.history, self.uniform = history, uniform
        self.register_buffer("losses", torch.zeros(steps * history + 1, dtype=torch.float64))  # the last is for none
        self.register_buffer("seen", torch.zeros(steps, dtype=torch.long))

    def probabilities(self) -> Tensor:
        root = self.losses[:-1].reshape(self.steps, self.history).square().mean(1).sqrt()
        root = root + torch.finfo(root.dtype).tiny  # all losses may be 0
        equal = torch.full_like(root, 1 / self.steps)
        aware = (1 - self.uniform) * root / root.sum() + self.uniform * equal
        return torch.where((self.seen >= self.history).all(), aware, equal)

    @torch.no_grad()
    def observe(self, k: Tensor, losses: Tensor) -> None:
        same = k[:, None] == k
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # within the batch
        slot = (k - 1) * self.history + (self.seen[k - 1] + earlier) % self.history
        slot = torch.where(later < self.history, slot, len(self.losses) - 1)
        self.losses[slot] = losses.to(self.losses)
        self.seen.index_add_(0, k - 1, torch.ones_like(k))
