"""One run of a task: its configuration, folder, problem, device, checkpoint, and what it has to say."""

import logging
import time
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments import checkpoint, classes, observing, report
from experiments.build import ConfigError, build
from experiments.known import is_exact
from experiments.problem import load_problem
from experiments.processes import current
from experiments.run import Run, provenance
from experiments.usage import Usage
from sde import GaussianSDE, ScoreModel, diagnose

log = logging.getLogger(__name__)
_FEW = 2000  # examples that a diagnosis takes the moments of


class Session:
    """One run: its configuration, folder, problem, device, and what it has to say."""

    def __init__(self, config: DictConfig, run: Run, resumable: bool = False):
        if config.resume is not None and not resumable:
            expected = "resume= goes on with a training or an evaluation: it is for task=train, all or likelihood"
            raise ConfigError(f"{expected}; leave it out")
        self.config, self.run = config, run
        self.device, self.problem = current().device(config.device), load_problem(config)
        weights = "the weights as they are" if config.train.ema == 0 else f"averaged weights (EMA {config.train.ema:g})"
        self.about_model = f"{weights} of a training of {config.train.steps} steps"
        self.trained: dict[str, Any] = {}  # the configuration that the checkpoint's model was trained under, if known
        self.classes = 0  # that it can be told
        self.said, self.figures, self.warned, self.usage = [], [], set(), Usage(self.device)
        torch.manual_seed(config.seed)
        run.note(seed=config.seed, device=_device_name(self.device), data=self.problem.convention(), **provenance())

    def say(self, text: str) -> None:
        """Print a part of the report."""
        self.said.append(text)
        print(f"\n{text}", flush=True)

    def diagnose(self, sde: GaussianSDE) -> None:
        """Log what the ends of time of ``sde`` cost these data, each warning once, and note the numbers."""
        x = self.problem.x(self.problem.data.train[:_FEW], torch.Generator().manual_seed(self.config.seed))
        found = diagnose(sde, x, self.problem.noise_width, quiet=True)
        for sentence in found.warnings:
            if sentence not in self.warned:
                log.warning(sentence)
        self.warned |= set(found.warnings)
        self.run.note(diagnosis=asdict(found))

    def close(self) -> None:
        """Write the report, and say where all is."""
        if self.figures:
            self.say(report.pictures(self.figures))
        self.say(f"All results: {self.run.folder}")
        self.run.note(seconds=round(time.time() - self.run.started, 1), usage=self.usage.found())
        self.run.path("report.txt").write_text("\n\n".join(self.said) + "\n")


def load_model(session: Session, told: bool = False, observed: bool = False) -> ScoreModel:
    """The checkpoint's model, under another process if asked for; refused for another data convention.

    told: whether it will be told the class of what it is asked about; one that knows nothing else is warned of.
    observed: whether it will be told observations, if it was trained on some: an ``ObservedModel``, or else refused.

    Without a checkpoint it is that of the store of networks, where there is one; or the exact score, with net=exact.
    """
    if is_exact(session.config):
        session.about_model = "the exact score"
        process = build(session.config.under or session.config.sde, where="sde", allowed=("sde.",))
        return build(session.config.net, where="net")(session.problem.data, process).to(session.device)
    if not observed:
        observing.refuse(session.config)
    from experiments import networks  # which trains, and what a training looks at on its way needs this module

    if session.config.checkpoint is None and networks.store(session.config) is not None:
        session.config = OmegaConf.merge(session.config, {"checkpoint": str(networks.obtain(session))})
    path = session.config.checkpoint
    file = checkpoint.find(path)
    content = checkpoint.read(file)
    model, convention, step = checkpoint.built(file, content, session.device)
    (convention, about), here = observing.separated(convention), session.problem.convention()
    if convention != here:
        raise ConfigError(f"the checkpoint was trained on {convention}, and this run has {here}; choose the same data=")
    if not observed:
        observing.refuse_observed(about, path)
    session.run.note(checkpoint={"path": path, "step": step, "sde": str(model.sde)})
    session.about_model, session.trained = f"averaged weights (EMA) of step {step}", content["config"]
    session.classes = content["components"]["net"]["parameters"].get("classes") or 0
    if not told:
        classes.warn_without_class(session.trained)
    if session.config.under is not None:
        other = build(session.config.under, where="under", allowed=("sde.",))
        session.run.note(under=str(other))
        model = model.under(other)
    return model if about is None else observing.ObservedModel(model, about)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
