"""The typed shape of the configuration: a misspelt key or a value of the wrong type is refused at once.

Nodes that name a class by ``_target_`` are open here; ``experiments.build`` checks them against that class.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Train:
    steps: int = MISSING
    batch_size: int = MISSING
    learning_rate: float = MISSING
    warmup: int = MISSING
    clip: float = MISSING
    ema: float = MISSING
    label_dropout: float = MISSING
    log_every: int = MISSING
    precision: str = MISSING
    channels_last: bool = MISSING
    compile: bool = MISSING
    cuda_graphs: bool = MISSING
    fused: bool = MISSING
    accumulate: int = MISSING
    data_on_device: Any = MISSING
    workers: int = MISSING
    save_every: int = MISSING
    keep_every: int = MISSING
    early_stop: int | None = None
    max_bad_steps: int = MISSING
    watch_every: int = MISSING
    watch_examples: int = MISSING
    distributed: str = MISSING


@dataclass
class LikelihoodSettings:
    divergence: Any = MISSING
    method: str | None = None
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    coordinates: str = "auto"
    split: str = "test"
    samples: int | None = None
    batch_size: int = MISSING
    dequantizer: Any = None
    draws: int = 1
    importance: bool = False
    prior: Any = None
    endpoint_correction: Any = False
    t_min: Any = None
    ode_subset: int = 32
    bounds: list[int] | None = None
    chain: Any = None
    variance: Any = "beta"
    decoder: Any = None
    baselines: bool = True


@dataclass
class OutOfDistribution:
    against: Any = None


@dataclass
class Interpolate:
    pairs: int = 6
    points: int = 9
    log_prob: bool = False


@dataclass
class Posterior:
    noise_std: float = 0.05
    examples: int = 4
    first: int = 0
    samples: int = 8
    split: str = "test"
    labels: list[int] | None = None
    classifier_path: str | None = None


@dataclass
class Compare:
    samples: int = MISSING
    seeds: int = MISSING
    budgets: list[int] = MISSING
    batch_size: int | None = None
    names: list[str] = MISSING
    solvers: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = MISSING
    measures: dict[str, Any] = field(default_factory=dict)
    features: Any = None
    split: str = "test"


@dataclass
class Config:
    task: Any = MISSING
    sde: Any = MISSING
    under: Any = None
    net: Any = MISSING
    parametrization: Any = MISSING
    label: str = "log_snr"
    solver: Any = MISSING
    data: Any = MISSING
    objective: Any = MISSING
    train: Train = field(default_factory=Train)
    logger: Any = MISSING
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    compare: Compare = field(default_factory=Compare)
    ood: OutOfDistribution = field(default_factory=OutOfDistribution)
    interpolate: Interpolate = field(default_factory=Interpolate)
    condition: Any = None
    guidance: Any = None
    posterior: Posterior = field(default_factory=Posterior)
    dequantization: str = "uniform"
    observe: Any = None
    observe_noise_std: float = 0.05
    seed: int = 0
    device: str = "auto"
    checkpoint: str | None = None
    networks: str | None = None
    optimize: str | None = None
    resume: str | None = None
    runs: Any = None
    plugins: list[str] = field(default_factory=list)


def register() -> None:
    """Make the schema known to Hydra under the name that ``conf/config.yaml`` extends."""
    ConfigStore.instance().store(name="schema", node=Config)
