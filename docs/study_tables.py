"""The tables and the figure of docs/study.md: ``python docs/study_tables.py FOLDER``, the folder of the sweep.

It reads ``league.csv``, prints Markdown, and writes docs/images/study.png.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from experiments.canvas import FAINT, canvas, curve_look, plain_log_ticks, readable

IMAGE = Path(__file__).parent / "images" / "study.png"
CLOSE = 1.05  # times the best
Values = dict[tuple[str, str, int], list[float]]


def lines(folder: Path) -> list[dict[str, str]]:
    """Every run, sampler and budget of the sweep."""
    with (folder / "league.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_floor(rows: list[dict[str, str]]) -> Values:
    """(SDE, sampler, budget) -> the distance over that of real data, for each seed."""
    found: Values = defaultdict(list)
    for row in rows:
        if row["sampler"]:
            ratio = float(row["sliced_w2"]) / float(row["sliced_w2_floor"])
            found[row["sde"], row["sampler"], int(row["budget"])].append(ratio)
    return found


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def shown(values: list[float]) -> str:
    """Mean over the seeds, in as many digits as say something."""
    value = mean(values)
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def bits(rows: list[dict[str, str]]) -> str:
    """Bits per dimension of each SDE: mean and standard error over seeds."""
    found = defaultdict(dict)
    for row in rows:
        if row["likelihood"]:
            found[row["sde"]][row["seed"]] = float(row["likelihood"])
    body = []
    for sde, by_seed in sorted(found.items(), key=lambda item: mean(item[1].values())):
        values = list(by_seed.values())
        error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        body.append([sde, str(len(values)), f"{mean(values):.4f}{error}"])
    return table(["SDE", "seeds", "test bits/dim"], body)


def at_budget(values: Values, sdes: list[str], samplers: list[str], budget: int) -> str:
    """Samplers by SDEs at one budget."""
    body = [[readable(s), *(shown(values[sde, s, budget]) for sde in sdes)] for s in samplers]
    return table([f"{budget} calls", *sdes], body)


def fewest(values: Values, sdes: list[str], samplers: list[str]) -> str:
    """The smallest budget from which on a sampler is as good, within CLOSE, as the best one at the largest budget."""
    budgets = sorted({budget for _, _, budget in values})
    best = {sde: min(mean(values[sde, sampler, budgets[-1]]) for sampler in samplers) for sde in sdes}

    def reached(sde: str, sampler: str) -> str:
        good = [mean(values[sde, sampler, budget]) <= CLOSE * best[sde] for budget in budgets]
        enough = [budget for i, budget in enumerate(budgets) if all(good[i:])]
        return str(enough[0]) if enough else f"> {budgets[-1]}"

    return table(["sampler", *sdes], [[readable(s), *(reached(sde, s) for sde in sdes)] for s in samplers])


def figure(values: Values, sdes: list[str], samplers: list[str]) -> None:
    """A panel for each SDE: times the noise floor against calls, a curve for each sampler; the legend has the last."""
    budgets = sorted({budget for _, _, budget in values})
    across = len(sdes) // 2 + 1
    with canvas(IMAGE, 2.9 * across, 6.2) as drawn:
        panels = list(drawn.subplots(2, across, sharex=True, sharey=True, squeeze=False).flat)
        for axes, sde in zip(panels, sdes, strict=False):
            for i, sampler in enumerate(samplers):
                y = [mean(values[sde, sampler, budget]) for budget in budgets]
                axes.plot(budgets, y, label=readable(sampler), markersize=4.5, linewidth=1.2, **curve_look(i))
            axes.axhline(1, color=FAINT, linewidth=1)
            axes.set(title=sde, xscale="log", yscale="log", ylim=(0.9, 20), xticks=budgets)
            plain_log_ticks(axes.yaxis)
            axes.set_xticks(budgets, [str(budget) for budget in budgets])
            axes.minorticks_off()
        for i, axes in enumerate(panels):
            axes.set(xlabel="network calls" if i >= across else "")
            axes.set(ylabel="sliced W2 over that of real data" if i % across == 0 else "")
            axes.tick_params(labelbottom=i >= across or i + across >= len(sdes))  # also above an empty place
        for spare in panels[len(sdes) :]:
            spare.set_axis_off()
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", fontsize=9.5)


def main(folder: Path) -> None:
    """Print the tables, and draw the figure."""
    rows = lines(folder)
    values = of_floor(rows)
    sdes, budgets = sorted({sde for sde, _, _ in values}), sorted({budget for _, _, budget in values})
    samplers = sorted(
        {sampler for _, sampler, _ in values}, key=lambda s: mean(mean(values[sde, s, budgets[1]]) for sde in sdes)
    )
    print(bits(rows), fewest(values, sdes, samplers), sep="\n\n")
    for budget in budgets:
        print(f"\n{at_budget(values, sdes, samplers, budget)}")
    figure(values, sdes, samplers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
