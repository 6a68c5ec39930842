"""Records on disk, so that peers are run once: their runs are read back, and ours only where that is asked for."""

import csv
from collections.abc import Iterable
from pathlib import Path

from measure import OURS, Record, measure
from problem import Method, Problem


class Store:
    """Records in a CSV file without a header, or in memory alone for ``path`` None.

    reuse: take our own runs from the file too, as they are if nothing has changed.
    """

    def __init__(self, path: Path | None = None, reuse: bool = False):
        self.path = path
        lines = path.read_text().splitlines() if path and path.is_file() else []
        found = (_record(row) for row in csv.reader(lines))
        latest = {(r.case, r.seed, r.budget, r.library, r.method, r.plan): r for r in found}
        self.kept = [r for r in latest.values() if reuse or r.library != OURS]

    def measure(
        self,
        problem: Problem,
        methods: Iterable[Method],
        budgets: tuple[int, ...],
        **options,
    ) -> list[Record]:
        """``measure.measure``, with what is stored of other libraries in place of running it again."""
        methods, budgets = list(methods), tuple(budgets)
        names = {(method.library, method.name) for method in methods}
        here = [r for r in self.kept if (r.case, r.seed) == (problem.name, problem.seed) and r.budget in budgets]
        here = [r for r in here if (r.library.split(",")[0], r.method) in names]
        done = {(r.library.split(",")[0], r.method, r.budget) for r in here}
        fresh = []
        for method in methods:
            left = [n for n in budgets if (method.library, method.name, n) not in done]
            found = list(measure(problem, [method], left, **options))
            self._append(found)  # at once: a long run that is stopped goes on from here
            fresh += found
        return here + fresh

    def _append(self, records: Iterable[Record]) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(records)


def _record(row: list[str]) -> Record:
    return Record(*(kind(value) for kind, value in zip(Record.__annotations__.values(), row, strict=True)))
