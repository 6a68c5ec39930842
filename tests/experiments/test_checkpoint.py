"""What a checkpoint holds, that it comes back whole, and that any harm to the file is found."""

import json
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CPU, exported, packed, save, sealed, unsealed
from omegaconf import OmegaConf

from experiments import archive, checkpoint, components, export
from experiments.checkpoint import CheckpointError
from experiments.problem import build_model

CONF = Path(__file__).parents[2] / "conf"
SCHEMA1 = Path(__file__).parent / "checkpoints" / "schema1.pt"
X, T = torch.tensor([[0.3, -1.2], [1.0, 2.0]]), torch.tensor(0.3)


class OfAnotherKind(torch.Tensor):
    """Can't be read again without this class."""


def test_all_of_it_comes_back(tmp_path):
    file = tmp_path / "checkpoints" / "last.pt"
    model = save(file, "sde.beta_max=15.0", "label=time")
    content = checkpoint.read(file)
    assert {name: content[name] for name in ("schema", "written_in", "step")} == {
        "schema": 2,
        "written_in": 2,
        "step": 7,
    }
    assert content["config"]["sde"]["_target_"] == "sde.VP" and content["convention"]["shape"] == [2]
    assert content["components"]["sde"]["parameters"]["beta_max"] == 15.0 and content["components"]["label"] == "time"
    assert content["provenance"]["versions"]["torch"] == torch.__version__
    assert content["training"]["losses"] == [0.5, None] and content["training"]["at"] == (1, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(content["model"][name], value) and torch.equal(content["ema"][name], value + 0.01)
    again = torch.optim.Adam(model.parameters())
    again.load_state_dict(content["training"]["optimizer"])
    assert all(value["step"] == 1 for value in again.state.values())
    for path in (tmp_path, str(tmp_path), file):
        loaded, convention, step = checkpoint.load(path, CPU)
        assert step == 7 and convention == content["convention"] and not loaded.training
        model.load_state_dict(content["ema"])
        assert torch.equal(loaded(X, T).eps, model(X, T).eps) and str(loaded) == str(model)


def test_other_programs_read_the_file(file):
    content = torch.load(file, weights_only=True)
    assert content["schema"] == 2 and json.loads(content["components"])["sde"]["name"] == "VP"
    assert content["training"]["at"] == (1, 2) and zipfile.ZipFile(file).testzip() is None
    assert torch.load(file, weights_only=True, mmap=True)["step"] == 7


def test_the_seal_is_what_it_is_said_to_be(file):
    data = file.read_bytes()
    assert sealed(unsealed(data)) == data and checkpoint.read(file)["digest"].encode() == data[-64:]


def test_every_component_is_built_again():
    """Each of a place beside the first of the others, as conf/ has them."""
    for sde in ("vp", "subvp", "ve", "cosine", "edm", "rectified_flow", "learned"):
        assert_rebuilt((sde, "mlp", "noise"), {"shape": [2], "levels": None})
    for parametrization in ("v", "data", "score", "velocity", "edm", "learned_variance"):
        assert_rebuilt(("vp", "mlp", parametrization), {"shape": [2], "levels": None})
    for net in ("unet_tiny", "dit_tiny"):
        assert_rebuilt(("vp", net, "levels"), {"shape": [1, 8, 8], "levels": 17})


def assert_rebuilt(names, convention):
    groups = zip(components.PLACES, names, strict=True)
    config = OmegaConf.create({place: OmegaConf.load(CONF / place / f"{name}.yaml") for place, name in groups})
    config.label = "log_snr"
    train = torch.zeros(3, *convention["shape"], dtype=torch.long) if convention["levels"] else None
    model = build_model(config, convention, train)
    stored = json.loads(json.dumps(components.describe_model(config)))
    again = components.build_stored(stored, convention, model.state_dict())
    assert str(again) == str(model)
    again.load_state_dict(model.state_dict())


def test_processes_around_processes_are_stored_and_built_again():
    node = {"_target_": "sde.exploding", "sde": {"_target_": "sde.VP", "beta_max": 15.0}}
    description = components.describe(node, "sde")
    assert description == {
        "name": "exploding",
        "parameters": {"sde": {"name": "VP", "parameters": {"beta_max": 15.0}}},
    }
    assert components.construct(description, "sde").sde.beta_max == 15.0


def test_the_first_schema_is_read():
    """Made by the version that wrote it, with the output that it gave there."""
    model, convention, step = checkpoint.load(SCHEMA1, CPU)
    found = [[0.02801305241882801, 0.02801305241882801], [0.02853561006486416, 0.02853561006486416]]
    assert torch.allclose(model(X, T).eps, torch.tensor(found), rtol=1e-5)
    assert (step, convention["shape"], model.sde.beta_max) == (7, [2], 15.0)
    content = checkpoint.read(SCHEMA1)
    assert (content["written_in"], content["digest"], content["training"], content["provenance"]) == (1, None, None, {})
    assert content["components"] == {
        "sde": {"name": "VP", "parameters": {"beta_min": 0.1, "beta_max": 15.0, "t_min": 1e-05, "t_max": 1.0}},
        "net": {
            "name": "MLP",
            "parameters": {
                **{"width": 8, "depth": 1, "embedding": 8, "embedding_kind": "sinusoidal"},
                **{"classes": 0, "dropout": 0.0, "layer_norm": True},
            },
        },
        "parametrization": {"name": "row", "parameters": {"name": "noise"}},
        "label": "log_sigma",
    }


def test_harm_to_the_first_schema_is_found_by_its_check_sums(tmp_path):
    data = bytearray(SCHEMA1.read_bytes())
    data[data.index(b"PK\x03\x04", 5000) - 100] ^= 1  # within the weights
    (tmp_path / "old.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="check sum of its entry"):
        checkpoint.load(tmp_path / "old.pt", CPU)


@pytest.mark.parametrize("size", [0, 1, 10, "half", -30, -1])
def test_a_truncated_checkpoint_is_refused(file, size):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2 if size == "half" else size])
    with pytest.raises(CheckpointError, match=r"last\.pt: not a readable checkpoint: it is cut short") as caught:
        checkpoint.load(file, CPU)
    assert caught.value.path == file and "cut short" in caught.value.reason


def test_every_flipped_byte_is_found_before_anything_is_parsed(file, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed a harmed file"))
    data = file.read_bytes()
    places = [*range(0, len(data), len(data) // 150), *range(len(data) - 100, len(data))]
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"SHA-256|cut short, damaged"):
            checkpoint.read(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="cut short, damaged"):
        checkpoint.read(file)


def test_foreign_and_missing_files_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "folder").mkdir()
    words = {"foreign.pt": "lacks its schema", "list.pt": "lacks its schema", "text.pt": "not a readable"}
    for path, expected in words.items() | {("none.pt", "there is no file"), ("folder", "last.pt, nor .*safetensors")}:
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.load(tmp_path / path, CPU)
    with pytest.raises(CheckpointError, match="needs a trained model; give checkpoint="):
        checkpoint.load(None, CPU)


def test_a_newer_schema_is_refused(file):
    file.write_bytes(packed(torch.load(file) | {"schema": 3}))
    with pytest.raises(CheckpointError, match=r"in schema 3; this one reads up to 2; update this program"):
        checkpoint.read(file)


def test_the_second_schema_without_a_digest_is_refused(file):
    file.write_bytes(unsealed(file.read_bytes()))
    with pytest.raises(CheckpointError, match="lacks the digest"):
        checkpoint.read(file)


CONVENTION = {"name": "mixture2d", "shape": [2], "levels": None}
WRONG = {
    "schema": ["2", 2.0, True, 0, -1, None],
    "components": [None, 1, "", "{", "[1]", "null", "NaN", "[" * 100_000, '{"sde": 1}'],
    "config": [None, "[]", {"a": 1}],
    "convention": [
        json.dumps(CONVENTION | change)
        for change in (
            *({"shape": shape} for shape in (None, 2, [], ["2"], [0], [-2], [2.0], [True], [2**40], [2**20, 2**20])),
            *({"levels": levels} for levels in ("17", 0, -1, 1.5, True, 2**40)),
        )
    ],
    "provenance": [7, "x"],
    "step": [-1, 1.0, "1", None, True, torch.tensor(1)],
    "model": [{"a": 1}, [torch.zeros(1)], 3, {1: torch.zeros(1)}],
    "ema": [None, {}, {"a": 1}, 3],
    "training": [[1], 3, "x", torch.zeros(1)],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_type_at_any_key_is_refused(file, name):
    content = torch.load(file)
    for value in WRONG[name]:
        file.write_bytes(packed(content | {name: value}))
        with pytest.raises(CheckpointError, match=rf"last\.pt: .*{name}|not a checkpoint|makes no sense|don't fit"):
            checkpoint.load(file, CPU)
    file.write_bytes(packed({key: value for key, value in content.items() if key != name}))
    if name == "training":
        assert checkpoint.read(file)["training"] is None
    else:
        with pytest.raises(CheckpointError, match=f"lacks (its )?{name}|its {name} "):
            checkpoint.load(file, CPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.popitem(), "1 missing, such as net."),
        (lambda w: w.update(more=torch.zeros(1)), "1 unknown, such as more"),
        (lambda w: w.update({next(iter(w)): torch.zeros(3, 1, 1)}), "1 of another shape or kind"),
        (lambda w: w.update({n: v.long() for n, v in w.items()}), "of another shape or kind, such as"),
        (lambda w: w.update({n: v.to(torch.complex64) for n, v in w.items()}), "of another shape or kind, such as"),
    ],
)
def test_weights_that_do_not_fit_are_named(file, change, words):
    content = torch.load(file)
    change(content["ema"])
    file.write_bytes(packed(content))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(file, CPU)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "PosixPath"),
        (defaultdict(int), "collections.defaultdict"),
        ({1, 2}, "is a set"),
        (b"x", "is a bytes"),
        (torch.zeros(1).expand(9), "number in memory"),
        (torch.zeros(2, 2).to_sparse(), "number in memory"),
        ({(1, 2): 3}, "neither a string nor an integer"),
        (torch.Generator(), "torch._C.Generator"),
        (torch.zeros(2).as_subclass(OfAnotherKind), "OfAnotherKind"),  # as a DTensor is
    ],
)
def test_a_training_that_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path, value, words):
    for training in ({"a": value}, {"a": [{"b": (1, value)}]}):
        with pytest.raises(TypeError, match=rf"checkpoint\['training'\]\['a'\].*{words}"):
            save(tmp_path / "last.pt", training=training)
    assert not list(tmp_path.iterdir())


def test_long_lists_and_deep_ones_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_DEEPEST", 40)
    deep = [1]
    for _ in range(30):
        deep = [deep]
    save(tmp_path / "last.pt", training={"losses": [0.5] * 50_000, "deep": deep, "same": [deep, deep]})
    found = checkpoint.read(tmp_path / "last.pt")["training"]
    assert found["losses"] == [0.5] * 50_000 and found["deep"] == deep and found["same"] == [deep, deep]


def test_lists_that_are_too_long_to_be_read_again_are_refused_when_they_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_LEAVES", 1000)
    with pytest.raises(TypeError, match=r"\['losses'\].*can hold 1,000 values; store long lists as tensors"):
        save(tmp_path / "last.pt", training={"losses": [0.5] * 1001})


def test_components_that_could_not_be_built_again_are_refused_when_they_are_saved():
    for node, words in [
        ({"_target_": "sde.vp.LinearBeta"}, "a checkpoint can hold .*VP"),
        ({"_target_": "models.MLP"}, "a checkpoint can hold .*VP"),
        ({"_target_": "sde.VP", "_partial_": True}, "sde._partial_: a checkpoint can't hold it"),
        ({"beta_min": 1.0}, "found None"),
    ]:
        with pytest.raises(ValueError, match=words):
            components.describe(node, "sde")
    assert components.describe({"_target_": "sde.vp.VP"}, "sde")["name"] == "VP"


def test_the_environment_stays_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = {
        "key": "${oc.env:SECRET}",
        "again": "${key}",
        "within": "a ${again} b",
        "decoded": '${oc.decode:"${oc.env:SECRET}"}',
        "spaced": "${ oc.env : SECRET, 'x\"y' }",
        "escaped": "\\\\${oc.env:SECRET}",
        "number": 3,
        "plain": "${number}",
    }
    found = checkpoint.resolved(OmegaConf.create(text))
    assert "hunter2" not in json.dumps(found)
    assert found["within"] == "a ${oc.env:SECRET} b" and found["again"] == found["key"] == text["key"]
    assert found["spaced"] == text["spaced"] and found["plain"] == 3 and found["decoded"] == text["decoded"]
    assert checkpoint.resolved(OmegaConf.create({"a": "${b}"})) == {"a": "${b}"}  # leads nowhere
    save(tmp_path / "last.pt", "checkpoint=${oc.env:SECRET}")
    assert b"hunter2" not in (tmp_path / "last.pt").read_bytes()
    assert checkpoint.read(tmp_path / "last.pt")["config"]["checkpoint"] == "${oc.env:SECRET}"


def test_exported_weights_are_the_same_to_the_bit(tmp_path):
    weights = exported(tmp_path)
    one, convention, step = checkpoint.load(tmp_path / "last.pt", CPU)
    for path in (weights, tmp_path):
        two = checkpoint.load(path, CPU)
        assert two[1:] == (convention, step) and str(two[0]) == str(one)
        for name, value in one.state_dict().items():
            assert torch.equal(value, two[0].state_dict()[name]), name
    content = checkpoint.read(weights)
    assert content["model"] is None and content["training"] is None and content["digest"]
    description = json.loads((tmp_path / "config.json").read_text())
    assert {"components", "convention", "step", "schema", "sha256"} <= description.keys()


def test_weights_of_any_layout_can_be_exported(tmp_path):
    """safetensors knows neither strides nor tensors that share their memory."""
    tied = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    content = checkpoint.read(SCHEMA1) | {"ema": {"a": tied, "b": tied, "c": tied[0].mT}}
    found = checkpoint.read(export.write(tmp_path, content))["ema"]
    assert all(torch.equal(found[name], value) for name, value in content["ema"].items()) and len(found) == 3


def test_harm_to_exported_weights_is_found(tmp_path):
    weights = exported(tmp_path)
    data, description = weights.read_bytes(), tmp_path / "config.json"
    text = description.read_text()
    for place in range(0, len(data), len(data) // 40):
        weights.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="SHA-256"):
            checkpoint.load(weights, CPU)
    weights.write_bytes(data)
    for wrong in ("", "{", "[]", "[" * 100_000, "{}", text.replace('"VP"', '"VE"'), " " * ((1 << 24) + 1)):
        description.write_text(wrong)
        with pytest.raises(CheckpointError):
            checkpoint.load(weights, CPU)
    description.write_text(text, "utf-32")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        checkpoint.load(weights, CPU)
    description.unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*config\.json"):
        checkpoint.load(weights, CPU)


def test_without_the_package_its_name_is_given(tmp_path, monkeypatch):
    weights = exported(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install 'unified-score-sde\[export\]'"):
        checkpoint.load(weights, CPU)
    assert export.WEIGHTS == "model.safetensors" and archive.CheckpointError is CheckpointError
