"""The figures of docs/sde.md: ``python docs/make_figures.py`` writes them into docs/images/ (5 seconds)."""

from pathlib import Path

import torch
from benes import Benes, TwoHumps, benes_model

from experiments.canvas import BLUE, FAINT, RED, canvas
from experiments.process_figures import family, schedules
from solvers import EulerMaruyama, simulate

IMAGES = Path(__file__).parent / "images"


def benes(path: Path) -> Path:
    """Paths of a process that is not affine, and samples of its reversal beside the exact density."""
    sde, data = Benes(), TwoHumps((20_000, 1), 0.05)
    forward = simulate(sde, data.sample(seed=0)[:60], steps=200, trajectory=1)
    back = EulerMaruyama(steps=300)(benes_model(sde), shape=data.shape, seed=1)
    x = torch.linspace(-2, 2, 400)
    with canvas(path, 10.0, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(forward.times, forward.trajectory[..., 0], color=BLUE, alpha=0.35, linewidth=0.7)
        left.set(xlabel="t", ylabel="x", title="forward: dx = tanh(x) dt + dw, 60 paths")
        right.hist(back.x[:, 0].numpy(), bins=80, range=(-2, 2), density=True, color=FAINT, label="20,000 samples")
        right.plot(x, TwoHumps((1,), 0.05 + sde.t_min).log_prob(x[:, None]).exp(), color=RED, label="exact density")
        right.set(xlabel="x", title="back: Euler-Maruyama, 300 steps")
        right.legend()
    return path


if __name__ == "__main__":
    for figure in (schedules(family(), IMAGES / "schedules.png"), benes(IMAGES / "benes.png")):
        print(figure)
