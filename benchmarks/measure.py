"""Runs every method in every setting within every budget, and finds the best setting of each."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from experiments.report import table
from problem import Method, Plan, Problem, within

BUDGETS = (5, 10, 20, 50, 100, 250)
OURS = "ours"


class Record(NamedTuple):
    """One run: the error, and what it took."""

    case: str
    seed: int
    budget: int
    library: str
    method: str
    plan: str
    error: float
    nfe: int
    seconds: float


class Best(NamedTuple):
    """The best setting of a method within a budget: medians over seeds."""

    label: str
    plan: str
    error: float
    seconds: float


def ends(budget: int) -> tuple[float, ...]:
    """The last noise levels that are tried: about the best of every peer, by budget."""
    if budget <= 20:
        return (0.01, 0.03, 0.1)
    return (0.002, 0.01, 0.03) if budget <= 50 else (0.0005, 0.002, 0.01) if budget <= 100 else (0.0005, 0.002)


def small_end(budget: int) -> float:
    """The last noise level for an ending that has no floor."""
    return 0.0308 * (budget / 20) ** -0.74


def plans(
    method: Method, budget: int, endings: bool, last: Callable[[int], tuple[float, ...]] = ends
) -> Iterator[Plan]:
    """Every setting of a method, ``last`` its last levels; with ``endings``, also those in place of its own."""
    for grid in method.grids:
        for end in ((None,) if method.own_end else ()) + last(budget):
            yield Plan(1, grid, end)
        for kind in method.endings[1:] if endings else ():
            yield Plan(1, grid, small_end(budget), kind)


def measure(
    problem: Problem,
    methods: Iterable[Method],
    budgets: Iterable[int],
    endings: bool = False,
    error: Callable[[Tensor], float] | None = None,
    last: Callable[[int], tuple[float, ...]] = ends,
) -> Iterator[Record]:
    """A record of every run; ``error`` of the samples, RMSE per dimension unless given."""
    for method in methods:
        for budget in budgets:
            for plan in plans(method, budget, endings, last):
                if run := within(method, problem, plan, budget):
                    library = method.library + (", our ending" if plan.ending != "own" else "")
                    found = (error or problem.error)(run.y)
                    head = (problem.name, problem.seed, budget, library, method.name)
                    yield Record(*head, str(plan), found, run.nfe, run.seconds)


def bests(records: Iterable[Record], case: str, budget: int) -> list[Best]:
    """The best setting of every method, best method first."""
    runs = defaultdict(lambda: defaultdict(list))
    for r in records:
        if (r.case, r.budget) == (case, budget):
            runs[f"{r.library}: {r.method}"][r.plan].append(r)
    found = [min((_median(label, p, rs) for p, rs in by.items()), key=lambda b: b.error) for label, by in runs.items()]
    return sorted(found, key=lambda best: best.error)


def _median(label: str, plan: str, runs: list[Record]) -> Best:
    errors, seconds = ([getattr(r, name) for r in runs] for name in ("error", "seconds"))
    return Best(label, plan, statistics.median(errors), statistics.median(seconds))


def group(label: str) -> str:
    """ "ours", "peers", or "peers, our ending"."""
    library = label.split(":")[0]
    return OURS if library == OURS else "peers" + library[library.find(",") :] * ("," in library)


def leaders(records: list[Record], case: str, budget: int) -> dict[str, Best]:
    """The best of every group."""
    return {group(best.label): best for best in reversed(bests(records, case, budget))}


def won(records: list[Record], case: str, budget: int, ours: Best) -> str:
    """In how many seeds one setting of ours is better than whatever setting of a peer is the best in that seed."""
    of = [r for r in records if (r.case, r.budget) == (case, budget)]
    mine = {r.seed: r.error for r in of if (f"{r.library}: {r.method}", r.plan) == (ours.label, ours.plan)}
    theirs = {
        seed: min((r.error for r in of if r.seed == seed and group(r.library + ":") == "peers"), default=None)
        for seed in mine
    }
    seeds = [seed for seed in mine if theirs[seed] is not None]
    return f"{sum(mine[seed] < theirs[seed] for seed in seeds)} of {len(seeds)}"


def cases(records: Iterable[Record]) -> list[str]:
    """The cases in the order of their records."""
    return list(dict.fromkeys(r.case for r in records))


def summary(records: list[Record], budgets: Iterable[int]) -> str:
    """For every case and budget, the best of every group, its setting, and the seeds that ours won."""
    rows = []
    for case in cases(records):
        for budget in budgets:
            best = leaders(records, case, budget)
            row = [case, str(budget)]
            for name in ("peers", "peers, our ending", OURS):
                row += _cells(best.get(name))
            both = OURS in best and "peers" in best
            ratio = f"{best['peers'].error / best[OURS].error:.2f}" if both else "-"
            rows.append((*row, ratio, won(records, case, budget, best[OURS]) if both else "-"))
    kept = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows)]
    header = ("case", "NFE", "peers", "setting", "with our ending", "setting", "ours", "setting", "ratio", "won")
    return table(tuple(header[i] for i in kept), [tuple(row[i] for i in kept) for row in rows])


def settled(records: list[Record], budget: int) -> dict[str, dict[str, Best]]:
    """By case and method, with one setting of each method for all cases: that of the least geometric mean error."""
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in (r for r in records if r.budget == budget):
        runs[f"{r.library}: {r.method}"][r.plan][r.case].append(r)
    found, wanted = defaultdict(dict), cases(r for r in records if r.budget == budget)
    for label, plans_ in runs.items():
        medians = {
            plan: {case: _median(label, plan, rs) for case, rs in by.items()}
            for plan, by in plans_.items()
            if len(by) == len(wanted)
        }
        if medians:
            plan = min(medians, key=lambda plan: sum(math.log(best.error) for best in medians[plan].values()))
            for case, best in medians[plan].items():
                found[case][label] = best
    return found


def default_against_settled(records: list[Record], budgets: Iterable[int], default: str) -> str:
    """Our ``default`` as it comes, beside the best peer in one setting for all cases of a budget."""
    rows = []
    for budget in budgets:
        for case, methods in settled(records, budget).items():
            peers = [best for label, best in methods.items() if group(label) == "peers"]
            own = [r for r in records if (r.case, r.budget, r.method, r.plan) == (case, budget, default, "")]
            if peers and own:
                best, mine = min(peers, key=lambda one: one.error), _median(f"{OURS}: {default}", "", own)
                rows.append((case, str(budget), *_cells(best), f"{mine.error:.2g}", f"{mine.error / best.error:.2f}"))
    header = ("case", "NFE", "best peer, one setting", "which", f"{default} as it comes", "ours / peer")
    return table(header, sorted(rows, key=lambda row: (row[0], int(row[1]))))


def _cells(best: Best | None) -> list[str]:
    return ["-", "-"] if best is None else [f"{best.error:.2g}", f"{best.label} {best.plan}".strip()]


def every_method(records: list[Record], case: str, budgets: Iterable[int], missing: Iterable[str] = ()) -> str:
    """The error of every method in its best setting, by budget; the methods in the order of their records."""
    by_budget = {n: {best.label: best for best in bests(records, case, n)} for n in budgets}
    labels = dict.fromkeys(f"{r.library}: {r.method}" for r in records if r.case == case)
    rows = [("best peer", *(_best(leaders(records, case, n).get("peers")) for n in by_budget))]
    rows += [(label, *(_best(found.get(label)) for found in by_budget.values())) for label in labels]
    rows += [(line, *("" for _ in by_budget)) for line in missing]
    return table((case, *map(str, by_budget)), rows)


def _best(best: Best | None) -> str:
    return "-" if best is None else f"{best.error:.2g}"
