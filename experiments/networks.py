"""A store of trained networks: each is trained once, whoever needs it and however many need it at the same time.

A network is known by what determines its weights: the settings of its training (``training_state.determining``), the
convention of its data, and the fingerprint of the examples. Its folder is an ordinary run of ``task=train``, named like
``vp-digits-seed0-1a2b3c4d5e6f``, with the record of all this in ``network.json``.

Of several processes that need the same network one trains it, under a lock that the system takes back when the process
ends, and the others wait; a training that was ended by force is gone on with by the next one, to the same last bit.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments import checkpoint, classes, observing, pictures, training
from experiments.build import ConfigError
from experiments.cells import invocation, short_hash
from experiments.checkpoint import resolved
from experiments.known import is_exact
from experiments.problem import Problem, build_model
from experiments.processes import current
from experiments.records import build_logger
from experiments.retention import BEST, LAST
from experiments.run import (
    CHECKPOINTS,
    Run,
    RunFolderTaken,
    locked,
    owner_of,
    provenance,
    read_json,
    replacing,
    write_json,
)
from experiments.session import Session
from experiments.training_state import determining, fingerprint, seed_everything
from experiments.watch import Watch
from models import ScoreNetwork

log = logging.getLogger(__name__)
RECORD, FAILURE = "network.json", "failed.json"
_LOCK, _POLL = ".network.lock", 0.5  # seconds


class NetworkFailed(RuntimeError):
    """The training of a network that this run needs has failed in another run of the same sweep."""


class Found(NamedTuple):
    """A trained network: its run's folder, and whether it was trained just now."""

    folder: Path
    trained_here: bool

    @property
    def file(self) -> Path:
        """The checkpoint with the weights that the training came to: after an early stop, the best."""
        early = read_json(self.folder / "summary.json").get("training", {}).get("stopped_early")
        return self.folder / CHECKPOINTS / (BEST if early else LAST)


def store(config: DictConfig) -> Path | None:
    """The folder of ``networks``, or a sweep's own; None where a network is trained in the run's own folder."""
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if config.networks is None and (not sweeping or current().count > 1):
        return None
    if current().count > 1:
        raise ConfigError("networks= is for runs of one process; train by task=train alone, and give checkpoint=FOLDER")
    if config.resume not in (None, "auto"):
        cure = "leave resume out, or train in a single run without networks="
        raise ConfigError(f"resume={config.resume} has no place among networks that are trained once; {cure}")
    return Path(config.networks).expanduser() if config.networks else Path(HydraConfig.get().sweep.dir) / "networks"


def identity(config: DictConfig, problem: Problem) -> dict[str, Any]:
    """All that determines the weights, as plain values."""
    examples = {"examples": fingerprint(problem.data.train), "convention": problem.convention()}
    labels = classes.labels(config, problem.data, "train")
    examples |= {} if labels is None else {"labels": fingerprint(labels)}
    return examples | {"settings": determining(config)}


def name_of(config: DictConfig, problem: Problem) -> str:
    """The name of a network's folder."""
    words = (config.sde._target_.rpartition(".")[2].lower(), problem.data.name, f"seed{config.seed}")
    title = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.")[:30] for word in words)
    return f"{title}-{short_hash(identity(config, problem))}"


def trained(session: Session) -> ScoreNetwork:
    """The configured network with the averaged weights: the store's, or one that is trained in the run's own folder."""
    if store(session.config) is None:
        model = training.train(session.config, session.problem, session.device, session.run)
        session.figures += pictures.of_training(session.run)
        return model
    return checkpoint.load(obtain(session), session.device)[0]


def obtain(session: Session) -> Path:
    """The checkpoint of the store's network, which is trained if need be; the run's summary notes which one it is."""
    found = Store(store(session.config)).get(session)
    summary = read_json(found.folder / "summary.json")
    session.run.note(
        network={"folder": str(found.folder), "trained_here": found.trained_here}, training=summary["training"]
    )
    session.figures += sorted((found.folder / "figures").glob("*.png"))
    how = "trained in" if found.trained_here else "that of"
    session.say(f"The network is {how} {found.folder}")
    seed_everything(session.config.seed)  # what follows must not depend on who trained
    return found.file


def check(session: Session) -> None:
    """Build what training needs, to refuse what can't work before any time is spent."""
    if is_exact(session.config):
        raise ConfigError("net=exact has nothing to learn; it is for task=compare, sample, likelihood and figures")
    observing.check(session.config, session.problem)
    convention = observing.convention(session.config, session.problem)
    model = build_model(session.config, convention, session.problem.data.train)
    training.check(session.config.train, session.device, session.problem.data.shape, model.sde.learned)
    classes.check(session.config, session.problem.data, model.net)
    training.build_objective(session.config, model)
    build_logger(session.config)
    checkpoint.about(session.config, convention)
    Watch(session.config, session.problem, session.device, session.run.folder).check(model)
    session.diagnose(model.sde)


class Store:
    """Trained networks in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, session: Session) -> Found:
        """The network that the session needs. Raises ``NetworkFailed``, and whatever ends its training."""
        config, problem = session.config, session.problem
        folder = self.folder.absolute() / name_of(config, problem)
        folder.mkdir(parents=True, exist_ok=True)
        if _done(folder):
            return self._use(folder, config, problem)
        check(session)
        with _alone(folder):
            if _done(folder):  # by the one that was waited for
                return self._use(folder, config, problem)
            _refuse_failed(folder)
            _train(folder, config, problem, session.device)
        return Found(folder, trained_here=True)

    def _use(self, folder: Path, config: DictConfig, problem: Problem) -> Found:
        record, here = read_json(folder / RECORD), provenance()
        if record.get("identity") != json.loads(json.dumps(identity(config, problem), default=str)):
            raise ConfigError(
                f"{folder / RECORD} is not of this training; move {folder} away, or choose other networks="
            )
        there = record["provenance"]
        pairs = {"commit": (there["git_commit"], here["git_commit"])}
        pairs["torch"] = tuple(one["versions"]["torch"] for one in (there, here))
        other = [f"{name} {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
        if other:
            cure = f"to train anew, move {folder} away or choose other networks="
            log.warning("using the network in %s, which was trained with %s; %s", folder, "; ".join(other), cure)
        return Found(folder, trained_here=False)


def _done(folder: Path) -> bool:
    return read_json(folder / "status.json").get("state") == "done"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process trains there; waits for one that does."""
    told = False
    while (lock := locked(folder, _LOCK)) is None:
        if not told:
            log.info("waiting for %s, which trains the network in %s", owner_of(_status(folder)), folder)
        told = True
        time.sleep(_POLL)
    try:
        yield
    finally:
        lock.close()


def _status(folder: Path) -> dict[str, Any]:
    return read_json(folder / "status.json")


def _refuse_failed(folder: Path) -> None:
    failure = read_json(folder / FAILURE)
    if invocation() and failure.get("sweep") == invocation():
        raise NetworkFailed(f"the training of the network in {folder} has failed in this sweep ({failure['error']})")


def _train(folder: Path, config: DictConfig, problem: Problem, device: torch.device) -> None:
    """As ``task=train`` in that folder, from where a former training of it ended."""
    try:
        run = Run(folder, "train", resume=True)
    except RunFolderTaken as error:
        raise RunFolderTaken(f"{error}: it is not waited for, as it is no run that trains for the store") from None
    config = deepcopy(config)
    with open_dict(config):
        config.resume = "auto"
    with suppress(FileNotFoundError):
        (folder / FAILURE).unlink()
    record = {"identity": identity(config, problem), "config": resolved(config), "provenance": provenance()}
    with replacing(folder / RECORD) as file:
        file.write(f"{json.dumps(record, indent=2, default=str)}\n".encode())
    run.note(seed=config.seed, data=problem.convention(), **provenance())
    with _ended(run), _logged(run.path("run.log")):
        training.train(config, problem, device, run)
        figures = pictures.of_training(run)
        run.path("report.txt").write_text(f"All results: {folder}\n" + "".join(f"{path}\n" for path in figures))


@contextmanager
def _ended(run: Run) -> Iterator[None]:
    """Record how the training ended."""
    try:
        yield
    except KeyboardInterrupt:
        run.end("interrupted")
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        write_json(run.path(FAILURE), {"sweep": invocation(), "error": told})
        run.end("failed", told)
        raise
    run.end("done")


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What is logged inside goes to this file, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
