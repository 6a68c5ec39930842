r"""Inpainting by replacement (Song et al., 2021, section 5 and appendix I.2), and colorization as inpainting (I.3).

Where a part of the data is known, the known part of x_t is replaced at each step by known data noised for that time,
alpha known + sigma z, and the model sees the whole. Its prediction is kept for the unknown part; for the known part it
is the known data itself, with the noise that x_t then has, so that the pair keeps its invariant and any sampler ends at
the known values.

**Biased.** The score of the unknown part u given the noised known part k_t is that of p(u_t | k_t), which is not that
of p(u_t | k_0): at each time what is known is taken to be as uncertain as its noise makes it, and u_t goes along with a
k_t that is drawn anew each time, on which the u_t before did not depend. On Gaussian data the mean is pulled towards
the unconditional one and correlations between the parts are too weak; no number of steps takes that away.
With half of 16 dimensions known the mean of the others is .40 posterior standard deviations off, and they are 1.13 as
wide (``fresh=False``: .57 and 1.26; with 10 rounds of RePaint: .16 and .97; python benchmarks/posterior.py).
``solvers.RePaint`` goes back and forth at each time, which lets the parts come to terms, for as many more calls.
``models.MMPS`` with a ``Mask`` has no such bias on Gaussians.
"""

import torch
from torch import Tensor

from sde import Around, Inside, Prediction, ScoreModel
from sde.base import expand


class Replacement(Inside, Around):
    """``model`` with a part of the data known; see the module's text for its bias.

    Parameters
    ----------
    known: data of the shape of ``mask`` for all samples, or ``(N, *mask.shape)``, one for each; read where known.
    mask: 1 (True) where known, 0 elsewhere; the shape of one sample.
    fresh: noise the known part afresh at each time, as the paper does. False: it has the noise of the state itself,
        whose known part then follows the exact way back to the known data.

    With ``fresh`` the field is no smooth function of time: take samplers of fixed steps. The noise is a function of the
    sample's number, the seed of the sampler, and t.
    """

    def __init__(self, model: ScoreModel, known: Tensor, mask: Tensor, fresh: bool = True):
        super().__init__(model.sde)
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool((mask == 1).any()):
            raise ValueError(
                "mask must be 1 where known and 0 elsewhere, with something known; found other values or all 0"
            )
        wanted, found = tuple(mask.shape), tuple(known.shape)
        if wanted not in (found, found[1:]):
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"known: expected the shape of the mask, ({shape}), or (N, {shape}), found {found}")
        self.model, self.fresh = model, fresh
        self.register_buffer("mask", mask == 1)
        self.keep_rows("known", known[None] if found == wanted else known)

    def _predict(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if x.shape[1:] != self.mask.shape:
            raise ValueError(
                f"Replacement: the mask is of shape {tuple(self.mask.shape)}, found samples {tuple(x.shape[1:])}"
            )
        alpha, sigma = (expand(c, x) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        mask, known = self.mask.to(x.device), self.rows("known", x).to(x)
        eps = (x - alpha * known) / sigma
        noise = self.noise.other(0).normal(tuple(x.shape), _number(t), x.device, x.dtype) if self.fresh else eps
        pair = self.model(torch.where(mask, alpha * known + sigma * noise, x), t, **condition)
        return Prediction(torch.where(mask, known, pair.x0), torch.where(mask, eps, pair.eps))


def _number(t: Tensor) -> Tensor:
    """A number of a draw for each time, a different one for times that differ; of each sample's own for ``(B,)``."""
    bits = t.detach().float().view(torch.int32).long()
    return bits[:, None] if bits.dim() else bits


class Rotated(Around):
    """The model of Q x for data x of ``model``: an orthogonal ``matrix`` Q along the first axis, that of the channels.

    Noise is alike in every basis, so that the pair turns as x does. Densities stay: |det Q| = 1.
    """

    def __init__(self, model: ScoreModel, matrix: Tensor):
        super().__init__(model.sde)
        square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1]
        if not square or not torch.allclose(matrix @ matrix.mT, torch.eye(len(matrix)).to(matrix), atol=1e-5):
            raise ValueError(
                f"Rotated: matrix must be orthogonal, (C, C), found shape {tuple(matrix.shape)}; see torch.linalg.qr"
            )
        self.model = model
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if x.shape[1:2] != self.matrix.shape[:1]:
            raise ValueError(
                f"Rotated: the matrix is of {len(self.matrix)} channels, found samples {tuple(x.shape[1:])}"
            )
        pair = self.model(turned(self.matrix.mT, x), t, **condition)
        return Prediction(*(turned(self.matrix, part) for part in pair))


def turned(matrix: Tensor, x: Tensor) -> Tensor:
    """Q x along the channels of ``x``, ``(B, C, ...)``."""
    return torch.einsum("ij,bj...->bi...", matrix.to(x), x)


def colorization(model: ScoreModel, grey: Tensor, weights: Tensor | None = None, fresh: bool = True) -> ScoreModel:
    """``model`` of images (C, H, W) given their grey values, the ``weights`` (C,) of whose sum are equal by default.

    In an orthogonal basis of the channels whose first vector is that of the weights, the grey value is one channel, and
    colorization is inpainting of the others (Song et al., 2021, appendix I.3), with the bias of ``Replacement``.
    ``grey``: ``(1, H, W)`` for all samples or ``(N, 1, H, W)``, in the units of the data.
    """
    channels = 3 if weights is None else len(weights)
    weights = torch.full((channels,), 1 / channels) if weights is None else weights
    if grey.dim() not in (3, 4) or grey.shape[-3] != 1:
        raise ValueError(f"grey: expected one channel, (1, H, W) or (N, 1, H, W), found {tuple(grey.shape)}")
    length = torch.linalg.vector_norm(weights)
    basis = torch.linalg.qr(weights[:, None], mode="complete").Q.mT
    basis = basis * torch.sign(basis[0] @ weights)
    known = torch.cat(
        [grey / length.to(grey), grey.new_zeros(*grey.shape[:-3], channels - 1, *grey.shape[-2:])], dim=-3
    )
    mask = torch.zeros(channels, *grey.shape[-2:], dtype=torch.bool)
    mask[0] = True
    return Rotated(Replacement(Rotated(model, basis), known, mask, fresh), basis.mT)
