"""The forward process: stochastic differential equations that turn data into noise."""

from sde.base import SDE, GaussianPrior, GaussianSDE, Kernel
from sde.noise import Noise
from sde.score import Prediction, ScoreModel
from sde.subvp import SubVP
from sde.ve import VE
from sde.vp import VP

__all__ = ["SDE", "VE", "VP", "GaussianPrior", "GaussianSDE", "Kernel", "Noise", "Prediction", "ScoreModel", "SubVP"]
