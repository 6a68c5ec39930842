"""Every figure of a run: functions from numbers to one PNG each, in one style.

A function checks its input, draws, writes `path` (folders are made) and returns it. Wrong shapes and numbers that are
not finite raise one ValueError before anything is drawn. The style and what the figures share are in `canvas`.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    INK,
    RED,
    arrangement,
    canvas,
    checked,
    checked_images,
    equal_contrast,
    log_if_wide,
    panel_axes,
    readable,
    running_mean,
    show_image,
    tile,
)


def image_grid(images: Tensor, path: Path, columns: int = 10, title: str | None = None) -> Path:
    """Images (N, C, H, W) in [-1, 1], C 1 or 3, row by row in one grid, each pixel a square; values beyond clip."""
    mosaic = tile(checked_images("images", images), columns)
    with canvas(path, mosaic.shape[1] / DPI, mosaic.shape[0] / DPI, layout="none") as figure:
        show_image(figure.add_axes((0, 0, 1, 1)), mosaic, title)
    return path


def samples_beside_real(real: Tensor, samples: dict[str, Tensor], path: Path, columns: int = 10) -> Path:
    """One panel of held-out images (N, C, H, W) in [-1, 1], then one per sampler, as many rows of images in each."""
    panels = {"held-out data": checked_images("real", real)}
    shape = "N, {}, {}, {}".format(*panels["held-out data"].shape[1:])
    panels |= {readable(name): checked(f"samples[{name!r}]", x, shape) for name, x in samples.items()}
    fewest = min(len(x) for x in panels.values())
    columns = min(columns, fewest)
    mosaics = [tile(x[: fewest // columns * columns], columns) for x in panels.values()]
    height, width = (size / DPI for size in mosaics[0].shape[:2])
    down, across = arrangement(len(panels), most=3)
    with canvas(path, across * (width + 0.15), down * (height + 0.35)) as figure:
        for axes, title, mosaic in zip(panel_axes(figure, down, across, len(panels)), panels, mosaics, strict=True):
            show_image(axes, mosaic, title)
    return path


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], path: Path, validation: Sequence[tuple[int, float]] | None = None
) -> Path:
    """Training loss (S,) at steps (S,), as it is and smoothed; `validation`: pairs (step, loss).

    Smoothed is the mean over a window of 1/20 of the curve. Logarithmic when positive and spanning a factor of five.
    """
    y = checked("losses", losses, "S")
    x = checked("steps", steps, str(len(y)))
    held_out = checked("validation", validation, "V, 2") if validation is not None and len(validation) else None
    window = max(1, len(y) // 20)
    with canvas(path, 6.5, 3.8) as figure:
        axes = figure.add_subplot(xlabel="training step", ylabel="loss")
        axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(x, running_mean(y, window), color=BLUE, linewidth=1.8, label="training")
        if held_out is not None:
            axes.plot(*held_out.T, "o", color=RED, markersize=4.5, label="validation")
        log_if_wide(axes, y)
        axes.legend()
    return path


def noise_to_data(trajectory: Tensor, times: Sequence[float], path: Path, columns: int = 10) -> Path:
    """Images (K, N, C, H, W) on their way from noise to data: a row per sample, `columns` of the K `times`, t above.

    Each column has the contrast of the data (`canvas.equal_contrast`).
    """
    x = checked("trajectory", trajectory, "K, N, C, H, W")
    t = checked("times", times, str(len(x)))
    chosen = torch.linspace(0, len(x) - 1, min(columns, len(x))).round().long()
    shown = equal_contrast(x, t)[chosen]
    mosaic = tile(checked_images("trajectory", shown.transpose(0, 1).flatten(0, 1)), len(chosen))
    centres = (torch.arange(len(chosen)) + 0.5) * mosaic.shape[1] / len(chosen)
    with canvas(path, mosaic.shape[1] / DPI, mosaic.shape[0] / DPI, layout="none") as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        show_image(axes, mosaic, None)
        for centre, value in zip(centres.tolist(), t[chosen].tolist(), strict=True):
            words = f"{value:.2g}".replace("e-0", "e-")
            axes.text(centre, -6, words, ha="center", va="bottom", fontsize=9)
        axes.text(-6, -6, "t =", ha="right", va="bottom", fontsize=9)
    return path


def audit_bars(
    ours: dict[str, float], baselines: dict[str, tuple[float, float]], value: float, stderr: float, path: Path
) -> Path:
    """The parts of our bits per dimension, end to end up to `value` +- `stderr`, and that beside the baselines.

    ours: part -> bits per dimension, signed, sum `value` (to 1e-3; else ValueError). baselines: name -> (bits per
    dimension, standard error). Error bars are one standard error.
    """
    parts = checked("ours", list(ours.values()), "P")
    if not abs(parts.sum().item() - value) < 1e-3:
        raise ValueError(f"ours: expected parts that sum to value = {value:.4f}, found a sum of {parts.sum():.4f}.")
    rows = [("ours", value, stderr), *((readable(name), *pair) for name, pair in baselines.items())]
    ranked = sorted(rows, key=itemgetter(1))
    checked("baselines, value, stderr", [row[1:] for row in ranked], "B, 2")
    with canvas(path, 11, 1.3 + 0.42 * max(len(parts) + 1, len(ranked))) as figure:
        left, right = figure.subplots(1, 2)
        _waterfall(left, [readable(name) for name in ours], parts)
        _ranking(right, ranked)
    return path


def samples_2d(samples: dict[str, Tensor], path: Path, data: Tensor) -> Path:
    """Data (M, 2), then the samples (N, 2) of each sampler, on equal axes set by the data; titles count the rest."""
    panels = {"held-out data": checked("data", data, "M, 2")}
    panels |= {readable(name): checked(f"samples[{name!r}]", x, "N, 2") for name, x in samples.items()}
    low, high = (extreme(panels["held-out data"], dim=0).values for extreme in (torch.min, torch.max))
    centre, reach = (low + high) / 2, 0.65 * (high - low).max().clamp_min(1e-6)
    down, across = arrangement(len(panels), most=4)
    with canvas(path, 2.9 * across, 3.1 * down) as figure:
        for i, (axes, name) in enumerate(zip(panel_axes(figure, down, across, len(panels)), panels, strict=True)):
            x = panels[name]
            beyond = int(((x - centre).abs() > reach).any(dim=1).sum())
            axes.scatter(*x.T, s=5, alpha=0.5, linewidths=0, color=BLUE if i else FAINT)
            axes.set(xlim=_around(centre[0], reach), ylim=_around(centre[1], reach), box_aspect=1)
            axes.set_title(name + (f"\n{beyond} of {len(x)} beyond the frame" if beyond else ""))
    return path


def _around(centre: Tensor, reach: Tensor) -> tuple[float, float]:
    return (centre - reach).item(), (centre + reach).item()


def _waterfall(axes, names: list[str], parts: Tensor) -> None:
    """Signed parts (P,), each from where the one above it ends, and their sum."""
    starts = torch.cat([parts.cumsum(dim=0) - parts, parts.new_zeros(1)]).tolist()
    widths = [*parts.tolist(), parts.sum().item()]
    colours = [*(RED if part > 0 else GREEN for part in parts.tolist()), BLUE]
    bars = axes.barh([*names, "total"], widths, left=starts, color=colours, height=0.6)
    axes.bar_label(bars, [f"{width:+.3f}" for width in widths[:-1]] + [f"{widths[-1]:.3f}"], padding=4, fontsize=9)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(title="parts of our bits per dimension", xlabel="bits per dimension", ymargin=0.03)
    axes.use_sticky_edges = False
    axes.margins(x=0.22)
    _as_table(axes)


def _ranking(axes, rows: list[tuple[str, float, float]]) -> None:
    names, values, errors = zip(*rows, strict=True)
    colours = [BLUE if name == "ours" else FAINT for name in names]
    bars = axes.barh(names, values, xerr=errors, color=colours, height=0.6, error_kw={"capsize": 3, "ecolor": INK})
    labels = [
        f"{value:.3f}" + (f" ± {error:.3f}" if error else "") for value, error in zip(values, errors, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set(title="beside baselines (lower is better)", xlabel="bits per dimension", xmargin=0.25)
    _as_table(axes)


def _as_table(axes) -> None:
    """First bar on top, no lines between the names."""
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
