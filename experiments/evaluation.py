r"""The likelihood of held-out data, with its parts and their errors.

For data of K levels, dequantized uniformly into bins of width w in D dimensions,

    bits/dim = -(prior + divergence + D log w) / (D log 2),

an upper bound of the discrete data's (see ``experiments.dequantization``); for continuous data the number is in nats.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments.build import ConfigError, build
from experiments.problem import Problem
from models import ScoreNetwork
from sde import GaussianSDE
from sde.diagnosis import truncation
from solvers import Divergence, Likelihood, log_likelihood


@dataclass(frozen=True)
class Report:
    """Mean likelihood of ``samples`` held-out examples: in bits/dim (lower is better) or, for continuous data, nats.

    value = prior + divergence + dequantization. stderr: over examples, which holds the chance of probes and of
    dequantization; stderr_probes: the part of it that comes from the divergence's probes, None where it is unknown.
    truncation: how much of bits/dim the noise at t_min can cost at most, contained in value; None for continuous data.
    """

    unit: str
    value: float
    stderr: float
    prior: float
    divergence: float
    dequantization: float
    stderr_probes: float | None
    truncation: float | None
    samples: int
    dimensions: int
    nfe: float
    protocol: dict[str, Any]

    def parts(self) -> dict[str, float]:
        """The parts that sum to ``value``."""
        return {"prior": self.prior, "divergence": self.divergence, "dequantization": self.dequantization}


def evaluate(model: ScoreNetwork, problem: Problem, config: DictConfig, device: torch.device) -> tuple[Report, Tensor]:
    """The report for the test split, and each example's log-density in nats, ``(N,)``."""
    settings = config.likelihood
    divergence = checked_divergence(settings)
    values = problem.data.test[: settings.samples]
    x = problem.x(values, torch.Generator().manual_seed(config.seed))
    options = {name: settings[name] for name in ("method", "rtol", "atol", "steps")}
    chunks = []
    for first in tqdm(range(0, len(x), settings.batch_size), desc="likelihood", disable=None, leave=False):
        part = x[first : first + settings.batch_size].to(device)
        chunks.append(_on_cpu(log_likelihood(model, part, divergence, first=first, **options)))
    prior, change = (torch.cat([getattr(c, name) for c in chunks]) for name in ("prior", "change"))
    stderr = None if chunks[0].stderr is None else torch.cat([c.stderr for c in chunks])
    nfe = sum(c.nfe for c in chunks) / len(chunks)
    return _report(
        problem, model.sde, prior, change, stderr, nfe, _protocol(model, settings, divergence)
    ), prior + change


def checked_divergence(settings: DictConfig) -> Divergence:
    """The divergence that the settings name; settings that can't work are refused."""
    divergence = build(settings.divergence, where="likelihood.divergence")
    if not isinstance(divergence, Divergence):
        raise ConfigError(f"likelihood.divergence must be a Divergence, found {type(divergence).__name__}")
    if settings.batch_size < 1 or (settings.samples is not None and settings.samples < 2):
        found = f"batch_size={settings.batch_size}, samples={settings.samples}"
        raise ConfigError(f"likelihood needs batch_size >= 1, and samples >= 2 or null for all, found {found}")
    return divergence


def _on_cpu(part: Likelihood) -> Likelihood:
    tensors = {name: value.cpu() for name, value in vars(part).items() if isinstance(value, Tensor)}
    return Likelihood(**(vars(part) | tensors))


def _protocol(model: ScoreNetwork, settings: DictConfig, divergence: Divergence) -> dict[str, Any]:
    ode = f"{settings.method}, " + (
        f"{settings.steps} steps" if settings.steps else f"rtol {settings.rtol:g}, atol {settings.atol:g}"
    )
    return {"sde": str(model.sde), "ode": ode, "divergence": str(divergence), "dequantization": "uniform"}


def _report(
    problem: Problem, sde: GaussianSDE, prior: Tensor, change: Tensor, probes: Tensor | None, nfe: float, protocol: dict
) -> Report:
    n, d, quantized = len(prior), problem.dimensions, problem.dequantizer
    # bits/dim counts downwards from the log-density; nats are given as they are.
    scale = -1 / (d * math.log(2)) if quantized else 1.0
    volume = scale * quantized.log_volume(d) if quantized else 0.0
    prior, change = scale * prior.double(), scale * change.double()
    return Report(
        unit="bits/dim" if quantized else "nats",
        value=(prior + change).mean().item() + volume,
        stderr=(prior + change).std().item() / n**0.5,
        prior=prior.mean().item(),
        divergence=change.mean().item(),
        dequantization=volume,
        stderr_probes=None if probes is None else abs(scale) * probes.double().square().mean().sqrt().item() / n**0.5,
        truncation=truncation(sde, quantized.bin_width) if quantized else None,
        samples=n,
        dimensions=d,
        nfe=nfe,
        protocol=protocol if quantized else protocol | {"dequantization": "none"},
    )
