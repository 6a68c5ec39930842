"""A report on stored runs: one table of samplers, likelihoods and trainings over seeds, from what the runs left behind.

``league.csv`` has a line for each run, sampler and budget with every number in full; ``table.csv`` the rows of the
tables; ``report.md`` and ``report.html`` are to be read. The same stored runs give the same bytes.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from experiments import chapters
from experiments.build import ConfigError
from experiments.chapters import Chapter, plain, relative
from experiments.collection import Collected, StoredRun, collect
from experiments.grouping import varying
from experiments.league import csv_text, flat_row
from experiments.league_figures import pareto
from experiments.metrics import Floor
from experiments.page import Figure, Gallery, Page, Part, Section, Settings, Words
from experiments.run import Run, replacing
from experiments.standings import Standings, best_samples, curve_names, ranked, standings

log = logging.getLogger(__name__)
TITLE = "Report on runs"
CURVES = 10  # samplers that a figure shows


def report(config: DictConfig, run: Run) -> None:
    """Collect the runs below ``runs`` and write a report on them into this run's folder."""
    collected = collect(folders_of(config.runs), ignore=run.folder)
    text = write_report(collected, run.folder)
    run.path("report.txt").write_text(f"{text}\n", encoding="utf-8")
    states = {run.name: run.state for run in collected.runs}
    run.note(report={"runs": len(states), "states": states})
    print(f"\n{text}\n\nThe page: {run.folder / 'report.html'}", flush=True)


def folders_of(runs: Any) -> list[str]:
    """The folders that ``runs=`` names. Raises ``ConfigError`` where it names none."""
    found = list(runs) if isinstance(runs, list | tuple | ListConfig) else [runs]
    if not found or not all(isinstance(one, str) and one for one in found):
        raise ConfigError(f"runs: expected a folder, or several, found {runs}; give runs=FOLDER or runs=[A,B]")
    return found


def write_report(collected: Collected, folder: str | Path) -> str:
    """Write league.csv, table.csv, report.md, report.html and figures/ into a folder; returns the report as text.

    An earlier report in the folder is replaced: it can be made again from the same runs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = standings(collected)
    compared = [run for run in collected.cells if run.summary.get("comparison")]
    parts = [
        chapters.failures(collected, folder),
        chapters.samplers(found, compared),
        Chapter("Figures", figures=_figures(found, folder)),
        chapters.likelihoods(collected),
        chapters.trainings(collected),
        chapters.all_runs(collected, folder),
    ]
    parts = [part for part in parts if part.tables or part.figures]
    intro = chapters.summary_words(collected)
    files = {
        "league.csv": csv_text(lines(collected)),
        "table.csv": csv_text([line for part in parts for line in part.lines]),
        "report.md": _markdown(intro, parts, folder),
        "report.html": _page(intro, parts, chapters.common(collected)).html(),
    }
    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
    return _text(intro, parts)


def lines(collected: Collected) -> list[dict[str, Any]]:
    """Every number of every run: a line for each of its samplers and budgets, or one where it compared none."""
    keys = varying([run.settings for run in collected.cells])
    return [line for run in collected.runs for line in _lines(run, keys)]


def _lines(run: StoredRun, keys: Sequence[str]) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"run": run.name, "task": run.task, "state": run.state, "seed": run.seed}
    common |= plain({key: run.settings[key] for key in keys if key in run.settings and key != "seed"})
    comparison, training = run.summary.get("comparison") or {}, run.summary.get("training") or {}
    likelihood, settings = run.summary.get("likelihood") or {}, comparison.get("settings", {})
    others = {
        "training_loss": training.get("loss"),
        "training_steps": training.get("steps"),
        "parameters": training.get("parameters"),
        "likelihood": likelihood.get("value"),
        "likelihood_stderr": likelihood.get("stderr"),
        "likelihood_unit": likelihood.get("unit"),
        "likelihood_examples": likelihood.get("n"),
        "likelihood_split": likelihood.get("split"),
    }
    where = {name: settings.get(name) for name in ("samples", "reference", "features")}
    rows = [where | flat_row(row, comparison["metrics"]) for row in comparison.get("rows", [])]
    return [common | row | others for row in rows or [{}]]


def _figures(found: Sequence[Standings], folder: Path) -> list[tuple[Path, str]]:
    """Quality against cost for each table of samplers, and the samples of its best."""
    figures = []
    for i, standing in enumerate(found):
        name = "pareto.png" if len(found) == 1 else f"pareto_{i + 1}.png"
        figures += _pareto(standing, folder / "figures" / name)
    samples = {path: words for standing in found for path, words in best_samples(standing)}
    return figures + list(samples.items())


def _pareto(standing: Standings, path: Path) -> list[tuple[Path, str]]:
    name, metric = standing.first
    order = [i for i in ranked(standing) if None not in (standing.rows[i]["nfe"], standing.rows[i]["seconds"])]
    if not order:
        return []
    names = curve_names(standing)
    every = list(dict.fromkeys(names[i] for i in order))
    shown = set(every[:CURVES])
    rows = [
        {"sampler": names[i], "nfe": standing.rows[i]["nfe"], "seconds": standing.rows[i]["seconds"]}
        | standing.rows[i]["metrics"][name]
        for i in sorted(order)
        if names[i] in shown
    ]
    pareto(rows, path, metric["title"], metric["best"], Floor(**metric["floor"]) if metric["floor"] else None)
    left_out = f"; the best {CURVES} of {len(every)}" if len(every) > CURVES else ""
    words = f"{metric['title']} against network calls and seconds{left_out}. The step line is the Pareto front."
    return [(path, f"{standing.title}: {words}")]


def _page(intro: str, parts: Sequence[Chapter], settings: str) -> Page:
    sections = [Section("", (Words(intro),)), *(_section(part) for part in parts)]
    if settings:
        sections.append(Section("Configuration", (Settings("Settings that all runs share", settings),)))
    return Page(TITLE, tuple(sections))


def _section(part: Chapter) -> Section:
    inside: list[Part] = [Words(words) for words in part.words] + list(part.tables)
    if part.figures:
        inside.append(Gallery(tuple(Figure(path, caption) for path, caption in part.figures)))
    return Section(part.title, tuple(inside))


def _markdown(intro: str, parts: Sequence[Chapter], folder: Path) -> str:
    blocks = [f"# {TITLE}", intro]
    for part in parts:
        blocks += [f"## {part.title}", *part.words, *(table.markdown() for table in part.tables)]
        blocks += [f"![{_alternative(caption)}](<{relative(path, folder)}>)" for path, caption in part.figures]
    return "\n\n".join(blocks) + "\n"


def _alternative(caption: str) -> str:
    return caption.replace("[", "(").replace("]", ")")


def _text(intro: str, parts: Sequence[Chapter]) -> str:
    blocks = [intro]
    for part in parts:
        if part.tables:
            blocks += [part.title.upper(), *part.words, *(table.text() for table in part.tables)]
    return "\n\n".join(blocks)
