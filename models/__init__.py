"""The score model: networks, what they predict, how they learn, and closed-form ones to measure against."""

from models.adaptive_times import LossAware, Tabulated
from models.chain_objectives import Hybrid, VariationalBound
from models.dit import DiT
from models.embedding import FourierEmbedding, SinusoidalEmbedding
from models.exact import GaussianMixture
from models.image_operators import Blur, Downsampling, Grayscale, box_mask, half_mask, random_mask
from models.implicit import ImplicitScoreMatching, SlicedScoreMatching, implicit_score_matching, sliced_score_matching
from models.learned_variance import LearnedVariance
from models.level_head import LevelHead
from models.level_sampling import AtLevels, IndexSampler, LossAwareIndex, UniformIndex
from models.linear_function import Linear
from models.mlp import MLP
from models.network import ScoreNetwork
from models.objective import Losses, Objective
from models.operators import Composition, LinearOperator, Mask, Matrix, RandomProjection
from models.parametrization import DataRow, EDMRow, NoiseRow, Parametrization, ScoreRow, VelocityRow, VRow
from models.score_matching import DenoisingScoreMatching, denoising_score_matching
from models.share import Share
from models.time_sampling import FixedTimes, LogNormal, SingleTime, TimeSampler, UniformLogSNR, UniformTime
from models.unet import UNet
from models.vdm import VariationalDiffusion
from models.weighted_objective import WeightedObjective
from models.weighting import CustomWeighting, EDMWeighting, LikelihoodWeighting, MinSNR, SimpleWeighting, Weighting

__all__ = [
    "MLP",
    "AtLevels",
    "Blur",
    "Composition",
    "CustomWeighting",
    "DataRow",
    "DenoisingScoreMatching",
    "DiT",
    "Downsampling",
    "EDMRow",
    "EDMWeighting",
    "FixedTimes",
    "FourierEmbedding",
    "GaussianMixture",
    "Grayscale",
    "Hybrid",
    "ImplicitScoreMatching",
    "IndexSampler",
    "LearnedVariance",
    "LevelHead",
    "LikelihoodWeighting",
    "Linear",
    "LinearOperator",
    "LogNormal",
    "LossAware",
    "LossAwareIndex",
    "Losses",
    "Mask",
    "Matrix",
    "MinSNR",
    "NoiseRow",
    "Objective",
    "Parametrization",
    "RandomProjection",
    "ScoreNetwork",
    "ScoreRow",
    "Share",
    "SimpleWeighting",
    "SingleTime",
    "SinusoidalEmbedding",
    "SlicedScoreMatching",
    "Tabulated",
    "TimeSampler",
    "UNet",
    "UniformIndex",
    "UniformLogSNR",
    "UniformTime",
    "VRow",
    "VariationalBound",
    "VariationalDiffusion",
    "VelocityRow",
    "WeightedObjective",
    "Weighting",
    "box_mask",
    "denoising_score_matching",
    "half_mask",
    "implicit_score_matching",
    "random_mask",
    "sliced_score_matching",
]
