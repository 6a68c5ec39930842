"""The way back: samplers, the probability-flow ODE, and exact likelihoods."""

from solvers.base import Output, SamplingDiverged, Solver
from solvers.bound import Bound, elbo
from solvers.bridge import DDIM, Ancestral
from solvers.chains import DDPM, AnnealedLangevin
from solvers.decoder import DiscretizedGaussian
from solvers.divergence import Divergence, Exact, Hutchinson
from solvers.euler import Euler
from solvers.euler_maruyama import EulerMaruyama
from solvers.grids import GRIDS, time_grid
from solvers.heun import Heun
from solvers.langevin import Langevin, PredictorCorrector
from solvers.likelihood import Likelihood, log_likelihood
from solvers.multistep import DPMSolver, UniPC
from solvers.ode import ODEError
from solvers.probability_flow import ProbabilityFlow
from solvers.runge_kutta import RungeKutta4
from solvers.sampler import GridSampler, Sampler, Step
from solvers.simulate import simulate

__all__ = [
    "DDIM",
    "DDPM",
    "GRIDS",
    "Ancestral",
    "AnnealedLangevin",
    "Bound",
    "DPMSolver",
    "DiscretizedGaussian",
    "Divergence",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "GridSampler",
    "Heun",
    "Hutchinson",
    "Langevin",
    "Likelihood",
    "ODEError",
    "Output",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RungeKutta4",
    "Sampler",
    "SamplingDiverged",
    "Solver",
    "Step",
    "UniPC",
    "elbo",
    "log_likelihood",
    "simulate",
    "time_grid",
]
