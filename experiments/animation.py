"""The way from noise to data as an animated GIF: images, and points in the plane. As ``experiments.figures``.

Every frame shows the time t and the log-SNR, 2 log(alpha / sigma), which means the same under every process. The first
frame and, longer, the last stand still, and then it begins again. A frame is drawn by what moves on top of what does
not, and all frames share one palette: grey levels where nothing has a colour, so that a pixel is off by 4.2 / 255 at
most, or else the colours of the samples above all. The bytes depend on the numbers, and on the versions of Matplotlib
and Pillow, alone.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.canvas import BLUE, DPI, FAINT, INK, blank, checked, checked_images, equal_contrast, tile
from experiments.plane_figures import frame_paths

FRAME, FIRST, LAST = 80, 600, 2500  # milliseconds that the frames stand
HEAD = 34  # pixels of the line of text above
GREYS, FEW, MANY = 32, 32, 240  # of a palette: without colours, of points, of photographs
TILE, SIDE = 48, 2.8  # pixels of an image's longer side, inches of a plane's


def evenly(log_snr: Sequence[float], most: int) -> Tensor:
    """Which of K states, noise first, to show so that all frames bring about as much: up to `most` indices.

    Equal steps of the angle atan(sigma / alpha): where x_t = alpha x_0 + sigma eps of unit variances and
    alpha^2 + sigma^2 = 1, it is the length of the way. Equal steps in time would show noise half of the time.
    """
    angle = torch.atan((-0.5 * torch.as_tensor(log_snr).detach().cpu().double()).exp())
    wanted = torch.linspace(angle[0].item(), angle[-1].item(), most, dtype=angle.dtype)
    return (wanted[:, None] - angle).abs().argmin(dim=1).unique()


def animated_images(
    trajectory: Tensor, times: Sequence[float], log_snr: Sequence[float], path: Path, columns: int = 8
) -> Path:
    """Images (K, N, C, H, W), data in [-1, 1], at K `times` and log-SNRs: one grid that turns from noise into data.

    Each frame has the contrast of the data (`canvas.equal_contrast`); the last one shows the samples as they are.
    """
    x = checked("trajectory", trajectory, "K, N, C, H, W")
    clock = _clock(times, log_snr, len(x))
    checked_images("trajectory", x[-1])
    mosaics = [tile(frame, columns, TILE) for frame in equal_contrast(x, clock.times)]
    height, width = mosaics[0].shape[:2]
    # A ten-thousandth of a pixel more: the size in pixels is rounded down.
    with blank((width + 1e-4) / DPI, (height + HEAD + 1e-4) / DPI, layout="none") as figure:
        axes = figure.add_axes((0, 0, 1, height / (height + HEAD)))
        axes.set_axis_off()
        picture = axes.imshow(mosaics[0].numpy(), interpolation="nearest", aspect="auto", animated=True)
        head = _Head(figure, clock, HEAD / (height + HEAD))

        def show(i: int) -> list:
            picture.set_data(mosaics[i].numpy())
            return [picture, *head.at(i)]

        return _write(figure, show, len(x), path, MANY)


def animated_points(
    trajectory: Tensor, times: Sequence[float], log_snr: Sequence[float], path: Path, data: Tensor, tail: int = 4
) -> Path:
    """Points (K, N, 2) at K `times` and log-SNRs, from noise to samples, over the density of `data` (M, 2).

    Behind each point are its last `tail` steps, but in the last frame. The axes are those of
    `plane_figures.trajectories_2d`.
    """
    from matplotlib.collections import LineCollection

    x, real = checked("trajectory", trajectory, "K, N, 2"), checked("data", data, "M, 2")
    clock = _clock(times, log_snr, len(x))
    share = HEAD / DPI / (SIDE + HEAD / DPI)
    with blank(SIDE, SIDE + HEAD / DPI, layout="none") as figure:
        axes = figure.add_axes((0.13, 0.08, 0.85, 0.99 - share - 0.08))
        axes.tick_params(labelsize=7)
        frame_paths(axes, x, real)
        lines = axes.add_collection(LineCollection([], color=BLUE, linewidths=0.7, alpha=0.4, animated=True))
        dots = axes.scatter(*x[0].T, s=7, color=BLUE, linewidths=0, animated=True, zorder=3)
        head = _Head(figure, clock, share)

        def show(i: int) -> list:
            dots.set_offsets(x[i].numpy())
            behind = tail if i < len(x) - 1 else 0  # at the end it is the samples that count
            lines.set_segments(x[i - min(i, behind) : i + 1].transpose(0, 1).numpy())
            return [lines, dots, *head.at(i)]

        return _write(figure, show, len(x), path, FEW)


class _Clock(NamedTuple):
    """Times (K,), and log-SNRs (K,), infinite where there is no signal or no noise."""

    times: Tensor
    log_snr: Tensor


def _clock(times: Sequence[float], log_snr: Sequence[float], frames: int) -> _Clock:
    level = torch.as_tensor(log_snr).detach().cpu().double()
    checked("log_snr", level.clamp(-1e9, 1e9), str(frames))  # NaN stays
    return _Clock(checked("times", times, str(frames)), level)


class _Head:
    """The line above the picture: the time on the left, the log-SNR on the right, and below how far it is."""

    def __init__(self, figure, clock: _Clock, share: float):
        self.clock, y = clock, 1 - 0.42 * share
        style = {"fontsize": 8, "va": "center", "color": INK, "animated": True}
        self.time = figure.text(0.015, y, "", ha="left", **style)
        self.level = figure.text(0.985, y, "", ha="right", **style)
        self.bar = figure.add_artist(_line(1 - 0.88 * share))

    def at(self, i: int) -> list:
        self.time.set_text(f"t = {self.clock.times[i]:.3g}")
        self.level.set_text(f"log-SNR = {self.clock.log_snr[i]:+.1f}".replace("-inf", "−∞").replace("+inf", "∞"))
        self.bar.set_xdata([0, (i + 1) / len(self.clock.times)])
        return [self.time, self.level, self.bar]


def _line(y: float):
    from matplotlib.lines import Line2D

    return Line2D([0, 0], [y, y], color=FAINT, linewidth=1.5, solid_capstyle="butt", antialiased=False, animated=True)


def _write(figure, show: Callable[[int], list], frames: int, path: Path, colours: int) -> Path:
    """The frames whose moving artists `show` gives, one after the other, as a GIF that begins again at its end."""
    figure.canvas.draw()
    still = figure.canvas.copy_from_bbox(figure.bbox)
    pixels = []
    for i in range(frames):
        figure.canvas.restore_region(still)
        for artist in show(i):
            figure.draw_artist(artist)
        pixels.append(torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8))
    width, height = figure.canvas.get_width_height()
    first, *others = _with_one_palette(torch.stack(pixels).view(frames, height, width, 4)[..., :3], colours)
    stands = [FIRST, *[FRAME] * (frames - 2), LAST][-frames:]
    written = io.BytesIO()
    first.save(written, "GIF", save_all=True, append_images=others, duration=stands, loop=0, optimize=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(written.getvalue())
    return path


def _with_one_palette(pixels: Tensor, colours: int) -> list:
    """Frames (K, H, W, 3) of bytes as Pillow's: in grey levels, or in the colours of the ends, three times the last."""
    from PIL import Image

    if (pixels == pixels[..., :1]).all():
        places = (pixels[..., 0].double() * ((GREYS - 1) / 255)).round().to(torch.uint8)
        return _indexed(places, [round(i * 255 / (GREYS - 1)) for i in range(GREYS) for _ in range(3)])
    ends = Image.fromarray(pixels[[0, -1, -1, -1]].flatten(0, 1).numpy())
    palette = ends.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    found = [Image.fromarray(frame.numpy()).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pixels]
    places = torch.stack([torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in found])
    places = places.view(pixels.shape[:3]).masked_fill((pixels == 255).all(dim=-1), colours)  # white stays white
    return _indexed(places, [*palette.getpalette()[: 3 * colours], 255, 255, 255])


def _indexed(places: Tensor, palette: list[int]) -> list:
    """Images of places (K, H, W) in a palette of red, green, blue, red, ..."""
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in places]
    for image in images:
        image.putpalette(palette)
    return images
