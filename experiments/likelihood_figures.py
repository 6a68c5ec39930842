"""The pictures of likelihoods, one PNG each: histograms, extremes, interpolations. As ``experiments.figures``."""

from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import (
    BLUE,
    DPI,
    FAINT,
    INK,
    MARKERS,
    ORANGE,
    PALETTE,
    canvas,
    checked,
    checked_images,
    density_behind,
    show_image,
    tile,
)


def histogram(groups: dict[str, Tensor], label: str, path: Path, title: str | None = None) -> Path:
    """The distribution of a number over the examples (N,) of each group, as densities over common bins.

    A broken line marks each group's mean. The bins end at the groups' 0.5 and 99.5 per cent quantiles: what lies beyond
    is counted in the last ones.
    """
    with canvas(path, 6.5, 3.6) as figure:
        _histogram(figure.add_subplot(), groups, label, title)
    return path


def out_of_distribution(scores: dict[str, dict[str, Tensor]], titles: dict[str, str], path: Path) -> Path:
    """One histogram of the groups (name -> (N,)) for each score (label -> groups), with its title."""
    with canvas(path, 5.2 * len(scores), 3.6) as figure:
        panels = figure.subplots(1, len(scores), squeeze=False).flat
        for axes, (label, groups) in zip(panels, scores.items(), strict=True):
            _histogram(axes, groups, label, titles[label])
    return path


def extreme_images(images: Tensor, values: Tensor, label: str, path: Path, columns: int = 10, rows: int = 2) -> Path:
    """Of images (N, C, H, W) in [-1, 1] the most and the least likely, by costs (N,) in units of ``label``."""
    x = checked_images("images", images)
    value = checked("values", values, str(len(x)))
    order = value.argsort()
    few = max(1, min(columns * rows, len(x) // 2))
    panels = {"most likely": order[:few], "least likely": order[len(x) - few :].flip(0)}
    mosaics = [tile(x[index], columns) for index in panels.values()]
    height, width = (size / DPI for size in mosaics[0].shape[:2])
    with canvas(path, max(width, 3.5), 2 * (height + 0.35)) as figure:
        for axes, (name, index), mosaic in zip(figure.subplots(2, 1), panels.items(), mosaics, strict=True):
            low, high = value[index].min().item(), value[index].max().item()
            show_image(axes, mosaic, f"{name}: {low:.3g} to {high:.3g} {label}")
    return path


def extreme_points(points: Tensor, values: Tensor, label: str, path: Path, few: int = 10) -> Path:
    """Points (N, 2) coloured by their values (N,), log-densities; rings around the least likely ``few``."""
    x = checked("points", points, "N, 2")
    value = checked("values", values, str(len(x)))
    least = value.argsort()[:few]
    floor = value.quantile(0.01).item()
    with canvas(path, 5.8, 4.8) as figure:
        axes = figure.add_subplot(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        drawn = axes.scatter(*x.T, c=value, s=9, linewidths=0, vmin=floor, vmax=value.max().item())
        axes.scatter(*x[least].T, s=60, facecolors="none", edgecolors=ORANGE, label=f"the {len(least)} least likely")
        figure.colorbar(drawn, ax=axes, label=label, extend="min")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return path


def interpolated_images(points: Tensor, path: Path) -> Path:
    """Images (n, P, C, H, W) in [-1, 1] on P ways: a row for each way, its ends the first and the last column."""
    x = checked("points", points, "n, P, C, H, W")
    mosaic = tile(checked_images("points", x.transpose(0, 1).flatten(0, 1)), len(x))
    with canvas(path, mosaic.shape[1] / DPI, mosaic.shape[0] / DPI, layout="none") as figure:
        show_image(figure.add_axes((0, 0, 1, 1)), mosaic, None)
    return path


def interpolated_points(points: Tensor, path: Path, data: Tensor) -> Path:
    """Ways (n, P, 2) through the plane, over the density of ``data`` (M, 2)."""
    x, real = checked("points", points, "n, P, 2"), checked("data", data, "M, 2")
    reach = 1.1 * max(x.abs().max().item(), real.abs().max().item())
    with canvas(path, 5.4, 5.4) as figure:
        axes = figure.add_subplot(
            box_aspect=1, xlim=(-reach, reach), ylim=(-reach, reach), xlabel="$x_1$", ylabel="$x_2$"
        )
        density_behind(axes, real, reach)
        for i, way in enumerate(x.unbind(1)):
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(*way.T, markersize=3.5, linewidth=1.2, **look)
            axes.plot(*way[[0, -1]].T, linestyle="", markersize=8, markeredgecolor=INK, **look)
    return path


def confusion(counts: Tensor, path: Path, title: str | None = None) -> Path:
    """How many examples of each class (rows) were taken for each (columns), ``(K, K)``; darker is more of the row."""
    n = checked("counts", counts, "K, K")
    share, k = n / n.sum(dim=1, keepdim=True).clamp_min(1), len(n)
    size = 2.2 + 0.42 * k
    with canvas(path, size, size) as figure:
        axes = figure.add_subplot(xlabel="predicted class", ylabel="true class", title=title or "", box_aspect=1)
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=range(k), yticks=range(k))
        axes.grid(False)
        for i, j in n.nonzero().tolist():
            colour = "white" if share[i, j] > 0.6 else INK
            axes.text(j, i, f"{int(n[i, j])}", ha="center", va="center", color=colour, fontsize=8)
    return path


def _histogram(axes, groups: dict[str, Tensor], label: str, title: str | None) -> None:
    """As densities, so that groups of different sizes compare."""
    values = {name: checked(f"groups[{name!r}]", group, "N") for name, group in groups.items()}
    together = torch.cat(list(values.values()))
    bins = min(40, max(8, round(1.5 * min(map(len, values.values())) ** 0.5)))
    low, high = (together.quantile(q).item() for q in (0.005, 0.995))
    edges = torch.linspace(low, max(high, low + 1e-6 * max(1.0, abs(low))), bins + 1, dtype=torch.float64)
    colours, dashes = (BLUE, ORANGE, FAINT), ("--", ":", "-.")
    for i, (name, value) in enumerate(values.items()):
        colour, mean = colours[i % len(colours)], value.mean().item()
        inside = value.clamp(edges[0].item(), edges[-1].item()).numpy()
        says = f"{name}: {len(value)}, mean {mean:.3g}"
        axes.hist(inside, bins=edges.numpy(), density=True, color=colour, alpha=0.5, label=says)
        axes.axvline(mean, color=colour, linestyle=dashes[i % len(dashes)], linewidth=1.6)
    axes.set(xlabel=label, ylabel="density of examples", title=title or "")
    axes.legend()
