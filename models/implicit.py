r"""Score matching without a target: the divergence of the score in place of the noise.

Partial integration removes the unknown score of p_t from E |s - grad log p_t|^2 / 2 and leaves, up to a constant,

    E [ tr(grad s) + |s|^2 / 2 ]                          implicit (Hyvarinen, 2005, eq. 4)
    E [ v^T grad s v + (v^T s)^2 / 2 ],   E v v^T = I     sliced (Song et al., "Sliced score matching", 2019, eq. 7)
    E [ v^T grad s v + |s|^2 / 2 ]                        sliced with reduced variance (eq. 8)

Here for the score of noised data, s = -eps_hat / sigma. Times 2 sigma^2, and with the constant D = E |eps|^2,

    |eps_hat|^2 - 2 sigma div(eps_hat) + D

has the expectation of |eps - eps_hat|^2 over the noise, since E eps . eps_hat = sigma E div(eps_hat) (Stein): the
weightings and times are those of denoising score matching, and so is the mean of the loss. Its variance is another: at
high noise it does not vanish with the error, and it may be negative.

One forward pass, and one product J^T v with a graph per probe or per dimension.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.network import ScoreNetwork
from models.share import Source, share_of
from models.time_sampling import TimeSampler
from models.weighted_objective import WeightedObjective
from models.weighting import Weighting
from sde.base import expand, require_count

Product = Callable[[Tensor], Tensor]


class _Targetless(WeightedObjective):
    """Score matching by |eps_hat|^2 and the divergence of eps_hat, or estimates of both."""

    differentiates_twice = True

    def check(self, model: ScoreNetwork) -> None:
        """Refuse a schedule that learns."""
        if model.sde.learned:
            raise ValueError(
                f"the schedule has parameters to learn, which {type(self).__name__} does not train; use "
                "DenoisingScoreMatching('likelihood') with times=UniformTime(), or sde.requires_grad_(False)"
            )

    def squared_error(
        self, model: ScoreNetwork, x0: Tensor, eps: Tensor, t: Tensor, generator: Source, **condition
    ) -> Tensor:
        graph, alpha, sigma = torch.is_grad_enabled(), model.sde.alpha(t), model.sde.sigma(t)
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = (expand(alpha, x0) * x0 + expand(sigma, x0) * eps).detach().requires_grad_()
            eps_hat = model(x, t, **condition).eps

        def product(v: Tensor) -> Tensor:
            options = dict(create_graph=graph, retain_graph=True, is_grads_batched=v.dim() > x.dim())
            return torch.autograd.grad(eps_hat, x, v, **options)[0]

        with torch.set_grad_enabled(graph):
            square, divergence = self.parts(eps_hat if graph else eps_hat.detach(), product, generator)
            of_noise = (square - 2 * sigma * divergence) / x0[0].numel() + 1
        return (torch.hypot(alpha, sigma) / alpha).square() * of_noise

    @abstractmethod
    def parts(self, eps_hat: Tensor, product: Product, generator: Source) -> tuple[Tensor, Tensor]:
        """|eps_hat|^2 and its divergence, ``(B,)``, or estimates; ``product``: J^T v of its Jacobian J."""


class ImplicitScoreMatching(_Targetless):
    """Implicit score matching by the exact trace: one product per dimension, for data of few.

    ``chunk``: products taken at a time, by vectorization; it pays on a GPU and costs ``chunk`` times the memory.
    The others are those of ``WeightedObjective``.
    """

    def __init__(
        self,
        weighting: str | Weighting | Callable = "simple",
        times: TimeSampler | None = None,
        chunk: int = 1,
    ):
        super().__init__(weighting, times)
        require_count(chunk, "ImplicitScoreMatching: chunk")
        self.chunk = chunk

    def parts(self, eps_hat: Tensor, product: Product, generator: Source) -> tuple[Tensor, Tensor]:
        size = eps_hat[0].numel()
        unit = torch.eye(size, device=eps_hat.device, dtype=eps_hat.dtype)
        basis = unit.reshape(size, 1, *eps_hat.shape[1:]).expand(size, *eps_hat.shape)
        parts = basis.unbind() if self.chunk == 1 else basis.split(self.chunk)
        products = torch.cat([product(e).reshape(-1, len(eps_hat), size) for e in parts])
        return eps_hat.square().flatten(1).sum(1), products.diagonal(0, 0, 2).sum(1)


def _rademacher(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    bits = torch.randint(2, shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like)


def _gaussian(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


PROBES = {"rademacher": _rademacher, "gaussian": _gaussian}
"""Random directions v with E v v^T = I."""


class SlicedScoreMatching(_Targetless):
    """Sliced score matching: the trace by random projections.

    Parameters
    ----------
    weighting, times: those of ``WeightedObjective``.
    probes: their number, of each sample; the loss is the mean over them.
    probe: "rademacher" (random signs, which vary less) or "gaussian".
    variance_reduced: |s|^2 as it is, in place of (v^T s)^2: less noise, unless the values are strongly correlated.
    """

    def __init__(
        self,
        weighting: str | Weighting | Callable = "simple",
        times: TimeSampler | None = None,
        probes: int = 1,
        probe: str = "rademacher",
        variance_reduced: bool = True,
    ):
        super().__init__(weighting, times)
        require_count(probes, "SlicedScoreMatching: probes")
        if probe not in PROBES:
            raise ValueError(f"SlicedScoreMatching: probe must be one of {', '.join(PROBES)}, found {probe!r}")
        self.probes, self.probe, self.variance_reduced = probes, probe, variance_reduced

    def parts(self, eps_hat: Tensor, product: Product, generator: Source) -> tuple[Tensor, Tensor]:
        make, shape = PROBES[self.probe], (self.probes, *eps_hat.shape)
        v = share_of(lambda whole, g: make(whole, g, eps_hat), shape, generator, axis=1)
        divergence = torch.stack([(one * product(one)).flatten(1).sum(1) for one in v]).mean(0)
        if self.variance_reduced:
            return eps_hat.square().flatten(1).sum(1), divergence
        return (v * eps_hat).flatten(2).sum(2).square().mean(0), divergence


def implicit_score_matching(
    model: ScoreNetwork,
    x0: Tensor,
    weighting: str | Weighting | Callable = "simple",
    times: TimeSampler | None = None,
    generator: Source = None,
    chunk: int = 1,
    **condition,
) -> Tensor:
    """Loss of each sample, ``(B,)``; see ``ImplicitScoreMatching``."""
    return ImplicitScoreMatching(weighting, times, chunk)(model, x0, generator, **condition).value


def sliced_score_matching(
    model: ScoreNetwork,
    x0: Tensor,
    weighting: str | Weighting | Callable = "simple",
    times: TimeSampler | None = None,
    generator: Source = None,
    probes: int = 1,
    probe: str = "rademacher",
    variance_reduced: bool = True,
    **condition,
) -> Tensor:
    """Loss of each sample, ``(B,)``; see ``SlicedScoreMatching``."""
    objective = SlicedScoreMatching(weighting, times, probes, probe, variance_reduced)
    return objective(model, x0, generator, **condition).value
