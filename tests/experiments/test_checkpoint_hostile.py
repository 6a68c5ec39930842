"""Checkpoints that someone made to do harm: nothing that a file says is imported, called, or believed."""

import ast
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import CPU, exported, sealed, unsealed, with_entries, with_json, with_pickle

from experiments import archive, build, checkpoint, components
from experiments.build import trust
from experiments.checkpoint import CheckpointError
from experiments.checkpoint_tasks import describe
from sde import GaussianSDE

SCHEMA1 = Path(__file__).parent / "checkpoints" / "schema1.pt"


@pytest.fixture
def marker(tmp_path):
    """What the payloads try to make."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def refused(path, words, seconds=2.0):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(path, CPU)
    assert time.perf_counter() - started < seconds
    assert caught.value.path and caught.value.reason
    return str(caught.value)


class Touching:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_something_is_refused(file, sound, marker, protocol):
    for payload in (Touching(os.system, f"touch {marker}"), Touching(Path.touch, marker), Touching(open, marker, "w")):
        file.write_bytes(with_pickle(sound, pickle.dumps({"schema": 2, "model": payload}, protocol)))
        refused(file, "refused: it names '?.* to be called|not a readable checkpoint")


def test_the_pickle_of_another_program_is_refused(file, marker):
    torch.save({"schema": 2, "model": Touching(os.system, f"touch {marker}")}, file)
    refused(file, "refused: it names 'posix system' to be called")
    file.write_bytes(pickle.dumps(Touching(os.system, f"touch {marker}")))
    refused(file, "not a readable checkpoint")
    torch.save({"model": Touching(os.system, f"touch {marker}")}, file, _use_new_zipfile_serialization=False)
    refused(file, "not a readable checkpoint")


def test_functions_that_torch_would_let_pass_are_refused(file, sound):
    for payload in (
        *(Touching(bytearray, 10**9), Touching(complex, 1, 2), Touching(set, [1])),
        Touching(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**12,), (1,), False),
    ):
        file.write_bytes(with_pickle(sound, pickle.dumps({"schema": 2, "model": payload}, 2)))
        refused(file, "refused: it names")


NAMES = (
    *("os.system", "logging.os.system", "torch.load", "builtins.open", "pathlib.Path.touch", "posix.system"),
    *(
        "experiments.run.write_json",
        "experiments.build.build",
        "sde.vp.VP",
        "sde.VP",
        "models.MLP",
        "DenoisingScoreMatching",
    ),
    *("GaussianSDE", "ScoreNetwork", "LevelHead", "VP ", "vp", "", "__import__", "a.b", ".", "sde.", "${oc.env:HOME}"),
)


@pytest.mark.parametrize("place", components.PLACES)
def test_names_that_are_not_in_the_table_are_refused(file, sound, marker, place):
    for name in NAMES:
        file.write_bytes(sound)
        stored = {"name": name, "parameters": {"command": f"touch {marker}"}}
        with_json(file, "components", lambda c, s=stored: c | {place: s})
        refused(file, f"{place}: (there is no|.* is not of this project)")


@pytest.mark.parametrize("name", [None, 1, 1.5, True, ["VP"], {"name": "VP"}, {"name": "VP", "parameters": {}}])
def test_names_that_are_no_strings_are_refused(file, name):
    with_json(file, "components", lambda c: c | {"sde": {"name": name, "parameters": {}}})
    refused(file, "sde: expected a name and a table of parameters")


def test_a_part_of_another_place_is_refused(file, sound):
    for place, other in (("sde", "net"), ("net", "sde"), ("parametrization", "sde"), ("sde", "parametrization")):
        file.write_bytes(sound)
        with_json(file, "components", lambda c, a=place, b=other: c | {a: c[b]})
        refused(file, f"{place}: there is no '")


@pytest.mark.parametrize(
    "target", ["os.system", "logging.os.system", "torch.load", "builtins.open", "pathlib.Path.touch"]
)
def test_targets_in_what_is_stored_are_never_called(file, sound, marker, target):
    """At the top, nested, and by an interpolation, in this schema and in the first."""
    node = {"_target_": target, "command": f"touch {marker}", "self": str(marker)}
    wrapped = {"name": "exploding", "parameters": {"sde": node}}
    reference = {"name": "VP", "parameters": {"beta_min": "${config.task}", "_target_": target}}
    for description in (node, wrapped, reference, {"name": "VP", "parameters": node}, {"name": node, "parameters": {}}):
        file.write_bytes(sound)
        with_json(file, "components", lambda c, d=description: c | {"sde": d})
        refused(file, "sde")
    file.write_bytes(sound)
    with_json(file, "config", lambda c: dict.fromkeys(c, node))
    checkpoint.load(file, CPU)  # which is for people to read
    first = torch.load(SCHEMA1)
    stored = json.loads(first["config"])
    for place in components.PLACES:
        for value in (node, {"_target_": "sde.exploding", "sde": node}, stored[place] | {"more": node}):
            torch.save(first | {"config": json.dumps(stored | {place: value})}, file)
            refused(file, place)


def test_texts_stay_texts(file, sound, monkeypatch):
    monkeypatch.setenv("BETA", "3.0")
    with_json(file, "components", lambda c: json.dumps(c).replace('"sinusoidal"', '"${oc.env:BETA}"'))
    message = refused(file, "embedding")
    assert "${oc.env:BETA}" in message
    file.write_bytes(sound)
    with_json(file, "components", lambda c: json.dumps(c).replace("20.0", '"${oc.env:BETA}"'))
    refused(file, r"sde.beta_max: expected float, found '\$\{oc.env:BETA\}'")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of a person's own, with a process, and with things that came there from elsewhere."""
    text = """
    from os import system
    import os
    from sde import VP
    class Mine(VP): pass
    class Other: pass
    """
    (tmp_path / "module_of_mine.py").write_text("\n".join(line.strip() for line in text.splitlines()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(build, "_trusted", ())
    yield "module_of_mine"
    sys.modules.pop("module_of_mine", None)


def test_a_class_of_one_s_own_needs_one_s_word(file, own_module, marker):
    with_json(
        file, "components", lambda c: c | {"sde": {"name": f"{own_module}.Mine", "parameters": {"beta_max": 15.0}}}
    )
    refused(file, rf"'module_of_mine.Mine' is not of this project; if it is your own .* add plugins=\[{own_module}\]")
    assert own_module not in sys.modules  # was not imported to find out
    trust([own_module], [f"plugins=[{own_module}]"])
    model = checkpoint.load(file, CPU)[0]
    assert isinstance(model.sde, GaussianSDE) and model.sde.beta_max == 15.0 and type(model.sde).__name__ == "Mine"
    for name in ("system", "os.system", "VP", "Missing", "Other", "__loader__", "Mine.__init__", "os"):
        given = {"command": f"touch {marker}"} if "system" in name else {}
        with_json(
            file, "components", lambda c, n=name, g=given: c | {"sde": {"name": f"{own_module}.{n}", "parameters": g}}
        )
        refused(file, "sde: (module_of_mine.* defines no|expected a GaussianSDE)")


def deflated(name):
    """Of one small entry, so that the file is hardly shorter than what it unpacks to."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED if name.endswith("/version") else zipfile.ZIP_STORED
    return entry


def test_compressed_entries_are_refused(file, sound):
    """Else a file of kilobytes could unpack to gigabytes."""
    bomb = with_entries(
        sound, lambda name, entry: (name, bytes(10**7) if name.endswith("/0") else entry), zipfile.ZIP_DEFLATED
    )
    assert len(bomb) < 100_000
    for data in (bomb, with_entries(sound, lambda name, entry: (deflated(name), entry))):
        file.write_bytes(data)
        refused(file, "entries are compressed")


def test_sizes_beyond_the_file_and_doubled_names_are_refused(file, sound):
    data = unsealed(sound)
    entry = data.rindex(b"PK\x01\x02")
    file.write_bytes(sealed(data[: entry + 20] + struct.pack("<II", 2**31, 2**31) + data[entry + 28 :]))
    refused(file, "longer than the file itself")
    file.write_bytes(sealed(data.replace(b"archive/byteorder", b"archive/version\0\0")))
    refused(file, "two of its entries have one name")


def nested(opening, closing, depth):
    return b"\x80\x02" + opening * depth + closing * depth + b"."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "nested more than"),  # as the key of a dictionary
        (b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".", "nested more than"),
        (b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".", "nested more than"),
        (b"\x80\x02})" + b"".join(b"q\x01h\x01\x86" for _ in range(100)) + b"K\x01s.", "nested .* or endlessly"),
        (b"\x80\x02]" + b"N0" * 600 + b".", "more than 1,000 instructions"),
        (b"\x80\x02]q\x00h\x00a.", "lacks its schema"),  # a list that holds itself
        (b"\x80\x02" + b"\x8a\xff" + b"\x01" * 255 + b".", "lacks its schema"),
        (b"", "not a readable"),
        (b".", "not a readable"),
        (b"\x80\x02h\x05.", "not a readable"),
    ],
    ids=[
        "deep key",
        "deep tuple",
        "deep list",
        "doubling",
        "long",
        "itself",
        "large number",
        "empty",
        "only its end",
        "no memo",
    ],
)
def test_absurd_pickles_are_refused(file, sound, content, words, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_OPCODES", 1000 if "1,000" in words else 5_000_000)
    file.write_bytes(with_pickle(sound, content))
    refused(file, words)


def tensor_pickle(numel, size, stride, offset=0):
    """The content of a checkpoint whose one weight claims what it likes, with 16 bytes of storage behind it."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(numel) + b"tQ"
    )
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + hooks + b"tR"
    return b"\x80\x02}X\x05\x00\x00\x00model" + tensor + b"s."


def number(value):
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


@pytest.mark.parametrize(
    ("numel", "size", "stride", "offset"),
    [
        (4, (2**40,), (0,), 0),
        (4, (2**20, 2**20), (0, 0), 0),
        (4, (4,), (2**40,), 0),
        (4, (4,), (-1,), 0),
        (4, (-4,), (1,), 0),
        (4, (4,), (1,), 2**40),
        (2**40, (4,), (1,), 0),
        (2**40, (2**40,), (1,), 0),
        (5, (5,), (1,), 0),
        (-1, (4,), (1,), 0),
        (4, (2**62, 2**62), (1, 1), 0),
    ],
)
def test_tensors_that_claim_more_than_there_is_are_refused(file, sound, numel, size, stride, offset):
    data = with_entries(sound, lambda name, entry: (name, bytes(16) if name.endswith("/data/0") else entry))
    file.write_bytes(with_pickle(data, tensor_pickle(numel, size, stride, offset)))
    refused(file, "not a readable checkpoint")


def test_the_same_tensor_without_the_lie_is_read(file, sound):
    """Else the test above would say nothing."""
    data = with_entries(sound, lambda name, entry: (name, bytes(16) if name.endswith("/data/0") else entry))
    file.write_bytes(with_pickle(data, tensor_pickle(4, (2, 2), (2, 1))))
    refused(file, "lacks its schema")


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("net", {"width": 10**12}),
        ("net", {"width": 1 << 20}),
        ("net", {"depth": 10**9}),
        ("net", {"depth": 1 << 20}),
        ("net", {"embedding": 1 << 24}),
        ("net", {"classes": 1 << 24}),
        ("sde", {"t_min": 1e308}),
        ("sde", {"t_max": float("inf")}),
        ("sde", {"beta_max": float("nan")}),
    ],
)
def test_absurd_sizes_are_refused_at_once(file, place, change):
    def changed(found):
        found[place]["parameters"] |= change
        return found

    with_json(file, "components", changed)
    refused(file, "its model can't be built")


def test_numbers_that_no_size_can_be_are_refused_before_they_are_used():
    for place, name, key in (("sde", "LearnedSchedule", "hidden"), ("net", "MLP", "classes")):
        with pytest.raises(build.ConfigError, match=f"{place}.{key}: expected at most 16,777,216, found 1000000000"):
            components.construct({"name": name, "parameters": {key: 10**9}}, place)


def test_deep_json_is_refused(file, sound):
    for name in ("components", "config", "convention", "provenance"):
        for text in ("[" * 10**6, '{"a":' * 10**6, "[" * 900 + "]" * 900, '{"sde":' * 900 + "1" + "}" * 900):
            file.write_bytes(sound)
            with_json(file, name, lambda _, t=text: t)
            if text.endswith("}") and name in ("config", "provenance"):
                checkpoint.load(file, CPU)
            else:
                refused(file, "makes no sense|can't be built|not a table|no shape")


@pytest.mark.parametrize("claim", [0, 7, 10**8, 10**8 + 1, 2**40, 2**63 - 1, 2**64 - 1])
def test_headers_of_safetensors_that_claim_too_much_are_refused(tmp_path, claim):
    weights = exported(tmp_path)
    rewrite(weights, struct.pack("<Q", claim) + weights.read_bytes()[8:])
    refused(weights, "not readable weights")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{" * 100,
        b'{"a":' * 100_000,
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_headers_of_safetensors_that_make_no_sense_are_refused(tmp_path, header):
    weights = exported(tmp_path)
    rewrite(weights, struct.pack("<Q", len(header)) + header + bytes(4))
    refused(weights, "not readable weights|don't fit")


def rewrite(weights, data):
    """Other weights, under the digest that belongs to them."""
    weights.write_bytes(data)
    beside = weights.with_name("config.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))


def test_texts_of_a_file_do_not_act_on_a_terminal(file, tmp_path):
    with_json(file, "config", lambda c: c | {"seed": "\x1b[2J\nstep  99", "train": {"steps": "\x07"}})
    text = describe(file, checkpoint.read(file))
    assert "seed            ?[2J?step  99" in text and "\x1b" not in text and "\x07" not in text


def unsafe(tree):
    """The calls in a module that would run what a file says, by their names."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {(word.arg, ast.unparse(word.value)) for word in call.keywords}
        if name in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "instantiate"):
            yield name
        if name.endswith("add_safe_globals") or ("allow_pickle", "True") in given:
            yield name
        if name == "torch.load" and ("weights_only", "True") not in given:
            yield name


def test_no_module_runs_what_a_file_says():
    root, found = Path(__file__).parents[2], {}
    for room in ("sde", "models", "solvers", "experiments"):
        for module in sorted((root / room).rglob("*.py")):
            if names := list(unsafe(ast.parse(module.read_text()))):
                found[module.name] = names
    assert found == {"build.py": ["instantiate"]}  # of configurations that a person gives
    wrong = "eval(x); torch.load(f); torch.load(f, weights_only=False); np.load(f, allow_pickle=True); pickle.load(f)"
    assert len(list(unsafe(ast.parse(wrong)))) == 5


def mutations(folder, count, seed):
    """What a process of its own says of so many mutated checkpoints."""
    program = Path(__file__).parents[1] / "mutated_checkpoints.py"
    places = os.pathsep.join(map(str, (program.parents[1], program.parent)))
    command = [sys.executable, "-W", "ignore", program, folder, str(count), str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": places})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert sum(found["outcomes"].values()) == count and found["complaints"] == []
    assert found["longest"][0] < 2.0
    assert {"os.system", "open", "exec", "pickle.find_class"} <= set(found["noticed"])  # else silence says nothing
    return found["outcomes"]


def test_mutated_checkpoints_are_refused_and_do_nothing(tmp_path):
    outcomes = mutations(tmp_path, 200, 0)
    refused = sum(number for outcome, number in outcomes.items() if outcome.endswith("refused"))
    assert 120 < refused < 200  # the rest was harmed where it does not matter, behind a digest made anew


@pytest.mark.slow
def test_two_thousand_mutated_checkpoints_are_refused_and_do_nothing(tmp_path):
    outcomes = mutations(tmp_path, 2000, 1)
    kinds = {outcome.split()[0] for outcome in outcomes if outcome.endswith("refused")}
    assert len(kinds) == 13  # each kind of mutation
