"""The Python code of docs/ runs, what it quotes is what stands in the file, and its links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    names = {"__name__": "docs"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    assert names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_quotes_and_links_to_is_there(page):
    text = page.read_text()
    for path, quoted in re.findall(r"```python title=(\S+)\n(.*?)```", text, re.DOTALL):
        assert quoted in (DOCS.parent / path).read_text(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DOCS / target).exists(), target


def test_the_worked_example_has_the_density_it_says(monkeypatch):
    """The exact likelihood of docs/benes.py against its closed form."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    from benes import Benes, TwoHumps, benes_model

    from solvers import log_likelihood

    sde = Benes()
    data = TwoHumps((8, 2), 0.05 + sde.t_min)
    x = data.sample(seed=1, dtype=torch.float64)
    found = log_likelihood(benes_model(sde), x, rtol=1e-8, atol=1e-8)
    assert torch.allclose(found.log_prob, data.log_prob(x), atol=1e-6)
