"""Checkpoints: one file with all that a model is, and all that its training needs to go on.

A checkpoint of schema 2 is a sealed archive (``experiments.archive``) of

    schema       2
    components   JSON: the model's parts by closed names (``experiments.components``), and its label
    config       JSON: the whole configuration of the training, to be read by people and never built
    convention   JSON: how data become x
    provenance   JSON: versions, platform, commit
    step         the training step
    model, ema   state dicts: the weights as they were trained, and their average
    training     whatever else a resumed training needs, or None

Schema 1, without a digest and with ``_target_`` in place of names, is read as well. Weights that were exported
(``experiments.export``) can stand wherever a checkpoint is only evaluated.
"""

import json
import math
import re
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from experiments import archive, components, export, run
from experiments.archive import CheckpointError
from experiments.dequantization import Uniform
from models import ScoreNetwork

__all__ = ["SCHEMA", "CheckpointError", "about", "built", "find", "load", "read", "save"]
SCHEMA = 2
_JSON = ("components", "config", "convention", "provenance")
_PARTS = ("schema", *_JSON, "step", "model", "ema", "training")
_INSIDE = (("checkpoints", "last.pt"), (export.WEIGHTS,), ("export", export.WEIGHTS))
_LARGEST_SIZE, _MOST_VALUES = 1 << 24, 1 << 28  # of one sample
_ENVIRONMENT = re.compile(r"oc\s*\.\s*(env|decode)")


def about(config: DictConfig, convention: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint says of its model besides weights, as JSON: once for all checkpoints of a training.

    Raises ``ConfigError`` for components that can't be stored.
    """
    return {
        "components": json.dumps(components.describe_model(config)),
        "config": json.dumps(resolved(config), default=str),
        "convention": json.dumps(convention),
        "provenance": json.dumps(run.provenance()),
    }


def save(
    path: Path,
    about: dict[str, str],
    step: int,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; a crash at any moment leaves either the old file or the new one.

    weights, ema: state dicts. training: dicts, lists and tuples of tensors and plain values. Raises ``TypeError`` for
    anything else in it, ``OSError`` where the disk is full.
    """
    content = {"schema": SCHEMA, **about, "step": step, "model": weights, "ema": ema, "training": training}
    archive.write(path, content)


def resolved(config: DictConfig) -> dict[str, Any]:
    """A configuration without interpolations, but those that read the environment, which stay as they are written."""
    hidden: dict[str, str] = {}

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hide(child) for name, child in value.items()}
        if isinstance(value, list):
            return [hide(child) for child in value]
        found = isinstance(value, str) and _ENVIRONMENT.search(value)
        return hidden.setdefault(value, f"@unresolved-{len(hidden)}@") if found else value

    raw = OmegaConf.to_container(config)
    try:
        text = json.dumps(OmegaConf.to_container(OmegaConf.create(hide(raw)), resolve=True), default=str)
    except OmegaConfBaseException:  # an interpolation that leads nowhere, in a part that this run has no use for
        return raw
    for original, mark in hidden.items():
        text = text.replace(mark, json.dumps(original)[1:-1])
    return json.loads(text)


def find(path: str | Path | None) -> Path:
    """The checkpoint at ``path``: a file, the folder of a run, or a folder with exported weights."""
    if not path:
        reason = "this task needs a trained model"
        raise CheckpointError(None, reason, "give checkpoint=FILE or checkpoint=RUN_FOLDER")
    place = Path(path).expanduser()
    inside = [place.joinpath(*parts) for parts in _INSIDE] if place.is_dir() else [place]
    for file in inside:
        if file.is_file():
            return file
    reason = f"there is no file {', nor '.join(map(str, inside))}"
    raise CheckpointError(f"checkpoint={path}", reason, "give a .pt file, the folder of a run, or exported weights")


def read(file: Path) -> dict[str, Any]:
    """The whole content of a checkpoint, verified and brought to schema 2, with its JSON as plain values.

    "training" is None where a training can't be resumed, "model" where there are averaged weights only; "written_in" is
    the schema that was found, "digest" the file's, None in schema 1. Nothing that the file names is imported, called or
    built. Raises ``CheckpointError``.
    """
    content, digest = export.read(file) if file.suffix == export.SUFFIX else archive.read(file)
    try:
        return _checked(content, digest) | {"digest": digest}
    except CheckpointError as error:
        raise CheckpointError(file, error.reason, error.cure) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(file, f"its content makes no sense ({type(error).__name__}: {error})") from error


def load(path: str | Path | None, device: torch.device) -> tuple[ScoreNetwork, dict[str, Any], int]:
    """The model with its averaged weights, the data convention it was trained under, and its training step."""
    file = find(path)
    return built(file, read(file), device)


def built(file: Path, content: dict[str, Any], device: torch.device) -> tuple[ScoreNetwork, dict[str, Any], int]:
    """The same of what ``read`` found in a file. Raises ``CheckpointError``."""
    weights, convention = content["ema"], content["convention"]
    try:
        model = components.build_stored(content["components"], convention, weights)
    except Exception as error:  # parameters that make no sense raise whatever the constructors do
        raise CheckpointError(file, f"its model can't be built ({error})") from error
    if odd := _misfits(model.state_dict(), weights):
        raise CheckpointError(file, f"its weights don't fit its own components: {odd}")
    model.load_state_dict(weights)
    return model.to(device).eval(), convention, content["step"]


def _checked(content: Any, digest: str | None) -> dict[str, Any]:
    """The content with its JSON parsed and every type as it should be."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema < 1:
        raise CheckpointError(None, "not a checkpoint of this project; it lacks its schema")
    if schema > SCHEMA:
        reason = f"a newer version of this program wrote it, in schema {schema}; this one reads up to {SCHEMA}"
        raise CheckpointError(None, reason, "update this program")
    if schema == 1:
        return _checked_parts(_migrated(content))
    if digest is None:
        raise CheckpointError(None, "it lacks the digest that every file of its schema has")
    return _checked_parts(_parsed(content, _JSON))


def _parsed(content: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """With the JSON of ``names`` parsed."""
    found = dict(content)
    for name in names:
        if not isinstance(content.get(name), str):
            raise CheckpointError(None, f"not a checkpoint of this project; it lacks {name}")
        found[name] = json.loads(content[name])
        if not isinstance(found[name], dict):
            raise CheckpointError(None, f"its {name} is not a table of names and values")
    return found


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 as schema 2."""
    found = _parsed(content, ("config", "convention"))
    missing = [place for place in components.PLACES if place not in found["config"]]
    if missing:
        raise CheckpointError(None, f"not a checkpoint of this project; it lacks {', '.join(missing)}")
    found["components"] = components.migrate(found["config"])
    return found | {"provenance": {}, "training": None}


def _checked_parts(content: dict[str, Any]) -> dict[str, Any]:
    for name in ("model", "ema"):
        _require_weights(name, content.get(name, ()), optional=name == "model")
    step = content.get("step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise CheckpointError(None, f"its step must be a count, found {archive.shown(step)}")
    if not isinstance(content.get("training"), (dict, NoneType)):
        raise CheckpointError(None, "its training is not a table of names and values")
    _complete(content["convention"])
    return {name: content.get(name) for name in _PARTS} | {"schema": SCHEMA, "written_in": content["schema"]}


def _require_weights(name: str, weights: Any, optional: bool) -> None:
    if weights is None and optional:
        return
    sound = isinstance(weights, dict) and all(
        type(key) is str and isinstance(value, Tensor) for key, value in weights.items()
    )
    if not sound:
        raise CheckpointError(None, f"not a checkpoint of this project; its {name} is not a table of named tensors")


def _complete(convention: dict[str, Any]) -> None:
    """Refuse a convention that makes no sense, and fill in what earlier ones don't say."""
    shape, levels = convention.get("shape"), convention.get("levels")
    fits = isinstance(shape, list) and all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in shape)
    if not fits or not shape or math.prod(shape) > _MOST_VALUES:
        raise CheckpointError(None, f"its convention has no shape of a sample, found {archive.shown(shape)}")
    if levels is not None and (type(levels) is not int or not 0 < levels <= _LARGEST_SIZE):
        raise CheckpointError(None, f"its convention's levels must be a count or none, found {archive.shown(levels)}")
    if "observation" in convention:
        _require_observation(convention["observation"])
    # Checkpoints that don't say so are of uniformly dequantized data.
    convention.setdefault("dequantization", Uniform.trained_on if convention["levels"] else None)


def _require_observation(about: Any) -> None:
    """Refuse what says of observations anything but their operator in words, their noise, shape and response."""
    kinds = {"operator": dict, "noise_std": float, "shape": list, "response": list}
    known = isinstance(about, dict) and about.keys() == kinds.keys()
    known = known and all(type(about[name]) is kind for name, kind in kinds.items())
    shape, numbers = (about["shape"], (about["noise_std"], *about["response"])) if known else ([], ())
    fits = all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in shape) and math.prod(shape) <= _MOST_VALUES
    if not shape or not fits or not all(type(number) is float and math.isfinite(number) for number in numbers):
        raise CheckpointError(None, f"its convention's observation makes no sense, found {archive.shown(about)}")


def _misfits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """What is wrong with weights, by a few of their names; empty if nothing is."""
    shared = expected.keys() & found.keys()
    other = [name for name in expected if name in shared and _kind(expected[name]) != _kind(found[name])]
    wrong = {
        "missing": [name for name in expected if name not in shared],
        "unknown": [name for name in found if name not in shared],
        "of another shape or kind": other,
    }
    return "; ".join(f"{len(names)} {what}, such as {', '.join(names[:3])}" for what, names in wrong.items() if names)


def _kind(value: Tensor) -> tuple:
    return value.shape, value.is_floating_point(), value.is_complex()
