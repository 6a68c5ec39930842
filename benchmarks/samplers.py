"""Samplers of this library and of others: quality against calls of the model and against time.

    python benchmarks/samplers.py [exact] [sde] [overhead] [trained --checkpoint RUN_FOLDER ...]

``exact``: RMSE per dimension against the exact flow from the same noise, with closed-form scores (see ``targets``).
``sde``: sliced W2 of stochastic samplers to fresh data. ``overhead``: time of the loop per call, with a model that
costs next to nothing. ``trained``: RMSE per dimension against a fine solution with the same network.

The libraries compared with are optional (see ``peers``). Every method is charged the calls that were counted, and
within each budget is shown in the best of its settings: its grids, and several last noise levels.
"""

import argparse
import logging
from pathlib import Path

import torch

import ours
import overhead
import stochastic
import trained
from measure import BUDGETS, Record, cases, default_against_settled, every_method, summary
from peers import available
from pictures import draw
from problem import STARTS, exact_problem
from store import Store
from targets import TARGETS

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "exact": "samplers",
    "sde": "samplers_sde",
    "overhead": "samplers_overhead",
    "trained": "samplers_trained",
}
"""The files of a part's tables and figure, without .txt and .png."""


def exact(args: argparse.Namespace) -> str:
    """RMSE against the exact flow: three targets, two starts."""
    methods, missing = available()
    store, records = Store(args.records, args.reuse), []
    for seed in args.seeds:
        for start in args.starts:
            for name in args.targets:
                problem = exact_problem(TARGETS[name](seed), start, seed)
                chosen = [*methods, *ours.methods(ours.ODE), *ours.methods(ours.FIXED)]
                records += store.measure(problem, chosen, args.budgets or BUDGETS)
                print(f"  {problem.name}, seed {seed}", flush=True)
    draw(records, args.budgets or BUDGETS, args.out / f"{NAMES['exact']}.png", "RMSE per dimension")
    title = f"Exact scores: RMSE per dimension against the exact flow, 256 samples, medians over seeds {args.seeds}"
    return pages(title, records, args.budgets or BUDGETS, missing)


def with_networks(args: argparse.Namespace) -> str:
    """RMSE against a fine solution with the same network."""
    methods, missing = available()
    store, records, lines, budgets = Store(args.records, args.reuse), [], [], args.budgets or trained.BUDGETS
    for path in args.checkpoint:
        for seed in args.seeds[:1]:
            problem, line = trained.problem(path, seed)
            lines.append(line)
            records += store.measure(problem, [*methods, *ours.methods(ours.ODE)], budgets, endings=True)
            print(f"  {line}", flush=True)
    draw(records, budgets, args.out / f"{NAMES['trained']}.png", "RMSE per dimension")
    title = "\n".join(("Trained networks: RMSE per dimension against a fine solution with the same network", *lines))
    return pages(title, records, budgets, missing)


def pages(title: str, records: list[Record], budgets: tuple[int, ...], missing: list[str]) -> str:
    """The summary, and a table of all methods for every case."""
    parts = [title, summary(records, budgets), default_against_settled(records, budgets, "ExponentialAdams")]
    return "\n\n".join(parts + [every_method(records, case, budgets, missing) for case in cases(records)])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="exact|sde|overhead|trained")
    parser.add_argument("--checkpoint", nargs="+", default=[], help="checkpoints, or folders of runs")
    parser.add_argument("--budgets", nargs="+", type=int, help="calls of the model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables and figures")
    parser.add_argument(
        "--records", type=Path, help="CSV that keeps all runs; those of other libraries are not run again"
    )
    parser.add_argument("--reuse", action="store_true", help="take our own runs from the records too")
    args = parser.parse_args(words)
    args.parts = args.parts or ["exact", "sde", "overhead"] + ["trained"] * bool(args.checkpoint)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if "trained" in args.parts and not args.checkpoint:
        parser.error("trained needs --checkpoint FILE_OR_FOLDER ...")
    return args


PARTS = {
    "exact": exact,
    "sde": lambda args: stochastic.report(args, Store(args.records, args.reuse), NAMES["sde"]),
    "overhead": lambda args: overhead.report(),
    "trained": with_networks,
}


def main() -> None:
    """Run the parts, print their tables, and write them."""
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        text = PARTS[part](args) + "\n"
        print(text, flush=True)
        (args.out / f"{NAMES[part]}.txt").write_text(text)


if __name__ == "__main__":
    main()
