"""Small checkpoints, and hostile ones: what ``torch.save`` would never write, with the seal of a sound file."""

import hashlib
import io
import json
import zipfile

import torch
from configurations import configuration

from experiments import checkpoint, export
from experiments.data import mixture2d
from experiments.problem import Problem, build_model

SMALL = ("net=mlp", "net.width=4", "net.depth=1", "net.embedding=4", "data=mixture2d", "parametrization=noise")
CPU = torch.device("cpu")


def save(file, *overrides, **more):
    """A checkpoint of random weights, with the state of an optimizer; returns its model."""
    config, convention = configuration(*SMALL, *overrides), Problem.of(mixture2d(10, 10, 10)).convention()
    model = build_model(config, convention)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 2), torch.tensor(0.3)).eps.square().sum().backward()
    optimizer.step()
    ema = {name: value + 0.01 for name, value in model.state_dict().items()}
    training = {
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "losses": [0.5, None],
        "at": (1, 2),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    about = checkpoint.about(config, convention)
    checkpoint.save(file, about, **({"step": 7, "training": training} | more), weights=model.state_dict(), ema=ema)
    return model


def exported(folder, *overrides):
    """The same, exported into a folder."""
    save(folder / "last.pt", *overrides)
    return export.write(folder, checkpoint.read(folder / "last.pt"))


def unsealed(data):
    """The archive as ``torch.save`` wrote it."""
    return data[:-73] + b"\0\0"


def sealed(data):
    """An archive with the digest of whatever it is, after the format's definition."""
    return data[:-2] + (71).to_bytes(2, "little") + b"sha256:" + hashlib.sha256(data).hexdigest().encode()


def packed(content):
    """Any content, sealed; nothing is checked."""
    file = io.BytesIO()
    torch.save(content, file)
    return sealed(file.getvalue())


def with_pickle(data, pickle):
    """A sealed archive with another pickle."""
    return with_entries(data, lambda name, entry: (name, pickle if name.endswith("data.pkl") else entry))


def with_entries(data, change, compression=zipfile.ZIP_STORED):
    """A sealed archive each of whose entries is changed by ``change(name, content) -> (name, content)``."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(unsealed(data))) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return sealed(file.getvalue())


def with_json(file, name, change):
    """Seal a checkpoint again whose JSON of ``name`` is ``change(parsed)``, or the text that it returns."""
    content = torch.load(file, weights_only=True)
    found = change(json.loads(content[name]))
    file.write_bytes(packed(content | {name: found if isinstance(found, str) else json.dumps(found)}))
