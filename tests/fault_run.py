"""``make fault-test``: a training that is killed at random moments and gone on with, against an undisturbed one.

Each process is the command line's own, killed by SIGKILL after a random time, and followed by the same command with
resume=auto. At the end every tensor of the checkpoint and every row of the metrics must be equal, to the last bit.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from experiments import checkpoint

COMMAND = (
    *("task=train", "net.channels=8", "net.attention=[false,false]", "net.dropout=0.1", "train.batch_size=32"),
    *("train.steps=3000", "train.log_every=5", "train.save_every=5", "train.warmup=50"),
)
TABLES = ("metrics.csv", "loss_by_log_snr.csv")
TIMES = ("seconds", "samples_per_second")


def start(folder: Path, *more: str) -> subprocess.Popen:
    """The training in ``folder``."""
    command = [sys.executable, "-m", "experiments", *COMMAND, f"hydra.run.dir={folder}", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps_done(folder: Path) -> int:
    """Steps of the last row; a killed process may leave half a row behind."""
    file = folder / TABLES[0]
    rows = file.read_text().splitlines()[1:] if file.is_file() else []
    return max((int(row.split(",")[0]) for row in rows if row.split(",")[0].isdigit()), default=0)


def finish(process: subprocess.Popen) -> None:
    """Wait for the end, which must be a good one."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}\n{err}")


def kill(folder: Path) -> str:
    """One process, killed while it starts, or up to 1.5 s after its first checkpoint; says what it was at."""
    last = folder / "checkpoints" / "last.pt"
    before, process = written(last), start(folder, "resume=auto")
    if random.random() < 0.25:
        time.sleep(random.uniform(0, 4))
    else:
        while process.poll() is None and written(last) == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
    if process.poll() is not None:
        raise SystemExit(f"the training ended before it was killed ({process.returncode}): {process.stderr.read()}")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if list(last.parent.glob("*.tmp")):
        return "saving"
    return "starting" if written(last) == before else "training"


def written(file: Path) -> int:
    """When a file was written, in nanoseconds; 0 for none."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def different(one, two, where: str = "") -> list[str]:
    """The names of all values that differ in any bit."""
    if isinstance(one, dict):
        names = sorted(one.keys() | two.keys())
        return [d for name in names for d in different(one.get(name), two.get(name), f"{where}.{name}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [d for i, pair in enumerate(zip(one, two, strict=True)) for d in different(*pair, f"{where}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    return [] if one == two or (one != one and two != two) else [where]


def result(folder: Path) -> dict:
    """What must be equal: all but times."""
    found = checkpoint.read(folder / "checkpoints" / "last.pt")
    found["training"]["progress"].pop("seconds")
    tables = {}
    for name in TABLES:
        with (folder / name).open(newline="") as file:
            tables[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return {name: found[name] for name in ("model", "ema", "training", "step")} | tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        whole, parts = Path(scratch, "whole"), Path(scratch, "parts")
        finish(start(whole))
        print(f"undisturbed: {steps_done(whole)} steps in {time.time() - began:.0f} s")
        at, lost = Counter(), []
        for i in range(options.kills):
            at[what := kill(parts)] += 1
            file = parts / "checkpoints" / "last.pt"
            saved = checkpoint.read(file)["step"] if file.is_file() else 0
            lost.append(steps_done(parts) - saved)
            row = steps_done(parts)
            print(f"kill {i + 1:2d} while {what:8s}: last row of step {row:4d}, checkpoint of {saved:4d}", flush=True)
        finish(start(parts, "resume=auto"))
        found = different(result(whole), result(parts))
    when = ", ".join(f"{n} while {what}" for what, n in at.items())
    print(f"{options.kills} kills ({when}) in {time.time() - began:.0f} s;")
    print(f"rows lost and made again: at most {max(lost)} steps' worth; values that differ: {len(found)}")
    if found:
        raise SystemExit("\n".join(found[:20]))


if __name__ == "__main__":
    main()
