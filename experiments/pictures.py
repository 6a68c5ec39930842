"""The pictures of a run: which ones, for images and for points in the plane."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from experiments import figures
from experiments.comparison import Comparison
from experiments.problem import Problem
from experiments.run import Run
from experiments.tally import NOISE_LEVELS
from experiments.training_figures import loss_by_noise_level
from models import GaussianMixture, ScoreNetwork
from solvers import DDIM, Exact, log_likelihood

_STRIP = DDIM(steps=100)  # deterministic and cheap: its states lie along the flow


def of_training(run: Run) -> list[Path]:
    """The loss over the steps, from ``metrics.csv``, and over the noise levels, from ``loss_by_log_snr.csv``."""
    rows, at = (_rows(run.path(name)) for name in ("metrics.csv", NOISE_LEVELS))
    steps, losses = ([float(row[key]) for row in rows] for key in ("step", "loss"))
    validation = [(float(row["step"]), float(row["validation_loss"])) for row in rows]
    counts = [float(row["count"]) for row in at]
    sums = [float(row["mean"] or 0) * count for row, count in zip(at, counts, strict=True)]
    bins = [[float(row[key]) for key in ("step", "low", "high")] for row in at]
    by_level = [[*where, total, count] for where, total, count in zip(bins, sums, counts, strict=True)]
    return [
        figures.loss_curve(steps, losses, run.path("figures", "loss.png"), validation),
        loss_by_noise_level(by_level, run.path("figures", "loss_by_log_snr.png")),
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def of_comparison(comparison: Comparison, problem: Problem, run: Run) -> list[Path]:
    """Quality against calls, and the samples beside held-out data."""
    rows = [vars(row) for row in comparison.rows]
    quality = figures.quality_against_nfe(rows, comparison.floor, run.path("figures", "quality.png"))
    return [quality, *of_samples(comparison.samples, problem, run)]


def of_samples(samples: dict[str, Tensor], problem: Problem, run: Run) -> list[Path]:
    """Samples of each solver beside held-out data; no picture of data that are neither images nor points."""
    if not (is_image(problem) or is_plane(problem)):
        return []
    path, real = run.path("figures", "samples.png"), problem.x(problem.data.test, torch.Generator().manual_seed(0))
    if is_image(problem):
        shown = {name: x[:40].clamp(-1, 1) for name, x in samples.items()}
        return [figures.samples_beside_real(real[:40].clamp(-1, 1), shown, path)]
    return [figures.samples_2d(samples, path, real)]


def of_flow(model: ScoreNetwork, problem: Problem, run: Run, device: torch.device, seed: int) -> list[Path]:
    """Noise that turns into data."""
    if is_image(problem):
        out = _STRIP(model, shape=(8, *problem.data.shape), seed=seed, device=device, trajectory=10)
        path = run.path("figures", "noise_to_data.png")
        return [figures.noise_to_data(out.trajectory.cpu(), out.times.cpu(), path)]
    if is_plane(problem):
        out = _STRIP(model, shape=(60, 2), seed=seed, device=device, trajectory=1)
        return [
            figures.trajectories_2d(out.trajectory.cpu(), run.path("figures", "trajectories.png"), problem.data.test)
        ]
    return []


def of_density(model: ScoreNetwork, exact: GaussianMixture, run: Run, device: torch.device) -> list[Path]:
    """Learned against exact: score fields at three noise levels, and the log-density."""
    fine, coarse = _plane(60).to(device), _plane(20).to(device)
    learned = log_likelihood(model, fine.reshape(-1, 2), Exact(), rtol=1e-4, atol=1e-4).log_prob.reshape(60, 60).cpu()
    truth = exact.log_prob(fine.reshape(-1, 2)).reshape(60, 60).cpu()
    times = model.sde.time(torch.tensor([4.0, 1.0, -2.0], device=device))
    with torch.no_grad():
        fields = [
            torch.stack([m.score(coarse.reshape(-1, 2), t).reshape(20, 20, 2) for t in times]).cpu()
            for m in (exact, model)
        ]
    return [
        figures.score_fields(*fields, coarse.cpu(), run.path("figures", "scores.png"), [float(t) for t in times]),
        figures.density_maps(truth, learned, fine.cpu(), run.path("figures", "density.png")),
    ]


def is_image(problem: Problem) -> bool:
    """Whether samples can be shown as pictures of one or three channels."""
    return len(problem.data.shape) == 3 and problem.data.shape[0] in (1, 3) and problem.dequantizer is not None


def is_plane(problem: Problem) -> bool:
    """Whether samples are points in the plane."""
    return tuple(problem.data.shape) == (2,)


def _plane(n: int, half: float = 2.5) -> Tensor:
    side = torch.linspace(-half, half, n)
    return torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
