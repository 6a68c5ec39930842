"""log p along the flow: error against calls of the model, ours and others'; and end to end against log p of the data.

    python benchmarks/likelihood.py [solver] [end_to_end] [peers] [trained --checkpoint RUN_FOLDER ...]

``solver``: the error of the integration alone, on closed-form scores (see ``density`` and ``targets``) and on the same
with an error of 2 % that is not a gradient. ``end_to_end``: against log p_0 of clean data, with the prior matched and
t_min corrected for, and without. ``peers``: the same question put to other libraries (see ``density_peers``; all
optional), and the figure. ``trained``: a network's own flow against a fine solution with the same probes.

Errors are mean absolute errors in nats, float64, over 256 points; medians over seeds. Bars stand beside them. Runs are
kept with ``--records FILE.csv``: those of others are then not run again, nor ours with ``--reuse``. All parts:

    python benchmarks/likelihood.py solver peers end_to_end --reuse --records likelihood.csv
    python benchmarks/likelihood.py trained --records likelihood.csv --checkpoint RUN_FOLDER ...

A way of ours that a version does not have is left out, so that a new one is measured by running this again.
"""

import argparse
from pathlib import Path

import torch

import density_ends
import density_peers
import density_tables
import density_trained
from density import SDES, exact_case, perturbed_case
from density_ways import DEFAULT, ONE_PASS, UNLIMITED, adaptive, fixed
from measure import OURS, Record
from peers import available
from problem import Method
from store import Store
from targets import TARGETS

RESULTS = Path(__file__).parent / "results"
NAMES = {name: f"likelihood_{name}" for name in ("solver", "end_to_end", "peers", "trained")}
"""The files of a part's tables, without .txt."""
STEPS = (30, 50, 100, 200, 400)
FEW = (30, 50, 75, 100, 150)
PERTURBED = ("a", "b")
DRAWN = (DEFAULT, "dopri8", "rk4", ONE_PASS)
"""The ways of ours in the figure: all of them would be too many to tell apart."""


def run(store: Store, case, methods: list[Method], budgets: tuple[int, ...] = (UNLIMITED,)) -> list[Record]:
    """Records of ``methods`` on a case; no last noise level is tried, for the case has its own end."""
    return store.measure(case, methods, budgets, last=lambda budget: (None,))


def ours(store: Store, case) -> list[Record]:
    """Every way of ours, at all tolerances or numbers of steps."""
    return run(store, case, adaptive()) + run(store, case, fixed(), STEPS)


def exact_cases(args: argparse.Namespace):
    """Every target under every process, for all seeds."""
    for name in args.targets:
        for process in args.sdes:
            for seed in args.seeds:
                yield exact_case(TARGETS[name](seed), process, seed, args.points)


def solver(args: argparse.Namespace) -> str:
    """Exact scores, and perturbed ones."""
    store, records, perturbed = Store(args.records, args.reuse), [], []
    for case in exact_cases(args):
        records += ours(store, case)
        print(f"  {case.name}, seed {case.seed}", flush=True)
    for case in perturbed_cases(args):
        perturbed += run(store, case, [m for m in adaptive() if m.name == DEFAULT])
        perturbed += run(store, case, [m for m in fixed() if m.name in ("rk4", ONE_PASS)], FEW)
        print(f"  {case.name}, seed {case.seed}", flush=True)
    labels = [method.name for method in adaptive()]
    bars = {"rk4": density_tables.RK4, ONE_PASS: density_tables.DEFECT}
    steps = [record for record in records if record.method not in labels]
    parts = [f"The integration alone, exact scores, seeds {args.seeds}", density_tables.adaptive(records, labels)]
    parts += [density_tables.fixed(steps, bars, STEPS)]
    bars = {ONE_PASS: density_tables.DEFECT_PERTURBED}
    parts += ["Scores perturbed by 2 %, against the density of their own flow"] * bool(perturbed)
    parts += [density_tables.fixed(perturbed, bars, FEW), density_tables.advantage(perturbed, FEW)] * bool(perturbed)
    return "\n\n".join(parts)


def perturbed_cases(args: argparse.Namespace):
    """The targets in which components meet, for all seeds."""
    for name in (name for name in args.targets if name in PERTURBED):
        for process in args.sdes:
            for seed in args.seeds:
                yield perturbed_case(TARGETS[name](seed), process, seed, args.points)


def peers(args: argparse.Namespace) -> str:
    """Others beside ours, and the figure of both."""
    methods, missing = available(libraries=density_peers.LIBRARIES)
    store, records = Store(args.records, args.reuse), []
    for case in exact_cases(args):
        records += ours(store, case) + run(store, case, methods)
        print(f"  {case.name}, seed {case.seed}", flush=True)
    drawn = [record for record in records if record.library != OURS or record.method in DRAWN]
    density_tables.draw(drawn, args.out / "likelihood.png", len(args.sdes))
    text = density_tables.against_peers(records, density_peers.HELD_TO)
    return "\n".join((f"Exact scores, seeds {args.seeds}", "", text, *missing))


def trained(args: argparse.Namespace) -> str:
    """Networks: error against a fine solution of the same flow with the same probes."""
    store, records, lines = Store(args.records, args.reuse), [], []
    for path in args.checkpoint:
        case, line = density_trained.case(path, args.seeds[0], args.points)
        lines.append(line)
        print(f"  {line}", flush=True)
        records += run(store, case, [m for m in adaptive(tolerances=density_trained.TOLERANCES) if m.name == DEFAULT])
        records += run(store, case, [m for m in fixed() if m.name in ("rk4", ONE_PASS)], FEW)
    density_tables.draw(records, args.out / "likelihood_trained.png", least=1e-6)
    tables = (density_tables.fixed(records, {}, FEW), density_tables.advantage(records, FEW))
    return "\n\n".join(("Trained networks, against a fine solution of the same flow", "\n".join(lines), *tables))


PARTS = {"solver": solver, "end_to_end": density_ends.report, "peers": peers, "trained": trained}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="|".join(PARTS))
    parser.add_argument("--checkpoint", nargs="+", default=[], help="checkpoints, or folders of runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sdes", nargs="+", choices=SDES, default=list(SDES))
    parser.add_argument("--points", type=int, default=256, help="points whose log p is asked for")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables and the figure")
    parser.add_argument("--records", type=Path, help="CSV that keeps all runs; those of others are not run again")
    parser.add_argument("--reuse", action="store_true", help="take our own runs from the records too")
    args = parser.parse_args(words)
    args.parts = args.parts or ["solver", "end_to_end", "peers"] + ["trained"] * bool(args.checkpoint)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if "trained" in args.parts and not args.checkpoint:
        parser.error("trained needs --checkpoint FILE_OR_FOLDER ...")
    return args


def main() -> None:
    """Run the parts, print their tables, and write them."""
    torch.set_num_threads(1)
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        text = PARTS[part](args) + "\n"
        print(text, flush=True)
        (args.out / f"{NAMES[part]}.txt").write_text(text)


if __name__ == "__main__":
    main()
