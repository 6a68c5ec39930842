"""Samples in batches that fit into the memory, from all processes.

Every sample has its own stream of random numbers (``sde.Noise``), so that any division of the samples draws the same
ones: with a solver of fixed steps exactly, up to how a machine rounds in batches of another size, and with one that
chooses its steps for a batch within its tolerances. Whole batches are dealt to the processes in turn; no solver knows
of the others or waits for them, and where all is done, all get everything.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from tqdm import tqdm

from experiments.processes import Processes, current
from sde import ScoreField
from sde.base import require_count
from solvers import Solver
from solvers.base import Output

log = logging.getLogger(__name__)
T = TypeVar("T")


class Fitting:
    """Work on numbered samples in pieces that fit into the memory: halved where they don't, from there on for all.

    ``key``: the setting that says how many samples are done at a time, for the advice.
    """

    def __init__(self, key: str):
        self.key, self.most = key, math.inf

    def __call__(self, work: Callable[[int, int], T], start: int, size: int) -> list[T]:
        """``work(start, size)``, or of pieces of it, in order.

        Raises ``torch.OutOfMemoryError`` where one sample alone does not fit; other errors are passed on.
        """
        done, end = [], start + size
        while start < end:
            piece = min(self.most, end - start)
            try:
                done.append(work(start, piece))
                start += piece
                continue
            except torch.OutOfMemoryError as error:
                if piece == 1:
                    raise torch.OutOfMemoryError(
                        f"a single sample does not fit into the memory: use a smaller network or device=cpu ({error})"
                    ) from error
            self._halve(piece)  # out of the handler, whose error holds on to what was computed
        return done

    def _halve(self, piece: int) -> None:
        log.log(
            logging.WARNING if self.most == math.inf else logging.DEBUG,
            "%d samples do not fit into the memory: going on in smaller batches, with the same results; "
            "to begin with them: %s=%d",
            *(piece, self.key, piece // 2),
        )
        self.most = piece // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw(
    solver: Solver,
    model: ScoreField,
    shape: tuple[int, ...],
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    processes: Processes | None = None,
) -> Output:
    """Samples of ``shape`` = ``(B, ...)``, on the CPU and in all processes where there are several.

    Parameters
    ----------
    seed, device, progress: as for a ``Solver``'s call.
    batch_size: samples drawn at a time by one process; None for all of its share. Halved where the memory is too small.
    processes: by default the ``current()`` ones.

    Raises what the solver raises, in all processes, and ``torch.OutOfMemoryError`` where one sample alone is too large.
    """
    require_count(shape[0], "draw: the number of samples")
    processes, n = processes or current(), shape[0]
    size = -(-n // processes.count) if batch_size is None else batch_size
    require_count(size, "batch_size")
    fit, shown = Fitting("compare.batch_size"), progress and processes.is_first

    def batch(start: int, count: int) -> Output:
        out = solver(model, (count, *shape[1:]), seed, device=device, first=start, progress=shown)
        return replace(out, x=out.x.cpu())

    starts = range(0, n, size)[processes.rank :: processes.count]
    bar = tqdm(starts, desc="samples", unit="batch", leave=False, disable=not shown or len(starts) < 2)
    hands = processes.gather_from(lambda: [Output.joined(fit(batch, start, min(size, n - start))) for start in bar])
    # As they were dealt: the first of each process, then the second.
    return Output.joined([hands[i % len(hands)][i // len(hands)] for i in range(sum(map(len, hands)))])
