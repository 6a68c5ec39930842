"""The forward process: stochastic differential equations that turn data into noise."""

from sde.base import SDE, GaussianPrior, GaussianSDE, Kernel
from sde.changed import Rescaled, TimeChanged, exploding, preserving
from sde.cosine import Cosine
from sde.diagnosis import Diagnosis, DiagnosisWarning, diagnose
from sde.edm import EDM
from sde.learned import LearnedSchedule
from sde.noise import Noise
from sde.rectified_flow import RectifiedFlow
from sde.score import Prediction, ScoreField, ScoreFunction, ScoreModel
from sde.subvp import SubVP
from sde.ve import VE
from sde.vp import VP

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "Diagnosis",
    "DiagnosisWarning",
    "GaussianPrior",
    "GaussianSDE",
    "Kernel",
    "LearnedSchedule",
    "Noise",
    "Prediction",
    "RectifiedFlow",
    "Rescaled",
    "ScoreField",
    "ScoreFunction",
    "ScoreModel",
    "SubVP",
    "TimeChanged",
    "diagnose",
    "exploding",
    "preserving",
]
