"""Mutated checkpoints, each loaded in this process under an audit of what Python does meanwhile.

    python tests/mutated_checkpoints.py FOLDER COUNT SEED

prints one JSON object: how many were refused and how many loaded, the longest time in seconds, and a list of
complaints, which must be empty: an exception other than ``CheckpointError``, or an event that reading data has no need
for; and what the audit noticed of forbidden things done at the end, so that its silence says something.
A mutation harms either the file, which the digest finds, or what lies behind a digest that was made for it anew.
"""

import codecs
import hashlib
import io
import json
import os
import pickle
import random
import sys
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import torch
from checkpoints import exported, packed, save, sealed, unsealed, with_entries, with_pickle

from experiments import checkpoint, export

FORBIDDEN = (
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "ctypes.dlopen")
ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    "x",
    "os.system",
    "${oc.env:HOME}",
    [],
    {},
    [[]],
    {"name": "VP"},
    "1" * 99,
)
_seen: list[str] | None = None


def audit(event, arguments):
    """Note what the reading of data must not do."""
    if _seen is None:
        return
    writes = event == "open" and (set(str(arguments[1])) & set("wax+") or (arguments[2] or 0) & 3)
    if event.startswith((*FORBIDDEN, *CHANGES, "pickle.", "import")) or writes:
        _seen.append(f"{event} {arguments!r:.150}")


def flipped(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def several(data, rng):
    for _ in range(rng.randint(2, 20)):
        data = flipped(data, rng)
    return data


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def spliced(data, rng):
    """A range of the file somewhere else in it, over what was there or before it."""
    start, to, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 300)
    return data[:to] + data[start : start + length] + data[to + length * rng.randint(0, 1) :]


def zeroed(data, rng):
    start, length = rng.randrange(len(data)), rng.randint(1, 300)
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


HARM = (flipped, several, truncated, spliced, zeroed)


def swapped(data, rng):
    """The content of two entries, one for the other."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        one, two = rng.sample(archive.namelist(), 2)
    return with_entries(data, lambda name, content: ({one: two, two: one}.get(name, name), content))


def tail(data, rng):
    """Harm to the directory of the archive, behind a new digest."""
    whole = unsealed(data)
    start = whole.rindex(b"PK\x05\x06") - 600
    return sealed(whole[:start] + rng.choice(HARM)(whole[start:], rng))


def anywhere(data, rng):
    return sealed(rng.choice(HARM)(unsealed(data), rng))


def pickled(data, rng):
    """Harm to the pickle, in an archive that is in order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return with_pickle(data, rng.choice(HARM)(pickle, rng))


def worded(data, rng):
    """Harm to one of the texts, or an odd value somewhere in it, in a file that is in order."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(("components", "components", "convention", "config", "provenance"))
    text = content[name]
    if rng.random() < 0.3:
        text = rng.choice(HARM)(text.encode(), rng).decode("latin1")
    else:
        text = json.dumps(odd(json.loads(text), rng))
    return packed(content | {name: text})


def odd(value, rng):
    """With one value within replaced by an odd one, or one key by another."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if isinstance(value, dict) and rng.random() < 0.1:
        value[rng.choice(("name", "parameters", "_target_", "x"))] = value.pop(key)
    else:
        value[key] = odd(value[key], rng)
    return value


def valued(data, rng):
    """One value of the content odd, or a tensor of an odd kind."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(list(content))
    state = content[name]
    if isinstance(state, dict) and rng.random() < 0.9:
        key = rng.choice(list(state))
        tensors = (torch.zeros(1).expand(2**40), torch.zeros(3), torch.zeros(2, 2).to_sparse(), torch.zeros(2).long())
        state[key] = rng.choice((*ODD, *tensors))
    else:
        content[name] = rng.choice(ODD)
    return packed(content)


RESEALED = (swapped, tail, anywhere, pickled, worded, valued)


def cases(folder, count, seed):
    """Each mutated file's kind, and the path to load, after it is written."""
    torch.manual_seed(0)
    save(folder / "sound.pt")
    sound, weights = (folder / "sound.pt").read_bytes(), exported(folder / "exported")
    data, description = weights.read_bytes(), weights.with_name("config.json")
    text = description.read_bytes()
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        kind = rng.choice((*HARM, *2 * RESEALED, "weights", "weights", "description", "description"))
        if kind in (*HARM, *RESEALED):
            (folder / "case.pt").write_bytes(kind(sound, rng))
            yield kind.__name__, folder / "case.pt", (folder / "case.pt").read_bytes() == sound
            continue
        harmed = rng.choice(HARM)(data, rng) if kind == "weights" else data
        there = json.loads(text) if rng.random() < 0.9 else odd(json.loads(text), rng)
        if isinstance(there, dict) and rng.random() < 0.9:
            there["sha256"] = hashlib.sha256(harmed).hexdigest()
        harmless = kind == "weights" or rng.random() < 0.3
        told = json.dumps(there if harmless else odd(there, rng)).encode()
        weights.write_bytes(harmed)
        description.write_bytes(told if kind == "weights" or rng.random() < 0.5 else rng.choice(HARM)(told, rng))
        yield kind, weights, False


def attempt(path):
    """Load a file; what came of it, the seconds it took, and what it should not have done."""
    global _seen
    _seen, modules, started = [], set(sys.modules), time.perf_counter()
    try:
        checkpoint.load(path, torch.device("cpu"))
        outcome, complaint = "loaded", []
    except checkpoint.CheckpointError as error:
        outcome, complaint = "refused", [] if error.path and error.reason else ["without path or reason"]
    except BaseException:
        outcome, complaint = "escaped", [traceback.format_exc()]
    seconds, events, _seen = time.perf_counter() - started, _seen, None
    return outcome, seconds, complaint + events + [f"imported {name}" for name in set(sys.modules) - modules]


def noticed(path):
    """What the audit says of a call, a file that is written, code that runs, and a pickle that is loaded as such."""
    global _seen
    _seen = []
    os.system("true")
    path.write_text("")
    exec("")
    pickle.loads(pickle.dumps(Counter))
    events, _seen = _seen, None
    return [event.split()[0] for event in events]


def main(folder, count, seed):
    """All of it."""
    for name in ("cp437", "raw-unicode-escape"):
        codecs.lookup(name)  # zipfile and pickletools ask for these, whatever a file names
    sys.addaudithook(audit)
    outcomes, longest, complaints = Counter(), (0.0, ""), []
    for kind, path, unchanged in cases(folder, count, seed):
        if not complaints and not outcomes:  # what is imported at the first use of anything, a sound file's too
            attempt(folder / "sound.pt"), attempt(folder / "exported" / export.WEIGHTS)
        outcome, seconds, complaint = attempt(path)
        outcomes[f"{kind} {outcome}"] += 1
        longest = max(longest, (seconds, kind))
        if kind in [harm.__name__ for harm in HARM] and outcome == "loaded" and not unchanged:
            complaint.append("a harmed file was loaded")
        complaints += [f"{kind}: {text}" for text in complaint]
    found = {"outcomes": outcomes, "longest": longest, "complaints": complaints[:20]}
    print(json.dumps(found | {"noticed": noticed(folder / "written")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
