r"""Score models in closed form: what every network is measured against.

Under a Gaussian SDE a mixture sum_k w_k N(mu_k, S_k) stays a mixture, sum_k w_k N(alpha mu_k, alpha^2 S_k + sigma^2 I).
With S = U diag(d) U^T, r = U^T (x - alpha mu) and v = alpha^2 d + sigma^2, a component's posterior means are

    x0 = mu + U (alpha d / v) r,        eps = U (sigma / v) r,

free of cancellation at both ends of time; the mixture's are their averages over the posterior of the component.

What is known of a mixture makes it another one: of a class, a component; of y = A x_0 + s_y n, by Bayes' rule for each,

    mu + K (y - A mu),    S - K A S,    K = S A^T (A S A^T + s_y^2 I)^-1,    weights w N(y; A mu, A S A^T + s_y^2 I).
"""

import math

import torch
from torch import Tensor

from sde import Density, GaussianSDE, Noise, Prediction, ScoreModel


class GaussianMixture(ScoreModel, Density):
    """The exact score of a mixture of K Gaussians with full covariances in D dimensions.

    Parameters
    ----------
    weights: ``(K,)``, positive; normalized to sum 1. means: ``(K, D)``. covariances: ``(K, D, D)``, symmetric, positive
        semi-definite. Data of any shape with D values are flattened.

    Its components are classes: with ``class_label``, int64 ``(B,)`` in 0 .. K, it is the model of one, and K is none.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, sde: GaussianSDE):
        super().__init__(sde)
        weights, means, covariances = (torch.as_tensor(p) for p in (weights, means, covariances))
        self._check(weights, means, covariances)
        variances, axes = torch.linalg.eigh(covariances)
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(means.dtype))
        self.register_buffer("means", means)
        self.register_buffer("variances", variances.clamp(min=0))
        self.register_buffer("axes", axes)
        self.classes = len(means)

    @staticmethod
    def _check(weights: Tensor, means: Tensor, covariances: Tensor):
        k, d = means.shape if means.dim() == 2 else (0, 0)
        if not k or weights.shape != (k,) or covariances.shape != (k, d, d):
            found = ", ".join(str(tuple(p.shape)) for p in (weights, means, covariances))
            raise ValueError(f"weights, means, covariances must have shapes (K,), (K, D), (K, D, D), found {found}")
        if not bool((weights > 0).all()):
            raise ValueError(f"the weights must be positive, found {weights.tolist()}")
        if not torch.allclose(covariances, covariances.mT) or bool((torch.linalg.eigvalsh(covariances) < -1e-6).any()):
            raise ValueError("the covariances must be symmetric and positive semi-definite")

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Prediction:
        alpha, sigma, residual, variance, log_joint = self._components(x, t)
        share = torch.softmax(log_joint, dim=1)
        if class_label is not None:
            known = torch.arange(self.classes, device=x.device) == class_label[:, None]
            share = torch.where(class_label[:, None] < self.classes, known.to(share), share)
        x0 = self.means + self._rotate(alpha * self.variances / variance * residual)
        eps = self._rotate(sigma / variance * residual)
        return Prediction(*(torch.einsum("bk,bkd->bd", share, part).reshape(x.shape) for part in (x0, eps)))

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Log-density of p_t (of the data for ``t=None``) at ``x`` of shape ``(B, ...)``; nats, ``(B,)``."""
        return torch.logsumexp(self._components(x, t)[-1], dim=1)

    def log_class(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """log p(k | x_t) of the components: the exact classifier of noisy data; nats, ``(B, K)``."""
        return torch.log_softmax(self._components(x, t)[-1], dim=1)

    def given(self, matrix: Tensor, observation: Tensor, noise_std: float) -> "GaussianMixture":
        """The mixture of x_0 given y = A x_0 + s_y n: ``matrix`` A is ``(m, D)``, ``observation`` y ``(m,)``."""
        covariances = (self.axes * self.variances[:, None]) @ self.axes.mT
        seen, noise = covariances @ matrix.mT, noise_std**2 * torch.eye(len(matrix)).to(matrix)
        evidence, misfit = matrix @ seen + noise, observation - self.means @ matrix.mT
        gain = torch.linalg.solve(evidence, seen.mT).mT
        means, left = self.means + torch.einsum("kdm,km->kd", gain, misfit), covariances - gain @ seen.mT
        of_misfit = torch.distributions.MultivariateNormal(torch.zeros_like(misfit), evidence).log_prob(misfit)
        weights = torch.softmax(self.log_weights + of_misfit, dim=0)
        return GaussianMixture(
            weights.clamp_min(torch.finfo(weights.dtype).tiny), means, (left + left.mT) / 2, self.sde
        )

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n`` samples of the data, ``(n, D)``."""
        noise, like = Noise(seed), dict(device=self.means.device, dtype=self.means.dtype)
        uniform = (noise.words((n,), 0, self.means.device) + 0.5) * 2.0**-32
        k = torch.searchsorted(self.log_weights.exp().cumsum(0), uniform.to(self.means.dtype)).clamp(
            max=len(self.means) - 1
        )
        scaled = self.variances[k].sqrt() * noise.normal((n, self.means.shape[1]), 1, **like)
        return self.means[k] + torch.einsum("nde,ne->nd", self.axes[k], scaled)

    def _components(self, x: Tensor, t: Tensor | None):
        """alpha and sigma as ``(B, 1, 1)``; residuals, variances ``(B, K, D)``; log of weight times density."""
        one = torch.ones(len(x), 1, 1, device=x.device, dtype=x.dtype)
        alpha, sigma = (
            (one, 0 * one) if t is None else (c.reshape(-1, 1, 1) * one for c in (self.sde.alpha(t), self.sde.sigma(t)))
        )
        residual = torch.einsum("kde,bkd->bke", self.axes, x.flatten(1)[:, None] - alpha * self.means)
        variance = alpha.square() * self.variances + sigma.square()
        log_density = -0.5 * (residual.square() / variance + torch.log(2 * math.pi * variance)).sum(-1)
        return alpha, sigma, residual, variance, self.log_weights + log_density

    def _rotate(self, components: Tensor) -> Tensor:
        return torch.einsum("kde,bke->bkd", self.axes, components)
