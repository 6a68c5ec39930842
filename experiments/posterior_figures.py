"""The pictures of posteriors and of samples of classes, one PNG each. As ``experiments.figures``."""

import math
from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import (
    BLUE,
    FAINT,
    MARKERS,
    ORANGE,
    PALETTE,
    RED,
    canvas,
    checked,
    checked_images,
    density_behind,
    panel_axes,
)
from experiments.posteriors import Posteriors

_ROWS, _SAMPLES, _SIDE = 8, 8, 0.72  # examples and samples that are shown, inches of an image
_HIDDEN = torch.tensor([0.80, 0.86, 0.94])  # no grey, which data may have


def posterior_images(found: Posteriors, path: Path) -> Path:
    """A row for each of the first examples: observation, samples, their mean and standard deviation, and the truth.

    What a mask hides is pale blue in the observation; of one that is no picture A^T y is shown.
    """
    n, k = min(_ROWS, len(found.truth)), min(_SAMPLES, found.samples.shape[1])
    title, seen = _observation(found, n)
    spread = checked("std", found.std[:n].flatten(0, 1), f"M, {', '.join(map(str, found.std.shape[2:]))}")
    spread = spread.unflatten(0, (n, -1)).mean(dim=1)
    top = max(spread.max().item(), 1e-12)
    columns = {0: title, 1: f"{k} samples", k + 1: "mean", k + 2: f"std, 0 to {top:.2g}", k + 3: "truth"}
    with canvas(path, _SIDE * (k + 4) + 0.5, _SIDE * n + 0.4) as figure:
        grid = figure.subplots(n, k + 4, squeeze=False)
        for i, row in enumerate(grid):
            samples = _pixels(checked_images("samples", found.samples[i, :k]))
            mean, truth = (_pixels(checked_images("x", x[i : i + 1]))[0] for x in (found.mean, found.truth))
            for axes, image in zip(row, [seen[i], *samples, mean, spread[i], truth], strict=True):
                axes.imshow(image.numpy(), interpolation="nearest", vmin=0, vmax=top, cmap="viridis")
                axes.set_axis_off()
        for column, words in columns.items():
            at = {"loc": "left"} if column == 1 else {}
            grid[0][column].set_title(words, fontsize=8, **at)
    return path


def posterior_points(found: Posteriors, data: Tensor, path: Path) -> Path:
    """A panel for each of the first examples: samples in the plane over the density of ``data``, truth and mean.

    The line of points x with A x = y is drawn where y is one number.
    """
    n, real = min(_ROWS, len(found.truth)), checked("data", data, "M, 2")
    samples, truth = checked("samples", found.samples[:n], "N, k, 2"), checked("truth", found.truth[:n], "N, 2")
    reach = 1.1 * max(x.abs().max().item() for x in (real, samples, truth))
    across = min(4, n)
    down = -(-n // across)
    with canvas(path, 3.2 * across, 3.2 * down + 0.3) as figure:
        for i, axes in enumerate(panel_axes(figure, down, across, n)):
            axes.set(box_aspect=1, xlim=(-reach, reach), ylim=(-reach, reach), xlabel="$x_1$", ylabel="$x_2$")
            density_behind(axes, real, reach)
            _line(axes, found, i, reach)
            axes.scatter(*samples[i].T, s=12, color=BLUE, linewidths=0, label="samples")
            axes.scatter(*found.mean[i].double()[:, None], marker="X", s=70, color=ORANGE, label="their mean")
            axes.scatter(*truth[i][:, None], marker="*", s=110, color=RED, label="truth")
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=4)
    return path


def class_images(samples: Tensor, labels: Tensor, path: Path, agreement: str | None = None) -> Path:
    """Images (L, k, C, H, W) in [-1, 1], a row for each class (L,)."""
    count, k = len(labels), min(16, samples.shape[1])
    title = f"asked for and found by a classifier: {agreement}" if agreement else ""
    with canvas(path, max(_SIDE * k + 0.6, 4.2), _SIDE * count + 0.4) as figure:
        figure.suptitle(title, fontsize=9)
        for label, row, images in zip(labels.tolist(), figure.subplots(count, k, squeeze=False), samples, strict=True):
            for axes, image in zip(row, _pixels(checked_images("samples", images[:k])), strict=True):
                axes.imshow(image.numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(str(label), rotation=0, labelpad=10, va="center")
    return path


def class_points(samples: Tensor, labels: Tensor, data: Tensor, path: Path) -> Path:
    """Points (L, k, 2) of each class (L,) over the density of ``data``."""
    x, real = checked("samples", samples, "L, k, 2"), checked("data", data, "M, 2")
    reach = 1.1 * max(x.abs().max().item(), real.abs().max().item())
    with canvas(path, 6.2, 5.2) as figure:
        axes = figure.add_subplot(
            box_aspect=1, xlim=(-reach, reach), ylim=(-reach, reach), xlabel="$x_1$", ylabel="$x_2$"
        )
        density_behind(axes, real, reach)
        for i, (label, points) in enumerate(zip(labels.tolist(), x, strict=True)):
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            axes.scatter(*points.T, s=14, linewidths=0, label=f"class {label}", **look)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return path


def _observation(found: Posteriors, n: int) -> tuple[str, Tensor]:
    """What is shown of the first observations, (n, H, W, 3), and its name."""
    y, observed = found.observation[:n].double(), tuple(found.operator.observed)
    if len(observed) != 3 or observed[0] not in (1, 3):
        back = found.operator.adjoint(y)
        return "$A^T y$", _pixels(back / back.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12))
    pixels = _pixels(y)
    if observed == tuple(found.truth.shape[1:]) and bool((~found.hidden).any()):
        pixels[:, found.hidden.all(dim=0)] = _HIDDEN.to(pixels)
    return "observation", pixels


def _pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] to (N, H, W, 3) in [0, 1]."""
    return ((images.double().clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def _line(axes, found: Posteriors, i: int, reach: float) -> None:
    """The points that the i-th observation allows, if it is of one number."""
    unit = torch.eye(2, dtype=torch.float64)
    matrix = found.operator(unit).flatten(1).mT
    rows = matrix.norm(dim=1) > 0
    if int(rows.sum()) != 1:
        return
    a, y = matrix[rows][0], found.observation[i].flatten().double()[rows]
    foot, along = a * y / a.square().sum(), torch.stack((-a[1], a[0])) / a.norm()
    ends = foot + 2 * math.sqrt(2) * reach * torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * along
    axes.plot(*ends.T, color=FAINT, linestyle="--", linewidth=1.2, label="observed")
