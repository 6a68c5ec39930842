"""The picture of a training's losses by noise level, one PNG. As ``experiments.figures``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.canvas import INK, canvas, checked, log_if_wide

_STAGES = 4


def loss_by_noise_level(rows: Sequence[Sequence[float]], path: Path) -> Path:
    """The loss against log-SNR: rows (R, 5) of step, low and high end of a bin, the sum of losses in it, their number.

    The steps make up to four stages of as many readings each; a curve is the mean over one, the later the darker. Bins
    without a sample are left out. Logarithmic when positive and spanning a factor of five.
    """
    table = checked("rows", rows, "R, 5")
    stages = [stage for stage in table[:, 0].unique().tensor_split(_STAGES) if len(stage)]
    with canvas(path, 6.5, 3.8) as figure:
        axes = figure.add_subplot(xlabel="log-SNR (data to the right)", ylabel="loss")
        for i, steps in enumerate(stages):
            x, y = _curve(table[torch.isin(table[:, 0], steps)])
            last = i == len(stages) - 1
            says = f"to step {int(steps[-1])}"
            axes.plot(x, y, color=INK if last else str(0.8 - 0.6 * i / _STAGES), marker="o", markersize=3, label=says)
        log_if_wide(axes, torch.cat([torch.as_tensor(line.get_ydata()) for line in axes.lines]))
        axes.legend()
    return path


def _curve(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the bins that hold anything, and the mean loss in each."""
    bins, which = rows[:, 1:3].unique(dim=0, return_inverse=True)
    sums, counts = (torch.zeros(len(bins), dtype=rows.dtype).index_add(0, which, rows[:, i]) for i in (3, 4))
    held = counts > 0
    return bins.mean(1)[held], (sums / counts)[held]
