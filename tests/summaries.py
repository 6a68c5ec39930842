"""Stored runs as they lie on a disk, made in no time: what status.json, summary.json and the configuration say."""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

SDES = {
    "vp": {"_target_": "sde.VP", "beta_min": 0.1, "beta_max": 20.0},
    "ve": {"_target_": "sde.VE", "sigma_min": 0.01, "sigma_max": 50.0},
}
SAMPLERS = {"ddim": 1.0, "heun": 1.4, "euler_maruyama": 2.2}


def comparison(shift: float = 0.0, budgets=(10, 20, 50), samples: int = 300, samplers=None, **settings: Any) -> dict:
    """A comparison of the first samplers of ``SAMPLERS``; ``shift`` is added to every sliced W2."""
    rows = []
    for name, factor in (samplers or SAMPLERS).items():
        for budget in budgets:
            w2 = 0.05 + factor / budget + shift
            metrics = {
                "sliced_w2": {"value": w2, "stderr": 0.004},
                "coverage": {"value": 0.9 - factor / budget, "stderr": 0.01},
                "bias": {"value": (-1) ** budget * factor / budget - 0.02, "stderr": None},
            }
            rows.append(
                {"sampler": name, "solver": f"{name.upper()}(steps={budget}, grid=log_snr)", "budget": budget}
                | {"steps": budget, "final": "mean", "nfe": budget, "backward": 0, "seconds": budget * 0.01 * factor}
                | {"peak_memory_bytes": 1 << 22, "metrics": metrics}
            )
    about = {"samples": samples, "seeds": 3, "batch_size": None, "reference": f"digits, test split, {samples} examples"}
    about |= {"model": "averaged weights (EMA 0.999) of step 1600", "sde": "VP(beta_min=0.1)", "features": None}
    metrics = {
        "sliced_w2": {"title": "sliced W2", "best": "low", "floor": {"mean": 0.05, "std": 0.004}},
        "coverage": {"title": "coverage", "best": "high", "floor": None},
        "bias": {"title": "bias", "best": "zero", "floor": None},
    }
    front = [i for i, row in enumerate(rows) if row["sampler"] == "ddim"]
    return {
        "settings": about | settings,
        "metrics": metrics,
        "rows": rows,
        "pareto": {"nfe": front, "seconds": front},
        "recommendation": "ddim with 50 steps: nothing cheaper is within its standard error",
        "chosen": "ddim",
    }


def likelihood(value: float, stderr: float = 0.02, n: int = 100, split: str = "test", unit: str = "bits/dim") -> dict:
    """What a run notes of its likelihood."""
    protocol = {"dequantization": "uniform", "draws": 1, "ode": "one_pass, 100 steps", "seed": 0}
    found = {"unit": unit, "value": value, "stderr": stderr, "n": n, "nfe": 100.0, "dimensions": 64}
    return found | {"split": split, "protocol": protocol, "prior": -3.0}


def training(loss: float) -> dict:
    """What a run notes of its training."""
    best = {"step": 1600, "validation_loss": loss + 0.1}
    return {"parameters": 175106, "steps": 1600, "seconds": 3.5, "loss": loss, "best": best}


def stored(
    folder: Path,
    sde: str = "vp",
    seed: int = 0,
    state: str = "done",
    error: str | None = None,
    task: str = "all",
    config: dict | None = None,
    picture: bool = False,
    **summary: Any,
) -> Path:
    """A run in a folder. config: top-level parts of the configuration. summary: of the run."""
    tree = {"task": {"_target_": f"experiments.tasks.{task}"}, "sde": SDES[sde], "seed": seed, "device": "auto"}
    tree |= {"data": {"_target_": "experiments.data.digits"}, "checkpoint": "${oc.env:NOWHERE}"} | (config or {})
    status = {"task": task, "state": state, "pid": 1 << 22, "host": "elsewhere", "seconds": 12.5}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    (folder / "status.json").write_text(json.dumps(status | ({"error": error} if error else {})))
    data = {"name": "digits", "shape": [1, 8, 8]}
    (folder / "summary.json").write_text(json.dumps({"seed": seed, "device": "cpu", "data": data} | summary))
    if picture:
        png(folder / "figures" / "samples.png")
    return folder


def png(path: Path, size: int = 96) -> Path:
    """A small picture, with a pattern to be seen."""
    rows = (b"\0" + bytes(int(127 + 120 * math.sin(x / 7) * math.cos(y / 5)) for x in range(size)) for y in range(size))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = zlib.compress(b"".join(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path
