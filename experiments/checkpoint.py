"""Checkpoints: tensors and plain values in one file, written atomically, read without running anything in it."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.dequantization import Uniform
from experiments.problem import build_model
from experiments.run import replacing
from models import ScoreNetwork

SCHEMA = 1
_PARTS = {"schema", "config", "convention", "step", "model", "ema"}
_STORED = ("sde", "net", "parametrization")


class CheckpointError(ValueError):
    """A checkpoint that can't be used: says which file and why."""


def save(
    path: Path, model: ScoreNetwork, ema: dict[str, torch.Tensor], config: DictConfig, convention: dict, step: int
):
    """Write a checkpoint; a crash at any moment leaves either the old file or the new one."""
    stored = {name: OmegaConf.to_container(config[name], resolve=True) for name in _STORED}
    stored["label"] = config.label
    content = {
        "schema": SCHEMA,
        "config": json.dumps(stored),
        "convention": json.dumps(convention),
        "step": step,
        "model": model.state_dict(),
        "ema": ema,
    }
    with replacing(path) as file:
        torch.save(content, file)


def find(path: str | None) -> Path:
    """The checkpoint at ``path``, which may be a file or the folder of a run."""
    if not path:
        raise CheckpointError("this task needs a trained model: give checkpoint=FILE or checkpoint=RUN_FOLDER")
    place = Path(path).expanduser()
    file = place / "checkpoints" / "last.pt" if place.is_dir() else place
    if not file.is_file():
        raise CheckpointError(f"checkpoint={path}: there is no file {file}; give a .pt file or the folder of a run")
    return file


def load(path: str | None, device: torch.device) -> tuple[ScoreNetwork, dict[str, Any], int]:
    """The model with its averaged weights, the data convention it was trained under, and its training step."""
    file = find(path)
    content = _read(file)
    convention = json.loads(content["convention"])
    # Checkpoints that don't say so are of uniformly dequantized data.
    convention.setdefault("dequantization", Uniform.trained_on if convention["levels"] else None)
    model = build_model(json.loads(content["config"]), convention)
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError as error:
        raise CheckpointError(f"{file}: its weights don't fit its own configuration ({error})") from None
    return model.to(device).eval(), convention, content["step"]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated and foreign files raise a dozen types
        raise CheckpointError(
            f"{file}: not a readable checkpoint ({type(error).__name__}); train again or use another"
        ) from error
    missing = _PARTS - content.keys() if isinstance(content, dict) else _PARTS
    if missing:
        raise CheckpointError(f"{file}: not a checkpoint of this project; it lacks {', '.join(sorted(missing))}")
    if content["schema"] != SCHEMA:
        raise CheckpointError(f"{file}: has schema {content['schema']}, and this version reads {SCHEMA}")
    return content
