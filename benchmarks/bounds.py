"""Likelihood and its bounds in one table: the flow's, the continuous ELBO, and ELBOs of chains.

    python benchmarks/bounds.py [--checkpoint RUN_FOLDER ...] [--samples 1000]

With closed-form scores: the mixture of two correlated Gaussians in 2-D under VP and VE, where all of them bound the
log-density of the data, which is known. With ``--checkpoint`` also a trained network, on the test data of its run,
uniformly dequantized or as they are, where only the continuous bound and the chains' are on one density.
"""

import argparse
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from experiments.bounds import bounds_table
from experiments.build import build
from experiments.checkpoint import load
from experiments.problem import Problem
from models import GaussianMixture
from sde import VE, VP, DDPMChain, GaussianSDE, ScoreModel
from solvers import Exact, GaussianReference, Hutchinson, learned_density, log_likelihood

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[1] / "conf" / "data"
STEPS = (25, 100, 1000)


def mixture(sde: GaussianSDE) -> GaussianMixture:
    """Two components, of different weights, means, variances and correlation; the tests' own."""
    covariances = torch.tensor([[[0.05, 0.02], [0.02, 0.05]], [[0.2, -0.1], [-0.1, 0.3]]], dtype=torch.float64)
    means = torch.tensor([[1.0, -1.0], [-1.5, 0.5]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances, sde)


def compared(model: ScoreModel, x0: Tensor, divergence, bin_width: float | None = None, **options) -> str:
    """The table of one model; the ODE takes ``x0`` as clean data, as the bounds do."""
    flow = log_likelihood(model, x0, divergence, rtol=1e-6, atol=1e-6, endpoint_correction=True)
    density = learned_density(model, x0[:64], reference=GaussianReference.of(x0))
    options = {"density": density, "points": 128, "bin_width": bin_width} | options
    found = bounds_table(model, x0, None, STEPS, flow_log_prob=flow.log_prob, flow_nfe=flow.nfe, **options)
    return found.text()


def exact(sde: GaussianSDE, samples: int, chains: tuple) -> str:
    """The mixture's, beside the log-density of the same samples."""
    model = mixture(sde)
    x0 = model.sample(samples, seed=9)
    log_prob = model.log_prob(x0)
    truth = (
        f"log p of the data, in closed form: {float(log_prob.mean()):.4f} ± {float(log_prob.std()) / samples**0.5:.4f}"
    )
    return f"Exact score, {sde}\n{truth}\n{compared(model, x0, Exact(), chains=chains)}"


def trained(path: str, samples: int) -> str:
    """A checkpoint's, on the test split of the data set that it names."""
    model, convention, _ = load(path, torch.device("cpu"))
    problem = Problem.of(build(OmegaConf.load(DATA / f"{convention['name']}.yaml"), where="data"))
    x0 = problem.x(problem.data.test[:samples], torch.Generator().manual_seed(0))
    width = problem.dequantizer.bin_width if problem.dequantizer else None
    divergence = Exact() if problem.dimensions < 10 else Hutchinson(probes=2)
    return f"{path}: {model.sde}\n{compared(model, x0, divergence, width)}"


def main() -> None:
    """Print the tables, and keep those of exact scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=[], help="checkpoints, or folders of runs")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pages = [exact(VP(), args.samples, (DDPMChain(),)), exact(VE(), args.samples, ())]
    text = "\n\n".join(pages) + "\n"
    print(text, flush=True)
    (RESULTS / "bounds.txt").write_text(text)
    for path in args.checkpoint:
        print(trained(path, args.samples), flush=True)


if __name__ == "__main__":
    main()
