"""The report on stored runs: what is found, what is averaged, what must not meet, and that it is always the same."""

import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from statistics import mean, stdev
from urllib.parse import unquote

import pytest
from configurations import configuration
from summaries import comparison, likelihood, png, stored, training

from experiments.build import ConfigError, build
from experiments.chapters import likelihoods, samplers, trainings
from experiments.collection import LARGEST_CONFIG, collect, hidden
from experiments.grouping import groups, over_seeds, varying
from experiments.report_task import write_report
from experiments.run import Run
from experiments.standings import curve_names, standings
from experiments.table_cells import BEST


@pytest.fixture(autouse=True)
def quick_figure(request, monkeypatch):
    """Another picture in place of the front, which takes as long as all else, but where it matters."""
    if not request.node.get_closest_marker("usefixtures"):
        monkeypatch.setattr("experiments.report_task.pareto", lambda rows, path, *_: png(path))


@pytest.fixture
def drawn():
    """The front is drawn."""


@pytest.fixture
def runs(tmp_path):
    """Two SDEs with three seeds each, all measured alike."""
    for i, sde in enumerate(("vp", "ve")):
        for seed in range(3):
            parts = {"comparison": comparison(0.01 * i + 0.003 * seed**2), "likelihood": likelihood(3.1 + i + seed**2)}
            stored(tmp_path / "runs" / f"{sde}-{seed}", sde, seed, picture=True, training=training(0.4 + seed), **parts)
    return tmp_path / "runs"


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def reported(runs, out):
    text = write_report(collect([runs]), out)
    return text, rows_of(out / "table.csv"), rows_of(out / "league.csv")


def test_runs_that_differ_in_their_seed_alone_are_one_row(runs, tmp_path):
    text, table, league = reported(runs, tmp_path / "out")
    assert len(league) == 2 * 3 * 9 and len(table) == 2 * 9 + 2 + 2
    (row,) = [r for r in table if (r["sde"], r["sampler"], r["steps"]) == ("VP", "ddim", "20")]
    values = [0.05 + 1 / 20 + 0.003 * seed**2 for seed in range(3)]
    assert row["seeds"] == "3"
    assert float(row["sliced_w2"]) == pytest.approx(mean(values), rel=1e-12)
    assert float(row["sliced_w2_stderr"]) == pytest.approx(stdev(values) / 3**0.5, rel=1e-12)
    (cost,) = [r for r in table if r["sde"] == "VE" and r["likelihood"]]
    assert float(cost["likelihood"]) == pytest.approx(mean([4.1, 5.1, 8.1]))
    assert float(cost["likelihood_stderr"]) == pytest.approx(stdev([4.1, 5.1, 8.1]) / 3**0.5)
    assert "0.1050 ± 0.0036" in text  # of the values above
    assert [r["sliced_w2"] for r in league if (r["run"], r["sampler"], r["steps"]) == ("vp-2", "ddim", "20")] == [
        repr(values[2])
    ]


def test_one_seed_keeps_its_own_error_and_a_repeated_one_adds_none():
    assert over_seeds([(0, 0.2, 0.03)]) == (0.2, 0.03)
    assert over_seeds([(0, 0.2, 0.03), (1, None, None)]) == (0.2, 0.03)
    assert over_seeds([(0, 1.0, 0.1), (0, 3.0, 0.1), (1, 4.0, 0.1)]) == (3.0, 1.0)  # of 2 and 4
    assert over_seeds([(0, 1.0, 0.1), (0, 3.0, 0.1)]) == (2.0, 0.1)
    assert over_seeds([(0, 0.0, None), (1, 1.0, None)]) == (0.5, pytest.approx(0.5))  # 0 is a value
    assert over_seeds([]) == (None, None)


def test_samplers_of_one_run_are_never_averaged(tmp_path):
    made = comparison()
    for row in made["rows"]:  # as of solvers that choose their own steps, twice
        row |= {"budget": None, "steps": None}
    stored(tmp_path / "a" / "0", seed=0, comparison=made)
    stored(tmp_path / "a" / "1", seed=1, comparison=made)
    (found,) = standings(collect([tmp_path / "a"]))
    assert len(found.rows) == 9 and [row["nfe"] for row in found.rows[:3]] == [10, 20, 50]


OTHERWISE = {
    "n": {"comparison": comparison(samples=100, reference="digits, test split, 300 examples")},
    "reference": {"comparison": comparison(reference="digits, validation split")},
    "features": {"comparison": comparison(features="pixels")},
    "metric settings": {"config": {"compare": {"projections": 64}}},
    "data settings": {"config": {"data": {"_target_": "experiments.data.digits", "seed": 3}}},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_was_measured_otherwise_has_a_table_of_its_own(what, runs, tmp_path):
    stored(runs / "other", "vp", 7, **({"comparison": comparison()} | OTHERWISE[what]))
    found = standings(collect([runs]))
    assert sorted(len(one.rows) for one in found) == [9, 18]
    (alone,) = [one for one in found if len(one.rows) == 9]
    assert all(group.seeds == 1 and [run.name for run in group.runs] == ["other"] for group in alone.of)
    text, table, _ = reported(runs, tmp_path / "out")
    assert "measured in 2 ways" in text and {r["table"] for r in table if r["sampler"]} == {"samplers 1", "samplers 2"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("samples each; against") >= 2 and "stand in separate tables" in page


@pytest.mark.parametrize("change", [{"n": 50}, {"split": "train"}, {"unit": "nats"}])
def test_likelihoods_of_other_examples_stand_apart(change, runs, tmp_path):
    stored(runs / "other", "vp", 7, likelihood=likelihood(3.0, **change))
    _, table, _ = reported(runs, tmp_path / "out")
    by_table = {}
    for row in table:
        if row["likelihood"]:
            by_table.setdefault(row["table"], []).append(row["seeds"])
    assert sorted(by_table.values()) == [["1"], ["3", "3"]]


def test_settings_that_have_no_say_in_a_metric_leave_runs_together(runs, tmp_path):
    more = {"compare": {"names": ["heun"], "budgets": [20], "seeds": 5}}
    stored(runs / "other", "vp", 7, config=more, comparison=comparison(budgets=(20,)))
    assert len(standings(collect([runs]))) == 1


def test_a_solver_is_told_by_its_row_and_what_else_was_compared_makes_no_group(runs, tmp_path):
    """Cells of a sweep over ``solver=`` and over lists of samplers share the rows that they have in common."""
    before = len(standings(collect([runs]))[0].rows)
    for i, name in enumerate(("DDIM", "Heun")):
        made = comparison(0.5, samplers={"ddim": 1.0})
        for row in made["rows"]:
            row["solver"] = f"DDIM(steps={row['steps']}, eta={i})"
        more = {"solver": {"_target_": f"solvers.{name}"}, "compare": {"names": [name]}, "likelihood": {"steps": i}}
        stored(runs / f"cell-{i}", "vp", 7, config=more, comparison=made)
    (found,) = standings(collect([runs]))
    assert len(found.rows) == before + 2 * 3
    added = [row for row in found.rows if "eta" in row["solver"]]
    assert [(row["seeds"], row["steps"]) for row in added] == [(1, 10), (1, 20), (1, 50)] * 2
    (table,) = samplers([found], collect([runs]).runs).tables
    assert [column.name for column in table.columns][:4] == ["sde", "sampler", "seeds", "solver"]
    names = curve_names(found)
    assert len(set(names)) == 2 * 3 + 2 and "ddim, VP (2)" in names and "ddim, VP (3)" in names


def test_a_likelihood_is_not_parted_by_the_samplers_beside_it(runs):
    for seed in (5, 6):
        more = {"solver": {"_target_": "solvers.Heun"}, "compare": {"names": [seed]}}
        stored(runs / f"other-{seed}", "vp", seed, config=more, likelihood=likelihood(3.0), training=training(1.0))
    (table,) = likelihoods(collect([runs])).tables
    assert sorted(row[1].text for row in table.rows) == ["3", "5"]
    (table,) = trainings(collect([runs])).tables
    assert sorted(row[1].text for row in table.rows) == ["3", "5"]


def test_settings_that_differ_are_found_within_their_class():
    vp, ve = {"sde._target_": "sde.VP", "sde.beta_max": 20}, {"sde._target_": "sde.VE", "sde.sigma_max": 50}
    assert varying([vp, ve]) == ["sde._target_"]
    assert varying([vp, ve, vp | {"sde.beta_max": 10}]) == ["sde._target_", "sde.beta_max"]
    assert varying([{"under": None}, {"under._target_": "sde.VP"}]) == ["under._target_"]
    assert varying([{"a": 1}, {"a": 1.5, "b": None}]) == ["a", "b"]
    assert varying([{"a": [1, 2]}, {"a": [1, 2]}]) == []


def test_the_best_of_a_column_is_marked_and_the_front_is_of_all_rows(runs):
    (found,) = standings(collect([runs]))
    (table,) = samplers([found], collect([runs]).runs).tables
    names = [column.name for column in table.columns]
    assert names[:3] == ["sde", "sampler", "seeds"]
    place = names.index("sliced W2")
    marked = [(row[0].text, row[1].text) for row in table.rows if row[place].mark == BEST]
    assert marked == [("VP", "ddim")] and "noise floor" in table.footer[0][1].text
    assert {table.rows[i][1].text for i in table.front} == {"ddim"} and len(table.front) == 3
    assert {table.rows[i][0].text for i in table.front} == {"VP"}


def test_runs_that_did_not_end_are_listed_with_their_reason(runs, tmp_path):
    stored(runs / "failed", seed=7, state="failed", error="NaNError: step 3 of /home/someone/data/x.npz")
    stored(runs / "interrupted", seed=8, state="interrupted")
    dead = stored(runs / "dead", seed=9, state="running")
    alive = stored(runs / "alive", seed=10, state="running")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for folder, pid in ((dead, process.pid), (alive, os.getpid())):
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps(status | {"pid": pid, "host": socket.gethostname()}))
    (stored(runs / "unreadable", seed=11) / "summary.json").write_text('{"half')
    (stored(runs / "senseless", seed=12, comparison={"rows": 3})).joinpath("x").touch()
    states = {run.name: run.state for run in collect([runs]).unfinished}
    assert states == {
        "failed": "failed",
        "interrupted": "interrupted",
        "dead": "died",
        "alive": "running",
        "unreadable": "unreadable",
        "senseless": "unreadable",
    }
    text, _, league = reported(runs, tmp_path / "out")
    assert "NaNError: step 3 of …/x.npz" in text and "summary.json can't be read" in text
    assert "6 done" in text and "2 unreadable" in text
    assert {row["run"]: row["state"] for row in league}["dead"] == "died"
    assert "device" not in league[0]  # those that did not come so far differ in nothing for that
    assert len(list(dead.iterdir())) == 3  # nothing was made in it


def test_a_run_with_a_lock_is_alive_as_long_as_it_is_held(tmp_path):
    run = Run(tmp_path / "runs" / "a", "train")
    assert [one.state for one in collect([tmp_path / "runs"]).runs] == ["running"]
    run._lock.close()
    assert [one.state for one in collect([tmp_path / "runs"]).runs] == ["died"]


def test_a_configuration_is_read_and_nothing_in_it_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("NOWHERE", "secret")
    stored(tmp_path / "a" / "0")
    large = stored(tmp_path / "a" / "1") / ".hydra" / "config.yaml"
    large.write_text("# " + "x" * LARGEST_CONFIG)
    (stored(tmp_path / "a" / "2") / ".hydra" / "config.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    first, second, third = collect([tmp_path / "a"]).runs
    assert first.settings["checkpoint"] == "${oc.env:NOWHERE}" and first.settings["device"] == "cpu"
    assert second.state == third.state == "unreadable" and "at most" in second.reason
    assert "config.yaml" in third.reason


def test_networks_of_a_sweep_are_trainings_and_no_cells(runs, tmp_path):
    folder = stored(runs / "networks" / "vp-digits-1", task="train", training=training(9.5))
    (folder / "network.json").write_text(json.dumps({"sde": {"_target_": "sde.VE"}, "seed": 4}))
    shutil.rmtree(folder / ".hydra")
    collected = collect([runs])
    (network,) = [run for run in collected.runs if run.network]
    assert network.settings == {"sde._target_": "sde.VE", "seed": 4, "device": "cpu"}
    assert network not in collected.cells and len(collected.cells) == 6
    text, table, _ = reported(runs, tmp_path / "out")
    assert "1 of them trainings" in text and "9.5" in text
    assert not any(row["sampler"] and row["seeds"] == "4" for row in table)


@pytest.mark.usefixtures("drawn")
def test_the_same_runs_give_the_same_bytes_wherever_they_are_read(runs, tmp_path, monkeypatch):
    for cell in list(runs.glob("ve-*")):
        shutil.rmtree(cell)
    stored(runs / "failed", state="failed", error=f"OSError: {runs}/vp-0/x.npz")
    write_report(collect([runs]), tmp_path / "one")
    walk = os.walk  # another order of the file system, other times

    def turned(*arguments, **options):
        for place, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield place, folders, files[::-1]

    monkeypatch.setattr(os, "walk", turned)
    for file in runs.rglob("*"):
        os.utime(file, (1, 1))
    write_report(collect([f"{runs}/../runs"]), tmp_path / "two")
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs, moved / "runs")
    write_report(collect([moved / "runs"]), moved / "one")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [str(file) for file in files] == [
        "figures/pareto.png",
        "league.csv",
        "report.html",
        "report.md",
        "table.csv",
    ]
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes() == (moved / "one" / file).read_bytes(), file
        assert str(tmp_path).encode() not in content, file


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.pictures = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.found.append(dict(attributes)["href"])
        self.pictures += tag == "img" and dict(attributes)["src"].startswith("data:image/png")


def test_links_lead_to_runs_and_pictures_and_samples_of_the_best_are_there(runs, tmp_path):
    stored(runs / "a name, with #?% 'signs'", seed=9, picture=True)
    write_report(collect([runs]), tmp_path / "out")
    page = Links((tmp_path / "out" / "report.html").read_text())
    assert not any(sign in link for link in page.found for sign in "#?' ")
    assert len(page.found) == 7 + 7 and all((tmp_path / "out" / unquote(link)).exists() for link in page.found)
    assert not any(link.startswith("/") for link in page.found)
    assert page.pictures == 1 + 2  # the front; samples of the best run of each SDE
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "](<../runs/vp-0/figures/samples.png>)" in markdown and "](<figures/pareto.png>)" in markdown


def test_several_folders_are_told_apart_and_each_run_counts_once(tmp_path):
    for name in ("a/runs", "b/runs"):
        stored(tmp_path / name / "10")
        stored(tmp_path / name / "9")
    folders = [tmp_path / "b/runs", tmp_path / "a/runs", tmp_path / "a/runs/../runs"]
    names = [run.name for run in collect(folders).runs]
    assert names == ["a/runs/9", "a/runs/10", "b/runs/9", "b/runs/10"]
    assert len(collect([tmp_path / "a", tmp_path / "a/runs"]).runs) == 2
    assert [run.name for run in collect([tmp_path / "a/runs/9"]).runs] == ["9"]


def test_a_folder_can_be_left_out_with_all_below_it(runs):
    stored(runs / "out" / "deep" / "run")
    assert len(collect([runs]).runs) == 7 and len(collect([runs], ignore=runs / "out").runs) == 6


@pytest.mark.parametrize(("unit", "best"), [("bits/dim", "VP"), ("nats", "VE")])
def test_the_best_likelihood_is_low_in_bits_and_high_in_nats(unit, best, tmp_path):
    for sde, value in (("vp", 3.0), ("ve", 4.0)):
        stored(tmp_path / "a" / sde, sde, likelihood=likelihood(value, unit=unit))
    (table,) = likelihoods(collect([tmp_path / "a"])).tables
    assert [row[0].text for row in table.rows if row[-1].mark == BEST] == [best]
    assert table.columns[-1].name == ("bits/dim" if unit == "bits/dim" else "log p, nats")


def test_what_cannot_be_reported_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"found none; mend runs="):
        collect([tmp_path])
    with pytest.raises(ConfigError, match=r"found no folder .*nowhere"):
        collect([tmp_path / "nowhere"])
    for given in ([], None, [3], ""):
        config = configuration("task=report")
        config.runs = given
        with pytest.raises(ConfigError, match=r"runs: expected a folder"):
            build(config.task)(config, Run(tmp_path / f"out-{given}", "report"))


def test_the_task_reports_into_its_own_folder_inside_the_runs(runs, capsys):
    (runs / "report-0").mkdir()
    for name in ("report-1", "report-2"):  # the second finds the first, which is no run
        config = configuration("task=report", f"runs={runs}")
        run = Run(runs / name, "report")
        build(config.task)(config, run)
        run.end("done")
    first, second = ({p.name: p.read_bytes() for p in (runs / n).glob("*.*")} for n in ("report-1", "report-2"))
    assert {"league.csv", "table.csv", "report.md", "report.html", "report.txt"} <= first.keys()
    assert all(first[name] == second[name] for name in first if name not in ("status.json", ".lock"))
    out = capsys.readouterr().out
    assert "6 runs: 6 done." in out and "0.0700" not in out and "report.html" in out


def test_runs_of_the_earlier_shape_are_read(tmp_path):
    old = {
        "rows": [{"sampler": "ddim", "nfe": 10.0, "seconds": 0.1, "distance": 0.2, "distance_std": 0.03}],
        "noise_floor": {"mean": 0.1, "std": 0.01},
    }
    stored(tmp_path / "a" / "0", config={"compare": {"samples": 200, "seeds": 9}}, comparison=old)
    (found,) = standings(collect([tmp_path / "a"]))
    assert found.rows[0]["metrics"]["sliced_w2"] == {"value": 0.2, "stderr": 0.01, "of_floor": 2.0}
    assert found.title == "200 samples each; against digits, test split"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file /home/me/data/x.npz, sorry", "no file …/x.npz, sorry"),
        ("C:\\Users\\me\\x.npz", "…/x.npz"),
        ("bits/dim and 1/2 at https://example.org/a/b", "bits/dim and 1/2 at https://example.org/a/b"),
        ("'/a/b c/d'", "'…/b c/d'"),
    ],
)
def test_paths_of_the_machine_are_left_out(text, shown):
    assert hidden(text) == shown


def test_groups_keep_what_differs(runs):
    found = groups(collect([runs]).runs)
    assert [(group.settings, group.seeds) for group in found] == [
        ({"sde._target_": "sde.VE"}, 3),
        ({"sde._target_": "sde.VP"}, 3),
    ]
    assert [run.name for run in found[0].runs] == ["ve-0", "ve-1", "ve-2"]
