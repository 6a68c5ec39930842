"""What samplers make of the same noise, one PNG each. As ``experiments.figures``.

Solvers of the probability-flow ODE all approximate one map from noise to data (Song et al., "Score-based generative
modeling through stochastic differential equations", 2021, section 4.3): where they begin at the same x_T, their
samples differ by their errors alone. Solvers of the reverse SDE add noise of their own, and end elsewhere.
"""

from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import (
    BLUE,
    DPI,
    FAINT,
    INK,
    arrangement,
    canvas,
    checked,
    checked_images,
    density_behind,
    panel_axes,
    readable,
    show_image,
    tile,
)


def same_noise_images(samples: dict[str, Tensor], reference: str, path: Path, columns: int = 12) -> Path:
    """Images (N, C, H, W) in [-1, 1] of samplers that began at the same noise: a row for each, a column per noise.

    Sample i of each stands in column i, for the first `columns` of them. On the right is each sampler's root mean
    square difference to those of `reference`, over all N, in units of x; the nearest come first.
    """
    known = _checked(samples, reference, "N, C, H, W")
    apart = _differences(known, reference)
    rows = [checked_images("samples", known[name])[:columns] for name in apart]
    mosaic = tile(torch.cat(rows), len(rows[0]))
    with canvas(path, mosaic.shape[1] / DPI, mosaic.shape[0] / DPI, layout="none") as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        show_image(axes, mosaic, None)
        high, wide = (size / len(some) for size, some in zip(mosaic.shape[:2], (rows, rows[0]), strict=True))
        for i, (name, difference) in enumerate(apart.items()):
            axes.text(-8, (i + 0.5) * high, readable(name), ha="right", va="center", fontsize=9)
            says = f"{difference:.3f}" if name != reference else "reference"
            axes.text(mosaic.shape[1] + 8, (i + 0.5) * high, says, ha="left", va="center", fontsize=9)
        axes.text(wide * len(rows[0]) / 2, -8, "a column: the same noise $x_T$", ha="center", va="bottom", fontsize=9)
        axes.text(mosaic.shape[1] + 8, -8, "RMS difference", ha="left", va="bottom", fontsize=9)
    return path


def same_noise_points(
    samples: dict[str, Tensor], reference: str, path: Path, data: Tensor | None = None, shown: int = 60
) -> Path:
    """Points (N, 2) of samplers that began at the same noise: a panel each, with lines from those of `reference`.

    The first `shown` pairs are drawn, over the density of `data` (M, 2). The titles have the root mean square distance
    of all N pairs.
    """
    known = _checked(samples, reference, "N, 2")
    real = None if data is None else checked("data", data, "M, 2")
    start = known[reference]
    reach = 1.1 * max(x.abs().max().item() for x in (start, real) if x is not None)
    others = {name: apart for name, apart in _differences(known, reference).items() if name != reference}
    if not others:
        raise ValueError(f"samples: expected another sampler beside the reference {reference!r}, found none.")
    down, across = arrangement(len(others), most=5)
    with canvas(path, 2.9 * across, 3.1 * down + 0.4) as figure:
        figure.get_layout_engine().set(h_pad=0.09)
        panels = panel_axes(figure, down, across, len(others))
        for axes, (name, apart) in zip(panels, others.items(), strict=True):
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), box_aspect=1)
            axes.tick_params(labelsize=8)
            axes.set_title(f"{readable(name)}\nRMS distance {2**0.5 * apart:.3f}")
            if real is not None:
                density_behind(axes, real, reach)
            _pairs(axes, start[:shown], known[name][:shown])
        words = (f"from: {readable(reference)}", "to: the panel's sampler")
        figure.legend(panels[0].collections[-2:], words, loc="outside lower center", ncols=2)
    return path


def _pairs(axes, start: Tensor, end: Tensor) -> None:
    """Lines from points (N, 2) to others, rings where they start and dots where they end."""
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(torch.stack((start, end), 1).numpy(), color=INK, linewidths=0.7, alpha=0.6))
    axes.scatter(*start.T, s=22, facecolors="white", edgecolors=FAINT, linewidths=1)
    axes.scatter(*end.T, s=8, color=BLUE, linewidths=0, zorder=3)


def _checked(samples: dict[str, Tensor], reference: str, shape: str) -> dict[str, Tensor]:
    """As many samples of each: one that is missing would put all others below the wrong noise."""
    if reference not in samples:
        raise ValueError(f"reference: expected one of {', '.join(samples) or 'no samples'}, found {reference!r}.")
    first = checked(f"samples[{reference!r}]", samples[reference], shape)
    same = ", ".join(map(str, first.shape))
    return {name: checked(f"samples[{name!r}]", x, same) for name, x in samples.items()}


def _differences(samples: dict[str, Tensor], reference: str) -> dict[str, float]:
    """The root mean square difference of each sampler's samples to those of one, over all values; least ones first."""
    found = {name: (x - samples[reference]).square().mean().sqrt().item() for name, x in samples.items()}
    return dict(sorted(found.items(), key=lambda item: (item[0] != reference, item[1])))
