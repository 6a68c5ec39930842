"""The picture of the processes' schedules, one PNG. As ``experiments.figures``.

A Gaussian process is alpha(t) and sigma(t) of x_t = alpha x_0 + sigma eps. Its log-SNR, 2 log(alpha / sigma), is what
is left of it when the clock is (Kingma et al., "Variational diffusion models", 2021): the noise level that a network
is asked about, whatever t is called there.
"""

from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import INK, MARKERS, PALETTE, canvas, checked, plain_log_ticks
from sde import EDM, VE, VP, Cosine, GaussianSDE, LearnedSchedule, RectifiedFlow, SubVP
from sde.base import last_time

_TITLES = {"alpha": "alpha", "sigma": "sigma", "log_snr": "log-SNR (nats)"}
_LOWEST_SIGMA, _HIGHEST_SIGMA = 3e-3, 2e2


def family() -> dict[str, GaussianSDE]:
    """Every process that the framework has, by name, at its defaults."""
    learned = LearnedSchedule().requires_grad_(False)
    plain = {"VP": VP(), "VE": VE(), "cosine": Cosine(), "EDM": EDM(), "rectified flow": RectifiedFlow()}
    return plain | {"sub-VP": SubVP(), "learned (start)": learned}


def schedules(processes: dict[str, GaussianSDE], path: Path, chosen: str | None = None) -> Path:
    """alpha, sigma and log-SNR of processes by name, over their clocks t / t_max; a broad band marks `chosen`."""
    if chosen is not None and chosen not in processes:
        raise ValueError(f"chosen: expected one of {', '.join(processes)}, found {chosen!r}.")
    curves = {name: _curves(name, sde) for name, sde in processes.items()}
    if not curves:
        raise ValueError("processes: expected at least one, found none.")
    with canvas(path, 12.0, 4.2) as figure:
        for i, (axes, title) in enumerate(zip(figure.subplots(1, 3), _TITLES.values(), strict=True), start=1):
            lines = [axes.plot(curve[:, 0], curve[:, i], **_look(k))[0] for k, curve in enumerate(curves.values())]
            if chosen is not None:
                axes.plot(curves[chosen][:, 0], curves[chosen][:, i], color=INK, alpha=0.2, linewidth=9, zorder=1)
            axes.set(xlabel="t / t_max", title=title)
            if title == "sigma":
                axes.set(yscale="log", ylim=(_LOWEST_SIGMA, _HIGHEST_SIGMA))
                plain_log_ticks(axes.yaxis)
        figure.legend(lines, list(curves), loc="outside lower center", ncols=min(8, len(curves)))
    return path


def _curves(name: str, sde: GaussianSDE) -> Tensor:
    """t / t_max, alpha, sigma and log-SNR at 81 times, (81, 4); a sigma off the axis at its edge."""
    t = torch.linspace(sde.t_min, last_time(sde), 81, dtype=torch.float64)
    values = torch.stack((t / sde.t_max, *(getattr(sde, part)(t) for part in _TITLES)), 1)
    return checked(f"processes[{name!r}]", values, "81, 4")


def _look(i: int) -> dict:
    """A colour and a marker for each, and dashes from the eighth on; the markers of none upon those of another."""
    style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "markevery": (2 * i % 14, 14)}
    return style | {"linestyle": "--" if i // len(PALETTE) % 2 else "-", "linewidth": 1.5, "markersize": 5}
