"""What must never be in the code: whatever would run, or import, what a file names (SECURITY.md).

Every reference in every file of the packages, of benchmarks/ and of docs/ is resolved through the file's own imports
and held against ``RULES``. tests/ are left out: they make the hostile files. An alias is seen (``from torch import
load as l``), a bare reference counts as a use (``f = torch.load``), a name put together from strings is not seen.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sde", "models", "solvers", "experiments", "conf", "benchmarks", "docs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve", "jsonpickle"}
RUN = {"eval", "exec", "__import__"}
TORCH_LOADS = {"torch.load", "torch.serialization.load"}
RUN_BY_TORCH = {"torch.hub", "torch.jit.load", "torch.package", "torch.utils.cpp_extension"}
SAFE_YAML = {"yaml", "yaml.safe_load", "yaml.safe_load_all", "yaml.safe_dump", "yaml.YAMLError"}
SHELLS = ("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "pty.spawn", "subprocess.get")
BY_NAME = {"import_module", "run_path", "run_module", "spec_from_file_location", "exec_module", "resolve_name"}
BY_HYDRA = {f"hydra.utils.{name}" for name in ("call", "get_class", "get_method", "get_object", "get_static_method")}

# Where a rule is broken on purpose: the one place that builds from configurations, and code that names its own modules.
EXCEPTIONS = {
    ("experiments/build.py", "instantiate"),
    ("experiments/build.py", "import by name"),
    ("experiments/__init__.py", "import by name"),
    ("experiments/cells.py", "resolver"),
    ("benchmarks/peers.py", "import by name"),
}


class Use(NamedTuple):
    """A reference: its dotted name, resolved through imports, and the call where it is called at once."""

    name: str
    call: ast.Call | None = None

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    def given(self, keyword: str, but: object) -> bool:
        """Whether the keyword is given, as anything but this constant."""
        values = [k.value for k in self.call.keywords if k.arg == keyword] if self.call else []
        return any(not (isinstance(value, ast.Constant) and value.value is but) for value in values)

    def lacks(self, keyword: str) -> bool:
        return self.call is None or all(k.arg != keyword for k in self.call.keywords)


RULES: dict[str, Callable[[Use], bool]] = {
    "pickle": lambda use: bool(PICKLES & set(use.name.split("."))) or use.last == "read_pickle",
    "eval": lambda use: use.name.removeprefix("builtins.") in RUN,
    "compile": lambda use: use.name == "builtins.compile" or (use.name == "compile" and use.call is not None),
    "torch.load": lambda use: use.name in TORCH_LOADS and use.lacks("weights_only"),
    "weights_only": lambda use: use.given("weights_only", but=True),
    "code in a model file": lambda use: any(f"{use.name}.".startswith(f"{name}.") for name in RUN_BY_TORCH),
    "np.load": lambda use: use.name == "numpy.load" and use.lacks("allow_pickle"),
    "allow_pickle": lambda use: use.given("allow_pickle", but=False),
    "safe globals": lambda use: use.last in {"add_safe_globals", "safe_globals"},
    "yaml": lambda use: use.name.split(".")[0] == "yaml" and use.name not in SAFE_YAML,
    "resolver": lambda use: use.last in {"register_new_resolver", "register_resolver"},
    "shell": lambda use: use.name.startswith(SHELLS) or use.given("shell", but=False),
    "extract": lambda use: use.last in {"extractall", "unpack_archive"},
    "instantiate": lambda use: use.last == "instantiate" or use.name in BY_HYDRA,
    "import by name": lambda use: use.last in BY_NAME or use.name == "pydoc.locate",
    "star": lambda use: use.last == "*",
}


def broken(source: str) -> set[str]:
    """The rules that a file breaks."""
    return {rule for use in uses(ast.parse(source)) for rule, breaks in RULES.items() if breaks(use)}


def uses(tree: ast.Module) -> Iterator[Use]:
    """Every import, name and attribute of a file."""
    origins = dict(imports(tree))
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            yield from (Use(module + alias.name) for alias in node.names if not guarded(module + alias.name))
        elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            yield Use(dotted(node, origins), called.get(id(node)))
        elif isinstance(node, ast.Call) and not isinstance(node.func, ast.Name | ast.Attribute):
            yield Use("?", node)


def guarded(name: str) -> bool:
    """Whether what matters is how it is called, so that importing it is no use yet."""
    return name in TORCH_LOADS | {"numpy.load"}


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local name -> what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr, origins: dict[str, str]) -> str:
    """``np.load`` as "numpy.load"; what hangs on an expression without a name, as "?.load"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, origins)}.{node.attr}"
    return origins.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_can_run_what_another_file_names(file):
    place = str(file.relative_to(ROOT))
    assert broken(file.read_text()) - {rule for where, rule in EXCEPTIONS if where == place} == set()


def test_every_exception_is_needed_and_every_package_is_searched():
    for place, rule in EXCEPTIONS:
        assert rule in broken((ROOT / place).read_text()), (place, rule)
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(FOLDERS) and len(FILES) > 100


BREAKING = {
    "pickle": (
        "import pickle",
        "import joblib as j",
        "from dill import loads",
        "def f():\n    import marshal",
        "from torch import pickle",
        "import shelve; shelve.open(path)",
        "pandas.read_pickle(path)",
        "torch.serialization.pickle.load(file)",
    ),
    "eval": ("eval(text)", "exec(text)", "f = eval", "import builtins\nbuiltins.exec(x)", "__import__(name)"),
    "compile": ("compile(text, name, 'exec')", "import builtins\nrun = builtins.compile"),
    "torch.load": (
        "import torch\ntorch.load(path)",
        "from torch import load as l\nl(path, map_location='cpu')",
        "import torch as t\nf = t.load",
        "import torch\ntorch.load(path, None, None, True)",
        "import torch\ntorch.load(path, **options)",
    ),
    "weights_only": ("torch.load(path, weights_only=False)", "f(path, weights_only=flag)", "f()(weights_only=0)"),
    "code in a model file": (
        "import torch\ntorch.hub.load(a, b)",
        "from torch.jit import load",
        "import torch.package",
    ),
    "np.load": ("import numpy as np\nnp.load(path)", "from numpy import load\nload(path, 'r', True)"),
    "allow_pickle": ("np.save(path, x, allow_pickle=True)", "numpy.load(path, allow_pickle=whatever)"),
    "safe globals": ("torch.serialization.add_safe_globals([A])", "with safe_globals([A]): pass"),
    "yaml": ("import yaml\nyaml.load(text)", "from yaml import full_load", "import yaml as y\ny.load(t, y.SafeLoader)"),
    "resolver": ("OmegaConf.register_new_resolver('eval', f)",),
    "shell": (
        "import os\nos.system('ls')",
        "from os import popen",
        "subprocess.run(command, shell=True)",
        "from subprocess import Popen as P\nP(command, shell=flag)",
        "import os\nos.execv(a, b)",
        "import subprocess\nsubprocess.getoutput(command)",
    ),
    "extract": ("archive.extractall(path)", "tarfile.open(path).extractall()", "shutil.unpack_archive(path)"),
    "instantiate": (
        "from hydra.utils import instantiate",
        "import hydra\nhydra.utils.instantiate(node)",
        "from hydra.utils import get_class",
    ),
    "import by name": (
        "from importlib import import_module",
        "import importlib\nimportlib.import_module(name)",
        "import runpy\nrunpy.run_path(path)",
        "import pydoc\npydoc.locate(name)",
    ),
    "star": ("from os import *",),
}
HARMLESS = (
    "model.eval(); self.compile(x); torch.compile(net); re.compile(words)",
    "def f(compile: bool = False):\n    return g(x, compile=compile) if compile else x",
    "import torch\ntorch.load(file, map_location='cpu', weights_only=True)",
    "import numpy as np\nnp.load(file, allow_pickle=False)\nnp.save(file, x)\nnp.savez(file, a=x)",
    "import yaml\nyaml.safe_load(text)",
    "import subprocess\nsubprocess.run(['git', 'describe'], shell=False, check=True)",
    "archive.extractfile(member); json.load(file); model.load_state_dict(state); OmegaConf.load(path)",
    "'eval(pickle.load(file))'  # exec",
    "import os\nos.replace(a, b)\nos.environ.get('SHELL')",
    "from torch import load\nload(path, weights_only=True)",
)


@pytest.mark.parametrize(("rule", "source"), [(rule, source) for rule, all in BREAKING.items() for source in all])
def test_each_rule_sees_what_breaks_it(rule, source):
    assert rule in broken(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_what_only_looks_alike_passes(source):
    assert broken(source) == set()


def test_every_rule_has_something_that_breaks_it():
    assert BREAKING.keys() == RULES.keys()
