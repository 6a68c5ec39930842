"""The page of a report as a file: its structure, its escaping, and that it asks nobody for anything."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
import torch
from summaries import comparison, png

from experiments import league
from experiments.canvas import PALETTE
from experiments.league_figures import pareto
from experiments.metrics import Floor
from experiments.page import LARGEST, Figure, Gallery, Items, Page, Section, Settings, Words
from experiments.page_parts import SCRIPT, STYLE
from experiments.table_cells import (
    BEST,
    FRONT,
    Cell,
    Column,
    Table,
    mark_best,
    natural,
    number,
    pareto_front,
    uncertain,
)

EVIL = "<script>alert('x')</script>\"&amp;"
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """A file as its elements, with the text of each; any element that is not closed in order is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.loose = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        found = [element for element in self.elements if element["tag"] == tag]
        return [one for one in found if all(one.get(name) == value for name, value in attributes.items())]


def evil_page(tmp_path):
    """A page on which every place for words holds markup."""
    table = Table(
        (Column(EVIL, EVIL), Column("n")),
        ((Cell(EVIL, title=EVIL), number(2.0)), (Cell(links=((EVIL, f"../{EVIL}"),)), Cell(mark=EVIL))),
        caption=EVIL,
        legend=((EVIL, EVIL),),
    )
    figure = Figure(png(tmp_path / "a.png"), EVIL)
    parts = (Words(EVIL), Items((EVIL,)), Settings(EVIL, EVIL), table, Gallery((figure, Figure(tmp_path / EVIL, "b"))))
    return Page(EVIL, (Section(EVIL, parts),))


def test_words_are_words_wherever_they_stand(tmp_path):
    page = Reader(evil_page(tmp_path).html())
    assert [one["text"] for one in page.all("script")] == [SCRIPT]
    assert [page.all(tag)[0]["text"] for tag in ("h1", "h2", "h3", "title")] == [EVIL] * 4
    assert page.all("th")[0]["text"] == page.all("th")[0]["title"] == EVIL
    assert page.all("td")[0]["text"] == page.all("td")[0]["title"] == page.all("a")[0]["text"] == EVIL
    assert page.all("a")[0]["href"] == f"../{EVIL}" and page.all("img")[0]["alt"] == EVIL
    assert page.all("summary")[0]["text"] == page.all("pre")[0]["text"] == page.all("li")[0]["text"] == EVIL


def test_the_policy_allows_the_pages_own_parts_and_nothing_else(tmp_path):
    page = Reader(evil_page(tmp_path).html())
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, text in (("style", STYLE), ("script", SCRIPT)):
        assert page.all(kind)[0]["text"] == text
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    addresses = [one[name] for one in page.elements for name in ("src", "href") if name in one]
    assert all(address.startswith(("data:", "../")) for address in addresses)
    assert not re.search(r"https?://|@import|url\(", page.all("style")[0]["text"] + page.all("script")[0]["text"])
    assert not [one for one in page.elements if "style" in one or any(name.startswith("on") for name in one)]


def test_the_page_is_html_5_in_the_projects_colours_and_always_the_same(tmp_path):
    page = evil_page(tmp_path)
    text = page.html()
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">') and text == page.html()
    found = Reader(text)
    assert len(found.all("main")) == len(found.all("h1")) == 1 and found.all("meta", charset="utf-8")
    assert found.all("th")[0]["scope"] == "col"
    assert sum(colour in STYLE for colour in PALETTE) >= 4 and "prefers-color-scheme: dark" in STYLE
    page.write(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_bytes() == text.encode()


def test_a_picture_that_cannot_be_put_in_is_said_to_be_missing(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(LARGEST + 1)
    for name, words in (("none.png", "No such file"), ("text.png", "expected a PNG"), ("large.png", "too large")):
        html = Figure(tmp_path / name, "a caption").html()
        assert words in html and name in html and "<img" not in html and "a caption" in html
    picture = png(tmp_path / "a.png")
    html = Figure(picture, "a caption").html()
    assert base64.b64encode(picture.read_bytes()).decode() in html and "wide" not in html


def test_numbers_are_written_with_their_errors_and_sorted_by_value():
    cell = uncertain(0.06123, 0.00412)
    assert cell.text == "0.0612 ± 0.0041" and cell.value == 0.06123
    assert cell.title == "95 % interval 0.0532 to 0.0693"  # 0.06123 -+ 1.96 x 0.00412
    assert uncertain(1234.5, 20.0).text == "1234 ± 20" and uncertain(0.5, None).text == "0.5"
    assert uncertain(None, None) == Cell() and uncertain(0.5, 0.0).text == "0.5"
    html = Table((Column("a"),), ((cell,), (Cell(),))).html()
    assert 'data-value="0.06123"' in html and html.count("data-value") == 1


@pytest.mark.parametrize(
    ("best", "values", "stderrs", "marked"),
    [
        ("low", [1.0, 1.2, 1.3], [0.2, 0.0, 9.0], [0, 1]),  # within the best's error, whatever one's own
        ("high", [1.0, 1.2, 1.3], [9.0, None, 0.1], [1, 2]),
        ("zero", [-0.1, 0.3, 0.05], [None, None, None], [2]),
        ("low", [None, 2.0, 1.0], [None, None, None], [2]),
        ("low", [None, 1.0], [None, None], []),
    ],
)
def test_the_best_share_their_mark_within_a_standard_error(best, values, stderrs, marked):
    cells = mark_best([number(value) for value in values], stderrs, best)
    assert [i for i, cell in enumerate(cells) if cell.mark == BEST] == marked


def test_the_front_is_what_nothing_beats():
    costs, scores = [10, 20, 50, 10, 30, 50], [0.3, 0.2, 0.1, 0.4, 0.2, 0.1]
    assert pareto_front(costs, scores) == [0, 1, 2, 5]  # 3 and 4 are beaten; two equal ones both stay
    rng = torch.rand(40, 2).tolist()
    front = pareto_front(*zip(*rng, strict=True))
    beaten = [i for i, (a, b) in enumerate(rng) if any(c < a and d < b for c, d in rng)]
    assert sorted(front + beaten) == list(range(40))


def test_names_with_numbers_are_sorted_as_people_do():
    assert sorted(["run 10", "run 2", "a", "run ²"], key=natural) == ["a", "run 2", "run 10", "run ²"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 1 cells, found 2"):
        Table((Column("a"),), ((Cell("1"), Cell("2")),))


def test_the_league_table_says_what_was_measured():
    found = league.league(comparison())
    names = [column.name for column in found.columns]
    assert names == [
        "sampler",
        "steps",
        "final",
        "NFE",
        "seconds",
        "peak MiB",
        "sliced W2",
        "of floor",
        "coverage",
        "bias",
    ]
    ddim = dict(zip(names, found.rows[2], strict=True))
    assert ddim["sliced W2"] == Cell("0.0700 ± 0.0040", 0.05 + 1 / 50, "95 % interval 0.0622 to 0.0778", BEST)
    assert ddim["of floor"].text == "1.40" and ddim["coverage"].mark == BEST and ddim["NFE"].mark == FRONT
    assert ddim["bias"].mark == BEST and ddim["sampler"].title == "DDIM(steps=50, grid=log_snr)"
    assert found.front == {0, 1, 2} and not any(cell.mark for cell in found.rows[-1])
    assert [cell.text for cell in found.footer[0]][6:9] == ["0.0500 ± 0.0040", "1.00", "–"]
    backwards = comparison()
    backwards["rows"][0]["backward"] = 7
    assert "backward" in [column.name for column in league.league(backwards).columns]


def test_the_league_as_text_markdown_and_csv():
    made = comparison()
    text, markdown, lines = league.text(made), league.markdown(made), league.as_csv(made).splitlines()
    assert "0.0700 ± 0.0040 ★" in text and "noise floor" in text and "Recommendation: ddim with 50" in text
    assert "| **0.0700 ± 0.0040** ★ |" in markdown and "| --: |" in markdown
    assert lines[0].startswith("sampler,solver,budget,steps,final,nfe") and len(lines) == 10
    assert lines[3].startswith('ddim,"DDIM(steps=50, grid=log_snr)",50,50,mean,50,0,0.5,4194304,0.07')
    made["rows"][0]["sampler"] = "a|b <i>\n*c*"
    assert r"| a\|b &lt;i> \*c\* |" in league.markdown(made)


def test_the_page_of_a_comparison(tmp_path):
    made = comparison()
    made["rows"][0]["sampler"] = EVIL
    picture = png(tmp_path / "samples.png")
    page = Reader(league.comparison_page({"comparison": made}, f"seed: 0\nname: {EVIL}", [picture]))
    words = " ".join(one["text"] for one in page.all("p"))
    for expected in (
        "300 samples",
        "digits, test split",
        "averaged weights (EMA 0.999)",
        "VP(beta_min=0.1)",
        "ddim with 50",
    ):
        assert expected in words
    assert len(page.all("tr")) == 1 + 9 + 1 and len(page.all("tr", **{"class": "front"})) == 3
    marks = page.all("span", role="img")
    assert {BEST, FRONT} == {one["text"] for one in marks} and all(one["aria-label"] for one in marks)
    assert EVIL in page.all("pre")[0]["text"] and page.all("td")[0]["text"] == EVIL
    assert page.all("figcaption")[0]["text"] == "Samples of each sampler beside held-out data"


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"settings": {}, "metrics": {}, "rows": []},
        comparison() | {"rows": [{"sampler": 3}]},
        comparison() | {"metrics": {"a": {"title": "A", "best": "lowest"}}},
        comparison() | {"rows": [{"sampler": "a", "nfe": "1", "seconds": 1, "metrics": {}}]},
        comparison() | {"rows": [{"sampler": "a", "nfe": float("nan"), "seconds": 1, "metrics": {}}]},
    ],
)
def test_what_is_no_comparison_is_refused(broken):
    with pytest.raises(ValueError, match="its comparison makes no sense"):
        league.comparison_page({"comparison": broken}, "", [])


def test_the_figure_of_the_front_shows_both_costs(tmp_path, monkeypatch):
    rows = [
        {"sampler": name, "nfe": nfe, "seconds": nfe / 100, "value": value, "stderr": None}
        for name, nfe, value in (("a", 10, 0.9), ("a", 20, 0.8), ("b", 10, 0.5), ("b", 40, 0.95))
    ]
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.step", lambda axes, x, y, **_: drawn.append((x.tolist(), y.tolist())))
    path = pareto(rows, tmp_path / "pareto.png", "coverage", "high", Floor(0.97, 0.01))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn == [([10, 40], [0.9, 0.95]), ([0.1, 0.4], [0.9, 0.95])]
    with pytest.raises(ValueError, match="at least 0"):
        pareto([rows[0] | {"seconds": -1.0}], tmp_path / "no.png")
    with pytest.raises(ValueError, match="NaN or infinite"):
        pareto([rows[0] | {"value": float("nan")}], tmp_path / "no.png")
