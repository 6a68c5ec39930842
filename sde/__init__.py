"""The forward process: stochastic differential equations that turn data into noise."""

from sde.base import SDE, GaussianPrior, GaussianSDE, Kernel
from sde.changed import Rescaled, TimeChanged, exploding, preserving
from sde.cosine import Cosine
from sde.ddpm import DDPMChain, cosine_betas, linear_betas, log_snr_betas, sde_betas
from sde.decoder import Decoder, DiscretizedGaussian, LevelPosterior
from sde.diagnosis import Diagnosis, DiagnosisWarning, diagnose
from sde.discrete import GaussianChain, Transition
from sde.edm import EDM
from sde.learned import LearnedSchedule
from sde.ncsn import (
    NCSNLevels,
    geometric_sigmas,
    largest_sigma,
    levels_for,
    sigma_ratio,
    step_size,
    variance_ratio,
)
from sde.noise import Noise
from sde.rectified_flow import RectifiedFlow
from sde.score import (
    Around,
    Density,
    Inside,
    PerSample,
    Prediction,
    ScoreField,
    ScoreModel,
    VariancePrediction,
    of_samples,
)
from sde.score_function import ScoreFunction
from sde.subvp import SubVP
from sde.ve import VE
from sde.vp import VP

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Around",
    "Cosine",
    "DDPMChain",
    "Decoder",
    "Density",
    "Diagnosis",
    "DiagnosisWarning",
    "DiscretizedGaussian",
    "GaussianChain",
    "GaussianPrior",
    "GaussianSDE",
    "Inside",
    "Kernel",
    "LearnedSchedule",
    "LevelPosterior",
    "NCSNLevels",
    "Noise",
    "PerSample",
    "Prediction",
    "RectifiedFlow",
    "Rescaled",
    "ScoreField",
    "ScoreFunction",
    "ScoreModel",
    "SubVP",
    "TimeChanged",
    "Transition",
    "VariancePrediction",
    "cosine_betas",
    "diagnose",
    "exploding",
    "geometric_sigmas",
    "largest_sigma",
    "levels_for",
    "linear_betas",
    "log_snr_betas",
    "of_samples",
    "preserving",
    "sde_betas",
    "sigma_ratio",
    "step_size",
    "variance_ratio",
]
