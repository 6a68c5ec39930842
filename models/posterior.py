r"""Posteriors of linear inverse problems y = A x_0 + s_y n, n standard normal, by three approximations of one score.

With x_0 | x_t taken as a Gaussian N(x0_hat, C), x0_hat the model's denoised estimate, y | x_t is Gaussian, too, and

    grad log p(y | x_t) = J^T A^T (s_y^2 I + A C A^T)^-1 (y - A x0_hat),        J = d x0_hat / d x_t,

C taken as constant. The three differ in C:

    DPS     0: the estimate is taken for the data (Chung et al., "Diffusion posterior sampling", 2023)
    PiGDM   r^2 I, r^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2): what data of variance s^2 in all directions have (Song
            et al., "Pseudoinverse-guided diffusion models", 2023, for s = 1)
    MMPS    (sigma^2 / alpha) J, the covariance itself by Tweedie's formula of second order: moment matching (Rozet et
            al., "Learning diffusion priors from observations by expectation maximization", 2024)

For Gaussian data the last is exact, whatever A; PiGDM for isotropic ones; DPS in no case. For other data p(x_0 | x_t)
is not Gaussian, and all three are approximations; benchmarks/posterior.py measures how good.

The inverse is never formed: conjugate gradients need A, A^T and C alone. For MMPS each of their iterations is one pass
back through the model, whose product sigma^2 / alpha J^T A^T p is kept: their sum is the gradient, so that K iterations
take one call and K passes back in all. J is symmetric and positive for exact models; of networks see ``MMPS``.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from models.conjugate_gradients import conjugate_gradients
from models.guidance import Steered, denoised, positive
from models.operators import LinearOperator
from sde import Prediction, ScoreModel
from sde.base import require_count

Back = Callable[[Tensor], Tensor]


class LinearPosterior(Steered):
    """The model of x_0 given y = A x_0 + s_y n; a subclass states how y's misfit steers.

    Parameters
    ----------
    operator: A, a ``LinearOperator`` on samples of the model's shape.
    observation: y, of the shape ``operator.observed`` for all samples, or ``(N, *operator.observed)``, one for each.
    noise_std: s_y >= 0, in the units of y; a number, or a tensor that broadcasts to ``operator.observed``.
    scale: of the gradient that is added to the score; 1 for the posterior, 0 for the model itself, bit for bit.

    Raises ``ValueError`` for an observation of another shape and for a noise level that can't be.
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        observation: Tensor,
        noise_std: float | Tensor,
        scale: float = 1.0,
    ):
        super().__init__(model, scale)
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"{type(self).__name__}: operator must be a LinearOperator such as Mask(mask), found "
                f"{type(operator).__name__}; Linear(function, shape) takes any linear function"
            )
        self.operator = operator
        self.keep_rows("observation", _explained(observation_rows(observation, operator), operator))
        self.register_buffer("noise_std", _noise_std(noise_std, operator, self.takes_zero))

    @property
    @abstractmethod
    def takes_zero(self) -> bool:
        """Whether an observation may be free of noise."""

    def steer(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, **condition) -> tuple[Prediction, Tensor]:
        if tuple(x.shape[1:]) != self.operator.shape:
            found = f"{self.operator.shape}, found samples of {tuple(x.shape[1:])}"
            raise ValueError(f"{type(self).__name__}: the operator is for {found}; build it for the model's data")
        if self.scale == 0:
            return self.model(x, t, **condition), torch.zeros_like(x)
        pair, back = denoised(self.model, x, t, **condition)
        misfit = self.rows("observation", x).to(x) - self.operator(pair.x0)
        widened = self.noise_std.to(x).square()
        return pair, self.shift(misfit, widened, lambda u: sigma.square() / alpha * back(u), alpha, sigma)

    @abstractmethod
    def shift(self, misfit: Tensor, variance: Tensor, back: Back, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(sigma^2 / alpha) grad log p(y | x_t) from y - A x0_hat, s_y^2, and u -> (sigma^2 / alpha) J^T u."""


class DPS(LinearPosterior):
    """Diffusion posterior sampling (Chung et al., 2023) with the noise's own variance: one call, one pass back.

    **Biased** on every data set, Gaussian ones too: far from the data the likelihood is far too narrow, which pulls too
    hard. On a Gaussian in 16 dimensions seen through a mask with s_y = .3 the mean is .58 posterior standard deviations
    off and samples are .46 as wide along the flow, .25 and .89 along the reverse SDE (python benchmarks/posterior.py).
    Its gradient grows as 1 / s_y^2 at all times, so that samplers need about as many steps. (The paper's step of
    zeta / |y - A x0| belongs to a sampler of 1000 steps; as a score it would depend on their number.)
    """

    @property
    def takes_zero(self) -> bool:
        return False

    def shift(self, misfit: Tensor, variance: Tensor, back: Back, alpha: Tensor, sigma: Tensor) -> Tensor:
        return back(self.operator.adjoint(misfit / variance))


class PiGDM(LinearPosterior):
    """Pseudoinverse guidance (Song et al., 2023) at the weight of Bayes' rule: one call, one pass back.

    **Exact** for Gaussian data of covariance ``data_std``^2 I; biased for others. On a Gaussian in 16 dimensions of
    condition number 100 seen through a mask with s_y = .3 the mean is .22 posterior standard deviations off and samples
    are 1.07 as wide (python benchmarks/posterior.py).

    Parameters
    ----------
    data_std: s, the standard deviation that the data are taken to have in every direction.
    iterations: of conjugate gradients for (s_y^2 I + r^2 A A^T)^-1, without the model; one is enough for operators of
        which A A^T is a multiple of the identity, such as masks.
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        observation: Tensor,
        noise_std: float | Tensor,
        data_std: float = 1.0,
        iterations: int = 20,
        scale: float = 1.0,
    ):
        super().__init__(model, operator, observation, noise_std, scale)
        require_count(iterations, "PiGDM: iterations")
        self.data_std, self.iterations = positive("PiGDM: data_std", data_std), iterations

    @property
    def takes_zero(self) -> bool:
        return True

    def shift(self, misfit: Tensor, variance: Tensor, back: Back, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = (self.data_std * sigma).square() / ((self.data_std * alpha).square() + sigma.square())
        spread = spread.reshape(spread.shape[:1] + (1,) * (misfit.dim() - 1)) if spread.dim() else spread

        def apply(p: Tensor) -> tuple[Tensor, Tensor]:
            return variance * p + spread * self.operator(self.operator.adjoint(p)), p

        return back(self.operator.adjoint(conjugate_gradients(apply, misfit, self.iterations, variance)[0]))


class MMPS(LinearPosterior):
    """Moment-matching posterior sampling (Rozet et al., 2024): one call and ``iterations`` passes back.

    **Exact** for Gaussian data once the conjugate gradients have converged, which takes as many iterations as A C A^T +
    s_y^2 I has different eigenvalues, at most the number of values of y, and far fewer to be near. For other data it is
    biased where p(x_0 | x_t) is far from Gaussian, most along the flow: on a mixture in 16 dimensions seen through a
    mask with s_y = .3 the mean is .15 posterior standard deviations off along it, and .07 along the reverse SDE, with
    two iterations; where modes are hard to tell, .4 and more (python benchmarks/posterior.py). What is
    observed where a ``Mask`` hides the data is not read.

    A network's J is neither symmetric nor positive where noise is large. Iterations stop there at directions that C
    can't have, which takes s_y > 0 to tell; and samplers with noise, such as ``SDEDPMSolver``, forget what is wrong
    there, where the flow does not (docs/conditional.md has figures).
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        observation: Tensor,
        noise_std: float | Tensor,
        iterations: int = 2,
        scale: float = 1.0,
    ):
        super().__init__(model, operator, observation, noise_std, scale)
        require_count(iterations, "MMPS: iterations")
        self.iterations = iterations

    @property
    def takes_zero(self) -> bool:
        return True

    def shift(self, misfit: Tensor, variance: Tensor, back: Back, alpha: Tensor, sigma: Tensor) -> Tensor:
        def apply(p: Tensor) -> tuple[Tensor, Tensor]:
            spread = back(self.operator.adjoint(p))
            return variance * p + self.operator(spread), spread

        return conjugate_gradients(apply, misfit, self.iterations, variance)[1]


def observation_rows(observation: Tensor, operator: LinearOperator) -> Tensor:
    """An observation of the shape ``operator.observed``, or one for each sample, as rows ``(1 or N, *observed)``."""
    wanted, found = tuple(operator.observed), tuple(observation.shape)
    if wanted not in (found, found[1:]) or not observation.is_floating_point() or not observation.isfinite().all():
        shape = ", ".join(map(str, wanted))
        raise ValueError(
            f"observation: expected finite numbers of shape ({shape}) or (N, {shape}), which {type(operator).__name__} "
            f"gives for data of shape {operator.shape}, found {observation.dtype} of shape {found}; build the operator "
            "for your data, or give what it observes"
        )
    return observation[None] if found == wanted else observation


def _explained(rows: Tensor, operator: LinearOperator) -> Tensor:
    """``rows``, but 0 where A writes nothing: without noise conjugate gradients would go after that without end."""
    return torch.where(operator.probe(rows.device) != 0, rows, 0)


def _noise_std(value: float | Tensor, operator: LinearOperator, takes_zero: bool) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float64 if not isinstance(value, Tensor) else None)
    try:
        fits = torch.broadcast_shapes(found.shape, operator.observed) == torch.Size(operator.observed)
    except RuntimeError:
        fits = False
    good = found.isfinite() & ((found >= 0) if takes_zero else (found > 0))
    if not fits or not bool(good.all()):
        least = "at least 0" if takes_zero else "positive"
        shown = f"shape {tuple(found.shape)}" if not fits else f"{found[~good].flatten()[0].item():g}"
        raise ValueError(
            f"noise_std must be {least} and finite, a number or of a shape that broadcasts to {operator.observed}, "
            f"found {shown}" + ("" if takes_zero else "; without noise take PiGDM or MMPS")
        )
    return found
