"""Small networks that learn the classes of the data, each in a file of its own: read where it is the same one.

The file holds the weights and what they are of: the recipe, and the data with all examples and labels of the training
split. A network of anything else is refused, and never trained over a file.
"""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from experiments import archive
from experiments.archive import CheckpointError
from experiments.build import ConfigError
from experiments.problem import Problem


def described(problem: Problem) -> dict[str, Any]:
    """What of the data decides a network that learns their classes, as plain values."""
    data, digest = problem.data, hashlib.sha256()
    for values in (data.train, data.labels["train"]):
        digest.update(values.contiguous().numpy().tobytes())
    return {"data": data.name, "dequantization": problem.trained_on, "examples": digest.hexdigest()}


def place(path: str | Path | None) -> Path | None:
    """The file at ``path``, None for none. Raises ``ConfigError`` where its folder is missing."""
    file = Path(path).expanduser() if path else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"path={path}: there is no folder {file.parent}; make it")
    return file


def keep(file: Path, network: nn.Module, about: dict[str, Any]) -> None:
    """Write the weights of a network, and what it is of."""
    archive.write(file, {"about": about, "weights": network.state_dict()})


def restore(file: Path, network: nn.Module, about: dict[str, Any], name: str, setting: str) -> None:
    """Load the weights of a file into ``network``. Raises ``CheckpointError`` for those of anything but ``about``.

    name, setting: what the network and the path of its file are called.
    """
    content, _ = archive.read(file)
    found = content.get("about") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(file, f"not {name}", f"give another {setting}")
    other = [
        f"{key} {found.get(key)!r} instead of {value!r}" for key, value in about.items() if found.get(key) != value
    ]
    if other:
        reason = f"it belongs to other data or another recipe: {', '.join(other)}"
        raise CheckpointError(file, reason, f"give another {setting}, and it is trained anew")
    try:
        network.load_state_dict(content["weights"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(file, f"its weights don't fit ({error})") from error
