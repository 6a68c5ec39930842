r"""The learned variance of a chain's steps back (Nichol and Dhariwal, "Improved DDPM", 2021, section 3.1).

A second output for each value of the data gives the weight v between the smallest and the largest variance that a step
from x_k to x_{k-1} can have for data of variance up to 1,

    variance = exp(v log beta + (1 - v) log beta_tilde)          (eq. 15).

The paper takes v = (output + 1) / 2 as it comes, and says that in practice it stays in [0, 1]. Here v =
sigmoid(2 output): that line at 0, to second order, and in [0, 1] for any output. The pair is that of the first
output, in any parametrization. ``Hybrid`` and ``VariationalBound`` train it; ``DDPM(variance="learned")`` and
``elbo(variance="learned")`` use it.
"""

import torch
from torch import Tensor

from models.parametrization import Parametrization, VarianceHead
from sde import GaussianSDE, Prediction


class LearnedVariance(Parametrization, VarianceHead):
    """The parametrization ``mean`` with one output more for each value: the weight of the variance.

    The network's channels are those of ``mean``, then those of the weight.
    """

    def __init__(self, mean: Parametrization):
        super().__init__()
        if not isinstance(mean, Parametrization) or isinstance(mean, VarianceHead):
            raise TypeError(f"LearnedVariance: expected a Parametrization such as NoiseRow(), found {mean!r}")
        self.mean, self.outputs, self.data_std = mean, mean.outputs + 1, mean.data_std

    def row(self, t: Tensor, sde: GaussianSDE) -> tuple[Tensor, Tensor]:
        return self.mean.row(t, sde)

    def predict(self, output: Tensor, x: Tensor, t: Tensor, sde: GaussianSDE) -> Prediction:
        """The pair of ``mean`` from all channels but the last C."""
        return self.mean.predict(output[:, : self.mean.outputs * x.shape[1]], x, t, sde)

    def variance_weight(self, output: Tensor) -> Tensor:
        return torch.sigmoid(2 * output[:, -(output.shape[1] // self.outputs) :])
