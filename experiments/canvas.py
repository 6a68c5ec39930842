"""What all figures share: one style, a figure that closes itself, checked input, pictures of images, plain ticks.

Matplotlib is imported by the first figure. Figures are made without pyplot: no window, backend or setting of the
caller is touched, and none stays open.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

DPI = 150
TILE = 60  # screen pixels of one image's longer side, in grids of many
INK, FAINT = "#262626", "#9a9a9a"
# Okabe and Ito (2008): told apart with any colour vision. Yellow is left out, it is lost on white.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE, MARKERS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, INK), "osD^vPXd<>*"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "image.cmap": "cividis",
}


@contextmanager
def blank(width: float, height: float, layout: str) -> Iterator:
    """A figure of this size (inches) in the one style, which holds inside the block."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def canvas(path: Path, width: float, height: float, layout: str = "constrained") -> Iterator:
    """A figure of this size (inches) in the one style, written to `path` when the block ends without an error."""
    with blank(width, height, layout) as figure:
        yield figure
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)


def checked(name: str, values: Tensor | Sequence, shape: str) -> Tensor:
    """Float64 on the CPU. In `shape` a number is that size, a letter any size but 0, and the same one each time."""
    x = torch.as_tensor(values).detach().cpu().double()
    if not _fits(x.shape, shape.split(", ")):
        raise ValueError(f"{name}: expected shape ({shape}), found ({', '.join(map(str, x.shape))}).")
    if not x.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, found {int((~x.isfinite()).sum())} NaN or infinite.")
    return x


def _fits(sizes: Sequence[int], words: list[str]) -> bool:
    known: dict[str, int] = {}
    expected = [int(w) if w.isdigit() else known.setdefault(w, n) for w, n in zip(words, sizes, strict=False)]
    return expected == list(sizes) and len(words) == len(sizes) and 0 not in expected


def checked_images(name: str, images: Tensor) -> Tensor:
    x = checked(name, images, "N, C, H, W")
    if x.shape[1] not in (1, 3):
        raise ValueError(f"{name}: expected shape (N, C, H, W) with 1 or 3 channels, found {tuple(x.shape)}.")
    return x


def equal_contrast(states: Tensor, t: Tensor) -> Tensor:
    """States (K, ...) at times (K,), each divided by its standard deviation relative to that at the smallest t.

    All have the contrast of the data then, whether the SDE's noise has deviation 1 or 50.
    """
    contrast = states.flatten(1).std(dim=1, correction=0).clamp_min(1e-12)
    return states * (contrast[t.argmin()] / contrast).view(-1, *[1] * (states.dim() - 1))


def tile(images: Tensor, columns: int, side: int = TILE) -> Tensor:
    """(N, C, H, W) in [-1, 1] to one RGB picture (h, w, 3) in [0, 1]: pixels enlarged, white lines between images.

    Pixels become whole squares, so that the longer side has about `side` of the screen's, or its own where it is more.
    """
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, found {columns}.")
    columns = min(columns, len(images))
    factor = max(1, round(side / max(images.shape[2:])))
    pixels = ((images.clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    tiles = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    rows = -(-len(tiles) // columns)
    tiles = torch.cat([tiles, tiles.new_ones(rows * columns - len(tiles), *tiles.shape[1:])])
    return tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def show_image(axes, mosaic: Tensor, title: str | None) -> None:
    axes.imshow(mosaic.numpy(), interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title)


def arrangement(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns for this many panels, at most `most` abreast, with few places left empty."""
    rows = -(-panels // most)
    return rows, -(-panels // rows)


def panel_axes(figure, down: int, across: int, used: int) -> list:
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[used:]:
        unused.remove()
    return axes[:used]


def curve_look(i: int) -> dict[str, str]:
    """The i-th curve's colour, marker and line: the first 77 have no pair of colour and marker in common."""
    line = "--" if i // len(PALETTE) % 2 else "-"
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "linestyle": line}


def readable(name: str) -> str:
    return name.replace("_", " ")


def running_mean(y: Tensor, window: int) -> Tensor:
    """The centred mean (S,) of what there is of a window around each of S values."""
    sums = torch.cat([y.new_zeros(1), y.cumsum(dim=0)])
    i = torch.arange(len(y))
    start, end = (i - window // 2).clamp_min(0), (i + (window + 1) // 2).clamp_max(len(y))
    return (sums[end] - sums[start]) / (end - start)


def log_if_wide(axes, values: Tensor) -> None:
    """A logarithmic y where positive values span a factor of five."""
    low, high = values.min().item(), values.max().item()
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)


def plain_log_ticks(axis) -> None:
    """Ticks at round numbers, the fewer the more decades there are, written without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 2000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def density_behind(axes, data: Tensor, reach: float, bins: int = 60) -> None:
    """Where data (M, 2) are, in grey: a smoothed histogram over [-reach, reach]^2."""
    counts, edges = torch.histogramdd(data, [bins, bins], range=[-reach, reach] * 2)
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, dtype=data.dtype) / 1.3).square())
    smooth = torch.nn.functional.conv2d(counts[None, None], (taps[:, None] * taps)[None, None], padding=4)[0, 0]
    x, y = ((edge[1:] + edge[:-1]) / 2 for edge in edges)
    levels = torch.linspace(0.04, 1.0, 8) * smooth.max()
    axes.contourf(x, y, smooth.T, levels=levels.tolist(), cmap="Greys", vmax=2 * smooth.max().item())
