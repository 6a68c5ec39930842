"""The score model that learns: a network, an SDE, and what the network predicts."""

import torch
from torch import Tensor, nn

from models.embedding import Conditioning
from models.labels import LABELS
from models.parametrization import ROWS, Parametrization, VarianceHead
from sde import GaussianSDE, Inside, Prediction, VariancePrediction
from sde.base import expand


class ScoreNetwork(Inside):
    """A network ``net(x, label, **condition)`` as a score model under ``sde``.

    The network sees x_t / sqrt(alpha^2 s^2 + sigma^2), of unit variance for data of standard deviation s (1, but for
    EDM's row: ``Parametrization.data_std``), and a label of shape ``(B,)``, by default log(sigma / alpha): in these,
    all Gaussian SDEs pose it the same problem. Both, and the pair, are computed in the precision of ``t`` and ``x``,
    also under autocast; the label is that of a level within ``sde.log_snr_range``, finite at both ends. Where alpha or
    sigma is 0 the row may leave x_0 or eps undetermined: it is asked just before (``Inside``).

    Parameters
    ----------
    net: any module that maps ``(B, C, ...)`` to ``(B, outputs * C, ...)``.
    parametrization: "noise", "data", "v", "velocity", "score", "edm", or a ``Parametrization`` such as ``LevelHead``.
    label: "log_snr", "log_sigma" or "time", see ``models.labels``.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: GaussianSDE,
        parametrization: str | Parametrization = "noise",
        label: str = "log_snr",
    ):
        super().__init__(sde)
        if label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, found {label!r}")
        if isinstance(parametrization, str):
            if parametrization not in ROWS:
                raise ValueError(f"parametrization must be one of {', '.join(ROWS)}, found {parametrization!r}")
            parametrization = ROWS[parametrization]()
        self.net, self.parametrization, self.label = net, parametrization, LABELS[label]
        self.predicts_variance = isinstance(parametrization, VarianceHead)
        self.classes = next((part.known for part in net.modules() if isinstance(part, Conditioning)), None)

    def _predict(
        self, x: Tensor, t: Tensor, with_variance: bool = False, **condition
    ) -> Prediction | VariancePrediction:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        label = self.label(t, alpha, sigma, self.sde).expand(len(x))
        scale = torch.hypot(self.parametrization.data_std * alpha, sigma)
        output = self.net(x / expand(scale, x), label, **condition).to(x.dtype)
        pair = self.parametrization.predict(output, x, t, self.sde)
        return VariancePrediction(*pair, self.parametrization.variance_weight(output)) if with_variance else pair
