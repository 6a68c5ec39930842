"""The score model: networks, what they predict, how they learn, and closed-form ones to measure against."""

from models.embedding import FourierEmbedding, SinusoidalEmbedding
from models.exact import GaussianMixture
from models.learned_variance import LearnedVariance
from models.level_head import LevelHead
from models.mlp import MLP
from models.network import ScoreNetwork
from models.objective import Losses, Objective
from models.parametrization import DataRow, EDMRow, NoiseRow, Parametrization, ScoreRow, VelocityRow, VRow
from models.score_matching import DenoisingScoreMatching, denoising_score_matching
from models.time_sampling import TimeSampler, UniformLogSNR, UniformTime
from models.unet import UNet

__all__ = [
    "MLP",
    "DataRow",
    "DenoisingScoreMatching",
    "EDMRow",
    "FourierEmbedding",
    "GaussianMixture",
    "LearnedVariance",
    "LevelHead",
    "Losses",
    "NoiseRow",
    "Objective",
    "Parametrization",
    "ScoreNetwork",
    "ScoreRow",
    "SinusoidalEmbedding",
    "TimeSampler",
    "UNet",
    "UniformLogSNR",
    "UniformTime",
    "VRow",
    "VelocityRow",
    "denoising_score_matching",
]
