"""The way back: samplers, the probability-flow ODE, and exact likelihoods."""

from sde import Decoder, DiscretizedGaussian, LevelPosterior
from solvers.adaptive import AdaptiveSDE
from solvers.base import Output, SamplingDiverged, Solver
from solvers.bound import Bound, elbo
from solvers.bridge import DDIM, Ancestral
from solvers.chains import DDPM, AnnealedLangevin
from solvers.continuous_bound import continuous_elbo, learned_density
from solvers.corrector import Corrector, PredictorCorrector
from solvers.divergence import Divergence, Exact, Hutchinson, HutchPlusPlus, default_divergence
from solvers.endpoint import EndpointWarning
from solvers.euler import Euler
from solvers.euler_maruyama import EulerMaruyama
from solvers.exponential_adams import ExponentialAdams
from solvers.grids import GRIDS, time_grid
from solvers.heun import Heun
from solvers.importance import GaussianReference, LogSNRDensity
from solvers.langevin import Langevin
from solvers.likelihood import Likelihood, log_likelihood
from solvers.line import inconsistency, line_likelihood
from solvers.matched_prior import MatchedPrior, matched_prior
from solvers.multistep import DPMSolver, UniPC
from solvers.ode import ODEError
from solvers.probability_flow import ProbabilityFlow
from solvers.repaint import RePaint
from solvers.reverse_diffusion import ReverseDiffusion
from solvers.runge_kutta import RungeKutta4
from solvers.sample import Sampled, sample
from solvers.sampler import GridSampler, Sampler, Step
from solvers.sde_dpm_solver import SDEDPMSolver
from solvers.simulate import simulate
from solvers.solver_error import SolverError, solver_error

__all__ = [
    "DDIM",
    "DDPM",
    "GRIDS",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "Bound",
    "Corrector",
    "DPMSolver",
    "Decoder",
    "DiscretizedGaussian",
    "Divergence",
    "EndpointWarning",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "ExponentialAdams",
    "GaussianReference",
    "GridSampler",
    "Heun",
    "HutchPlusPlus",
    "Hutchinson",
    "Langevin",
    "LevelPosterior",
    "Likelihood",
    "LogSNRDensity",
    "MatchedPrior",
    "ODEError",
    "Output",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RePaint",
    "ReverseDiffusion",
    "RungeKutta4",
    "SDEDPMSolver",
    "Sampled",
    "Sampler",
    "SamplingDiverged",
    "Solver",
    "SolverError",
    "Step",
    "UniPC",
    "continuous_elbo",
    "default_divergence",
    "elbo",
    "inconsistency",
    "learned_density",
    "line_likelihood",
    "log_likelihood",
    "matched_prior",
    "sample",
    "simulate",
    "solver_error",
    "time_grid",
]
