"""What the steps of a training measure, added up on the device and read by the host once in a while.

A sum over steps of the loss and of the gradient's norm, how many steps were left out because one of them was not
finite, and the losses of the samples by the log signal-to-noise ratio at which they were measured, in equal bins.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 20
NOISE_LEVELS = "loss_by_log_snr.csv"
COLUMNS = ("step", "low", "high", "mean", "count")


class Tallied(NamedTuple):
    """Means over the good of ``steps`` steps, NaN where there are none; ``first``: the first bad one (from 1), or None.

    means, counts: of each bin of log-SNR the mean loss (NaN of none) and the number of finite losses.
    """

    steps: int
    good: int
    loss: float
    norm: float
    first: int | None
    means: list[float]
    counts: list[int]


class Tally:
    """Running sums on a device; nothing waits for it but ``read``.

    Parameters
    ----------
    low, high: ends of the bins of log-SNR; what lies beyond counts in the first or the last.
    """

    def __init__(self, low: float, high: float, device: torch.device, bins: int = BINS):
        # Counts stay exact up to 2^53, or 2^24 where the device has no float64.
        precise = torch.float32 if device.type == "mps" else torch.float64
        self.edges, self.width, self.low = torch.linspace(low, high, bins + 1, device=device), (high - low) / bins, low
        self._sums = torch.zeros(5 + 2 * bins, dtype=precise, device=device)
        self._steps, self._heads, self._first = self._sums[0], self._sums[1:4], self._sums[4]
        self._bins = self._sums[5:].view(2, bins)
        self.clear()

    def bins(self) -> list[tuple[float, float]]:
        """The ends of each bin."""
        return [(self.low + i * self.width, self.low + (i + 1) * self.width) for i in range(len(self.edges) - 1)]

    def clear(self) -> None:
        """Forget everything."""
        self._sums.zero_()
        self._first.fill_(math.inf)

    def add(self, loss: Tensor, norm: Tensor, good: Tensor, value: Tensor, log_snr: Tensor) -> None:
        """One step: loss, norm and whether both are finite, (); loss and log-SNR of each sample, (B,)."""
        self._steps += 1
        torch.minimum(self._first, torch.where(good, math.inf, self._steps), out=self._first)
        head = torch.stack((torch.ones_like(loss), loss, norm))
        self._heads += torch.where(good, head, 0)
        sound = value.isfinite()
        share = torch.stack((torch.where(sound, value, 0), sound)).to(self._bins.dtype)
        self._bins.index_add_(1, torch.bucketize(log_snr, self.edges[1:-1]), share)

    def read(self) -> Tallied:
        """What there is since the last reading; the sums start anew."""
        steps, good, loss, norm, first, *bins = self._sums.tolist()
        self.clear()
        sums, counts = bins[: len(bins) // 2], bins[len(bins) // 2 :]
        return Tallied(
            steps=int(steps),
            good=int(good),
            loss=loss / good if good else math.nan,
            norm=norm / good if good else math.nan,
            first=int(first) if math.isfinite(first) else None,
            means=[s / n if n else math.nan for s, n in zip(sums, counts, strict=True)],
            counts=[int(n) for n in counts],
        )
