"""sde <- {models, solvers} <- experiments <- conf: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "sde": {"sde"},
    "models": {"sde", "models"},
    "solvers": {"sde", "solvers"},
    "experiments": {"sde", "models", "solvers", "experiments"},
    "conf": {"sde", "models", "solvers", "experiments", "conf"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or path.parent.name for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_lies_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & MAY_IMPORT.keys() <= MAY_IMPORT[room], file


def test_the_process_needs_torch_alone():
    for file in sorted((ROOT / "sde").rglob("*.py")):
        assert imported(file) <= {"sde", "torch", *sys.stdlib_module_names}, file


def test_solvers_need_torch_torchdiffeq_and_a_progress_bar_alone():
    for file in sorted((ROOT / "solvers").rglob("*.py")):
        assert imported(file) <= {"sde", "solvers", "torch", "torchdiffeq", "tqdm", *sys.stdlib_module_names}, file
