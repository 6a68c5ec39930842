"""The pictures of points in the plane, one PNG each: paths, scores and densities. As ``experiments.figures``.

The score is the gradient of log p_t; arrows of all lengths can't be read beside each other, so that they are drawn as
directions, and their lengths as colours on a logarithmic scale. Log-densities are in nats, by default those of
``log_likelihood`` along the probability-flow ODE (Song et al., 2021, eq. 39).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import BLUE, ORANGE, canvas, checked, density_behind


def trajectories_2d(trajectory: Tensor, path: Path, data: Tensor | None = None) -> Path:
    """Paths (K, N, 2) from noise (first) to samples (last) over the density of `data` (M, 2).

    Where the noise starts five times as far out, both axes are asinh: linear near 0, logarithmic far from it.
    """
    x = checked("trajectory", trajectory, "K, N, 2")
    real = None if data is None else checked("data", data, "M, 2")
    with canvas(path, 5.6, 6.0) as figure:
        axes = figure.add_subplot(box_aspect=1, xlabel="$x_1$", ylabel="$x_2$")
        frame_paths(axes, x, real)
        _paths(axes, x)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return path


def frame_paths(axes, x: Tensor, data: Tensor | None) -> None:
    """Axes that hold paths (K, N, 2), asinh where they begin far out, over the density of `data` (M, 2)."""
    inner = 1.15 * max(part.abs().max().item() for part in (x[-1], data) if part is not None)
    outer = max(1.05 * x.abs().max().item(), inner)
    if outer > 5 * inner:
        axes.set_xscale("asinh", linear_width=inner / 4)
        axes.set_yscale("asinh", linear_width=inner / 4)
        # Powers of ten that are not in the linear part, where they would be upon each other.
        powers = [10.0**n for n in range(math.ceil(math.log10(inner / 4)), math.floor(math.log10(outer)) + 1)]
        places = [*(-value for value in reversed(powers)), 0.0, *powers]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(places, [f"{value:g}" for value in places])
            axis.set_ticks([], minor=True)
    axes.set(xlim=(-outer, outer), ylim=(-outer, outer))
    if data is not None:
        density_behind(axes, data, inner)


def score_fields(exact: Tensor, learned: Tensor, grid: Tensor, path: Path, times: Sequence[float]) -> Path:
    """Exact and learned scores (T, M, M, 2) on `grid` (M, M, 2), a row per time, and |learned - exact| / |exact|.

    Arrows give the direction and colours the length. The relative error is large around zeros of the exact score.
    """
    t = checked("times", times, "T").tolist()
    exact = checked("exact", exact, f"{len(t)}, M, M, 2")
    shape = f"{exact.shape[1]}, {exact.shape[2]}, 2"
    learned, grid = checked("learned", learned, f"{len(t)}, {shape}"), checked("grid", grid, shape)
    error = (learned - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-12)
    with canvas(path, 10.5, 3.0 * len(t) + 0.4, layout="compressed") as figure:
        for row, axes in enumerate(figure.subplots(len(t), 3, squeeze=False, sharex=True, sharey=True)):
            _arrows(figure, axes[:2], grid, exact[row], learned[row])
            _error_map(figure, axes[2], grid, error[row])
            axes[0].set_ylabel(f"t = {t[row]:.2g}")
            for column, title in enumerate(("exact score", "learned score", "relative error") if row == 0 else ()):
                axes[column].set_title(title)
    return path


def density_maps(exact: Tensor, learned: Tensor, grid: Tensor, path: Path) -> Path:
    """Exact and learned log-densities (M, M), in nats, on `grid` (M, M, 2) in one colour scale, and their difference.

    The scale ends 12 nats below the exact maximum; beyond, the difference is left out (grey).
    """
    exact = checked("exact", exact, "M, M")
    shape = f"{exact.shape[0]}, {exact.shape[1]}"
    learned, grid = checked("learned", learned, shape), checked("grid", grid, f"{shape}, 2")
    top = exact.max().item()
    difference = learned - exact
    difference[exact < top - 12] = torch.nan
    limit = max(difference.nan_to_num().abs().max().item(), 1e-6)
    with canvas(path, 11, 3.6, layout="compressed") as figure:
        left, middle, right = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, values, title in ((left, exact, "exact"), (middle, learned, "learned")):
            densities = _map(axes, grid, values, title, vmin=top - 12, vmax=top)
        figure.colorbar(densities, ax=[left, middle], label="log-density (nats)", extend="both")
        colours = _map(
            right,
            grid,
            difference,
            "learned - exact (grey: off scale)",
            vmin=-limit,
            vmax=limit,
            cmap="RdBu_r",
        )
        right.set_facecolor("#d4d4d4")
        figure.colorbar(colours, ax=right, label="difference (nats)")
    return path


def density_beside_data(learned: Tensor, grid: Tensor, data: Tensor, path: Path) -> Path:
    """The learned log-density (M, M), in nats, on `grid` (M, M, 2), beside `data` (N, 2): where no exact one is known.

    The scale ends 12 nats below the maximum. The title has the integral over the grid, which is 1 of a density that
    the grid holds all of: it is out where the likelihood, or the grid, is.
    """
    learned = checked("learned", learned, "M, M")
    shape = f"{learned.shape[0]}, {learned.shape[1]}"
    grid, real = checked("grid", grid, f"{shape}, 2"), checked("data", data, "N, 2")
    cell = (grid[1, 1] - grid[0, 0]).abs().prod()
    mass, top = (learned.exp().sum() * cell).item(), learned.max().item()
    with canvas(path, 8.6, 4.0, layout="compressed") as figure:
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        left.scatter(*real.T, s=5, alpha=0.5, linewidths=0, color=BLUE)
        left.set(title="held-out data", aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
        colours = _map(right, grid, learned, f"learned (integral {mass:.3f})", vmin=top - 12, vmax=top)
        right.set(xlabel="$x_1$")
        figure.colorbar(colours, ax=right, label="log-density (nats)", extend="min")
    return path


def scores_over_data(learned: Tensor, grid: Tensor, data: Tensor, path: Path, times: Sequence[float]) -> Path:
    """Learned scores (T, M, M, 2) on `grid` (M, M, 2), a panel per time, over the density of `data` (N, 2)."""
    t = checked("times", times, "T").tolist()
    learned = checked("learned", learned, f"{len(t)}, M, M, 2")
    grid = checked("grid", grid, f"{learned.shape[1]}, {learned.shape[2]}, 2")
    real = checked("data", data, "N, 2")
    with canvas(path, 4.0 * len(t), 3.5, layout="compressed") as figure:
        for axes, field, time in zip(figure.subplots(1, len(t), squeeze=False).flat, learned, t, strict=True):
            density_behind(axes, real, grid.abs().max().item())
            _arrows(figure, [axes], grid, field)
            axes.set_title(f"learned score, t = {time:.2g}")
    return path


def _paths(axes, x: Tensor) -> None:
    """Paths (K, N, 2), orange where they start and blue where they end."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    pieces = torch.stack([x[:-1], x[1:]], dim=2).transpose(0, 1).flatten(0, 1)
    progress = torch.linspace(0, 1, len(x) - 1).repeat(x.shape[1])
    colours = LinearSegmentedColormap.from_list("path", [ORANGE, "#b0b0b0", BLUE])
    axes.add_collection(LineCollection(pieces.numpy(), array=progress.numpy(), cmap=colours, linewidths=0.7, alpha=0.5))
    axes.scatter(*x[0].T, s=14, facecolors="white", edgecolors=ORANGE, label="noise", zorder=3, clip_on=False)
    axes.scatter(*x[-1].T, s=10, color=BLUE, linewidths=0, label="samples", zorder=3)


def _arrows(figure, panels: Sequence, grid: Tensor, *fields: Tensor) -> None:
    """Scores (M, M, 2), one for each of the axes: arrows of one length, coloured by the score's.

    The colours are one logarithmic scale, that of the first.
    """
    from matplotlib.colors import LogNorm

    few = slice(None, None, -(-len(grid) // 20))
    lengths = fields[0].norm(dim=-1)
    top = max(lengths.max().item(), 1e-6)
    norm = LogNorm(max(lengths.min().item(), top / 1000), top)
    for axes, field in zip(panels, fields, strict=True):
        length = field.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        arrows = [part[few, few].numpy() for part in (*grid.unbind(-1), *(field / length).unbind(-1), length[..., 0])]
        drawn = axes.quiver(*arrows, norm=norm, pivot="mid", scale=22, width=0.006)
        axes.set(aspect="equal")
        axes.grid(False)
    figure.colorbar(drawn, ax=list(panels), label="|score|")


def _error_map(figure, axes, grid: Tensor, error: Tensor) -> None:
    from matplotlib.colors import LogNorm

    colours = _map(axes, grid, error, "", norm=LogNorm(1e-3, 1))
    figure.colorbar(colours, ax=axes, extend="both", label="|learned - exact| / |exact|")


def _map(axes, grid: Tensor, values: Tensor, title: str, **colours):
    """Values (M, M) on a grid (M, M, 2) as colours; what a colour bar needs is returned."""
    axes.set(title=title, aspect="equal")
    axes.grid(False)
    return axes.pcolormesh(
        *grid.permute(2, 0, 1).numpy(), values.numpy(), shading="nearest", rasterized=True, **colours
    )
