"""Exported weights: the averaged weights as safetensors, and beside them what they are the weights of.

``model.safetensors`` holds tensors and nothing else, and is read by any program; ``config.json`` holds the components
by closed names, the data's convention, the step, and the SHA-256 of the former. A training can't go on from these.
Needs the package ``safetensors``, of the extra ``export``.
"""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from experiments.archive import CheckpointError, require_plain
from experiments.build import ConfigError
from experiments.run import replacing

SUFFIX = ".safetensors"
WEIGHTS, DESCRIPTION = f"model{SUFFIX}", "config.json"
_TABLES = ("components", "convention", "provenance")
_LONGEST = 1 << 24  # bytes of a description


def _safetensors() -> ModuleType:
    """Imported when it is needed: no other task does."""
    try:
        import safetensors.torch
    except ImportError:
        cure = "pip install 'unified-score-sde[export]', or pip install safetensors"
        raise ConfigError(f"exported weights need the package safetensors, which is not installed: {cure}") from None
    return safetensors.torch


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write the averaged weights of what ``checkpoint.read`` gave, and their description, into an existing folder."""
    whole = torch.contiguous_format  # and copies, for safetensors refuses tensors that share their memory
    weights = {name: value.detach().cpu().clone(memory_format=whole) for name, value in content["ema"].items()}
    data = _safetensors().save(weights)
    description = {name: content[name] for name in ("schema", "step", *_TABLES)}
    description["sha256"] = hashlib.sha256(data).hexdigest()
    with replacing(folder / WEIGHTS) as file:
        file.write(data)
    with replacing(folder / DESCRIPTION) as file:
        file.write(f"{json.dumps(description, indent=2)}\n".encode())
    return folder / WEIGHTS


def read(file: Path) -> tuple[dict[str, Any], str]:
    """The content as that of a checkpoint with averaged weights only, and the digest of the weights.

    Raises ``CheckpointError`` for whatever can't be read, ``ConfigError`` without the package.
    """
    load = _safetensors().load
    try:
        description, data = _description(file), file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if description.get("sha256") != digest:
            raise CheckpointError(file, f"damaged: it doesn't have the SHA-256 digest that {DESCRIPTION} gives for it")
        weights = load(data)
        require_plain(weights)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(file, f"not readable weights ({type(error).__name__}: {error!s:.200})") from error
    texts = {name: json.dumps(description.get(name)) for name in _TABLES} | {"config": "{}"}
    return description | texts | {"model": None, "ema": weights, "training": None}, digest


def _description(file: Path) -> dict[str, Any]:
    """What lies beside the weights."""
    beside = file.with_name(DESCRIPTION)
    if not beside.is_file():
        raise CheckpointError(file, f"there is no {beside}, which says what these are the weights of", "export again")
    if beside.stat().st_size > _LONGEST:
        raise CheckpointError(beside, f"too long for a description, of more than {_LONGEST:,} bytes")
    try:
        found = json.loads(beside.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(beside, f"not readable JSON ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(beside, "not a table of names and values")
    return found
