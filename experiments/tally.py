"""What the steps of a training measure, added up on the device and read by the host once in a while.

A sum over steps of the loss and of the gradient's norm, how many steps were left out because one of them was not
finite, for how many in a row, at which noise levels it began, and the losses of the samples by the log signal-to-noise
ratio at which they were measured, in equal bins.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.processes import ALONE, Processes

BINS = 20
NOISE_LEVELS = "loss_by_log_snr.csv"
COLUMNS = ("step", "low", "high", "mean", "count")


class Tallied(NamedTuple):
    """Means over the good of ``steps`` steps, NaN where there are none; ``first``: the first bad one (from 1), or None.

    means, counts: of each bin of log-SNR the mean loss (NaN of none) and the number of finite losses.
    run: the most bad steps in a row, of which the last was one of these; they may have begun before.
    levels: the least and the largest log-SNR of the samples whose loss was not finite in the ``first`` bad step; None
    where all were, so that it was their gradient that was not.
    """

    steps: int
    good: int
    loss: float
    norm: float
    first: int | None
    means: list[float]
    counts: list[int]
    run: int
    levels: tuple[float, float] | None


class Tally:
    """Running sums on a device; nothing waits for it but ``read``.

    Of several processes each adds its own samples, and the losses, norms and verdicts that they share.

    Parameters
    ----------
    low, high: ends of the bins of log-SNR; what lies beyond counts in the first or the last.
    """

    def __init__(self, low: float, high: float, device: torch.device, bins: int = BINS, processes: Processes = ALONE):
        # Counts stay exact up to 2^53, or 2^24 where the device has no float64.
        precise = torch.float32 if device.type == "mps" else torch.float64
        self.edges, self.width, self.low = torch.linspace(low, high, bins + 1, device=device), (high - low) / bins, low
        self.processes = processes
        self._sums = torch.zeros(9 + 2 * bins, dtype=precise, device=device)
        self._steps, self._heads, self._first = self._sums[0], self._sums[1:4], self._sums[4]
        self._present, self._run, self._levels = self._sums[5], self._sums[6], self._sums[7:9]
        self._bins = self._sums[9:].view(2, bins)
        self.clear()

    def bins(self) -> list[tuple[float, float]]:
        """The ends of each bin."""
        return [(self.low + i * self.width, self.low + (i + 1) * self.width) for i in range(len(self.edges) - 1)]

    def clear(self) -> None:
        """Forget everything but the run of bad steps that is under way."""
        present = self._present.clone()
        self._sums.zero_()
        self._present.copy_(present)
        self._first.fill_(math.inf)
        self._levels.fill_(-math.inf)

    def add(
        self, loss: Tensor, norm: Tensor, good: Tensor, value: Tensor, log_snr: Tensor, excused: Tensor | None = None
    ) -> None:
        """One step: loss, norm and whether both are finite, (); loss and log-SNR of each sample, (B,).

        ``excused``, (): that it need not be good, since a loss scale that is still too large is tried.
        """
        self._steps += 1
        head = torch.stack((torch.ones_like(loss), loss, norm))
        self._heads += torch.where(good, head, 0)
        sound = value.isfinite()
        self._add_bad(~good if excused is None else ~(good | excused), sound, log_snr)
        share = torch.stack((torch.where(sound, value, 0), sound)).to(self._bins.dtype)
        self._bins.index_add_(1, torch.bucketize(log_snr, self.edges[1:-1]), share)

    def _add_bad(self, bad: Tensor, sound: Tensor, log_snr: Tensor) -> None:
        """Whether a step is a bad one, and of which samples the loss is finite."""
        # The least is kept as the largest of -log-SNR, so that -inf stands for none of both.
        ends = torch.where(sound, -math.inf, torch.stack((-log_snr, log_snr))).amax(1)
        self._levels.copy_(torch.where(bad & (self._first == math.inf), ends, self._levels))
        torch.minimum(self._first, torch.where(bad, self._steps, math.inf), out=self._first)
        self._present.add_(1).mul_(bad)
        torch.maximum(self._run, self._present, out=self._run)

    def state(self) -> Tensor:
        """All sums, of all processes, on the CPU."""
        return self._whole().cpu()

    def load(self, state: Tensor) -> None:
        """Go on from the sums of ``state``."""
        self._sums.copy_(state)
        if not self.processes.is_first:
            self._bins.zero_()

    def read(self) -> Tallied:
        """What there is since the last reading; the sums start anew."""
        steps, good, loss, norm, first, _, run, low, high, *bins = self._whole().tolist()
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
            run=int(run),
            levels=(-low, high) if -low <= high else None,
        )

    def _whole(self) -> Tensor:
        """The sums with what only some of the processes have seen."""
        rest = self._sums[:7], self.processes.largest(self._levels), self.processes.sum(self._bins).flatten()
        return torch.cat(rest)
