"""The pictures of a run: which ones, for images and for points in the plane."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from experiments import animation, figures, plane_figures, process_figures, sampler_figures
from experiments.advice import calls
from experiments.comparison import Comparison
from experiments.league_figures import pareto
from experiments.problem import Problem
from experiments.run import Run
from experiments.tally import NOISE_LEVELS
from experiments.training_figures import loss_by_noise_level
from models import GaussianMixture, ScoreNetwork
from sde import SDE, GaussianSDE
from solvers import DDIM, Exact, log_likelihood

# Deterministic and cheap, with states along the flow. At equal angles its RMS error for digits and two moons is .006 to
# .011 under five processes; equal times, which leave few states between EDM's noise and the data, err by .26 there.
_STRIP = DDIM(steps=100, grid="angle")
_FRAMES = 26
_PIXELS = 8192  # of the data in a frame, whose file grows with them
_EXACT = "probability_flow"


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
    """Quality against calls, the samples beside held-out data, and how far apart the same noise ends."""
    (name, metric), path = comparison.first, run.path("figures", "quality.png")
    shown = [{"sampler": row["sampler"], "nfe": calls(row), "seconds": row["seconds"]} for row in comparison.rows]
    rows = [one | row["metrics"][name] for one, row in zip(shown, comparison.rows, strict=True)]
    quality = pareto(rows, path, metric["title"], metric["best"], comparison.floor)
    reference = _EXACT if _EXACT in comparison.samples else comparison.chosen
    same_noise = of_same_noise(comparison.samples, reference, problem, run)
    return [quality, *of_samples(comparison.samples, problem, run), *same_noise]


def of_samples(samples: dict[str, Tensor], problem: Problem, run: Run) -> list[Path]:
    """Samples of each solver beside held-out data; no picture of data that are neither images nor points."""
    if not (is_image(problem) or is_plane(problem)):
        return []
    path, real = run.path("figures", "samples.png"), problem.x(problem.data.test, torch.Generator().manual_seed(0))
    if is_image(problem):
        shown = {name: x[:40].clamp(-1, 1) for name, x in samples.items()}
        return [figures.samples_beside_real(real[:40].clamp(-1, 1), shown, path)]
    return [figures.samples_2d(samples, path, real)]


def of_same_noise(samples: dict[str, Tensor], reference: str, problem: Problem, run: Run) -> list[Path]:
    """Samples of each solver beside those of another one, all from the same noise."""
    path = run.path("figures", "same_noise.png")
    if is_image(problem):
        shown = {name: x.clamp(-1, 1) for name, x in samples.items()}
        return [sampler_figures.same_noise_images(shown, reference, path)]
    if is_plane(problem) and len(samples) > 1:
        return [sampler_figures.same_noise_points(samples, reference, path, problem.data.test)]
    return []


def of_flow(model: ScoreNetwork, problem: Problem, run: Run, device: torch.device, seed: int) -> list[Path]:
    """Noise that turns into data, as a picture and as an animation."""
    if not (is_image(problem) or is_plane(problem)):
        return []
    shape = tuple(problem.data.shape)
    count = min(24, max(2, _PIXELS // (shape[-1] * shape[-2]))) if is_image(problem) else 300
    out = _STRIP(model, shape=(count, *shape), seed=seed, device=device, trajectory=2)
    states, times, log_snr = (x.detach().cpu() for x in (out.trajectory, out.times, model.sde.log_snr(out.times)))
    shown = animation.evenly(log_snr, _FRAMES)
    moving, clock = run.path("figures", "noise_to_data.gif"), (times[shown], log_snr[shown])
    if is_image(problem):
        few = animation.evenly(log_snr, 10)
        still = figures.noise_to_data(states[few, :8], times[few], run.path("figures", "noise_to_data.png"))
        return [still, animation.animated_images(states[shown], *clock, moving)]
    still = plane_figures.trajectories_2d(states[:, :60], run.path("figures", "trajectories.png"), problem.data.test)
    return [still, animation.animated_points(states[shown], *clock, moving, problem.data.test)]


def of_density(model: ScoreNetwork, exact: GaussianMixture, run: Run, device: torch.device) -> list[Path]:
    """Learned against exact: score fields at three noise levels, and the log-density."""
    fine, coarse = _plane(60).to(device), _plane(20).to(device)
    learned, truth = _log_density(model, fine), exact.log_prob(fine.reshape(-1, 2)).reshape(60, 60).cpu()
    times = _times(model)
    fields = [_scores(m, coarse, times) for m in (exact, model)]
    return [
        plane_figures.score_fields(*fields, coarse.cpu(), run.path("figures", "scores.png"), times.tolist()),
        plane_figures.density_maps(truth, learned, fine.cpu(), run.path("figures", "density.png")),
    ]


def of_learned_density(model: ScoreNetwork, problem: Problem, run: Run, device: torch.device) -> list[Path]:
    """Scores and log-density of points in the plane whose density is not known, beside held-out data."""
    data = problem.data.test
    half = 1.25 * data.abs().max().item()
    fine, coarse, times = _plane(60, half).to(device), _plane(20, half).to(device), _times(model)
    scores, learned = _scores(model, coarse, times), _log_density(model, fine)
    return [
        plane_figures.scores_over_data(scores, coarse.cpu(), data, run.path("figures", "scores.png"), times.tolist()),
        plane_figures.density_beside_data(learned, fine.cpu(), data, run.path("figures", "density.png")),
    ]


def of_process(sde: SDE, run: Run) -> list[Path]:
    """The schedules of a process beside those of the family; none of a process that has no alpha and sigma."""
    if not isinstance(sde, GaussianSDE):
        return []
    known = process_figures.family()
    own = next((name for name, other in known.items() if other == sde), f"{type(sde).__name__} (this one)")
    return [process_figures.schedules(known | {own: sde}, run.path("figures", "schedules.png"), own)]


def _log_density(model: ScoreNetwork, grid: Tensor) -> Tensor:
    """At a grid (M, M, 2): (M, M), in nats."""
    found = log_likelihood(model, grid.reshape(-1, 2), Exact(), rtol=1e-4, atol=1e-4)
    return found.log_prob.reshape(grid.shape[:2]).cpu()


def _scores(model: ScoreNetwork, grid: Tensor, times: Tensor) -> Tensor:
    """At a grid (M, M, 2) and times (T,): (T, M, M, 2)."""
    with torch.no_grad():
        return torch.stack([model.score(grid.reshape(-1, 2), t).reshape(grid.shape) for t in times]).cpu()


def _times(model: ScoreNetwork) -> Tensor:
    """Of little, equal and much noise beside the data."""
    return model.sde.time(torch.tensor([4.0, 1.0, -2.0], device=next(model.parameters()).device)).detach()


def is_image(problem: Problem) -> bool:
    """Whether samples can be shown as pictures of one or three channels."""
    return len(problem.data.shape) == 3 and problem.data.shape[0] in (1, 3) and problem.dequantizer is not None


def is_plane(problem: Problem) -> bool:
    """Whether samples are points in the plane."""
    return tuple(problem.data.shape) == (2,)


def _plane(n: int, half: float = 2.5) -> Tensor:
    side = torch.linspace(-half, half, n)
    return torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
