"""The score model: networks, what they predict, how they learn, and closed-form ones to measure against."""

from models.chain_objectives import Hybrid, VariationalBound
from models.embedding import FourierEmbedding, SinusoidalEmbedding
from models.exact import GaussianMixture
from models.learned_variance import LearnedVariance
from models.level_head import LevelHead
from models.level_sampling import AtLevels, IndexSampler, LossAwareIndex, UniformIndex
from models.mlp import MLP
from models.network import ScoreNetwork
from models.objective import Losses, Objective
from models.parametrization import DataRow, EDMRow, NoiseRow, Parametrization, ScoreRow, VelocityRow, VRow
from models.score_matching import DenoisingScoreMatching, denoising_score_matching
from models.time_sampling import TimeSampler, UniformLogSNR, UniformTime
from models.unet import UNet
from models.vdm import VariationalDiffusion

__all__ = [
    "MLP",
    "AtLevels",
    "DataRow",
    "DenoisingScoreMatching",
    "EDMRow",
    "FourierEmbedding",
    "GaussianMixture",
    "Hybrid",
    "IndexSampler",
    "LearnedVariance",
    "LevelHead",
    "LossAwareIndex",
    "Losses",
    "NoiseRow",
    "Objective",
    "Parametrization",
    "ScoreNetwork",
    "ScoreRow",
    "SinusoidalEmbedding",
    "TimeSampler",
    "UNet",
    "UniformIndex",
    "UniformLogSNR",
    "UniformTime",
    "VRow",
    "VariationalBound",
    "VariationalDiffusion",
    "VelocityRow",
    "denoising_score_matching",
]
