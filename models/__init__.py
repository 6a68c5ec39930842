"""The score model: networks, what they predict, how they learn, and closed-form ones to measure against."""

from models.adaptive_times import LossAware, Tabulated
from models.chain_objectives import Hybrid, VariationalBound
from models.dit import DiT
from models.embedding import FourierEmbedding, SinusoidalEmbedding
from models.exact import GaussianMixture
from models.guidance import Blend, Classifier, ClassifierFree, Conditioned, Guided, Steered
from models.image_operators import Blur, Downsampling, Grayscale, box_mask, half_mask, random_mask
from models.implicit import ImplicitScoreMatching, SlicedScoreMatching, implicit_score_matching, sliced_score_matching
from models.learned_variance import LearnedVariance
from models.level_head import LevelHead
from models.level_sampling import AtLevels, IndexSampler, LossAwareIndex, UniformIndex
from models.linear_function import Linear
from models.mlp import MLP
from models.network import ScoreNetwork
from models.noisy_classifier import ClassifierNet, NoisyClassifier, noisy_cross_entropy
from models.objective import Losses, Objective
from models.operators import Composition, LinearOperator, Mask, Matrix, RandomProjection
from models.parametrization import DataRow, EDMRow, NoiseRow, Parametrization, ScoreRow, VelocityRow, VRow
from models.posterior import DPS, MMPS, LinearPosterior, PiGDM
from models.replacement import Replacement, Rotated, colorization
from models.score_matching import DenoisingScoreMatching, denoising_score_matching
from models.share import Share
from models.time_sampling import FixedTimes, LogNormal, SingleTime, TimeSampler, UniformLogSNR, UniformTime
from models.unet import UNet
from models.vdm import VariationalDiffusion
from models.weighted_objective import WeightedObjective
from models.weighting import CustomWeighting, EDMWeighting, LikelihoodWeighting, MinSNR, SimpleWeighting, Weighting

__all__ = [
    "DPS",
    "MLP",
    "MMPS",
    "AtLevels",
    "Blend",
    "Blur",
    "Classifier",
    "ClassifierFree",
    "ClassifierNet",
    "Composition",
    "Conditioned",
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
    "Guided",
    "Hybrid",
    "ImplicitScoreMatching",
    "IndexSampler",
    "LearnedVariance",
    "LevelHead",
    "LikelihoodWeighting",
    "Linear",
    "LinearOperator",
    "LinearPosterior",
    "LogNormal",
    "LossAware",
    "LossAwareIndex",
    "Losses",
    "Mask",
    "Matrix",
    "MinSNR",
    "NoiseRow",
    "NoisyClassifier",
    "Objective",
    "Parametrization",
    "PiGDM",
    "RandomProjection",
    "Replacement",
    "Rotated",
    "ScoreNetwork",
    "ScoreRow",
    "Share",
    "SimpleWeighting",
    "SingleTime",
    "SinusoidalEmbedding",
    "SlicedScoreMatching",
    "Steered",
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
    "colorization",
    "denoising_score_matching",
    "half_mask",
    "implicit_score_matching",
    "noisy_cross_entropy",
    "random_mask",
    "sliced_score_matching",
]
