"""The tasks on a checkpoint as a file: say what is in it, export its weights. They need no data and build no model."""

from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import archive, checkpoint, components, export
from experiments.run import Run

_SETTINGS = ("steps", "batch_size", "learning_rate", "warmup", "clip", "ema", "precision")
_WIDTH = 400  # characters of one line about something that a file says


def inspect(config: DictConfig, run: Run) -> None:
    """Print what is in a checkpoint."""
    file = checkpoint.find(config.checkpoint)
    text = describe(file, checkpoint.read(file))
    run.path("report.txt").write_text(f"{text}\n")
    print(f"\n{text}", flush=True)


def export_weights(config: DictConfig, run: Run) -> None:
    """Write a checkpoint's averaged weights as safetensors, with a description, into ``export/``."""
    file = checkpoint.find(config.checkpoint)
    content = checkpoint.read(file)
    weights = export.write(run.path("export", export.WEIGHTS).parent, content)
    run.note(export={"checkpoint": str(file), "weights": str(weights), "bytes": weights.stat().st_size})
    text = f"the averaged weights of {file} are in {weights.parent}; checkpoint={weights.parent} evaluates them"
    run.path("report.txt").write_text(f"{text}\n")
    print(f"\n{text}", flush=True)


def describe(file: Path, content: dict[str, Any]) -> str:
    """What ``checkpoint.read`` found in a file, as lines of text."""
    digest = f"SHA-256 {content['digest']} verified" if content["digest"] else "no digest"
    parts = content["components"]
    lines = {
        "file": file,
        "size": f"{file.stat().st_size:,} bytes, {digest}",
        "schema": content["written_in"],
        "step": content["step"],
        **{place: called(parts.get(place)) for place in components.PLACES},
        "label": parts.get("label"),
        "data": listed(content["convention"]),
        "weights": _weights(content["model"]),
        "average": _weights(content["ema"]),
        "resume": _training(content["training"]),
        **_settings(content["config"]),
        **_provenance(content["provenance"]),
    }
    return "\n".join(f"{name:<16}{_printable(value)}" for name, value in lines.items())


def called(description: Any) -> str:
    """A stored description as a call, ``VP(beta_min=0.1, beta_max=20.0)``; other values as they are."""
    if isinstance(description, list):
        return f"[{', '.join(called(child) for child in description)}]"
    if not isinstance(description, dict):
        return repr(description)
    parameters = description.get("parameters")
    given = parameters.items() if isinstance(parameters, dict) else ()
    return f"{description.get('name')}({', '.join(f'{name}={called(value)}' for name, value in given)})"


def listed(values: Any) -> str:
    """``name=value`` of each."""
    return ", ".join(f"{name}={value}" for name, value in values.items()) if isinstance(values, dict) else str(values)


def _weights(state: dict[str, Any] | None) -> str:
    if state is None:
        return "none"
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    numbers = sum(value.numel() for value in state.values())
    return f"{numbers:,} numbers in {len(state)} tensors ({listed(dict(kinds))})"


def _training(state: dict[str, Any] | None) -> str:
    if not state:
        return "not possible, only weights are here"
    return f"possible, from {', '.join(map(str, state))} ({archive.size(state):,} bytes of tensors)"


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """The settings of the training that matter most."""
    train, found = config.get("train"), {}
    if isinstance(train, dict):
        found["training"] = listed({name: train[name] for name in _SETTINGS if name in train})
    if isinstance(objective := config.get("objective"), dict):
        found["objective"] = listed(objective)
    return found | ({"seed": config["seed"]} if "seed" in config else {})


def _provenance(provenance: dict[str, Any]) -> dict[str, str]:
    return {name.removeprefix("git_"): listed(value) for name, value in provenance.items()}


def _printable(value: Any) -> str:
    """One line, without what would act on a terminal."""
    text = "".join(character if character.isprintable() else "?" for character in str(value))
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
