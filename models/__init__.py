"""The score model: networks, what they predict, how they learn, and closed-form ones to measure against."""

from models.adaptive_times import LossAware, Tabulated
from models.chain_objectives import Hybrid, VariationalBound
from models.dit import DiT
from models.embedding import FourierEmbedding, SinusoidalEmbedding
from models.exact import GaussianMixture
from models.implicit import ImplicitScoreMatching, SlicedScoreMatching, implicit_score_matching, sliced_score_matching
from models.learned_variance import LearnedVariance
from models.level_head import LevelHead
from models.level_sampling import AtLevels, IndexSampler, LossAwareIndex, UniformIndex
from models.mlp import MLP
from models.network import ScoreNetwork
from models.noisy_classifier import ClassifierNet, NoisyClassifier, noisy_cross_entropy
from models.objective import Losses, Objective
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
    "ClassifierNet",
    "CustomWeighting",
    "DataRow",
    "DenoisingScoreMatching",
    "DiT",
    "EDMRow",
    "EDMWeighting",
    "FixedTimes",
    "FourierEmbedding",
    "GaussianMixture",
    "Hybrid",
    "ImplicitScoreMatching",
    "IndexSampler",
    "LearnedVariance",
    "LevelHead",
    "LikelihoodWeighting",
    "LogNormal",
    "LossAware",
    "LossAwareIndex",
    "Losses",
    "MinSNR",
    "NoiseRow",
    "NoisyClassifier",
    "Objective",
    "Parametrization",
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
    "denoising_score_matching",
    "implicit_score_matching",
    "noisy_cross_entropy",
    "sliced_score_matching",
]
