"""The figures of docs/sde.md: ``python docs/make_figures.py`` writes them into docs/images/ (20 seconds)."""

from pathlib import Path

import torch
from benes import Benes, TwoHumps, benes_model

from experiments.canvas import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, SKY, canvas
from experiments.labels import label_curves
from sde import EDM, VE, VP, Cosine, GaussianSDE, LearnedSchedule, RectifiedFlow, SubVP
from sde.base import last_time
from solvers import EulerMaruyama, simulate

IMAGES = Path(__file__).parent / "images"
PROCESSES: dict[str, tuple[GaussianSDE, str]] = {
    "VP": (VP(), BLUE),
    "sub-VP": (SubVP(), SKY),
    "VE": (VE(), RED),
    "cosine": (Cosine(), GREEN),
    "EDM": (EDM(), ORANGE),
    "rectified flow": (RectifiedFlow(), PURPLE),
    "learned (start)": (LearnedSchedule().requires_grad_(False), INK),
}


def schedules(path: Path) -> Path:
    """alpha, sigma and log-SNR of every process over its clock."""
    with canvas(path, 13.0, 4.2) as figure:
        for axes, name in zip(figure.subplots(1, 3), ("alpha", "sigma", "log_snr"), strict=True):
            curves = {}
            for label, (sde, colour) in PROCESSES.items():
                t = torch.linspace(sde.t_min, last_time(sde), 81, dtype=torch.float64)
                curves[label] = torch.stack((t / sde.t_max, getattr(sde, name)(t)), 1)
                axes.plot(*curves[label].T, color=colour, linewidth=1.8, linestyle="--" if "learned" in label else "-")
            axes.set(xlabel="t / t_max", title={"log_snr": "log-SNR (nats)"}.get(name, name))
            if name == "sigma":
                axes.set(yscale="log", ylim=(3e-3, 2e2))
            places = {label: curve[::4] for label, curve in curves.items()}
            label_curves(axes, places, [colour for _, colour in PROCESSES.values()])
    return path


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
    for figure in (schedules(IMAGES / "schedules.png"), benes(IMAGES / "benes.png")):
        print(figure)
