"""Processes that save checkpoints one after the other until they are killed, and what they leave.

    python tests/killed_while_saving.py FOLDER TIMES SEED [plain]

prints one JSON object: how many of the files that were left could be read, how many temporary files lay beside them,
and the steps they were of. With "plain" the files are written where they belong, for comparison.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from checkpoints import save

from experiments import archive, checkpoint


def saving(file):
    """Without an end; the files are of some megabytes, so that a kill falls into the writing of one."""
    for step in range(1_000_000):
        save(file, "net.width=256", "net.depth=2", step=step)


def killed(file, seconds):
    """Kill such a process that long after its first file; the file's step, None where it can't be read."""
    child = os.fork()
    if child == 0:
        saving(file)
    while not file.is_file():
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return checkpoint.read(file)["step"]
    except checkpoint.CheckpointError:
        return None


def main(folder, times, seed, plain):
    """All of it."""
    if plain:
        archive.replacing = lambda path: path.open("wb")
    rng = random.Random(seed)
    save(folder / "warm.pt", "net.width=256", "net.depth=2")
    steps = [killed(folder / str(i) / "last.pt", rng.uniform(0.1, 0.4)) for i in range(times)]
    rests = len(list(folder.glob("*/*.tmp")))
    again = [save(file, "net.width=256", "net.depth=2", step=1) for file in folder.glob("*/last.pt")]
    left = len(list(folder.glob("*/*.tmp")))
    read = sum(step is not None for step in steps)
    print(json.dumps({"steps": steps, "read": read, "rests": rests, "again": len(again), "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "plain" in sys.argv)
